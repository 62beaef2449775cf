"""Prepared parameters compute what they were made of, in the forward pass and when decoding."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_models import inference, tree
from jaxopt_models.checkpoint.export import export_hf
from jaxopt_models.checkpoint.native import save
from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.inference import for_device, prepare
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import (
    abstract_params,
    forward,
    forward_with_taps,
    init,
)
from jaxopt_models.packed import PackedTensor
from jaxopt_models.qtensor import LowRank, QTensor, quantize_array
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.sharding import make_mesh, shard, shardings

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MODELS = {
    "llama": ModelConfig.from_hf({"model_type": "llama"} | _SIZES),
    "biases": ModelConfig.from_hf({"model_type": "qwen2"} | _SIZES),
    "query and key norms": ModelConfig.from_hf({"model_type": "qwen3"} | _SIZES),
    "a key for each query": ModelConfig.from_hf(
        {"model_type": "llama"} | _SIZES | {"num_key_value_heads": 4}
    ),
    "gemma": ModelConfig.from_hf(
        {"model_type": "gemma3_text", "sliding_window": 6, "sliding_window_pattern": 2}
        | _SIZES
        | {"num_hidden_layers": 2}
    ),
    "experts": ModelConfig.from_hf(
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | _SIZES
    ),
}
LLAMA = MODELS["llama"]
TOKENS = jnp.asarray(np.arange(48).reshape(2, 24) * 7 % 96, jnp.int32)


def params_of(config: ModelConfig) -> Any:
    """Random parameters, biases among them."""

    def leaf(path: str, array: jax.Array) -> jax.Array:
        key = jax.random.key(len(path))
        return jax.random.normal(key, array.shape) if path.endswith("bias") else array

    return tree.map_with_path(leaf, init(config, jax.random.key(0)))


def quantized(config: ModelConfig, recipe: str | Recipe) -> Any:
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    return quantize(Model(config, params_of(config)), recipe, [TOKENS])[0]


def names_of(module: dict[str, Any]) -> set[str]:
    return {name for name in module if name.endswith("_proj")}


def kinds(params: Any) -> set[type]:
    return {
        type(leaf)
        for path, leaf in tree.leaves_with_paths(params)
        if tree.is_decoder_matrix(path, leaf)
    }


def assert_same_logits(config: ModelConfig, params: Any, prepared: Any) -> None:
    """Up to float32 sums in another order: each packed product ends with its tensor's scale."""
    expected = np.asarray(forward(config, params, TOKENS))
    found = np.asarray(forward(config, prepared, TOKENS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def assert_the_same(config: ModelConfig, params: Any, prepared: Any) -> None:
    """Logits, and tokens of the decode loop."""
    assert_same_logits(config, params, prepared)
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1].tolist()]
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_ids": ()}
    new = generate(config, prepared, prompts, **options).tokens
    assert new == generate(config, params, prompts, **options).tokens


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_arrays_are_joined(config):
    params = params_of(config)
    prepared = prepare(params)
    for i, layer in enumerate(prepared["layers"]):
        assert names_of(layer["self_attn"]) == {"qkv_proj", "o_proj"}
        joined = {"gate_up_proj", "down_proj"}
        assert names_of(layer["mlp"]) == (set() if i in config.moe_layers else joined)
    assert tree.size_in_bits(prepared) == tree.size_in_bits(params)
    assert prepared["embed_tokens"]["weight"] is params["embed_tokens"]["weight"]
    assert_the_same(config, params, prepared)


