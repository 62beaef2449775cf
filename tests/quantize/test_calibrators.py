"""Input magnitudes from a histogram against those from the values themselves."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import laplace, norm

from jaxopt_models.errors import UserError
from jaxopt_models.formats import resolve
from jaxopt_models.quantize.calibrators import input_amax
from jaxopt_models.statistics import BINS, BINS_AN_OCTAVE, LOWEST, InputStatistics

_INT8, _FP8, _NVFP4 = resolve("int8"), resolve("fp8"), resolve("nvfp4")
_BIN = 2 ** (1 / BINS_AN_OCTAVE)
_METHODS = ("max", "percentile", "mse", "entropy")

_UNIFORM = np.linspace(-1, 1, 100_001)
_GAUSSIAN = norm.ppf((np.arange(200_000) + 0.5) / 200_000)
_LAPLACE = laplace.ppf((np.arange(200_000) + 0.5) / 200_000)
_OUTLIER = np.append(_GAUSSIAN, 20.0)
_SAMPLES = {
    "uniform": _UNIFORM,
    "gaussian": _GAUSSIAN,
    "laplace": _LAPLACE,
    "outlier": _OUTLIER,
    "rectified": np.maximum(_OUTLIER, 0),
    "tiny": _OUTLIER * 1e-6,
}
_every_sample = pytest.mark.parametrize("x", _SAMPLES.values(), ids=_SAMPLES.keys())


def _statistics(x):
    with np.errstate(divide="ignore"):
        bins = np.floor((np.log2(np.abs(x)) - LOWEST) * BINS_AN_OCTAVE)
    counts = np.bincount(np.clip(bins, 0, BINS - 1).astype(int).reshape(-1), minlength=BINS)
    return InputStatistics(
        count=jnp.float32(1),
        amax=jnp.float32(np.abs(x).max()),
        channel_amax=jnp.zeros(1),
        channel_abs=jnp.zeros(1),
        histogram=jnp.asarray(counts, jnp.float32),
    )


def _int8_error(x, amax):
    scale = amax / 127
    return np.sum((x - np.clip(np.round(x / scale), -128, 127) * scale) ** 2)


@_every_sample
@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("spec", [_INT8, _FP8], ids=["int8", "fp8"])
def test_no_magnitude_exceeds_the_largest_seen(x, method, spec):
    found = input_amax(_statistics(x), method, spec=spec)
    assert found.dtype == jnp.float32 and found.shape == ()
    assert 0 < found <= np.float32(np.abs(x).max())


@_every_sample
def test_percentile_is_that_of_the_values_to_a_bin(x):
    statistics, nonzero = _statistics(x), np.mean(x != 0)
    last = 0.0
    for percentile in (60, 90, 99, 99.9, 99.99, 100):
        found = float(input_amax(statistics, "percentile", spec=_INT8, percentile=percentile))
        expected = np.quantile(np.abs(x), percentile / 100)
        assert expected / _BIN <= found * (1 + 1e-6) and found <= expected * _BIN * (1 + 1e-6)
        assert found >= last
        last = found
    assert found == np.float32(np.abs(x).max())
    assert nonzero > 0.4


def test_percentile_among_zeros_does_not_clip_the_rest():
    x = np.append(np.zeros(100_000), [1.0, 3.0])
    assert input_amax(_statistics(x), "percentile", spec=_INT8) == 3


@_every_sample
def test_mse_is_as_good_as_the_best_clipping_of_the_values(x):
    found = float(input_amax(_statistics(x), "mse", spec=_INT8))
    points = np.abs(x).max() * np.exp2(-np.arange(0, 6, 1 / 16))
    assert _int8_error(x, found) <= 1.03 * min(_int8_error(x, point) for point in points)


@pytest.mark.parametrize("name", ["laplace", "outlier", "tiny"])
def test_mse_and_entropy_clip_long_tails(name):
    x = _SAMPLES[name]
    amax = np.abs(x).max()
    for method in ("mse", "entropy"):
        assert input_amax(_statistics(x), method, spec=_INT8) < 0.95 * amax
    assert input_amax(_statistics(_UNIFORM), "entropy", spec=_INT8) == 1


def _int8_divergence(distribution, amax):
    """KL divergence of clipped magnitudes from the same spread over their rounding intervals."""
    beyond = distribution.sf(np.linspace(0, amax, 2049))
    kept = beyond[:-1] - beyond[1:]
    level = np.round((np.arange(2048) + 0.5) / 2048 * 127)
    spread = np.concatenate(
        [np.full(np.sum(level == k), kept[level == k].mean()) for k in range(128)]
    )
    true = kept.copy()
    true[-1] += beyond[-1]
    p, q = true / true.sum(), spread / spread.sum()
    return np.sum(p * np.log(p / q))


@pytest.mark.parametrize(("name", "distribution"), [("gaussian", norm), ("laplace", laplace)])
def test_entropy_is_as_good_as_the_best_clipping_of_the_density(name, distribution):
    x = _SAMPLES[name]
    found = float(input_amax(_statistics(x), "entropy", spec=_INT8))
    points = np.abs(x).max() * np.exp2(-np.arange(0, 2, 1 / 16))
    least = min(_int8_divergence(distribution, point) for point in points)
    assert _int8_divergence(distribution, found) <= 1.1 * least


@pytest.mark.parametrize("method", _METHODS)
def test_magnitudes_scale_with_the_input(method):
    small, large = (
        float(input_amax(_statistics(_OUTLIER * scale), method, spec=_INT8)) for scale in (1, 256)
    )
    np.testing.assert_allclose(large, 256 * small, rtol=1e-6)


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_zeros_do_not_count(method):
    padded = np.append(_LAPLACE, np.zeros(1_000_000))
    found, expected = (input_amax(_statistics(x), method, spec=_FP8) for x in (padded, _LAPLACE))
    assert found == expected


def test_headroom_keeps_small_blocks_precise_and_leaves_room_for_larger():
    x = np.random.default_rng(0).permutation(_GAUSSIAN)
    block_amax = np.abs(x).reshape(-1, 16).max(axis=1)
    found = float(input_amax(_statistics(x), "headroom", spec=_NVFP4))
    np.testing.assert_allclose(found, 16384 * np.quantile(block_amax, 0.01), rtol=0.05)
    assert found > np.abs(x).max()
    # The block scale of the smallest hundredth is a normal E4M3 number.
    assert np.quantile(block_amax, 0.01) / found * 448 > 2.0**-6


def test_headroom_of_a_range_too_wide_for_block_scales_is_that_of_the_largest_blocks():
    x = np.full(160_000, 1e-7)
    x[::100] = 1
    x[0] = 4
    found = input_amax(_statistics(x), "headroom", spec=_NVFP4)
    np.testing.assert_allclose(found, 1, rtol=_BIN - 1)


def test_an_input_of_zeros_has_magnitude_zero():
    for method in _METHODS:
        assert input_amax(_statistics(np.zeros(64)), method, spec=_INT8) == 0


def test_experts_share_the_largest_of_theirs():
    statistics = replace(_statistics(_GAUSSIAN), amax=jnp.array([1.0, 5.0, 2.0]))
    assert input_amax(statistics, spec=_INT8) == 5


@pytest.mark.parametrize(
    ("method", "spec", "message"),
    [
        ("median", _INT8, "unknown"),
        ("mse", _NVFP4, "choose 'max'"),
        ("entropy", resolve("int8", granularity="token"), "one static scale"),
        ("headroom", _FP8, "block scales in E4M3"),
    ],
)
def test_methods_that_do_not_go_with_the_format_are_refused(method, spec, message):
    with pytest.raises(UserError, match=message):
        input_amax(_statistics(_GAUSSIAN), method, spec=spec)


def test_a_histogram_and_a_sensible_percentile_are_asked_for():
    statistics = _statistics(_GAUSSIAN)
    with pytest.raises(UserError, match="needs a histogram"):
        input_amax(replace(statistics, histogram=None), "percentile", spec=_INT8)
    for percentile in (0, 101, float("nan")):
        with pytest.raises(UserError, match="not in"):
            input_amax(statistics, "percentile", spec=_INT8, percentile=percentile)
