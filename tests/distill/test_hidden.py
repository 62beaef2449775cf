"""Losses of hidden states: their positions, their layers, and the projection between widths."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models.distill.hidden import (
    HiddenLoss,
    spread,
    summed_hidden_losses,
    with_projection,
    without_projection,
)
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig

B, T = 3, 5
NARROW = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 60,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
)
WIDE = replace(NARROW, hidden_size=12, num_layers=4, attention_kinds=("full",) * 4)
TERMS = HiddenLoss("hidden_cosine", ((0, 1), (1, 3))), HiddenLoss("hidden_mean_square", ((1, 2),))


def _streams(seed: int, config: ModelConfig) -> dict[int, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), config.num_layers)
    return {i: jax.random.normal(key, (B, T, config.hidden_size)) for i, key in enumerate(keys)}


@pytest.fixture
def mask():
    return jax.random.bernoulli(jax.random.key(3), 0.6, (B, T))


def _project(weight: jax.Array, streams: dict[int, jax.Array], pairs: dict[int, int]):
    return {j: streams[i] @ weight.T for i, j in pairs.items()}


def test_sums_are_over_positions_that_predict_what_is_learnt(mask):
    student, teacher = _streams(0, NARROW), _streams(1, WIDE)
    params = with_projection({}, NARROW, WIDE, jax.random.key(2))
    found = summed_hidden_losses(TERMS, params, student, teacher, mask)
    weight = np.asarray(params["hidden_projection"]["weight"], np.float64)
    expected = np.zeros(2)
    for b, t in np.argwhere(np.asarray(mask)[:, 1:]):
        own = {i: weight @ np.asarray(s[b, t], np.float64) for i, s in student.items()}
        its = {j: np.asarray(s[b, t], np.float64) for j, s in teacher.items()}
        for i, j in ((0, 1), (1, 3)):
            norms = np.linalg.norm(own[i]) * np.linalg.norm(its[j])
            expected[0] += (1.0 - own[i] @ its[j] / norms) / 2
        expected[1] += np.sum((own[1] - its[2]) ** 2) / np.sum(its[2] ** 2)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_teacher_that_is_the_projected_student_costs_nothing(mask):
    student = _streams(0, NARROW)
    params = with_projection({}, NARROW, WIDE, jax.random.key(2))
    teacher = _project(params["hidden_projection"]["weight"], student, {0: 1, 1: 3})
    terms = [replace(term, layers=((0, 1), (1, 3))) for term in TERMS]
    found = summed_hidden_losses(terms, params, student, teacher, mask)
    np.testing.assert_allclose(found, 0.0, atol=1e-5)


def test_gradients_reach_the_student_and_the_projection_only(mask):
    student, teacher = _streams(0, NARROW), _streams(1, WIDE)
    params = with_projection({}, NARROW, WIDE, jax.random.key(2))

    def total(params, student, teacher):
        return jnp.sum(summed_hidden_losses(TERMS, params, student, teacher, mask))

    of_params, of_student, of_teacher = jax.grad(total, (0, 1, 2))(params, student, teacher)
    assert jnp.any(of_params["hidden_projection"]["weight"] != 0.0)
    learnt = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    for gradient in of_student.values():
        np.testing.assert_array_equal(jnp.any(gradient != 0.0, axis=-1), learnt)
    assert not any(jnp.any(gradient) for gradient in of_teacher.values())


@pytest.mark.parametrize(("student", "teacher"), [(NARROW, WIDE), (WIDE, NARROW)])
def test_a_projection_keeps_lengths_as_far_as_it_can(student, teacher):
    params = with_projection({"norm": jnp.ones(1)}, student, teacher, jax.random.key(0))
    weight = params["hidden_projection"]["weight"]
    assert weight.shape == (teacher.hidden_size, student.hidden_size)
    np.testing.assert_allclose(jnp.linalg.svd(weight, compute_uv=False), jnp.ones(8), rtol=1e-5)
    assert without_projection(params).keys() == {"norm"}
    assert with_projection({}, student, student, jax.random.key(0)) == {}


@pytest.mark.parametrize("student", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("teacher", [1, 2, 5, 8, 24, 32])
def test_layers_are_spread_evenly(student, teacher):
    pairs = spread(student, teacher)
    assert len(pairs) == min(student, teacher) and pairs[-1] == (student - 1, teacher - 1)
    for side in zip(*pairs, strict=True):
        assert list(side) == sorted(set(side))
    for i, j in pairs:  # as deep, but for the rounding
        assert abs((i + 1) / student - (j + 1) / teacher) <= 0.5 / max(student, teacher) + 1e-9
    assert spread(teacher, teacher) == tuple((i, i) for i in range(teacher))


def test_what_is_refused(mask):
    with pytest.raises(UserError, match="loss 'cosine' is unknown; choose hidden_cosine"):
        HiddenLoss("cosine")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="names layer 2 of the student, which has 0 to 1"):
        HiddenLoss("hidden_cosine", ((2, 3),)).between(NARROW, WIDE)
    with pytest.raises(UserError, match="names layer -1 of the teacher, which has 0 to 3"):
        HiddenLoss("hidden_cosine", ((1, -1),)).between(NARROW, WIDE)
    with pytest.raises(UserError, match="hidden_cosine needs layers; name some"):
        HiddenLoss("hidden_cosine", ()).between(NARROW, WIDE)
    with pytest.raises(UserError, match="8 wide in the student and 12 in the teacher"):
        summed_hidden_losses(TERMS, {}, _streams(0, NARROW), _streams(1, WIDE), mask)
