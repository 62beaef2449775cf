"""Folding smoothing factors: the unquantized function of every architecture stays what it was."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward, forward_with_taps, init
from jaxopt_models.qtensor import quantize_array
from jaxopt_models.quantize.fold import fold, foldable, ties
from jaxopt_models.quantize.smooth import FREE, Tied

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
_MODELS = {
    "llama": {"model_type": "llama"},
    "llama_bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 8},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts_per_tok": 2} | _EXPERTS,
}
CONFIGS = {name: ModelConfig.from_hf(_SIZES | hf) for name, hf in _MODELS.items()}
EVERY = pytest.mark.parametrize("name", CONFIGS)

DENSE_GROUPS = (
    ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    ("self_attn/o_proj",),
    ("mlp/gate_proj", "mlp/up_proj"),
    ("mlp/down_proj",),
)
EXPERT_GROUPS = (*DENSE_GROUPS[:2], ("mlp/experts/down_proj",))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)

_jitted = jax.jit(forward, static_argnums=0)


def model(config, seed=0):
    """Random parameters with norms and biases that are no identity."""
    rng = np.random.default_rng(seed)

    def disturb(path, leaf):
        if "norm" in path or path.endswith("bias"):
            return leaf + jnp.asarray(0.4 * rng.standard_normal(leaf.shape), jnp.float32)
        return leaf

    return tree.map_with_path(disturb, init(config, jax.random.key(seed)))


def groups(config):
    return EXPERT_GROUPS if config.moe_layers else DENSE_GROUPS


def weight_of(layer, name):
    return dict(tree.leaves_with_paths(layer))[f"{name}/weight"]


def factors(layer, config, name, seed=0):
    """Random factors over two orders of magnitude, equal where they must be."""
    weight = weight_of(layer, name)
    shape = (*weight.shape[:-2], weight.shape[-1])
    logarithms = jnp.asarray(np.random.default_rng(seed).normal(0, 1.2, shape), jnp.float32)
    return jnp.exp(ties(layer, config, name).maximum(logarithms))


def smooth(layer, config, names, s):
    """The whole transformation: the input divided, the columns that read it multiplied."""
    layer = fold(layer, config, names[0], s)
    columns = {f"{n}/weight": weight_of(layer, n) * jnp.expand_dims(s, -2) for n in names}
    return tree.replace(layer, columns)


def smooth_everything(config, params):
    layers = []
    for layer in params["layers"]:
        for i, names in enumerate(reversed(groups(config))):
            layer = smooth(layer, config, names, factors(layer, config, names[0], i))
        layers.append(layer)
    return params | {"layers": tuple(layers)}


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@EVERY
def test_the_function_is_unchanged(name):
    config = CONFIGS[name]
    params = model(config)
    assert_same(
        _jitted(config, smooth_everything(config, params), TOKENS), _jitted(config, params, TOKENS)
    )


@EVERY
def test_what_the_linear_reads_is_divided(name):
    """Each group alone: its input over s, and no other input changed."""
    config = CONFIGS[name]
    params = model(config)
    taps = ["layers/0/*/input"] + ["layers/0/*/group_sizes"] * bool(config.moe_layers)
    run = jax.jit(partial(forward_with_taps, config, taps=taps))
    _, before = run(params, TOKENS)
    first, *rest = params["layers"]
    for names in groups(config):
        s = factors(first, config, names[0])
        _, after = run(params | {"layers": (smooth(first, config, names, s), *rest)}, TOKENS)
        for tap, value in before.items():
            found = after[tap]
            if tap.removeprefix("layers/0/").removesuffix("/input") in names:
                found = times(found, s, before.get("layers/0/mlp/experts/group_sizes"))
            assert_same(found, value)


def times(x, s, group_sizes):
    """Rows times s, or times that of the expert they belong to."""
    if s.ndim == 2:
        return x * jnp.repeat(s, group_sizes, axis=0)
    return x * s.reshape((1,) * (x.ndim - 1) + (-1,))


@EVERY
def test_folding_inside_jit_is_folding_outside(name):
    config = CONFIGS[name]
    layer = model(config)["layers"][0]
    for names in groups(config):
        s = factors(layer, config, names[0])
        outside = fold(layer, config, names[0], s)
        inside = jax.jit(lambda la, s, n=names[0]: fold(la, config, n, s))(layer, s)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), inside, outside)


def test_norms_become_float32_and_the_rest_is_shared():
    config = CONFIGS["gemma3"]
    layer = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model(config)["layers"][0])
    s = factors(layer, config, "mlp/up_proj")
    folded = fold(layer, config, "mlp/up_proj", s)
    norm = folded["pre_feedforward_layernorm"]["weight"]
    old = layer["pre_feedforward_layernorm"]["weight"].astype(jnp.float32)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose((1 + norm) * s, 1 + old, rtol=1e-6)
    changed = [
        path
        for (path, a), (_, b) in zip(
            tree.leaves_with_paths(layer), tree.leaves_with_paths(folded), strict=True
        )
        if a is not b
    ]
    assert changed == ["pre_feedforward_layernorm/weight"]


def test_heads_that_share_keys_and_values_share_factors():
    """Of a layer as it is, pruned or not, whatever the config says of the number of heads."""
    config = CONFIGS["llama"]
    layer = model(config)["layers"][0]
    assert ties(layer, config, "self_attn/o_proj") == Tied(repeats=2, width=8)
    assert ties(layer, config, "mlp/down_proj") == FREE
    pruned = tree.replace(
        layer, {"self_attn/v_proj/weight": weight_of(layer, "self_attn/v_proj")[:8]}
    )
    assert ties(pruned, config, "self_attn/o_proj") == Tied(repeats=4, width=8)
    untied = jnp.exp(jnp.arange(32, dtype=jnp.float32) / 32)
    with pytest.raises(UserError, match="share a key-value head"):
        fold(layer, config, "self_attn/o_proj", untied)


def test_without_sharing_nothing_is_tied():
    config = ModelConfig.from_hf(_SIZES | _MODELS["llama"] | {"num_key_value_heads": 4})
    params = model(config)
    layer = params["layers"][0]
    s = jnp.exp(jnp.arange(32, dtype=jnp.float32) / 8 - 2)
    changed = smooth(layer, config, ["self_attn/o_proj"], s)
    assert_same(
        _jitted(config, params | {"layers": (changed, params["layers"][1])}, TOKENS),
        _jitted(config, params, TOKENS),
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_share_their_norm_with_the_router(name):
    config = CONFIGS[name]
    layer = model(config)["layers"][0]
    assert foldable(layer, config, "mlp/experts/down_proj")
    for path in ("mlp/experts/gate_proj", "mlp/experts/up_proj", "mlp/router"):
        assert not foldable(layer, config, path)
        with pytest.raises(UserError, match=f"makes the input of {path}"):
            fold(layer, config, path, jnp.ones(32, jnp.float32))


def test_a_quantized_producer_stays_as_it_is():
    config = CONFIGS["llama"]
    layer = model(config)["layers"][0]
    path = "mlp/up_proj/weight"
    layer = tree.replace(layer, {path: quantize_array(weight_of(layer, "mlp/up_proj"), "int8")})
    assert not foldable(layer, config, "mlp/down_proj")
    assert foldable(layer, config, "mlp/up_proj")
    with pytest.raises(UserError, match="no unquantized norm or linear"):
        fold(layer, config, "mlp/down_proj", jnp.ones(48, jnp.float32))
