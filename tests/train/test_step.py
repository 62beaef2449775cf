"""A step of training: what it averages, guards and leaves alone."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import ONE_LAYER

import jaxopt_models as jom
from jaxopt_models import tree
from jaxopt_models.distill.hidden import HiddenLoss
from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.distill.losses import top_k
from jaxopt_models.errors import UserError
from jaxopt_models.qtensor import LowRank
from jaxopt_models.train.leaves import computed, fake_quantized, fold
from jaxopt_models.train.objectives import QAD, QAT, Term, next_token_loss
from jaxopt_models.train.step import make_train_step, start
from jaxopt_models.train.trainable import combine, partition

SGD = optax.sgd(0.1)
MIXED = (
    *QAD,
    Term(LogitLoss("cross_entropy"), 0.5),
    Term(HiddenLoss("hidden_cosine")),
    Term(HiddenLoss("hidden_mean_square", ((1, 1),)), 2.0),
)


def _equal(a, b):
    return all(
        x.tobytes() == y.tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture
def fakes(tiny_params, tiny_quantized):
    return fake_quantized(tiny_params, tiny_quantized)


def test_a_step_is_compiled_once(tiny_config, tiny_params, fakes, tokens):
    """What it returns is placed as what it began with."""
    adam = optax.adamw(1e-3)
    step = make_train_step(next_token_loss(tiny_config, QAD), adam)
    state = start(fakes, adam, freeze=("norm/*",))
    for _ in range(3):
        state, _ = step(state, tiny_params, {"tokens": tokens})
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_parts_are_one_batch(tiny_config, tiny_params, fakes, tokens):
    """Also where they have different numbers of tokens to learn."""
    mask = jnp.ones(tokens.shape).at[:3, 5:].set(0.0)
    loss = next_token_loss(tiny_config, MIXED)
    whole, found = make_train_step(loss, SGD)(
        start(fakes, SGD), tiny_params, {"tokens": tokens, "mask": mask}
    )
    parts = {"tokens": tokens.reshape(4, 2, 16), "mask": mask.reshape(4, 2, 16)}
    other, metrics = make_train_step(loss, SGD, parts=4)(start(fakes, SGD), tiny_params, parts)
    assert found.keys() == metrics.keys() and found["count"] == mask[:, 1:].sum()
    for name in found:
        np.testing.assert_allclose(metrics[name], found[name], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(other.trained), jax.tree.leaves(whole.trained), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    expected = found["forward_kl"] + 0.5 * found["cross_entropy"]
    expected += found["hidden_cosine"] + 2.0 * found["hidden_mean_square"]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def test_documents_in_one_row_are_learnt_as_if_alone(tiny_config, tiny_params, fakes, tokens):
    """In rows of their own, the first token of each, and what is behind the last, are no loss."""
    cuts = (0, 5, 12)
    at = jnp.arange(16)
    starts = sum((jnp.where(at >= cut, cut - before, 0) for before, cut in pairwise(cuts)), 0 * at)
    packed = {"tokens": tokens, "starts": jnp.broadcast_to(starts, tokens.shape)}
    packed["mask"] = jnp.broadcast_to(at < 14, tokens.shape)
    alone = jnp.concatenate(
        [jnp.pad(tokens[:, a:b], ((0, 0), (0, 16 - b + a))) for a, b in pairwise((*cuts, 14))]
    )
    lengths = jnp.repeat(jnp.array([5, 7, 2]), len(tokens))
    separate = {"tokens": alone, "mask": at[None] < lengths[:, None]}
    loss = next_token_loss(tiny_config, MIXED)
    step = make_train_step(loss, SGD)
    (one, found), (other, expected) = (
        step(start(fakes, SGD), tiny_params, batch) for batch in (packed, separate)
    )
    assert found["count"] == expected["count"] == 8 * (4 + 6 + 1)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.trained), jax.tree.leaves(other.trained), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("scales", ["dynamic", "learned"])
def test_what_parts_share_is_prepared_once(tiny_params, tiny_quantized, tokens, scales):
    """The same step bit for bit, but that weights are rounded before the loop over parts."""
    config = replace(ONE_LAYER, dtype="bfloat16")
    params, quantized = ({**p, "layers": p["layers"][:1]} for p in (tiny_params, tiny_quantized))
    fakes = fake_quantized(params, _with_low_rank(quantized), scales, "clip")
    freeze = ("layers/0/mlp/up_proj/weight/weight", "norm/weight")
    loss, batch = next_token_loss(config, QAT), {"tokens": tokens.reshape(4, 2, 16)}
    found, inside = [], []
    for prepare in (None, partial(computed, dtype=config.dtype)):
        step = make_train_step(loss, SGD, parts=4, prepare=prepare)
        state = start(fakes, SGD, freeze=freeze)
        inside.append(str(_loop(step.trace(state, None, batch).jaxpr)).count("round"))
        found.append(step(state, None, batch))
    (expected, known), (state, metrics) = found
    assert _equal(state, expected) and metrics == known
    assert inside[0] > 0 and (inside[1] == 0 or scales == "learned")


def _loop(jaxpr):
    """Over the parts."""
    return next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan").params["jaxpr"]


def _with_low_rank(params):
    """With a correction beside one matrix, to be trained."""
    path = "layers/0/mlp/up_proj/weight"
    leaf = params["layers"][0]["mlp"]["up_proj"]["weight"]
    low_rank = LowRank(jnp.full((2, 32), 0.01), jnp.full((64, 2), 0.01))
    return tree.replace(params, {path: replace(leaf, low_rank=low_rank)})


@pytest.mark.parametrize("remat", ["products", "layers"])
def test_what_is_computed_again_is_the_same_and_not_kept(tiny_params, tiny_config, remat):
    """Activations of four layers and 2 x 512 tokens are more than all parameters."""
    layers = tiny_params["layers"] * 2
    config = replace(tiny_config, num_layers=4, attention_kinds=("full",) * 4)
    params = tiny_params | {"layers": layers}
    tokens = jnp.broadcast_to(jnp.arange(512, dtype=jnp.int32) % 64, (2, 512))
    batch, step, found = {"tokens": tokens}, jnp.int32(0), []
    for chosen in ("none", remat):
        loss = next_token_loss(config, QAT, remat=chosen)
        gradient = jax.grad(lambda p, loss=loss: loss(p, None, batch, step).total)
        compiled = jax.jit(gradient).lower(params).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        found.append((compiled(params), memory.temp_size_in_bytes))
    (plain, kept), (again, fewer) = found
    assert fewer < 0.5 * kept
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_a_long_gradient_is_shortened(tiny_config, fakes, tokens):
    loss, batch = next_token_loss(tiny_config, QAT), {"tokens": tokens}
    free, metrics = make_train_step(loss, SGD)(start(fakes, SGD), None, batch)
    norm = metrics["gradient_norm"]
    short, same = make_train_step(loss, SGD, max_norm=float(norm / 4))(
        start(fakes, SGD), None, batch
    )
    np.testing.assert_allclose(same["gradient_norm"], norm, rtol=1e-5)
    before = start(fakes, SGD).trained
    steps = zip(*(jax.tree.leaves(t) for t in (before, free.trained, short.trained)), strict=True)
    for old, far, near in steps:
        np.testing.assert_allclose(4 * (near - old), far - old, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing(tiny_config, fakes, tokens):
    plain = next_token_loss(tiny_config, QAT)
    adam = optax.adam(1e-3)

    def loss(params, context, batch, step):
        sums = plain(params, context, batch, step)
        return sums._replace(total=sums.total * batch["factor"])

    step, state = make_train_step(loss, adam), start(fakes, adam)
    state, _ = step(state, None, {"tokens": tokens, "factor": jnp.float32(1)})
    kept = jax.tree.map(jnp.copy, state)
    for i, bad in enumerate((jnp.nan, jnp.inf)):
        state, metrics = step(state, None, {"tokens": tokens, "factor": jnp.float32(bad)})
        assert metrics["skipped"] == 1 and state.skipped == i + 1
    assert _equal((state.trained, state.optimizer), (kept.trained, kept.optimizer))
    state, metrics = step(state, None, {"tokens": tokens, "factor": jnp.float32(1)})
    assert (int(state.step), int(state.skipped), int(state.all_skipped)) == (4, 0, 2)
    assert metrics["skipped"] == 0 and not _equal(state.trained, kept.trained)


def test_distillation_brings_the_quantized_model_back(tiny_config, tiny_params, fakes, tokens):
    """To the teacher, on tokens that it was not trained on, too, and it folds exactly."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-4, 25))
    step = make_train_step(next_token_loss(tiny_config), optimizer, max_norm=1.0)
    state = start(fakes, optimizer)
    others = [jax.random.randint(jax.random.key(7), (4, 16), 0, 64)]

    def divergence(params) -> float:
        kl = jom.evaluate(tiny_config, params, others, reference=tiny_params).kl
        assert kl is not None
        return kl

    before = divergence(fakes)
    for i in range(25):
        batch = jax.random.randint(jax.random.key(100 + i), (8, 16), 0, 64)
        state, _ = step(state, tiny_params, {"tokens": batch})
    folded = fold(state.params)
    assert divergence(folded) == divergence(state.params) < 0.85 * before


