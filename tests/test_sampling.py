"""Sampling: what is drawn has the distribution it should have, and noise belongs to its place.

Frequencies are judged by Pearson's statistic, which has a chi-square distribution with one degree
of freedom fewer than there are tokens. Bounds are its quantiles that a right sampler exceeds with
one seed in a million (`RISK`); that the same counts refute a slightly wrong distribution is
asserted beside.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxopt_models.errors import UserError
from jaxopt_models.sampling import Sampler, keep_most_likely, make_sampler, position_noise

RISK = 1e-6
DRAWS = 40_000
LOGITS = np.array([2.0, 1.5, 1.0, 0.9, 0.5, 0.0, -0.3, -0.8, -1.0, -1.3], np.float32)


@jax.jit
def call(sampler: Sampler, logits: jax.Array, positions: jax.Array) -> jax.Array:
    return sampler(logits, positions)


@functools.cache
def draw(temperature: float, top_k: int, top_p: float, seed: int = 0) -> np.ndarray:
    """Tokens at many positions of one request, all with the logits above: int [DRAWS]."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampler = make_sampler(1, key=jax.random.key(seed), **options)
    logits = jnp.broadcast_to(LOGITS, (1, DRAWS, LOGITS.size))
    positions = jnp.arange(DRAWS, dtype=jnp.int32)[None]
    return np.asarray(call(sampler, logits, positions))[0]


