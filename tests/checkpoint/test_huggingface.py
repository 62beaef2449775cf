"""Hugging Face directories: what is written is read back, and what does not fit is refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxopt_models.checkpoint import huggingface
from jaxopt_models.checkpoint.hf_names import hf_names
from jaxopt_models.errors import UserError
from jaxopt_models.formats import resolve
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params, forward
from jaxopt_models.qtensor import QTensor
from jaxopt_models.tree import leaves_with_paths


def read(directory, **options):
    config = huggingface.read_config(directory)
    return config, huggingface.read_params(directory, config, **options)


def by_name(config, params):
    """Arrays under their names in a Hugging Face checkpoint, experts taken apart."""
    return {
        name: part
        for path, leaf in leaves_with_paths(params)
        for name, part in zip(
            hf_names(config, path), leaf if leaf.ndim == 3 else [leaf], strict=True
        )
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_tensor_arrives_in_its_leaf(golden_name, dtype, golden, write_checkpoint):
    hf, tensors = golden(golden_name)
    tensors = {key: array.astype(dtype) for key, array in tensors.items()}
    config, params = read(write_checkpoint(hf, tensors, max_shard_bytes=10_000))
    arrived = by_name(config, params)
    assert arrived.keys() == tensors.keys()
    for key, array in tensors.items():
        assert arrived[key].dtype == dtype
        np.testing.assert_array_equal(np.asarray(arrived[key]), array, err_msg=key)


def test_logits_are_those_of_transformers(golden, golden_run, write_checkpoint):
    hf, tensors = golden("mixtral")
    config, params = read(write_checkpoint(hf, tensors))
    tokens, logits = golden_run("mixtral")
    np.testing.assert_allclose(forward(config, params, jnp.asarray(tokens)), logits, atol=1e-4)


def test_dtype_converts_float_weights(golden, write_checkpoint):
    _, params = read(write_checkpoint(*golden("qwen2")), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_place_sees_every_path_once(golden, write_checkpoint):
    seen = []

    def place(path, array):
        seen.append(path)
        return jnp.asarray(array)

    config, params = read(write_checkpoint(*golden("mixtral")), place=place)
    assert seen == [path for path, _ in leaves_with_paths(abstract_params(config))]


def test_multimodal_gemma_reads_as_its_text_model(golden, write_checkpoint):
    hf, tensors = golden("gemma3")
    plain = read(write_checkpoint(hf, tensors))[1]
    nested = {"model_type": "gemma3", "text_config": hf, "vision_config": {}}
    renamed = {f"language_model.{key}": array for key, array in tensors.items()}
    renamed["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    _, params = read(write_checkpoint(nested, renamed))
    jax.tree.map(np.testing.assert_array_equal, plain, params)


def test_tied_head_may_be_stored_if_it_is_the_embedding(golden, write_checkpoint):
    hf, tensors = golden("smollm2")
    head = tensors["model.embed_tokens.weight"]
    read(write_checkpoint(hf, tensors | {"lm_head.weight": head}))
    with pytest.raises(UserError, match="'lm_head.weight' differs from the embedding"):
        read(write_checkpoint(hf, tensors | {"lm_head.weight": head + 1}))


def test_generation_config_gives_all_end_tokens(golden, write_checkpoint):
    directory = write_checkpoint(*golden("llama3"))
    assert huggingface.read_config(directory).eos_token_ids == (2,)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert huggingface.read_config(directory).eos_token_ids == (5, 7)


def change(key, value=None):
    def apply(tensors):
        name = f"model.layers.0.{key}"
        return {k: v for k, v in tensors.items() if k != name} | (
            {} if value is None else {name: value}
        )

    return apply


BROKEN = {
    "missing": (change("mlp.up_proj.weight"), r"'model.layers.0.mlp.up_proj.weight' is missing"),
    "shape": (
        change("input_layernorm.weight", np.zeros(7, np.float32)),
        r"input_layernorm.weight' has shape \[7\] where the config needs \[32\]",
    ),
    "left over": (
        change("self_attn.q_proj.bias", np.zeros(32, np.float32)),
        "q_proj.bias' has no place in a llama model",
    ),
    "NaN": (
        change("input_layernorm.weight", np.full(32, np.nan, np.float32)),
        "input_layernorm.weight' holds NaN or infinity",
    ),
    "infinity": (
        change("input_layernorm.weight", np.full(32, np.inf, ml_dtypes.bfloat16)),
        "input_layernorm.weight' holds NaN or infinity",
    ),
    "integer": (
        change("input_layernorm.weight", np.ones(32, np.int8)),
        "input_layernorm.weight' has dtype int8, not a float",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_named(case, golden, write_checkpoint):
    hf, tensors = golden("llama2")
    alter, message = BROKEN[case]
    with pytest.raises(UserError, match=message):
        read(write_checkpoint(hf, alter(tensors)))


def test_a_missing_expert_is_named(golden, write_checkpoint):
    hf, tensors = golden("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    del tensors[name]
    with pytest.raises(UserError, match=f"'{name}' is missing"):
        read(write_checkpoint(hf, tensors))


def test_experts_of_different_dtypes_are_refused(golden, write_checkpoint):
    hf, tensors = golden("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    tensors[name] = tensors[name].astype(np.float16)
    with pytest.raises(UserError, match=f"'{name}' is float16 where .* is float32"):
        read(write_checkpoint(hf, tensors))


def test_a_flattened_matrix_is_refused(golden, write_checkpoint):
    hf, tensors = golden("llama2")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].reshape(-1)
    with pytest.raises(UserError, match=r"'lm_head.weight' has shape \[3072\]"):
        read(write_checkpoint(hf, tensors))


def test_overflow_of_a_narrow_dtype_is_an_error(golden, write_checkpoint):
    hf, tensors = golden("llama2")
    tensors = change("input_layernorm.weight", np.full(32, 1e6, np.float32))(tensors)
    with pytest.raises(UserError, match="infinity as float16.*too narrow"):
        read(write_checkpoint(hf, tensors), dtype="float16")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no such file"), ("{", "not valid JSON"), ("[]", "not a JSON")]
)
def test_config_file_errors(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json: {message}"):
        huggingface.read_config(tmp_path)


BLOCKWISE = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(strategy, **inputs):
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": strategy},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group | inputs},
        "ignore": ["lm_head"],
    }


def fp8_tensors(hf, spec, suffix):
    """Random weights by name: projections are E4M3 codes with a scale for each tile of `spec`."""
    rng = np.random.default_rng(0)
    config = ModelConfig.from_hf(hf)
    tensors = {}
    for path, leaf in leaves_with_paths(abstract_params(config)):
        for name in hf_names(config, path):
            shape = leaf.shape[-2:]
            values = rng.normal(size=shape).astype(np.float32)
            if path.endswith("_proj/weight"):
                tiles = [-(-n // t) for n, t in zip(shape, spec.tile(shape), strict=True)]
                tensors[name] = values.astype(ml_dtypes.float8_e4m3fn)
                tensors[name + suffix] = rng.uniform(0.5, 2, tiles).astype(np.float32)
            else:
                tensors[name] = values.astype(ml_dtypes.bfloat16)
    return tensors


def multiplied(codes, scale, spec):
    """`code * scale` by the definition, with each scale repeated over its tile."""
    for axis, (extent, tile) in enumerate(zip(codes.shape, spec.tile(codes.shape), strict=True)):
        scale = np.repeat(scale, tile, axis=axis).take(np.arange(extent), axis=axis)
    return (codes.astype(np.float32) * scale).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", ["llama2", "mixtral"])
@pytest.mark.parametrize(
    ("settings", "options", "suffix"),
    [
        (BLOCKWISE, {"granularity": "block2d", "block_size": 128}, "_scale_inv"),
        (compressed("tensor"), {"granularity": "tensor"}, "_scale"),
        (compressed("channel"), {"granularity": "channel"}, "_scale"),
    ],
)
def test_fp8_checkpoints_become_quantized_leaves(
    settings, options, suffix, name, golden, write_checkpoint
):
    hf = golden(name)[0] | {"hidden_size": 144, "intermediate_size": 160, "num_hidden_layers": 1}
    spec = resolve("fp8", **options)
    tensors = fp8_tensors(hf, spec, suffix)
    config, params = read(write_checkpoint(hf | {"quantization_config": settings}, tensors))
    for path, leaf in leaves_with_paths(params):
        assert isinstance(leaf, QTensor) == path.endswith("_proj/weight")
        names = hf_names(config, path)
        if isinstance(leaf, QTensor):
            parts = [multiplied(tensors[n], tensors[n + suffix], spec) for n in names]
            assert leaf.dtype == "bfloat16" and leaf.codes.dtype == ml_dtypes.float8_e4m3fn
            values = leaf.dequantize()
        else:
            parts, values = [tensors[n] for n in names], leaf
        expected = np.stack(parts) if leaf.ndim == 3 else parts[0]
        np.testing.assert_array_equal(values, expected, err_msg=path)


def test_scales_may_be_stored_without_trailing_axes(golden, write_checkpoint):
    hf = golden("llama2")[0] | {"num_hidden_layers": 1}
    tensors = fp8_tensors(hf, resolve("fp8"), "_scale")
    flat = {
        key: array.reshape(-1) if key.endswith("_scale") else array
        for key, array in tensors.items()
    }
    read(write_checkpoint(hf | {"quantization_config": compressed("tensor")}, flat))


def test_fp8_inputs_are_quantized_as_the_checkpoint_says(golden, write_checkpoint):
    hf = golden("llama2")[0] | {"num_hidden_layers": 1}
    tensors = fp8_tensors(hf, resolve("fp8", granularity="channel"), "_scale")
    dynamic = compressed("channel", input_activations={"dynamic": True, "strategy": "token"})
    _, params = read(write_checkpoint(hf | {"quantization_config": dynamic}, tensors))
    quantizer = params["layers"][0]["mlp"]["up_proj"]["weight"].input
    assert quantizer.amax is None and quantizer.spec == resolve("fp8", granularity="token")


def test_a_missing_scale_is_named(golden, write_checkpoint):
    hf = golden("llama2")[0] | {"num_hidden_layers": 1}
    tensors = fp8_tensors(hf, resolve("fp8"), "_scale")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    del tensors[name]
    with pytest.raises(UserError, match=f"'{name}' is missing"):
        read(write_checkpoint(hf | {"quantization_config": compressed("tensor")}, tensors))


UNSUPPORTED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "None": {"bits": 4},
    r"weight_block_size \[64, 128\]": BLOCKWISE | {"weight_block_size": [64, 128]},
    "static activation": BLOCKWISE | {"activation_scheme": "static"},
    "format 'pack-quantized'": compressed("channel") | {"format": "pack-quantized"},
    "weights by 'group'": compressed("group"),
    "quantized KV cache": compressed("tensor") | {"kv_cache_scheme": {"num_bits": 8}},
    "other than dynamic": compressed("tensor", input_activations={"dynamic": False}),
}


@pytest.mark.parametrize("method", UNSUPPORTED)
def test_other_quantizations_are_refused_by_name(method, golden, write_checkpoint):
    hf, tensors = golden("llama2")
    directory = write_checkpoint(hf | {"quantization_config": UNSUPPORTED[method]}, tensors)
    with pytest.raises(UserError, match=f"config.json: quantization_config .*{method}"):
        read(directory)


def test_quantization_described_in_another_file_is_refused(golden, write_checkpoint):
    directory = write_checkpoint(*golden("llama2"))
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": {}}))
    with pytest.raises(UserError, match="'modelopt' is not supported"):
        read(directory)
