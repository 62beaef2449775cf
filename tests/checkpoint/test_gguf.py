"""GGUF files as models: the same config and weights as the checkpoint they were converted from."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models.checkpoint import gguf as reader
from jaxopt_models.checkpoint import huggingface
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def in_pairs(rows, heads):
    """Rows of q or k as the conversion to GGUF orders them: the halves of a head interleaved."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def converted(hf, tensors):
    """Tensors under GGUF's names, from the gguf package's own table, and in GGUF's order."""
    table = gguf.get_tensor_name_map(ARCHITECTURES[hf["model_type"]], hf["num_hidden_layers"])
    for name, array in tensors.items():
        if hf["model_type"] == "llama" and "q_proj" in name:
            array = in_pairs(array, hf["num_attention_heads"])
        if hf["model_type"] == "llama" and "k_proj" in name:
            array = in_pairs(array, hf["num_key_value_heads"])
        if hf["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            array = array + 1
        yield table.get_name(name, try_suffixes=(".weight", ".bias")), array


def write_gguf(path, hf, tensors, extra=lambda writer: None):
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[hf["model_type"]]]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    if "head_dim" in hf:
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])
    if hf["model_type"] == "gemma3_text":
        writer.add_sliding_window(hf["sliding_window"])
        writer.add_float32("gemma3.rope.freq_base_swa", hf["rope_local_base_freq"])
    writer.add_bos_token_id(hf["bos_token_id"])
    writer.add_eos_token_id(hf["eos_token_id"])
    extra(writer)
    for name, array, *kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind[0] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_gguf_defines(hf):
    """The config of a golden Gemma 3 with what GGUF cannot say otherwise than by its own rules."""
    if hf["model_type"] != "gemma3_text":
        return hf
    hf = {key: value for key, value in hf.items() if key != "layer_types"}
    return hf | {"query_pre_attn_scalar": hf["head_dim"]}


