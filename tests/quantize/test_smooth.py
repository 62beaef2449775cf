"""Smoothing factors: what they guarantee, and the search's objective against plain arithmetic."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models.errors import UserError
from jaxopt_models.formats import resolve
from jaxopt_models.qtensor import fake_quant
from jaxopt_models.quantize.smooth import Tied, awq, search_smoothquant, smoothed, smoothquant
from jaxopt_models.statistics import InputStatistics

WIDTH, TOKENS = 48, 192
INT4 = resolve("int4", block_size=16)
INT8 = resolve("int8", granularity="channel")
NVFP4 = resolve("nvfp4")

WEIGHTS = pytest.mark.parametrize(
    "spec",
    [
        INT4,
        INT8,
        NVFP4,
        resolve("fp8"),
        resolve("fp8", granularity="block2d", block_size=16),
        resolve("int4", block_size=16, symmetric=False),
    ],
    ids=lambda s: f"{s.format}-{s.granularity}-{s.symmetric}",
)
INPUTS = pytest.mark.parametrize(
    "activation",
    [NVFP4, resolve("mxfp4"), resolve("int8", granularity="token"), resolve("fp8")],
    ids=lambda s: f"{s.format}-{s.granularity}",
)


def matrix(seed, rows, width=WIDTH):
    values = np.random.default_rng(seed).standard_normal((rows, width)) / np.sqrt(width)
    return jnp.asarray(values, jnp.float32)


def group(seed=0):
    return matrix(seed, 32), matrix(seed + 1, 16)


def tokens(seed=2, outliers=(3, 20), times=30.0):
    """Correlated rows, a few channels of which are much larger than the others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((TOKENS, WIDTH)) @ (
        np.eye(WIDTH) + 0.2 * rng.standard_normal((WIDTH, WIDTH))
    )
    mixed[:, list(outliers)] *= times
    return jnp.asarray(mixed, jnp.float32)


def observed(x):
    magnitude = jnp.abs(x)
    return InputStatistics(
        count=jnp.float32(x.shape[0]),
        amax=jnp.max(magnitude),
        channel_amax=jnp.max(magnitude, axis=0),
        channel_abs=jnp.mean(magnitude, axis=0),
        second_moment=jnp.matmul(x.T, x, precision="highest") / x.shape[0],
        sample=x,
    )


def rounded_input(x, s, spec):
    """Q(x / s) with a static scale where the format has one."""
    static = spec.two_level or spec.granularity == "tensor"
    return fake_quant(x / s[None], spec, amax=jnp.max(jnp.abs(x / s[None])) if static else None)


def rounded_weights(weights, s, spec):
    """Q(W s); a two-level global scale is that of the whole group."""
    scaled = [w * s[None] for w in weights]
    shared = jnp.max(jnp.abs(jnp.concatenate(scaled))) if spec.two_level else None
    return [fake_quant(w, spec, amax=shared) for w in scaled]


def product(x, weight):
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


def weight_loss(x, weights, s, spec):
    """Mean over tokens of the squared error of all outputs, one token at a time."""
    rounded = rounded_weights(weights, s, spec)
    errors = [
        product(x / s[None], q) - product(x, w) for q, w in zip(rounded, weights, strict=True)
    ]
    return sum(np.mean(np.sum(e * e, axis=1)) for e in errors)


def input_loss(x, weights, s, spec):
    """What uncorrelated rounding errors of the inputs add to it."""
    error = np.asarray(rounded_input(x, s, spec) - x / s[None], np.float64)
    columns = [np.sum(np.asarray(w * s[None], np.float64) ** 2, axis=0) for w in weights]
    return float(np.mean(error * error, axis=0) @ sum(columns))


# ---- factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_is_its_formula(alpha):
    x, weights = tokens(), group()
    s = smoothquant(weights, observed(x), alpha)
    top = np.abs(np.asarray(x)).max(0)
    heaviest = np.maximum(*(np.abs(np.asarray(w)).max(0) for w in weights))
    np.testing.assert_allclose(s, top**alpha / heaviest ** (1 - alpha), rtol=1e-5)