def test_training_on_text_learns_it(tiny_config, fakes, tokens):
    optimizer = optax.adam(1e-2)
    step, state = make_train_step(next_token_loss(tiny_config, QAT), optimizer), None
    state = start(fakes, optimizer)
    losses = []
    for _ in range(25):
        state, metrics = step(state, None, {"tokens": tokens})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_weights_may_follow_the_step(tiny_config, tiny_params, fakes, tokens):
    rising = Term(LogitLoss("cross_entropy"), optax.linear_schedule(0.0, 1.0, 2))
    step = make_train_step(next_token_loss(tiny_config, (*QAD, rising)), SGD)
    state = start(fakes, SGD)
    for weight in (0.0, 0.5, 1.0):
        state, found = step(state, tiny_params, {"tokens": tokens})
        expected = found["forward_kl"] + weight * found["cross_entropy"]
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def test_hidden_states_become_those_of_the_teacher(tiny_config, tiny_params, fakes, tokens):
    """Without any loss of logits; the teacher's streams are the target, and have no gradient."""
    optimizer = optax.adam(1e-3)
    terms = (Term(HiddenLoss("hidden_mean_square")), Term(HiddenLoss("hidden_cosine"), 0.0))
    step, state = make_train_step(next_token_loss(tiny_config, terms), optimizer), None
    state = start(fakes, optimizer)
    found = []
    for _ in range(15):
        state, metrics = step(state, tiny_params, {"tokens": tokens})
        found.append(metrics)
    for name in ("hidden_mean_square", "hidden_cosine"):
        assert found[-1][name] < 0.7 * found[0][name]
    loss = next_token_loss(tiny_config, terms)
    gradient = jax.grad(lambda t: loss(fakes, t, {"tokens": tokens}, jnp.int32(0)).total)
    assert not any(jnp.any(part) for part in jax.tree.leaves(gradient(tiny_params)))


