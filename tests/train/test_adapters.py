"""Low-rank adapters: nothing at first, learnt alone, kept or merged exactly."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, quantized

import jaxopt_models as jom
from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.formats import resolve
from jaxopt_models.inference import prepare
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.ops import linear
from jaxopt_models.qtensor import DenseTensor, InputQuantizer, QTensor, quantize_array
from jaxopt_models.quantize.low_rank import low_rank, residual
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.train.adapters import LINEARS, adapter_arrays, merged, with_adapters
from jaxopt_models.train.leaves import fold
from jaxopt_models.train.objectives import QAT, next_token_loss
from jaxopt_models.train.step import make_train_step, start

KEY = jax.random.key(7)
UP = "layers/0/mlp/up_proj/weight"
# Stacked experts, and an output head of its own.
EXPERTS = ModelConfig.from_hf(
    {
        "model_type": "mixtral",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
)
W4A4 = InputQuantizer(jnp.float32(3.0), resolve("nvfp4"))


def _mixed(params, bases):
    """Weights of each kind that `bases` makes of them, by glob."""

    def leaf(path, weight):
        found = (base for pattern, base in bases.items() if tree.matches(path, pattern))
        return next(found, lambda w: w)(weight) if tree.is_decoder_matrix(path, weight) else weight

    return tree.map_with_path(leaf, params)


def _codes(weight):
    return quantize_array(weight, "nf4")


def _fake(weight):
    return FakeTensor(weight.astype(jnp.float32), spec=resolve("nf4"))


def _with_input(weight):
    return replace(quantize_array(weight, "nvfp4"), input=W4A4)


# Architecture, weights that are no floats, and where adapters are.
MODELS = {
    "floats and codes": (CONFIG, {"layers/1/*": _codes}, LINEARS),
    "fake and W4A4": (CONFIG, {"layers/0/*": _fake, "*": _with_input}, LINEARS),
    "experts": (EXPERTS, {"*/down_proj/*": _codes}, (*LINEARS, "lm_head/*")),
}


@cache
def _model(name, dtype=jnp.float32):
    config, bases, match = MODELS[name]
    params = jom.init(config, jax.random.key(0))
    params |= {"embed_tokens": {"weight": 20 * params["embed_tokens"]["weight"]}}
    return config, _mixed(jax.tree.map(dtype, params), bases), match


def _equal(a, b):
    same = jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return same and all(x.tobytes() == y.tobytes() for x, y in pairs)


def _run(config, params, tokens):
    return jax.jit(jom.forward, static_argnums=0)(config, params, tokens)


def _learnt(params, amount=0.05):
    """Adapters as if trained: `up` is no longer zero."""

    def moved(path, array):
        noise = amount * jax.random.normal(tree.key_at(KEY, path), array.shape)
        return array + noise if path.endswith("/low_rank/up") else array

    named = tree.arrays_with_paths(params)
    return jax.tree.unflatten(jax.tree.structure(params), [moved(*each) for each in named])


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_at_first(tokens, name):
    config, params, match = _model(name)
    adapted = with_adapters(params, KEY, 4, 8.0, match)
    of = {path: leaf for path, leaf in tree.leaves_with_paths(adapted) if tree.is_leaf(leaf)}
    assert len(of) == (8 if config is EXPERTS else 14)
    assert all(path.startswith("lm_head/") or "_proj/" in path for path in of)
    for leaf in of.values():
        *stack, rows, width = leaf.shape
        assert leaf.low_rank.down.shape == (*stack, 4, width)
        assert leaf.low_rank.up.shape == (*stack, rows, 4)
    assert _run(config, adapted, tokens).tobytes() == _run(config, params, tokens).tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_they_learn_alone(tokens, name):
    config, params, match = _model(name, jnp.bfloat16)  # what is frozen may be narrow
    optimizer = optax.adam(1e-2)
    state = start(with_adapters(params, KEY, 4, 8.0, match), optimizer, adapter_arrays(match))
    paths = [path for path, _ in tree.arrays_with_paths(state.trained)]
    assert len(paths) == 2 * (8 if config is EXPERTS else 14)
    assert all("/low_rank/" in path for path in paths)
    frozen = jax.tree.map(jnp.copy, state.frozen)
    step, losses = make_train_step(next_token_loss(config, QAT), optimizer), []
    for _ in range(6):
        state, metrics = step(state, None, {"tokens": tokens})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and _equal(state.frozen, frozen)
    assert all(jnp.any(up != 0) for p, up in tree.arrays_with_paths(state.trained) if "/up" in p)


def test_the_rule_is_that_of_the_paper():
    """With W + s B A, and the learning rate of A divided by s."""
    scale, rate = 8.0, 1e-2
    keys = jax.random.split(jax.random.key(3), 3)
    weight, x, target = (
        jax.random.normal(k, n) for k, n in zip(keys, ((6, 16), (9, 16), (9, 6)), strict=True)
    )
    params = {"layers": ({"q_proj": {"weight": weight}},)}
    start_of = with_adapters(params, KEY, 2, 2 * scale)["layers"][0]["q_proj"]["weight"].low_rank

    def ours(pair):
        return jnp.mean((linear(x, DenseTensor(weight, low_rank=pair)) - target) ** 2)

    def theirs(pair):
        product = jnp.matmul(pair["B"], pair["A"], precision="highest")
        return jnp.mean((linear(x, weight + scale * product) - target) ** 2)

    def trained(loss, pair, optimizer) -> Any:
        state, step = optimizer.init(pair), jax.jit(jax.grad(loss))
        for _ in range(20):
            updates, state = optimizer.update(step(pair), state)
            pair = optax.apply_updates(pair, updates)
        return pair

    with jax.numpy_dtype_promotion("standard"):
        rates: Any = {"A": optax.adam(rate / scale, eps=1e-30), "B": optax.adam(rate, eps=1e-30)}
        paper = optax.partition(rates, {"A": "A", "B": "B"})
        pair = trained(ours, start_of, optax.adam(rate, eps=1e-30))
        other = trained(theirs, {"A": start_of.down / scale, "B": start_of.up}, paper)
    np.testing.assert_allclose(pair.down, scale * other["A"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(pair.up, other["B"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("rank", "alpha"), [(8, 8.0), (8, 32.0), (16, 32.0)])
def test_alpha_over_rank_is_in_what_is_drawn(tiny_params, rank, alpha):
    adapted = with_adapters(tiny_params, KEY, rank, alpha)
    drawn = [
        array * array.shape[-1] ** 0.5
        for path, array in tree.arrays_with_paths(adapted)
        if path.endswith("/low_rank/down")
    ]
    spread = jnp.std(jnp.concatenate([one.ravel() for one in drawn]))
    np.testing.assert_allclose(spread, alpha / rank, rtol=0.05)
    assert len({float(one[0, 0]) for one in drawn}) == len(drawn)


@pytest.mark.parametrize("name", ["floats and codes", "experts"])
def test_merged_is_the_same_function(tokens, name):
    config, params, match = _model(name)
    adapted = _learnt(with_adapters(params, KEY, 4, 8.0, match))
    floats = merged(adapted)
    assert not any(tree.is_leaf(leaf) for _, leaf in tree.leaves_with_paths(floats))
    before, after = (_run(config, p, tokens) for p in (adapted, floats))
    assert jnp.max(jnp.abs(before - _run(config, params, tokens))) > 0.1
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_merged_is_rounded_once(tiny_params):
    half = jax.tree.map(jnp.bfloat16, tiny_params)
    adapted = _learnt(with_adapters(half, KEY, 4, 8.0))
    leaf, array = (t["layers"][0]["mlp"]["up_proj"]["weight"] for t in (adapted, merged(adapted)))
    pair = [np.asarray(part, np.float64) for part in (leaf.low_rank.up, leaf.low_rank.down)]
    exact = np.asarray(leaf.weight, np.float64) + pair[0] @ pair[1]
    assert array.dtype == jnp.bfloat16
    error = np.abs(np.asarray(array, np.float64) - exact)
    assert np.all(error <= 2**-8 * np.abs(exact) + 1e-6)


def test_steps_of_the_input_are_merged_as_well():
    weight = jax.random.normal(jax.random.key(1), (24, 32))
    q = replace(quantize_array(weight, "int8"), pre_scale=1 + jnp.arange(32) / 32, rotate=16)
    adapted = _learnt(with_adapters({"layers": ({"q_proj": {"weight": q}},)}, KEY, 4, 8.0))
    (leaf,), (array,) = (
        jax.tree.leaves(t, is_leaf=tree.is_leaf) for t in (adapted, merged(adapted))
    )
    x = jax.random.normal(jax.random.key(2), (5, 32))
    np.testing.assert_allclose(linear(x, array), linear(x, leaf), rtol=1e-5, atol=1e-4)


def test_a_fake_quantized_weight_rounds_the_sum():
    adapted = _learnt(with_adapters(_model("fake and W4A4")[1], KEY, 4, 8.0, (UP,)))
    before, after = (t["layers"][0]["mlp"]["up_proj"]["weight"] for t in (adapted, merged(adapted)))
    assert isinstance(after, FakeTensor) and after.low_rank is None
    np.testing.assert_allclose(after.weight, before.weight + before.low_rank.product())
    kept = fold(adapted)["layers"][0]["mlp"]["up_proj"]["weight"]
    assert isinstance(kept, QTensor) and _equal(kept.low_rank, before.low_rank)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_holds_them(tmp_path, name):
    config, params, match = _model(name)
    adapted = _learnt(with_adapters(params, KEY, 4, 8.0, match))
    jom.save(tmp_path / "adapted", config, adapted)
    assert _equal(jom.load(tmp_path / "adapted").params, adapted)


def test_beside_a_correction_both_work(tiny_params, tokens):
    """Of SVDQuant, say: what it adds stays, and is trained along."""

    def corrected(path, weight):
        if not tree.is_decoder_matrix(path, weight):
            return weight
        part = low_rank(weight, 3)
        return replace(quantize_array(residual(weight, part), "nvfp4"), low_rank=part)

    params = tree.map_with_path(corrected, tiny_params)
    adapted = with_adapters(params, KEY, 4, 8.0, (UP,))
    before, after = (t["layers"][0]["mlp"]["up_proj"]["weight"] for t in (params, adapted))
    assert after.low_rank.down.shape == (7, 32) and after.low_rank.up.shape == (64, 7)
    np.testing.assert_allclose(after.low_rank.product(), before.low_rank.product(), atol=1e-6)
    np.testing.assert_allclose(
        _run(CONFIG, adapted, tokens), _run(CONFIG, params, tokens), rtol=1e-4, atol=1e-4
    )
    state = start(adapted, optax.sgd(0.1), adapter_arrays((UP,)))
    assert [a.shape for a in jax.tree.leaves(state.trained)] == [(7, 32), (64, 7)]
    state, _ = make_train_step(next_token_loss(CONFIG, QAT), optax.sgd(0.1))(
        state, None, {"tokens": tokens}
    )
    moved = state.params["layers"][0]["mlp"]["up_proj"]["weight"].low_rank.up - after.low_rank.up
    assert jnp.all(jnp.any(moved != 0, axis=0))


def test_several_devices_give_the_same(tokens):
    mesh = make_mesh({"data": 2, "model": 4})
    params = with_adapters(_model("floats and codes")[1], KEY, 4, 8.0)
    optimizer = optax.adam(1e-2)
    step = make_train_step(next_token_loss(CONFIG, QAT), optimizer)
    alone, shared = (start(p, optimizer, adapter_arrays()) for p in (params, shard(params, mesh)))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    for _ in range(3):
        alone, a = step(alone, None, {"tokens": tokens})
        shared, b = step(shared, None, {"tokens": jax.device_put(tokens, rows)})
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-4)
    dense, codes = (layer["mlp"]["down_proj"]["weight"] for layer in shared.params["layers"])
    assert dense.weight.sharding.shard_shape(dense.shape) == (32, 16)
    for pair in (dense.low_rank, codes.low_rank):
        assert pair.down.sharding.shard_shape(pair.down.shape) == (4, 16)


def test_what_is_refused(tiny_params):
    with pytest.raises(UserError, match="'embed_tokens/.*' matches no weight that can have an ada"):
        with_adapters(tiny_params, KEY, 4, 8.0, (*LINEARS, "embed_tokens/*"))
    with pytest.raises(UserError, match="down_proj/weight' is 32x64 and has no rank 33; choose"):
        with_adapters(tiny_params, KEY, 33, 8.0)
    with pytest.raises(UserError, match=r"rank 4 and alpha 0.0 do nothing; give positive ones"):
        with_adapters(tiny_params, KEY, 4, 0.0)
    packed = prepare({**tiny_params, "layers": quantized(tiny_params, "nvfp4")["layers"]})
    with pytest.raises(UserError, match="is a PackedTensor, which cannot have an adapter; give"):
        with_adapters(packed, KEY, 4, 8.0)
    with pytest.raises(UserError, match="quantizes its input, but not that of its low-rank part"):
        merged(with_adapters(quantized(tiny_params, input=W4A4), KEY, 4, 8.0))
    model = jom.Model(CONFIG, with_adapters(tiny_params, KEY, 4, 8.0), None)
    with pytest.raises(UserError, match="has an adapter; fold it in with adapters.merged first"):
        jom.quantize(model, jom.Recipe.load("nf4"))