def kept(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens the filters keep, one by one in falling order, float64."""
    order = sorted(range(logits.size), key=lambda token: -logits[token])
    order = order[:top_k] if top_k else order
    weights = np.exp(logits[order].astype(np.float64) - logits.max())
    passed, last = 0.0, order[0]
    for token, probability in zip(order, weights / weights.sum(), strict=True):
        if passed >= top_p and top_p < 1:
            break
        passed, last = passed + probability, token
    return logits >= logits[last]


def distribution(temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    scaled = LOGITS.astype(np.float64) / temperature
    return normalized(np.where(kept(scaled, top_k, top_p), np.exp(scaled), 0))


def normalized(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def statistic(tokens: np.ndarray, expected: np.ndarray) -> float:
    counts, support = np.bincount(tokens, minlength=expected.size), expected > 0
    mean = tokens.size * expected[support]
    assert mean.min() >= 5  # or the statistic would not have its distribution
    return float(((counts[support] - mean) ** 2 / mean).sum())


def quantile(expected: np.ndarray) -> float:
    return float(stats.chi2.isf(RISK, np.count_nonzero(expected) - 1))


# Distribution


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.8), (0.8, 6, 0.9)],
)
def test_tokens_have_the_distribution_of_the_softmax(temperature, top_k, top_p, seed):
    tokens = draw(temperature, top_k, top_p, seed)
    expected = distribution(temperature, top_k, top_p)
    assert set(np.unique(tokens)) == set(np.flatnonzero(expected))
    assert statistic(tokens, expected) < quantile(expected)
    warmer = normalized(np.where(expected > 0, np.exp(LOGITS / (1.15 * temperature)), 0))
    assert statistic(tokens, warmer) > quantile(warmer)


def test_the_filters_see_the_temperature():
    """Top-p is taken of the distribution that is sampled from."""
    assert draw(0.5, 0, 0.8).max() < draw(1.0, 0, 0.8).max() < draw(2.0, 0, 0.8).max()


@pytest.mark.parametrize("apart", ["positions", "requests"])
def test_neighbouring_tokens_are_independent(apart):
    shape = (1, DRAWS) if apart == "positions" else (DRAWS, 1)
    sampler = make_sampler(shape[0], temperature=1.0)
    logits = jnp.broadcast_to(LOGITS[:5], (*shape, 5))
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    tokens = np.asarray(call(sampler, logits, positions)).ravel()
    table = np.zeros((5, 5))
    np.add.at(table, (tokens[:-1], tokens[1:]), 1)
    result: Any = stats.chi2_contingency(table)
    assert result.pvalue > RISK


# Noise


def noise(requests: list[int], positions: list[list[int]], seed: int = 0) -> np.ndarray:
    key = jax.random.key(seed)
    return np.asarray(position_noise(key, jnp.asarray(requests), jnp.asarray(positions), 32))


def test_noise_depends_on_request_and_position_alone():
    among_others = noise([3, 7, 3], [[0, 5], [5, 0], [9, 5]])
    for row, column, request, position in [(0, 0, 3, 0), (0, 1, 3, 5), (1, 0, 7, 5), (2, 0, 3, 9)]:
        alone = noise([request], [[position]])[0, 0]
        assert np.array_equal(among_others[row, column], alone)
    assert np.array_equal(among_others[0, 1], among_others[2, 1])


def test_noise_differs_between_requests_positions_tokens_and_keys():
    all_noise = np.stack([noise([0, 1, 2], [[0, 1, 2]] * 3, seed) for seed in (0, 1)])
    assert np.unique(all_noise).size > 0.999 * all_noise.size
    # (1, 2) is not (2, 1): request and position are not merely added up.
    assert not np.any(noise([1], [[2]]) == noise([2], [[1]]))


def test_noise_is_the_same_inside_jit():
    requests, positions = jnp.asarray([3, 7]), jnp.asarray([[0, 5], [5, 1]])
    jitted = jax.jit(position_noise, static_argnums=3)(jax.random.key(0), requests, positions, 32)
    assert np.array_equal(jitted, noise([3, 7], [[0, 5], [5, 1]]))


def test_noise_is_standard_gumbel():
    sample = noise([0, 1], [list(range(400))] * 2).ravel()
    assert stats.kstest(sample, "gumbel_r").pvalue > RISK


def test_several_positions_at_once_are_those_positions_one_by_one():
    sampler = make_sampler(3, temperature=[0.0, 0.8, 1.3], top_k=[0, 5, 0], top_p=[1.0, 0.9, 0.7])
    logits = jax.random.normal(jax.random.key(5), (3, 4, 16))
    positions = jnp.asarray([[0, 1, 2, 3], [7, 8, 9, 10], [3, 1, 2, 0]])
    together = np.asarray(sampler(logits, positions))
    for i in range(4):
        one = sampler(logits[:, i : i + 1], positions[:, i : i + 1])
        assert np.array_equal(together[:, i : i + 1], one)
    assert together.dtype == np.int32


# Settings of each row


def mixed_logits() -> tuple[jax.Array, jax.Array]:
    logits = jax.random.normal(jax.random.key(1), (4, 50, 16))
    return logits, jnp.broadcast_to(jnp.arange(50, dtype=jnp.int32), (4, 50))


def sample(**options) -> np.ndarray:
    return np.asarray(call(make_sampler(4, **options), *mixed_logits()))


def test_each_row_has_its_own_settings():
    options = {"temperature": [0.0, 1.0, 0.7, 1.5], "top_k": [0, 3, 0, 0], "top_p": [1, 1, 0.6, 1]}
    together = sample(**options)
    for row in range(4):
        for_all = {name: values[row] for name, values in options.items()}
        assert np.array_equal(together[row], sample(**for_all)[row])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": [0.0] * 4, "top_k": 5, "top_p": 0.5},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-6},
        {"temperature": 1e-4},
    ],
)
def test_settings_that_leave_no_choice_take_the_most_likely(options):
    assert np.array_equal(sample(**options), np.argmax(mixed_logits()[0], axis=-1))


@pytest.mark.parametrize("options", [{"top_k": 16}, {"top_k": 99}, {"top_k": [0, 16, 17, 0]}])
def test_filters_that_keep_all_change_nothing(options):
    assert np.array_equal(sample(temperature=1.0, **options), sample(temperature=1.0))


def test_dead_work_is_left_out():
    assert not make_sampler(2).stochastic
    assert not make_sampler(2, top_k=0, top_p=1.0, temperature=[0.0, 1.0]).filtered
    assert make_sampler(2, temperature=[0.0, 1.0]).stochastic
    assert make_sampler(2, top_k=[0, 2]).filtered and make_sampler(2, top_p=[1.0, 0.5]).filtered


def test_the_key_defaults_to_zero_and_requests_to_rows():
    default = sample(temperature=1.0)
    spelled_out = {"key": jax.random.key(0), "request_ids": [0, 1, 2, 3]}
    assert np.array_equal(default, sample(temperature=1.0, **spelled_out))
    assert not np.array_equal(default, sample(temperature=1.0, key=jax.random.key(1)))


def test_rows_of_one_request_draw_the_same_noise():
    logits, positions = mixed_logits()
    sampler = make_sampler(4, temperature=1.0, request_ids=[5, 6, 5, 7])
    first, second, third, _ = np.asarray(sampler(logits.at[:].set(logits[:1]), positions))
    assert np.array_equal(first, third) and not np.array_equal(first, second)


# Filters


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 11, 12, 40])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.55, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("step", [0.0, 0.75])
def test_the_most_likely_are_kept_as_one_by_one(top_k, top_p, step):
    """With ties too, where logits are multiples of a step."""
    logits = np.random.default_rng(0).normal(size=(3, 7, 12)).astype(np.float32) * 2
    logits = np.round(logits / step).astype(np.float32) * np.float32(step) if step else logits
    ours = keep_most_likely(
        jnp.asarray(logits), jnp.full((3, 1), top_k), jnp.full((3, 1), top_p, jnp.float32)
    )
    expected = np.apply_along_axis(lambda row: kept(row, top_k, top_p), -1, logits)
    assert np.array_equal(ours, np.where(expected, logits, -np.inf))
    assert expected.any(-1).all()


def test_ties_with_the_last_one_kept_are_kept():
    logits = jnp.asarray([[[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]])
    two = keep_most_likely(logits, jnp.asarray([[2]]), jnp.asarray([[1.0]]))
    assert np.isfinite(two).tolist() == [[[False, True, True, True, True, False]]]
    same = jnp.ones((1, 1, 6))
    assert jnp.isfinite(keep_most_likely(same, jnp.asarray([[1]]), jnp.asarray([[0.1]]))).all()


def test_filters_differ_by_row():
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (3, 2, LOGITS.size))
    top_k, top_p = jnp.asarray([[0], [3], [0]]), jnp.asarray([[1.0], [1.0], [0.5]])
    counts = np.isfinite(keep_most_likely(logits, top_k, top_p)).sum(-1)
    expected = [LOGITS.size, 3, kept(LOGITS, 0, 0.5).sum()]
    assert counts.tolist() == [[count] * 2 for count in expected]


# What it refuses


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or positive"),
        ({"temperature": [0.5, -1.0]}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": [0.5]}, "one for each of the 2 prompts"),
        ({"temperature": [0.5, 0.5, 0.5]}, "one for each of the 2 prompts"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": [0.5, float("nan")]}, "top_p"),
        ({"top_p": []}, "one for each of the 2 prompts"),
        ({"top_k": -1}, "top_k must be 0 .off. or a positive integer"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_k": [1, 2, 3]}, "one for each of the 2 prompts"),
        ({"request_ids": [1]}, "request_ids must have an entry for each of the 2 prompts"),
    ],
)
def test_values_out_of_range_are_named(options, problem):
    with pytest.raises(UserError, match=problem):
        make_sampler(2, **options)