# Every format with a kernel; inputs as they are, in static and dynamic formats, rotated.
RULES = {
    "nvfp4, smoothed": {"weight": "nvfp4", "activation": "nvfp4", "smooth": "smoothquant"},
    "mxfp4, rotated": {"weight": "mxfp4", "activation": "mxfp4", "rotate": 64},
    "w4a8, smoothed": {
        "weight": {"format": "int4", "block_size": 128},
        "activation": {"format": "fp8", "granularity": "tensor"},
        "smooth": "smoothquant",
    },
}
RECIPES = [
    ("int4_awq", "biases"),
    ("nvfp4, smoothed", "llama"),
    ("nvfp4_weight_only", "query and key norms"),
    ("nvfp4_fp8_kv", "gemma"),
    ("mxfp4, rotated", "llama"),
    ("w4a8, smoothed", "llama"),
    ("fp8", "biases"),
    ("fp8_dynamic", "gemma"),
    ("fp8_block", "a key for each query"),
    ("int8", "query and key norms"),
    ("int8_default", "llama"),
]


@pytest.mark.parametrize(("recipe", "model"), RECIPES)
def test_quantized_matrices_are_packed_and_joined(recipe, model):
    config = MODELS[model]
    if recipe in RULES:
        rules = [{"match": "*"} | RULES[recipe]]
        recipe = Recipe.model_validate({"name": "quick", "rules": rules})
    params = with_bfloat16_scales(quantized(config, recipe))
    prepared = prepare(params)
    assert kinds(params) == {QTensor} and kinds(prepared) == {PackedTensor}
    for layer in prepared["layers"]:
        assert names_of(layer["self_attn"]) == {"qkv_proj", "o_proj"}
        assert names_of(layer["mlp"]) == {"gate_up_proj", "down_proj"}
    assert_the_same(config, params, prepared)


def test_8_bits_with_floats_have_no_kernel():
    params = quantized(LLAMA, "int8_weight_only")
    prepared = prepare(params)
    assert kinds(prepared) == {QTensor}
    assert jax.tree.structure(prepared) == jax.tree.structure(params)