def test_a_teacher_that_is_known_beforehand(tiny_config, tiny_params, fakes, tokens):
    term = Term(LogitLoss("forward_kl", top_k=8))
    known = top_k(jom.forward(tiny_config, tiny_params, tokens), 8)
    step = make_train_step(next_token_loss(tiny_config, (term,)), SGD)
    live, a = step(start(fakes, SGD), tiny_params, {"tokens": tokens})
    file, b = step(start(fakes, SGD), None, {"tokens": tokens, "teacher": known})
    np.testing.assert_allclose(a["forward_kl_top8"], b["loss"], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(live.trained), jax.tree.leaves(file.trained), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_adapters_learn_beside_frozen_codes(tiny_config, tiny_params, tiny_quantized, tokens):
    path = "layers/0/mlp/up_proj/weight"
    q = tiny_quantized["layers"][0]["mlp"]["up_proj"]["weight"]
    adapted = replace(q, low_rank=LowRank(jnp.ones((2, 32)) / 8, jnp.zeros((64, 2))))
    params = tree.replace(tiny_quantized, {path: adapted})
    optimizer = optax.adam(1e-2)
    state = start(params, optimizer, train=("*/low_rank/*",))
    assert len(jax.tree.leaves(state.trained)) == 2
    step = make_train_step(next_token_loss(tiny_config), optimizer)
    losses = []
    for _ in range(10):
        state, metrics = step(state, tiny_params, {"tokens": tokens})
        losses.append(float(metrics["loss"]))
    after = state.params["layers"][0]["mlp"]["up_proj"]["weight"]
    assert losses[-1] < losses[0] and _equal(after.codes, q.codes)
    assert jnp.any(after.low_rank.up != 0)


def test_what_is_frozen_stays(tiny_config, fakes, tokens):
    state = start(fakes, SGD, train=("*_proj/*",), freeze=("layers/0/*",))
    paths = [path for path, _ in tree.arrays_with_paths(state.trained)]
    assert paths and all(p.startswith("layers/1/") and p.endswith("/weight/weight") for p in paths)
    frozen = jax.tree.map(jnp.copy, state.frozen)
    state, _ = make_train_step(next_token_loss(tiny_config, QAT), SGD)(
        state, None, {"tokens": tokens}
    )
    assert _equal(state.frozen, frozen)
    assert jax.tree.structure(state.params) == jax.tree.structure(fakes)


@pytest.mark.parametrize("scales", ["static", "learned_untied"])
def test_what_can_be_trained(tiny_params, tiny_quantized, scales):
    fakes = fake_quantized(tiny_params, tiny_quantized, scales)
    trained, frozen = partition(fakes)
    leaf, rest = (t["layers"][0]["mlp"]["up_proj"]["weight"] for t in (trained, frozen))
    assert leaf.weight is not None and rest.weight is None
    if scales == "static":
        assert leaf.scales.scale is None and rest.scales.scale is not None
    else:
        assert leaf.scales.amax is not None and leaf.scales.rounding is not None
        assert leaf.scales.overall is None and rest.scales.overall is not None
    assert _equal(combine(trained, frozen), fakes)


def test_what_is_refused(tiny_config, tiny_params, tiny_quantized, fakes):
    with pytest.raises(UserError, match="'layers/7/.*' matches nothing that can be trained; paths"):
        start(fakes, SGD, train=("layers/7/*",))
    with pytest.raises(UserError, match=r"nothing is trained: \* freezes all of it"):
        start(fakes, SGD, freeze=("*",))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    with pytest.raises(UserError, match="'embed_tokens/weight' is bfloat16, in which small"):
        start(half, SGD)
    with pytest.raises(UserError, match="losses forward_kl, forward_kl: give one or more"):
        next_token_loss(tiny_config, (*QAD, *QAD))
    hidden = next_token_loss(tiny_config, (Term(HiddenLoss("hidden_cosine")),))
    with pytest.raises(UserError, match="hidden_cosine needs the teacher's parameters"):
        hidden(tiny_params, None, {"tokens": jnp.zeros((1, 4), jnp.int32)}, jnp.int32(0))
    codes = {"layers": tiny_quantized["layers"][0]["mlp"]["up_proj"]}
    with pytest.raises(UserError, match="matches nothing that can be trained; there is nothing"):
        start(codes, SGD)