@pytest.mark.parametrize("name", ["llama2", "llama_bias", "smollm2", "qwen2", "qwen3", "gemma3"])
def test_same_model_as_the_checkpoint_it_was_made_of(tmp_path, name, golden, write_checkpoint):
    hf, tensors = golden(name)
    hf = as_gguf_defines(hf)
    path = write_gguf(tmp_path / "a.gguf", hf, converted(hf, tensors))
    config = reader.read_config(path)
    assert config == ModelConfig.from_hf(hf)
    expected = huggingface.read_params(write_checkpoint(hf, tensors), config)
    params = reader.read_params(path, config, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_logits_are_those_of_transformers(tmp_path, golden, golden_run):
    hf, tensors = golden("llama2")
    path = write_gguf(tmp_path / "a.gguf", hf, converted(hf, tensors))
    config = reader.read_config(path)
    tokens, logits = golden_run("llama2")
    params = reader.read_params(path, config, dtype="float32")
    np.testing.assert_allclose(forward(config, params, jnp.asarray(tokens)), logits, atol=1e-4)


def rope_factors(hf, scaling):
    """Llama 3's divisors of the rotary frequencies, one by one as its authors define them."""
    size = hf["hidden_size"] // hf["num_attention_heads"]
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * hf["rope_theta"] ** (i / size)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(scaling["factor"])
        else:
            blend = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - blend) / scaling["factor"] + blend))
    return np.array(factors, np.float32)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama3_rope_is_recovered_from_its_factors(tmp_path, golden):
    hf, tensors = golden("llama2")
    hf |= {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
    factors = rope_factors(hf, LLAMA3)
    assert len(set(factors.tolist())) >= 3  # untouched, blended and divided frequencies
    path = write_gguf(
        tmp_path / "a.gguf", hf, [*converted(hf, tensors), ("rope_freqs.weight", factors)]
    )
    config = reader.read_config(path)
    assert config == ModelConfig.from_hf(hf)
    reader.read_params(path, config)
    other = [*converted(hf, tensors), ("rope_freqs.weight", factors * 1.1)]
    with pytest.raises(UserError, match="'rope_freqs.weight' is not the rescaling of Llama 3"):
        reader.read_config(write_gguf(tmp_path / "b.gguf", hf, other))


def test_linear_rope_scaling(tmp_path, golden):
    hf, tensors = golden("llama_linear_rope")

    def scaling(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    path = write_gguf(tmp_path / "a.gguf", hf, converted(hf, tensors), scaling)
    assert reader.read_config(path) == ModelConfig.from_hf(hf)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_weights_are_dequantized(tmp_path, kind, golden):
    hf, _ = golden("qwen3")
    config = ModelConfig.from_hf(hf | {"intermediate_size": 64})
    number = gguf.GGMLQuantizationType[kind]
    tensors = random_tensors(config)
    quantized = [
        (name, gguf.quants.quantize(array, number), number) if array.ndim == 2 else (name, array)
        for name, array in converted(hf, tensors)
    ]
    path = write_gguf(tmp_path / "a.gguf", hf | {"intermediate_size": 64}, quantized)
    params = reader.read_params(path, config, dtype="float32")
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(up, number), number)
    np.testing.assert_array_equal(params["layers"][1]["mlp"]["up_proj"]["weight"], expected)
    narrow = reader.read_params(path, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}


def random_tensors(config):
    """Normal weights under Hugging Face's names."""
    from jaxopt_models.checkpoint.hf_names import hf_names
    from jaxopt_models.models.transformer import abstract_params
    from jaxopt_models.tree import leaves_with_paths

    rng = np.random.default_rng(0)
    return {
        hf_names(config, path)[0]: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in leaves_with_paths(abstract_params(config))
    }


def test_all_end_tokens_are_read(tmp_path, golden):
    hf, tensors = golden("llama2")
    path = write_gguf(
        tmp_path / "a.gguf", hf, converted(hf, tensors), lambda writer: writer.add_eot_token_id(9)
    )
    assert reader.read_config(path).eos_token_ids == (2, 9)


def test_the_27b_gemma_scales_queries_by_model_width(tmp_path, golden):
    hf, tensors = golden("gemma3")
    layer = {key: array for key, array in tensors.items() if ".layers." not in key}
    deep = as_gguf_defines(hf) | {"num_hidden_layers": 62}
    config = reader.read_config(write_gguf(tmp_path / "a.gguf", deep, converted(deep, layer)))
    assert config.query_scale == (hf["hidden_size"] // hf["num_attention_heads"]) ** -0.5


OPTIONS = {
    "llama.expert_count": lambda w: w.add_expert_count(8),
    "llama.rope.dimension_count": lambda w: w.add_rope_dimension_count(4),
    "llama.attention.value_length": lambda w: w.add_value_length(4),
    "llama.attention.sliding_window": lambda w: w.add_sliding_window(16),
    "rope scaling 'yarn'": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "rope.scaling.factor": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
}


@pytest.mark.parametrize("key", OPTIONS)
def test_variants_are_refused_by_key(tmp_path, key, golden):
    hf, tensors = golden("llama2")
    path = write_gguf(tmp_path / "a.gguf", hf, converted(hf, tensors), OPTIONS[key])
    with pytest.raises(UserError, match=f"a.gguf: .*{key}"):
        reader.read_config(path)


def test_layers_of_different_width_are_refused(tmp_path, golden):
    hf, tensors = golden("llama2")
    hf["intermediate_size"] = [48, 64, 48]
    path = write_gguf(tmp_path / "a.gguf", hf, converted(hf, tensors))
    with pytest.raises(UserError, match="'llama.feed_forward_length' = .*not supported"):
        reader.read_config(path)


def test_unknown_architecture_and_missing_keys(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'mamba' is not supported; supported are"):
        reader.read_config(tmp_path / "a.gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="block_count' is missing"):
        reader.read_config(tmp_path / "b.gguf")


def test_weight_errors_name_the_tensor(tmp_path, golden):
    hf, tensors = golden("llama2")
    config = ModelConfig.from_hf(hf)
    good = dict(converted(hf, tensors))

    def read(changes):
        table = {name: array for name, array in (good | changes).items() if array is not None}
        reader.read_params(write_gguf(tmp_path / "a.gguf", hf, table.items()), config)

    with pytest.raises(UserError, match="'blk.1.ffn_up.weight' is missing"):
        read({"blk.1.ffn_up.weight": None})
    with pytest.raises(UserError, match=r"'output_norm.weight' has shape \[7\].*needs \[32\]"):
        read({"output_norm.weight": np.zeros(7, np.float32)})
    with pytest.raises(UserError, match="'blk.0.attn_q.bias' has no place in a llama model"):
        read({"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    with pytest.raises(UserError, match="'output_norm.weight' holds NaN"):
        read({"output_norm.weight": np.full(32, np.nan, np.float32)})


REAL = {"smollm2-135m": "smollm2", "gemma3-270m": "gemma3"}


@pytest.mark.parametrize("name", REAL)
def test_real_models_say_what_transformers_says(name, builtin, real_run):
    path, expected = builtin(name), real_run(REAL[name])
    config = reader.read_config(path)
    params = reader.read_params(path, config)
    tokens = jnp.asarray(expected["tokens"])
    logits = np.asarray(jax.jit(forward, static_argnums=0)(config, params, tokens))
    np.testing.assert_array_equal(logits.argmax(-1), expected["argmax"])
    top = np.take_along_axis(logits, expected["top_ids"], axis=-1)
    np.testing.assert_allclose(top, expected["top_logits"], atol=1e-3)
