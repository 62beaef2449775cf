"""Rotated models compute what the models did, and their weights are easier to round."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard, orthogonal
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params, forward, forward_with_taps
from jaxopt_models.qtensor import fake_quant, quantize_array
from jaxopt_models.quantize.rotate import (
    fuse_layer,
    fuse_norms,
    rotate_ends,
    rotate_heads,
    rotate_hidden,
    rotate_layer,
    rotate_layer_heads,
)

_SHAPE = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_MODELS = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},  # biases of q, k and v; tied: embeddings scale nothing
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, "mlp_only_layers": [1]} | _MOE,
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
}
_ROTATABLE = [name for name in _MODELS if name != "gemma3"]


@cache
def _model(name, dtype=jnp.float32, **changes):
    """A random model whose norms have gains and whose biases are not zero."""
    config = ModelConfig.from_hf(_SHAPE | _MODELS[name] | changes)
    rng = np.random.default_rng(0)

    def leaf(path, array):
        noise = rng.standard_normal(array.shape)
        if "norm" in path:
            noise = noise * 0.4 + (0 if config.unit_offset_norm else 1)
        elif array.ndim > 1:
            noise /= np.sqrt(array.shape[-1])
        return jnp.asarray(noise, dtype)

    return config, tree.map_with_path(leaf, abstract_params(config))


def _tokens(config):
    return jnp.asarray(np.random.default_rng(2).integers(0, config.vocab_size, (2, 12)), jnp.int32)


_logits = jax.jit(forward, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 3))
def _taps(config, params, tokens, taps):
    return forward_with_taps(config, params, tokens, taps)[1]


def _assert_same_function(before, after):
    tokens = _tokens(before[0])
    expected, found = _logits(*before, tokens), _logits(*after, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def _norms(params):
    return {path: leaf for path, leaf in tree.leaves_with_paths(params) if "norm" in path}


@pytest.mark.parametrize("name", _MODELS)
def test_fused_norms_change_nothing(name):
    config, params = _model(name)
    fused = fuse_norms(config, params)
    _assert_same_function((config, params), fused)
    kept = ("q_norm", "k_norm") + (("post_",) if config.sandwich_norm else ())
    for path, weight in _norms(fused[1]).items():
        if any(part in path for part in kept):
            assert np.array_equal(weight, _norms(params)[path])
        else:
            assert np.all(np.asarray(weight) == (0 if config.unit_offset_norm else 1)), path


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", _ROTATABLE)
def test_a_rotated_residual_stream_changes_nothing(name, seed):
    config, params = _model(name)
    rotated = rotate_hidden(config, params, seed)
    _assert_same_function((config, params), rotated)
    table, basis = params["embed_tokens"]["weight"], orthogonal(48, seed)
    np.testing.assert_allclose(rotated[1]["embed_tokens"]["weight"], table @ basis, atol=1e-6)


@pytest.mark.parametrize("name", _MODELS)
def test_rotated_heads_change_nothing(name):
    """Grouped queries, biases of v_proj, and heads of 12 and 20, which are no powers of two."""
    config, params = _model(name)
    rotated = rotate_heads(config, params)
    assert rotated[0] == config
    _assert_same_function((config, params), rotated)


def test_the_stream_itself_is_the_rotated_one():
    config, params = _model("qwen3_moe")
    after = rotate_hidden(config, params, 5)
    taps = ("embed_tokens/output", "layers/[01]/output")
    plain, rotated = (_taps(*model, _tokens(config), taps) for model in ((config, params), after))
    assert len(plain) == 3
    for name, stream in plain.items():
        np.testing.assert_allclose(rotated[name], stream @ orthogonal(48, 5), atol=1e-4)


def test_values_of_heads_are_the_rotated_ones():
    config, params = _model("qwen2")
    after = rotate_heads(config, params)
    value, found = (
        _taps(*model, _tokens(config), ("layers/0/self_attn/value",))["layers/0/self_attn/value"]
        for model in ((config, params), after)
    )
    np.testing.assert_allclose(found, value @ orthogonal(12), atol=1e-5)


def test_both_rotations_together_and_again():
    before = _model("qwen3")
    after = rotate_heads(*rotate_hidden(*before, 1))
    _assert_same_function(before, rotate_hidden(*after, 2))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_layer_by_layer_gives_the_same_arrays(name):
    config, params = _model(name)
    basis = orthogonal(48, 3)
    streamed_config, streamed = rotate_ends(config, params, basis)
    layers = [
        rotate_layer_heads(config, rotate_layer(config, layer, basis)) for layer in params["layers"]
    ]
    whole_config, whole = rotate_heads(*rotate_hidden(config, params, 3))
    assert streamed_config == whole_config
    jax.tree.map(np.testing.assert_array_equal, streamed | {"layers": tuple(layers)}, whole)


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen3_moe"])
def test_heads_are_untied_and_arrays_float32_in_the_models_own_shapes(name):
    config, params = _model(name, jnp.bfloat16)
    changed, rotated = rotate_heads(*rotate_hidden(config, params))
    assert changed == dataclasses.replace(config, tie_word_embeddings=False)
    shapes = {path: leaf.shape for path, leaf in tree.leaves_with_paths(abstract_params(changed))}
    found = dict(tree.leaves_with_paths(rotated))
    assert {path: leaf.shape for path, leaf in found.items()} == shapes
    untouched = ("q_proj/bias", "k_proj/bias", "gate_proj/bias", "up_proj/bias")
    for path, leaf in found.items():
        stays = "norm" in path or path.endswith(untouched)
        assert leaf.dtype == (jnp.bfloat16 if stays else jnp.float32), path
    assert "lm_head" not in params or params["lm_head"]["weight"].dtype == jnp.bfloat16


def test_what_is_not_rotated_is_shared():
    config, params = _model("llama")
    rotated = rotate_heads(config, params)[1]
    assert rotated["embed_tokens"]["weight"] is params["embed_tokens"]["weight"]
    assert (
        rotated["layers"][0]["mlp"]["up_proj"]["weight"]
        is (params["layers"][0]["mlp"]["up_proj"]["weight"])
    )


def test_gemma_keeps_its_residual_stream():
    config, params = _model("gemma3")
    for rotate in (
        lambda: rotate_hidden(config, params),
        lambda: rotate_layer(config, params["layers"][0], np.eye(48)),
        lambda: rotate_ends(config, params, np.eye(48)),
    ):
        with pytest.raises(UserError, match="gemma3_text model cannot be rotated, .* rotate heads"):
            rotate()


def test_quantized_leaves_are_refused():
    config, params = _model("llama tied")
    path = "layers/1/self_attn/o_proj/weight"
    (weight,) = tree.select(params, path).values()
    spoiled = tree.replace(params, {path: quantize_array(weight, "int8")})
    for rotate in (fuse_norms, rotate_hidden, rotate_heads):
        with pytest.raises(UserError, match=f"'{path}' is a QTensor already; rotate before"):
            rotate(config, spoiled)
    layer = spoiled["layers"][1]
    for rotate in (fuse_layer, rotate_layer_heads):
        with pytest.raises(UserError, match="'self_attn/o_proj/weight' is a QTensor already"):
            rotate(config, layer)
    table = quantize_array(params["embed_tokens"]["weight"], "int8")
    with pytest.raises(UserError, match="'embed_tokens/weight' is a QTensor already"):
        rotate_ends(config, params | {"embed_tokens": {"weight": table}}, np.eye(48))


# ---- why ----------------------------------------------------------------------------------------


def _with_outliers(config, params):
    """A few channels of the residual stream far above the others, as large models have them."""
    loud = np.ones(config.hidden_size, np.float32)
    loud[[3, 17]] = 30

    def leaf(path, array):
        if path.endswith(("embed_tokens/weight", "layernorm/weight")):
            return array * loud.reshape((1,) * (array.ndim - 1) + (-1,))
        return array

    return tree.map_with_path(leaf, params)


@jax.jit
def _in_four_bits(weight):
    return fake_quant(weight, "int4", granularity="channel")


def _rounded(path, leaf):
    return _in_four_bits(leaf) if tree.is_decoder_matrix(path, leaf) else leaf


def test_a_rotated_model_loses_less_in_four_bits():
    config, params = _model(
        "llama", hidden_size=128, intermediate_size=256, tie_word_embeddings=True
    )
    params = _with_outliers(config, params)
    tokens = _tokens(config)
    exact = _logits(config, params, tokens)

    def error(model):
        config, params = model
        lost = _logits(config, tree.map_with_path(_rounded, params), tokens) - exact
        return float(jnp.linalg.norm(lost) / jnp.linalg.norm(exact))

    plain, fused = (config, params), fuse_norms(config, params)
    rotated = rotate_hidden(config, params)
    assert error(rotated) < 0.8 * min(error(fused), error(plain))
    streams = [_taps(*model, tokens, ("layers/0/output",)) for model in (plain, rotated)]
    before, after = (scipy.stats.kurtosis(np.ravel(s["layers/0/output"])) for s in streams)
    assert after < before / 10


def test_a_layer_with_outliers_loses_less_once_rotated():
    """The product of inputs and weight, both of 4 bits, with the rotation online.

    Blocks of 128 share a scale; in NVFP4, whose 16 do, an outlier spoils few others anyway.
    """
    rng = np.random.default_rng(4)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 256), (32, 256)))
    x[:, [5, 90, 200]] *= 40
    weight[:, [11, 120]] *= 20

    @jax.jit
    def errors(x, weight):
        def error(x, weight):
            lost = fake_quant(x, "int4") @ fake_quant(weight, "int4").T - exact
            return jnp.linalg.norm(lost) / jnp.linalg.norm(exact)

        exact = x @ weight.T
        return error(x, weight), error(hadamard(x, 128), hadamard(weight, 128))

    plain, rotated = errors(x, weight)
    assert rotated < 0.7 * plain