def test_smoothquant_evens_out_the_maxima():
    """With alpha 1/2, the input's and the weight's maximum of a channel become equal."""
    x, weights = tokens(), group()
    s = smoothquant(weights, observed(x), 0.5)
    heaviest = jnp.max(jnp.abs(jnp.concatenate(weights)), axis=0)
    np.testing.assert_allclose(jnp.max(jnp.abs(x), axis=0) / s, heaviest * s, rtol=1e-5)


def test_factors_keep_within_limits():
    x = tokens().at[:, 0].multiply(1e9).at[:, 1].multiply(1e-9)
    s = smoothquant(group(), observed(x), 1.0)
    assert s[0] == np.float32(1e4) and s[1] == np.float32(1e-4)


METHODS = {
    "smoothquant": lambda w, t: smoothquant(w, t, 1.0),
    "smoothquant-weights": lambda w, t: smoothquant(w, t, 0.0),
    "search": lambda w, t: search_smoothquant(w, t, INT8, INT8)[0],
    "awq": lambda w, t: awq(w, t, INT4)[0],
    "awq-w4a4": lambda w, t: awq(w, t, NVFP4, NVFP4)[0],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_channel_of_zeros_has_factor_one(method):
    x = tokens().at[:, 5].set(0.0).at[:, 7].set(0.0)
    weights = [w.at[:, 9].set(0.0).at[:, 7].set(0.0) for w in group()]
    s = np.asarray(METHODS[method](weights, observed(x)))
    assert np.all(np.isfinite(s)) and np.all(s > 0)
    np.testing.assert_array_equal(s[[5, 7, 9]], 1.0)
    assert np.any(s != 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_seen_is_nothing_smoothed(method):
    """An expert that no token reached."""
    s = METHODS[method](group(), observed(jnp.zeros((TOKENS, WIDTH), jnp.float32)))
    np.testing.assert_array_equal(s, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_product_is_unchanged(method):
    x, weights = tokens(), group()
    s = METHODS[method](weights, observed(x))
    for weight in weights:
        exact = product(x, weight)
        np.testing.assert_allclose(
            product(x / s[None], weight * s[None]), exact, atol=1e-5 * np.abs(exact).max()
        )


def test_tied_channels_share_a_factor():
    tied = Tied(repeats=3, width=4)
    for s in (
        smoothquant(group(), observed(tokens()), 0.5, tied=tied),
        search_smoothquant(group(), observed(tokens()), INT8, tied=tied)[0],
        awq(group(), observed(tokens()), INT4, tied=tied)[0],
    ):
        heads = np.asarray(s).reshape(-1, 3, 4)
        np.testing.assert_array_equal(heads, np.broadcast_to(heads[:, :1], heads.shape))
        assert len(np.unique(s)) > 1


def test_statistics_of_a_smoothed_input():
    x = tokens()
    s = jnp.exp(matrix(4, 1)[0] * 5)
    expected, found = observed(x / s[None]), smoothed(observed(x), s)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, found
    )


# ---- the search ---------------------------------------------------------------------------------


@WEIGHTS
def test_the_loss_from_second_moments_is_that_of_the_tokens(spec):
    x, weights = tokens(), group()
    for search in (awq, search_smoothquant):
        s, losses = search(weights, observed(x), spec)
        np.testing.assert_allclose(jnp.min(losses), weight_loss(x, weights, s, spec), rtol=1e-3)
        plain = weight_loss(x, weights, jnp.ones_like(s), spec)
        np.testing.assert_allclose(losses[0], plain, rtol=1e-3)


@INPUTS
def test_the_loss_counts_the_rounding_of_inputs(activation):
    x, weights = tokens(), group()
    s, losses = awq(weights, observed(x), NVFP4, activation)
    expected = weight_loss(x, weights, s, NVFP4) + input_loss(x, weights, s, activation)
    np.testing.assert_allclose(jnp.min(losses), expected, rtol=1e-3)


@INPUTS
def test_the_loss_predicts_the_error_of_the_quantized_product(activation):
    """Rounding errors of inputs are nearly uncorrelated, so the objective is nearly the truth."""
    x, weights = tokens(times=8.0), group()
    s, losses = awq(weights, observed(x), NVFP4, activation)
    rows, rounded = rounded_input(x, s, activation), rounded_weights(weights, s, NVFP4)
    pairs = zip(rounded, weights, strict=True)
    errors = [product(rows, q) - product(x, w) for q, w in pairs]
    true = sum(np.mean(np.sum(e * e, axis=1)) for e in errors)
    np.testing.assert_allclose(jnp.min(losses), true, rtol=0.2)


@WEIGHTS
def test_the_search_is_never_worse_than_nothing(spec):
    """Also on Gaussian inputs without outliers, where there is little to gain."""
    for x in (tokens(), tokens(outliers=())):
        for search, tried in ((awq, 11), (search_smoothquant, 21)):
            s, losses = search(group(), observed(x), spec)
            assert losses.shape == (1 + tried,) and np.all(np.isfinite(losses))
            plain = weight_loss(x, group(), jnp.ones_like(s), spec)
            assert weight_loss(x, group(), s, spec) <= plain * (1 + 1e-4)


@pytest.mark.parametrize("spec", [INT8, NVFP4], ids=["int8", "nvfp4"])
def test_with_quantized_inputs_neither(spec):
    for x in (tokens(), tokens(outliers=())):
        for search in (awq, search_smoothquant):
            _, losses = search(group(), observed(x), spec, spec)
            assert np.all(np.isfinite(losses)) and jnp.min(losses) <= losses[0]


@pytest.mark.parametrize("spec", [INT4, NVFP4], ids=["int4", "nvfp4"])
def test_outlier_channels_make_it_strictly_better(spec):
    _, losses = awq(group(), observed(tokens()), spec)
    assert jnp.min(losses) < 0.5 * losses[0]


def test_searching_for_quantized_inputs_finds_other_factors():
    """Weights alone want the large channels large; inputs want them small."""
    x, weights = tokens(), group()

    def total(s):
        return weight_loss(x, weights, s, NVFP4) + input_loss(x, weights, s, NVFP4)

    blind, _ = awq(weights, observed(x), NVFP4)
    aware, _ = awq(weights, observed(x), NVFP4, NVFP4)
    assert total(aware) <= total(blind) * (1 + 1e-4)
    assert total(aware) < 0.9 * total(jnp.ones_like(aware))


def test_static_scales_are_those_of_all_tokens():
    """A sample without the largest token must not make the static scale smaller."""
    x = tokens()
    largest = jnp.argmax(jnp.max(jnp.abs(x), axis=1))
    spec, ratios = resolve("fp8"), (0.5,)
    with_all = observed(x)
    others = x[jnp.arange(TOKENS) != largest]
    _, losses = awq(group(), replace(with_all, sample=others), INT8, spec, ratios=ratios)
    _, wrong = awq(group(), observed(others), INT8, spec, ratios=ratios)
    _, full = awq(group(), with_all, INT8, spec, ratios=ratios)
    assert jnp.all(jnp.abs(losses - full) < jnp.abs(wrong - full))


def test_unfilled_places_of_a_sample_do_not_count():
    x = tokens()
    padded = jnp.concatenate([x, jnp.zeros_like(x)])
    _, expected = awq(group(), observed(x), NVFP4, NVFP4)
    _, losses = awq(group(), replace(observed(x), sample=padded), NVFP4, NVFP4)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("search", [awq, search_smoothquant], ids=["awq", "smoothquant"])
def test_experts_together_are_experts_one_by_one(search):
    inputs = [tokens(2), tokens(3, outliers=(1,)), jnp.zeros((TOKENS, WIDTH), jnp.float32)]
    weights = [group(0), group(5), group(9)]
    stacked_weights, statistics = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *zip(weights, map(observed, inputs), strict=True)
    )
    together = jax.vmap(lambda w, t: search(w, t, NVFP4, NVFP4))(stacked_weights, statistics)
    for i, (w, x) in enumerate(zip(weights, inputs, strict=True)):
        s, losses = search(w, observed(x), NVFP4, NVFP4)
        np.testing.assert_allclose(together[0][i], s, rtol=1e-5)
        np.testing.assert_allclose(together[1][i], losses, rtol=1e-3, atol=1e-12)
    np.testing.assert_array_equal(together[0][2], 1.0)


@pytest.mark.parametrize("search", [awq, search_smoothquant], ids=["awq", "smoothquant"])
def test_missing_statistics_are_named(search):
    statistics = observed(tokens())
    with pytest.raises(UserError, match="second moments"):
        search(group(), replace(statistics, second_moment=None), INT4)
    with pytest.raises(UserError, match="sample"):
        search(group(), replace(statistics, sample=None), NVFP4, NVFP4)
