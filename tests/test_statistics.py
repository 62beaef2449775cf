"""Statistics of inputs: what NumPy says in float64, however the rows come."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import statistics
from jaxopt_models.statistics import (
    BINS,
    BINS_AN_OCTAVE,
    HIGHEST,
    LOWEST,
    InputStatistics,
    Wanted,
    empty,
    finished,
    update,
)

WIDTH = 12
EVERYTHING = Wanted(second_moment=True, histogram=True, sample=8)
_update = jax.jit(update, static_argnames="batches")


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 rows with channels of different means and magnitudes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*shape, WIDTH)) + rng.standard_normal(WIDTH)
    return (x * 10.0 ** rng.uniform(-2, 2, WIDTH)).astype(np.float32)


def totals(wanted: Wanted, parts: list[np.ndarray], sizes=None) -> InputStatistics:
    """Statistics of batches of rows, one after the other, not yet finished."""
    experts = 0 if sizes is None else len(sizes[0])
    total = empty(wanted, parts[0].shape[-1], len(parts), experts)
    for i, x in enumerate(parts):
        groups = None if sizes is None else jnp.asarray(sizes[i], jnp.int32)
        total = _update(total, jnp.asarray(x), jnp.int32(i), batches=len(parts), group_sizes=groups)
    return total


def observed(wanted: Wanted, parts: list[np.ndarray], sizes=None) -> InputStatistics:
    return finished(totals(wanted, parts, sizes))


def assert_describes(found: InputStatistics, x: np.ndarray) -> None:
    """All but histogram and sample, against the rows x [T, K]."""
    x = x.astype(np.float64)
    assert float(found.count) == len(x)
    assert float(found.amax) == np.abs(x).max(initial=0)
    np.testing.assert_array_equal(found.channel_amax, np.abs(x).max(0, initial=0))
    count = max(len(x), 1)
    np.testing.assert_allclose(found.channel_abs, np.abs(x).sum(0) / count, rtol=1e-6)
    assert found.lost is None
    if found.second_moment is not None:
        expected = x.T @ x / count
        bound = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        error = np.abs(np.asarray(found.second_moment, np.float64) - expected)
        assert np.all(error <= 5e-7 * bound)


def evenly(x: np.ndarray, count: int) -> np.ndarray:
    """The rows in the middle of `count` equal parts."""
    return x[[(2 * i + 1) * len(x) // (2 * count) for i in range(count)]]


def test_of_one_matrix():
    parts = [rows(3, 7, seed=1), rows(2, 11, seed=2), rows(1, 5, seed=3)]
    assert_describes(
        observed(EVERYTHING, parts), np.concatenate([p.reshape(-1, WIDTH) for p in parts])
    )


@pytest.mark.parametrize("width", [23, 40])
def test_second_moment_of_wide_rows_is_mirrored(monkeypatch, width):
    monkeypatch.setattr(statistics, "_WIDE", 12)  # one and two times in halves, also odd ones
    rng = np.random.default_rng(width)
    x = rng.standard_normal((50, width)).astype(np.float32)
    gram = np.asarray(jax.jit(statistics._gram)(x))
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(gram, x.astype(np.float64).T @ x, rtol=1e-5, atol=1e-5)


def test_what_is_not_wanted_is_not_there():
    found = observed(Wanted(), [rows(5)])
    assert found.second_moment is None and found.histogram is None and found.sample is None
    assert_describes(found, rows(5))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_widened_first(dtype):
    x = np.asarray(jnp.asarray(rows(40) / 8, dtype))
    found = observed(Wanted(second_moment=True), [x])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert_describes(found, x.astype(np.float32))


def test_the_histogram_counts_sixteenths_of_octaves():
    # Middles of bins, so that the logarithm's last bit does not matter.
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, BINS, (50, WIDTH))
    x = 2.0 ** (LOWEST + (chosen + 0.5) / BINS_AN_OCTAVE) * rng.choice([-1, 1], chosen.shape)
    found = observed(EVERYTHING, [x[:20].astype(np.float32), x[20:].astype(np.float32)])
    np.testing.assert_array_equal(found.histogram, np.bincount(chosen.ravel(), minlength=BINS))


def test_the_ends_of_the_histogram_take_what_lies_beyond():
    x = np.array([[0.0, 1e-30, -1e-30, 2.0 ** (LOWEST - 1), 2.0**HIGHEST, -1e30]], np.float32)
    histogram = np.asarray(observed(EVERYTHING, [x]).histogram)
    assert (histogram[0], histogram[-1], histogram.sum()) == (4, 2, 6)


@pytest.mark.parametrize("wanted, batches, each", [(8, 2, 4), (5, 2, 3), (4, 1, 4)])
def test_the_sample_is_spread_evenly_over_the_text(wanted, batches, each):
    parts = [rows(23, seed=i) for i in range(batches)]
    sample = observed(Wanted(sample=wanted), parts).sample
    np.testing.assert_array_equal(sample, np.concatenate([evenly(part, each) for part in parts]))


def test_a_sample_larger_than_the_text_holds_every_row():
    x = rows(3)
    sample = np.asarray(observed(Wanted(sample=8), [x]).sample)
    assert sample.shape == (8, WIDTH)
    np.testing.assert_array_equal(np.unique(sample, axis=0), np.unique(x, axis=0))


# Experts

SIZES = [[4, 0, 9, 0], [1, 6, 0, 0]]  # the last expert gets nothing, two get nothing for a while


def groups(parts: list[np.ndarray], expert: int) -> list[np.ndarray]:
    """The rows of one expert in each batch."""
    starts = [np.cumsum([0, *sizes]) for sizes in SIZES]
    return [x[s[expert] : s[expert + 1]] for x, s in zip(parts, starts, strict=True)]


def test_of_experts_each_on_its_own_rows():
    parts = [rows(sum(sizes), seed=i) for i, sizes in enumerate(SIZES)]
    found = observed(EVERYTHING, parts, SIZES)
    together = observed(EVERYTHING, parts)
    np.testing.assert_array_equal(found.histogram, together.histogram)
    for expert in range(4):
        own = groups(parts, expert)
        one = jax.tree.map(
            lambda field, expert=expert: field[expert], replace(found, histogram=None)
        )
        assert_describes(one, np.concatenate(own))
        for sampled, x in zip(np.split(np.asarray(one.sample), 2), own, strict=True):
            np.testing.assert_array_equal(sampled, evenly(x, 4) if len(x) else 0)


def test_of_one_expert_are_those_of_one_matrix():
    x = rows(30)
    alone, expert = observed(EVERYTHING, [x]), observed(EVERYTHING, [x], [[30]])
    for name in ("count", "amax", "channel_amax", "sample"):
        np.testing.assert_array_equal(getattr(expert, name)[0], getattr(alone, name))
    np.testing.assert_allclose(expert.channel_abs[0], alone.channel_abs, rtol=1e-6)
    assert expert.second_moment is not None
    assert_describes(replace(expert, **{n: getattr(expert, n)[0] for n in _DENSE}), x)


_DENSE = ("count", "amax", "channel_amax", "channel_abs", "second_moment")


# Sums


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_second_moments_do_not_depend_on_the_cut_into_batches():
    x = rows(1024)
    exact = x.astype(np.float64).T @ x.astype(np.float64) / len(x)
    for count in (1, 2, 16, 128):
        found = observed(Wanted(second_moment=True), np.split(x, count)).second_moment
        assert relative(found, exact) < 2e-7, count


def test_the_same_batches_give_the_same_bits():
    parts = np.split(rows(96), 6)
    once, again = observed(EVERYTHING, parts), observed(EVERYTHING, parts)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_small_batches_behind_a_large_one_are_not_lost():
    # 2^24 swallows every quarter that is added to it alone.
    parts = [np.full((1, 1), 4096, np.float32)] + [np.full((1, 1), 0.5, np.float32)] * 100
    naive = np.float32(0)
    for part in parts:
        naive = naive + part[0, 0] ** 2
    assert naive == 2**24
    total = totals(Wanted(second_moment=True), parts)
    assert total.second_moment is not None and total.lost is not None
    assert float(total.second_moment[0, 0]) == 2**24 and float(total.lost[0, 0]) == 25
    mean = observed(Wanted(second_moment=True), parts).second_moment
    assert mean is not None and float(mean[0, 0]) == pytest.approx((2**24 + 25) / 101, rel=1e-7)


def test_compensation_takes_either_order():
    parts = [np.full((1, 1), 0.5, np.float32)] * 3 + [np.full((1, 1), 4096, np.float32)]
    total = totals(Wanted(second_moment=True), parts)
    assert total.second_moment is not None and total.lost is not None
    assert float(total.second_moment[0, 0]) + float(total.lost[0, 0]) == 2**24 + 0.75


def test_nan_and_infinity_are_seen():
    for value in (np.nan, np.inf):
        x = rows(4)
        x[2, 3] = value
        for sizes in (None, [[1, 3]]):
            found = observed(Wanted(), [rows(4), x], None if sizes is None else sizes * 2)
            np.testing.assert_equal(np.max(np.asarray(found.amax)), np.float32(value))


def test_inside_a_loop_over_experts():
    """`update` may be mapped over, as `experts.observe_all` does."""
    x, wanted = rows(4, 9), Wanted(second_moment=True, sample=3)
    start = empty(wanted, WIDTH, 1, experts=4)
    step = partial(update, index=jnp.int32(0), batches=1)
    found = finished(jax.lax.map(lambda pair: step(*pair), (start, jnp.asarray(x))))
    for expert in range(4):
        one = jax.tree.map(lambda field, expert=expert: field[expert], found)
        assert_describes(one, x[expert])