def test_a_block_of_rows_is_not_cut():
    """Keys and values of 64 rows here, in blocks of 128."""
    params = quantized(LLAMA, "fp8_block")
    prepared = prepare(params)
    layer = prepared["layers"][0]
    assert names_of(layer["self_attn"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names_of(layer["mlp"]) == {"gate_up_proj", "down_proj"}
    assert kinds(prepared) == {PackedTensor}
    assert_same_logits(LLAMA, params, prepared)


def test_scales_of_tensors_and_channels_are_joined():
    def by_channel(q: Any) -> Any:
        again = quantize_array(q.dequantize(), "fp8", granularity="channel")
        return replace(again, input=q.input)

    params = changed(quantized(LLAMA, "fp8"), "k_proj", by_channel)
    prepared = prepare(params)
    assert names_of(prepared["layers"][0]["self_attn"]) == {"qkv_proj", "o_proj"}
    assert_same_logits(LLAMA, params, prepared)


def test_static_scales_that_differ_stay_apart():
    def wider(q: Any) -> Any:
        return replace(q, input=replace(q.input, amax=q.input.amax * 2))

    params = changed(quantized(LLAMA, "int8_default"), "up_proj", wider)
    prepared = prepare(params)
    assert names_of(prepared["layers"][0]["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
    assert_same_logits(LLAMA, params, prepared)


def with_bfloat16_scales(params: Any) -> Any:
    """What packing INT4 does to its scales; inputs in FP8 would tell the difference."""

    def leaf(_: str, q: Any) -> Any:
        if not isinstance(q, QTensor) or q.spec.format != "int4":
            return q
        return replace(q, scale=q.scale.astype(jnp.bfloat16).astype(q.scale.dtype))

    return tree.map_with_path(leaf, params)


def changed(params: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """With one kind of linear changed in every layer."""

    def leaf(path: str, weight: Any) -> Any:
        return change(weight) if path.endswith(f"{name}/weight") else weight

    return tree.map_with_path(leaf, params)


def test_shared_steps_go_with_what_is_joined():
    """The pre_scale of AWQ, where no norm takes it, belongs to the input that q, k and v share."""
    params, scale = quantized(LLAMA, "int4_awq"), jnp.linspace(0.5, 2, 128)
    for name in ("q_proj", "k_proj", "v_proj"):
        params = changed(params, name, lambda q: replace(q, pre_scale=scale + 0))
    prepared = prepare(params)
    np.testing.assert_array_equal(
        prepared["layers"][0]["self_attn"]["qkv_proj"]["weight"].pre_scale, scale
    )
    assert_the_same(LLAMA, params, prepared)


APART: dict[str, Callable[[Any], Any]] = {
    "pre_scale": lambda q: replace(q, pre_scale=jnp.full(128, 0.9)),
    "input": lambda q: replace(q, input=replace(q.input, amax=q.input.amax * 2)),
    "no input": lambda q: replace(q, input=None),
    "rotate": lambda q: replace(q, rotate=64),
    "low rank": lambda q: replace(q, low_rank=LowRank(jnp.ones((2, 128)), jnp.ones((64, 2)))),
    "format": lambda q: replace(quantize_array(q.dequantize(), "mxfp4"), input=q.input),
    "no kernel": lambda q: replace(quantize_array(q.dequantize(), "fp8"), input=q.input),
    "array": lambda q: q.dequantize(),
}


@pytest.fixture(scope="module")
def nvfp4() -> Any:
    return quantized(LLAMA, "nvfp4")


@pytest.mark.parametrize("change", APART.values(), ids=APART)
def test_what_differs_stays_apart(nvfp4, change):
    params = changed(nvfp4, "k_proj", change)
    prepared = prepare(params)
    for layer in prepared["layers"]:
        assert names_of(layer["self_attn"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert names_of(layer["mlp"]) == {"gate_up_proj", "down_proj"}
    assert_same_logits(LLAMA, params, prepared)


def test_one_bias_of_three_keeps_them_apart():
    params = params_of(LLAMA)
    params["layers"][0]["self_attn"]["q_proj"]["bias"] = jnp.ones(128)
    attention = prepare(params)["layers"][0]["self_attn"]
    assert names_of(attention) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_rows_of_half_a_tile_stay_apart():
    config = ModelConfig.from_hf(LLAMA.to_hf() | {"intermediate_size": 264})
    params = init(config, jax.random.key(0))
    for name in ("gate_proj", "up_proj"):
        params = changed(params, name, lambda weight: quantize_array(weight, "nvfp4"))
    prepared = prepare(params)
    assert names_of(prepared["layers"][0]["mlp"]) == {"gate_proj", "up_proj", "down_proj"}
    assert_same_logits(config, params, prepared)


def test_taps_keep_their_names():
    params = params_of(LLAMA)
    taps = ["layers/*_proj/input", "layers/0/self_attn/key"]
    _, found = forward_with_taps(LLAMA, prepare(params), TOKENS, taps)
    _, expected = forward_with_taps(LLAMA, params, TOKENS, taps)
    assert found.keys() == expected.keys() and len(found) == 8
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_bits_per_weight_stay():
    params = quantized(LLAMA, "nvfp4_weight_only")
    # K = 128 is padded to 512 here, and K = 256 likewise.
    assert tree.bits_per_weight(params) == pytest.approx(4.5, abs=0.01)
    wide = ModelConfig.from_hf(LLAMA.to_hf() | {"hidden_size": 512, "intermediate_size": 512})
    wide = replace(wide, num_heads=16)
    prepared = prepare(quantized(wide, "nvfp4_weight_only"))
    assert tree.bits_per_weight(prepared) == pytest.approx(4.5, abs=0.01)
    params = quantized(wide, "int8_default")
    assert tree.bits_per_weight(prepare(params)) == tree.bits_per_weight(params)


@pytest.mark.parametrize("format", ["int4", "nvfp4", "mxfp4"])
def test_split_over_devices(format):
    """Rows on one axis, columns where K has a step of 512 for each device."""
    config = replace(
        ModelConfig.from_hf(LLAMA.to_hf() | {"hidden_size": 512, "intermediate_size": 1024}),
        num_heads=16,
    )

    def leaf(path: str, array: jax.Array) -> Any:
        return quantize_array(array, format) if tree.is_decoder_matrix(path, array) else array

    prepared = prepare(tree.map_with_path(leaf, init(config, jax.random.key(0))), join=False)
    mesh = make_mesh({"data": 4, "model": 2})
    layer = shardings(prepared, mesh)["layers"][0]
    rows, columns = layer["mlp"]["up_proj"]["weight"], layer["mlp"]["down_proj"]["weight"]
    assert rows.weight.codes.spec == rows.weight.scales.spec == P("model", None)
    assert rows.weight.factor.spec == P("model")
    assert columns.weight.codes.spec == columns.weight.scales.spec == P(None, "model")
    assert columns.weight.factor.spec == P(None)
    whole = layer["self_attn"]["o_proj"]["weight"]  # a single step
    assert whole.weight.codes.spec == P(None, None)

    run = jax.jit(partial(forward, config))
    found, expected = run(shard(prepared, mesh), TOKENS), run(prepared, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("recipe", ["fp8_dynamic", "fp8_block", "int8_default"])
def test_8_bits_split_over_devices(recipe):
    config = MODELS["a key for each query"]
    config = ModelConfig.from_hf(config.to_hf() | {"hidden_size": 256, "intermediate_size": 512})
    config = replace(config, num_heads=8, num_kv_heads=8)
    prepared = prepare(quantized(config, recipe), join=False)
    mesh = make_mesh({"data": 4, "model": 2})
    layer = shardings(prepared, mesh)["layers"][0]
    rows, columns = layer["mlp"]["up_proj"]["weight"], layer["mlp"]["down_proj"]["weight"]
    assert rows.weight.codes.spec == P("model", None)
    assert columns.weight.codes.spec == P(None, "model")
    if recipe == "fp8_block":
        assert rows.weight.scales.spec == P("model", None)
        assert columns.weight.scales.spec == P(None, "model")
    else:
        assert rows.weight.scales.spec == P("model") and columns.weight.scales.spec == P(None)

    run = jax.jit(partial(forward, config))
    found, expected = run(shard(prepared, mesh), TOKENS), run(prepared, TOKENS)
    # A sum in another order may carry an activation over to the neighboring code.
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_block_is_not_split():
    """Of 128 rows or columns here, over two devices."""
    prepared = prepare(quantized(LLAMA, "fp8_block"), join=False)
    layer = shardings(prepared, make_mesh({"data": 4, "model": 2}))["layers"][0]
    for name in ("q_proj", "k_proj", "o_proj"):
        weight = layer["self_attn"][name]["weight"].weight
        assert weight.codes.spec == weight.scales.spec == P(None, None)


def test_kernels_of_the_device_decide(monkeypatch):
    params, config = params_of(LLAMA), replace(LLAMA, dtype="bfloat16")
    assert for_device(config, params) is params  # here is none
    monkeypatch.setattr(inference, "hopper_processors", lambda: 132)
    assert "qkv_proj" in for_device(config, params)["layers"][0]["self_attn"]
    assert for_device(LLAMA, params) is params  # float32


def test_what_has_no_values_cannot_be_prepared():
    with pytest.raises(UserError, match="'embed_tokens/weight' has no values; call prepare outsi"):
        prepare(abstract_params(LLAMA))
    with pytest.raises(UserError, match="has no values"):
        jax.jit(prepare)(params_of(LLAMA))


@pytest.mark.parametrize("recipe", [None, "nvfp4_weight_only", "fp8_dynamic"])
def test_they_are_for_running_only(recipe, tmp_path):
    params = prepare(quantized(LLAMA, recipe) if recipe else params_of(LLAMA))
    model, message = Model(LLAMA, params), "_proj/weight' is laid out for running, not to be "
    with pytest.raises(UserError, match=message + "saved; give the parameters that"):
        save(tmp_path / "saved", LLAMA, params)
    with pytest.raises(UserError, match=message + "exported"):
        export_hf(tmp_path / "exported", model)
    with pytest.raises(UserError, match=message + "quantized"):
        quantize(model, Recipe.load("nvfp4_weight_only"))
