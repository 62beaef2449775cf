"""Losses of a batch, a piece at a time: the sums and gradients of the whole."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_models.distill import losses, pieces
from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.distill.objective import summed_losses
from jaxopt_models.distill.predictor import Predictor
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import logits
from jaxopt_models.qtensor import quantize_array
from jaxopt_models.sharding import make_mesh

B, T, D, V = 4, 11, 16, 60
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
)
TERMS = (
    LogitLoss("forward_kl", temperature=2.0),
    LogitLoss("cross_entropy"),
    LogitLoss("reverse_kl"),
    LogitLoss("jensen_shannon", beta=0.2),
    LogitLoss("forward_kl", top_k=7),
)
WEIGHTS = jnp.array([1.0, 0.5, 0.25, 2.0, 0.125])


def _random(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _predictor(seed: int, config: ModelConfig = CONFIG) -> Predictor:
    head = {"embed_tokens": {"weight": _random(seed, V, D)}}
    return Predictor(head, _random(seed + 1, B, T, D), config)


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(9), (B, T), 0, V)
    return tokens, jax.random.bernoulli(jax.random.key(8), 0.7, (B, T)).astype(jnp.int32)


def _plain(terms, weights, student, teacher, tokens, mask):
    """Of all logits at once."""
    ours = logits(student.config, student.head, student.hidden)[:, :-1]
    theirs = logits(teacher.config, teacher.head, teacher.hidden)[:, :-1]
    each = [
        jnp.sum(mask[:, 1:].astype(jnp.float32) * term.at(ours, theirs, tokens[:, 1:]))
        for term in terms
    ]
    return jnp.sum(weights * jnp.stack(each)), jnp.stack(each)


@pytest.mark.parametrize("piece", [1, 4, T, None])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_pieces_give_the_sums_and_gradients_of_the_whole(batch, piece, cap):
    config = replace(CONFIG, final_softcap=cap)
    student, teacher = _predictor(0, config), _predictor(5, config)

    def of(function, head, hidden, **options):
        own = replace(student, head=head, hidden=hidden)
        return function(TERMS, WEIGHTS, own, teacher, *batch, **options)

    arguments = student.head, student.hidden
    ours, plain = partial(of, summed_losses, piece=piece), partial(of, _plain)
    for found, expected in zip(jax.jit(ours)(*arguments), plain(*arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    found, expected = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: 3.0 * f(*a)[0], argnums=(0, 1)))(*arguments)
        for f in (ours, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("chunks", "cap"), [(4, None), (7, 5.0), (V, None)])
def test_chunks_of_the_vocabulary_give_the_same(batch, chunks, cap):
    """Each kind alone; 60 tokens are cut evenly, unevenly, and into single ones."""
    config = replace(CONFIG, final_softcap=cap)
    student, teacher = _predictor(0, config), _predictor(5, config)
    teacher = replace(teacher, head={"lm_head": teacher.head["embed_tokens"]})
    terms = (*TERMS[:4], LogitLoss("jensen_shannon", temperature=3.0))

    def total(head, hidden, weights, **options):
        own = replace(student, head=head, hidden=hidden)
        return summed_losses(terms, weights, own, teacher, *batch, **options)

    cut, whole = (
        jax.jit(jax.value_and_grad(partial(total, piece=3, chunks=n), (0, 1), has_aux=True))
        for n in (chunks, 1)
    )
    for weights in jnp.eye(len(terms)):
        (_, sums), found = cut(student.head, student.hidden, weights)
        (_, plain), expected = whole(student.head, student.hidden, weights)
        np.testing.assert_allclose(sums, plain, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(b))))


def test_chunks_need_no_teacher(batch):
    student = _predictor(0)

    def total(hidden, chunks):
        own = replace(student, hidden=hidden)
        return summed_losses(TERMS[1:2], jnp.ones(1), own, None, *batch, chunks=chunks)[0]

    found, expected = (jax.value_and_grad(total)(student.hidden, n) for n in (V + 1, 1))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_chunks_of_narrow_models_round_no_more_near_the_teacher(batch, kind):
    """Where both are sure and differ little: what each logit adds and takes nearly cancels."""
    student = _predictor(0)
    near = student.head["embed_tokens"]["weight"] + 0.02 * _random(7, V, D)
    teacher = replace(student, head={"embed_tokens": {"weight": near}})
    student, teacher = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student, teacher))

    def total(head, hidden, chunks):
        own, terms = replace(student, head=head, hidden=hidden), (LogitLoss(kind),)
        return summed_losses(terms, jnp.ones(1), own, teacher, *batch, chunks=chunks)[0]

    cut, whole = (
        jax.jit(jax.grad(partial(total, chunks=n), (0, 1)))(student.head, student.hidden)
        for n in (7, 1)
    )
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.linalg.norm(a - b) < 2**-6 * jnp.linalg.norm(b)


def test_chunks_take_less_memory():
    tokens = jnp.zeros((256, 2), jnp.int32)
    heads = [{"embed_tokens": {"weight": _random(i, 4096, D)}} for i in (0, 1)]
    config = replace(CONFIG, vocab_size=4096)
    student, teacher = (Predictor(head, _random(2, 256, 2, D), config) for head in heads)

    def taken(chunks):
        def total(head, hidden):
            own = replace(student, head=head, hidden=hidden)
            options = {"piece": 1, "chunks": chunks}
            return summed_losses(TERMS[:4], WEIGHTS[:4], own, teacher, tokens, tokens, **options)[0]

        program = jax.jit(jax.grad(total, (0, 1))).lower(student.head, student.hidden).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert taken(16) < taken(1) / 4


def test_a_position_of_too_many_rows_is_cut(batch, monkeypatch):
    """Unless its losses cannot be: a top k is all tokens or none."""
    monkeypatch.setattr(pieces, "_ENTRIES", B * V // 4)
    student, teacher = _predictor(0), _predictor(5)

    def shapes(terms, **options):
        def total(hidden):
            own = replace(student, hidden=hidden)
            weights = jnp.ones(len(terms))
            return summed_losses(terms, weights, own, teacher, *batch, **options)[0]

        return _shapes(jax.make_jaxpr(jax.grad(total))(student.hidden).jaxpr)

    whole, chunk = (B, 1, V), (B, 1, V // 4)
    assert chunk in (found := shapes(TERMS[:4])) and whole not in found
    assert whole in shapes(TERMS)
    with pytest.raises(UserError, match="the vocabulary cannot be cut into chunks, since a top k"):
        shapes(TERMS, chunks=2)
    codes = quantize_array(teacher.head["embed_tokens"]["weight"], "fp8")
    teacher = replace(teacher, head={"embed_tokens": {"weight": codes}})
    assert whole in shapes(TERMS[:4])
    with pytest.raises(UserError, match="since an output head is no plain array"):
        shapes(TERMS[:4], chunks=2)
    with pytest.raises(UserError, match="into 0 chunks; choose 1 or more"):
        shapes(TERMS[:4], chunks=0)


def test_narrow_hidden_states_have_narrow_gradients(batch):
    student, teacher = _predictor(0), _predictor(5)
    hidden = student.hidden.astype(jnp.bfloat16)

    def total(hidden):
        own = replace(student, hidden=hidden)
        return 2.0 * summed_losses(TERMS, WEIGHTS, own, teacher, *batch, piece=4)[0]

    found, expected = jax.grad(total)(hidden), jax.grad(total)(hidden.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    apart = jnp.linalg.norm(found.astype(jnp.float32) - expected)
    assert apart < 0.02 * jnp.linalg.norm(expected)


def test_tokens_that_are_not_learnt_have_no_part(batch):
    tokens, mask = batch
    student, teacher = _predictor(0), _predictor(5)

    def total(tokens, mask, hidden=student.hidden):
        own = replace(student, hidden=hidden)
        return summed_losses(TERMS, WEIGHTS, own, teacher, tokens, mask)[0]

    # Positions that predict those that are learnt.
    before = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))[..., None].astype(jnp.float32)
    assert total(jnp.where(mask > 0, tokens, 3), mask) == total(tokens, mask.at[:, 0].set(1))
    np.testing.assert_allclose(
        total(tokens, mask, student.hidden * before), total(tokens, mask), rtol=1e-6
    )
    gradient = jax.grad(lambda h: total(tokens, mask, h))(student.hidden)
    np.testing.assert_array_equal(jnp.any(gradient != 0, axis=-1), before[..., 0] > 0)


def test_a_known_teacher_is_a_teacher(batch):
    """Its most likely tokens from a file are as good as the model."""
    student, teacher = _predictor(0), _predictor(5)
    terms, weights = (
        (LogitLoss("forward_kl", 2.0, top_k=7), LogitLoss("cross_entropy")),
        jnp.ones(2),
    )
    known = losses.top_k(logits(CONFIG, teacher.head, teacher.hidden), 7, 2.0)
    expected = summed_losses(terms, weights, student, teacher, *batch, piece=3)
    found = summed_losses(terms, weights, student, known, *batch, piece=3)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    with pytest.raises(UserError, match="reverse_kl needs all of the teacher's logits"):
        summed_losses([LogitLoss("reverse_kl")], jnp.ones(1), student, known, *batch)


def test_a_quantized_head_lets_gradients_through(batch):
    """Its scale has one, its codes have none."""
    student, teacher = _predictor(0), _predictor(5)
    head = {
        "embed_tokens": {"weight": quantize_array(student.head["embed_tokens"]["weight"], "fp8")}
    }

    def total(hidden, weight):
        own = Predictor(weight, hidden, CONFIG)
        return summed_losses(TERMS, WEIGHTS, own, teacher, *batch)[0]

    dense = {"embed_tokens": {"weight": head["embed_tokens"]["weight"].dequantize()}}
    found, expected = (jax.grad(total)(student.hidden, one) for one in (head, dense))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    scale = head["embed_tokens"]["weight"].scale

    def of_scale(scale):
        weight = replace(head["embed_tokens"]["weight"], scale=scale)
        return total(student.hidden, {"embed_tokens": {"weight": weight}})

    slope = (of_scale(scale * 1.001) - of_scale(scale * 0.999)) / (0.002 * scale)
    np.testing.assert_allclose(jax.grad(of_scale)(scale), slope, rtol=2e-2)


def _shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """Of everything that is computed."""
    inner = (e for eqn in jaxpr.eqns for e in jaxprs_in_params(eqn.params))
    own = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars}
    return own.union(*(_shapes(one) for one in inner))


def test_all_logits_never_exist(batch):
    student, teacher = _predictor(0), _predictor(5)

    def total(head, hidden):
        own = replace(student, head=head, hidden=hidden)
        return summed_losses(TERMS, WEIGHTS, own, teacher, *batch, piece=2)[0]

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(student.head, student.hidden)
    assert max(map(math.prod, _shapes(jaxpr.jaxpr))) < B * T * V / 2


def test_a_head_that_is_not_trained_costs_no_gradient(batch):
    student, teacher = _predictor(0), _predictor(5)

    def total(head, hidden):
        own = replace(student, head=head, hidden=hidden)
        return summed_losses(TERMS, WEIGHTS, own, teacher, *batch, piece=2)[0]

    def products(argnums):
        step = jax.jit(jax.grad(total, argnums)).lower(student.head, student.hidden)
        return str(step.compile().as_text()).count(" dot(")

    assert products(1) == products((0, 1)) - 1


@pytest.mark.parametrize(("count", "chunks"), [(5, 1), (4, 5)])
def test_sharded_batches_give_the_same(batch, count, chunks):
    student, teacher = _predictor(0), _predictor(5)
    mesh = make_mesh({"data": 4, "model": 2})

    def total(student, teacher, tokens, mask):
        arguments = TERMS[:count], WEIGHTS[:count], student, teacher, tokens, mask
        return summed_losses(*arguments, piece=4, chunks=chunks)[0]

    def put(tree: Any) -> Any:
        def place(array: jax.Array) -> jax.Array:
            spec = P("model") if array.ndim == 2 and array.shape[1] == D else P("data")
            return jax.device_put(array, NamedSharding(mesh, spec))

        return jax.tree.map(place, tree)

    expected = jax.jit(jax.grad(total))(student, teacher, *batch)
    found = jax.jit(jax.grad(total))(put(student), put(teacher), *put(batch))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitLoss("kl"), "loss 'kl' is unknown; choose cross_entropy, forward_kl"),  # pyright: ignore[reportArgumentType]
        (lambda: LogitLoss("reverse_kl", top_k=3), "top_k goes with forward_kl"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_teachers_that_do_not_fit(batch):
    student, teacher = _predictor(0), _predictor(5, replace(CONFIG, vocab_size=V + 1))
    with pytest.raises(UserError, match="the teacher has 61 tokens in its vocabulary"):
        summed_losses(TERMS, WEIGHTS, student, teacher, *batch)
    with pytest.raises(UserError, match="forward_kl needs a teacher"):
        summed_losses(TERMS[:1], WEIGHTS[:1], student, None, *batch)
    with pytest.raises(UserError, match="5 losses need as many weights"):
        summed_losses(TERMS, WEIGHTS[:2], student, teacher, *batch)
