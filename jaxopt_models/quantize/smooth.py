"""Smoothing: a factor for each input channel, so that rounding errs where it costs least.

    y = (x / s) (W · s)ᵀ        for every s > 0 in [K], as long as nothing is rounded

A group of linears that read one input shares s, since the input is divided once: weights are a
sequence of [N_i, K]. `fold` moves 1/s into what computes x. All functions are pure, work inside jit
and vmap over a leading axis of experts (without the statistics' histogram, which has no such axis).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxopt_models.block_search import Search
from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import find_scales, from_grid, tile_expand, tile_reduce, to_grid
from jaxopt_models.qtensor import InputQuantizer
from jaxopt_models.statistics import InputStatistics

Weights = Sequence[jax.Array]

RATIOS = tuple(i / 10 for i in range(11))
ALPHAS = tuple(i / 20 for i in range(21))
_SMALLEST, _LARGEST = 1e-4, 1e4


@dataclass(frozen=True)
class Tied:
    """Channels that must share a factor: of K = [groups, repeats, width], those along `repeats`."""

    repeats: int
    width: int

    def maximum(self, values: jax.Array) -> jax.Array:
        """[K] with each channel replaced by the largest of those it is tied to."""
        return self._spread(jnp.max(self._split(values), axis=-2, keepdims=True), values)

    def mean(self, values: jax.Array) -> jax.Array:
        """[K] with each channel replaced by the mean of those it is tied to."""
        return self._spread(jnp.mean(self._split(values), axis=-2, keepdims=True), values)

    def _split(self, values: jax.Array) -> jax.Array:
        return values.reshape(*values.shape[:-1], -1, self.repeats, self.width)

    def _spread(self, shared: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.broadcast_to(shared, self._split(values).shape).reshape(values.shape)


FREE = Tied(repeats=1, width=1)


def smoothed(statistics: InputStatistics, s: jax.Array) -> InputStatistics:
    """Statistics of x / s from those of x: exact but for the histogram, which becomes None."""
    moment, sample = statistics.second_moment, statistics.sample
    channel_amax = statistics.channel_amax / s
    return replace(
        statistics,
        amax=jnp.max(channel_amax, axis=-1),
        channel_amax=channel_amax,
        channel_abs=statistics.channel_abs / s,
        second_moment=None if moment is None else moment / (s[..., :, None] * s[..., None, :]),
        histogram=None,
        sample=None if sample is None else sample / s[..., None, :],
    )


@partial(jax.jit, static_argnames="tied")
def smoothquant(
    weights: Weights,
    statistics: InputStatistics,
    alpha: float | jax.Array = 1.0,
    *,
    tied: Tied = FREE,
) -> jax.Array:
    """Evens out the channel maxima of activations at the expense of the weights'.

        s_j = max |X_j|^alpha / max |W_j|^(1 - alpha), kept within [1e-4, 1e4]

    A channel that is always zero in the activations or in the weights has s_j = 1.

    Args:
      weights: [N_i, K] float32 of the linears that read the input.
      statistics: of that input; needs `channel_amax`.
      alpha: 0 looks at the weights alone, 1 at the activations alone.
      tied: channels that must get one factor.

    Returns:
      s, float32 [K]. Reference: Xiao et al. 2022, arXiv:2211.10438.
    """
    x, w = _channel_maxima(weights, statistics, tied)
    return _factors(x, w, jnp.float32(alpha))


@partial(jax.jit, static_argnames=("spec", "activation_spec", "search", "alphas", "tied"))
def search_smoothquant(
    weights: Weights,
    statistics: InputStatistics,
    spec: QuantSpec,
    activation_spec: QuantSpec | None = None,
    *,
    search: Search = "max",
    alphas: tuple[float, ...] = ALPHAS,
    tied: Tied = FREE,
) -> tuple[jax.Array, jax.Array]:
    """`smoothquant` with the alpha of least output error, or no smoothing if that is better still.

    Arguments, objective and results are those of `awq`.
    """
    x, w = _channel_maxima(weights, statistics, tied)
    found = [_factors(x, w, jnp.float32(alpha)) for alpha in alphas]
    return _best([jnp.ones_like(x), *found], weights, statistics, spec, activation_spec, search)


@partial(jax.jit, static_argnames=("spec", "activation_spec", "search", "ratios", "tied"))
def awq(
    weights: Weights,
    statistics: InputStatistics,
    spec: QuantSpec,
    activation_spec: QuantSpec | None = None,
    *,
    search: Search = "max",
    ratios: tuple[float, ...] = RATIOS,
    tied: Tied = FREE,
) -> tuple[jax.Array, jax.Array]:
    """Factors from mean magnitudes, with the exponent of least output error (AWQ's search).

        s_j = x_j^a / w_j^(1 - a),  x_j = mean |X_j|,  w_j = mean over rows of |W_j| / block amax,
        kept within [1e-4, 1e4], then divided by sqrt(max s · min s)

    minimises over s = 1 and the ratios a the error of a token's outputs, in expectation

        Σ_i tr(ΔW_i H ΔW_iᵀ) + Σ_k E[e_k²] Σ_i ||(W_i s)_k||²
        ΔW = Q(W s) / s - W,   H = E[x xᵀ],   e = Q_act(x / s) - x / s

    The first sum equals the mean over tokens of ||ΔW x||² that implementations measure on cached
    activations; by H it costs 2 N K² operations a candidate whatever the amount of text. The
    second, the rounding noise of quantized activations taken as uncorrelated, counts only with an
    `activation_spec`. Q rounds to nearest under scales from the maximum; a two-level format's
    global scale is shared by the group. A channel without activations or weights has s_j = 1.

    Args:
      weights: [N_i, K] float32 of the linears that read the input.
      statistics: of that input; needs `second_moment`, and `sample` for an `activation_spec`.
      spec: number format of the weights; static.
      activation_spec: that of the input, None where it is not quantized; static.
      search: how the input's block scales are chosen; static.
      ratios: exponents a to try; static.
      tied: channels that must get one factor; static.

    Returns:
      (s float32 [K], losses float32 [1 + R]: of no smoothing, then of each ratio).

    Raises:
      UserError: for statistics without what the objective needs.

    Reference: Lin et al. 2023, arXiv:2306.00978.
    """
    x = tied.mean(statistics.channel_abs)
    w = tied.mean(_relative_magnitude(weights, spec))
    found = [_centred(_factors(x, w, jnp.float32(ratio)), x, w) for ratio in ratios]
    return _best([jnp.ones_like(x), *found], weights, statistics, spec, activation_spec, search)


def _channel_maxima(
    weights: Weights, statistics: InputStatistics, tied: Tied
) -> tuple[jax.Array, jax.Array]:
    maxima = [jnp.max(jnp.abs(w), axis=0) for w in weights]
    return tied.maximum(statistics.channel_amax), tied.maximum(jnp.max(jnp.stack(maxima), axis=0))


def _relative_magnitude(weights: Weights, spec: QuantSpec) -> jax.Array:
    """Mean over all rows of |w| / (amax of what shares w's scale): [K]."""

    def total(weight: jax.Array) -> jax.Array:
        magnitude, tile = jnp.abs(weight), spec.tile(weight.shape)
        amax = tile_expand(tile_reduce(magnitude, tile), tile, weight.shape)
        return jnp.sum(magnitude / jnp.where(amax == 0, 1.0, amax), axis=0)

    rows = sum(weight.shape[0] for weight in weights)
    return jnp.sum(jnp.stack([total(weight) for weight in weights]), axis=0) / rows


def _factors(x: jax.Array, w: jax.Array, exponent: jax.Array) -> jax.Array:
    """x^a / w^(1-a) within limits; exactly 1 where x or w is zero."""
    alive = (x > 0) & (w > 0)
    s = jnp.where(alive, x, 1.0) ** exponent / jnp.where(alive, w, 1.0) ** (1 - exponent)
    return jnp.where(alive, jnp.clip(s, _SMALLEST, _LARGEST), 1.0)


def _centred(s: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    """Divides by the geometric mean of the extremes, channels that are always zero aside."""
    alive = (x > 0) & (w > 0)
    top = jnp.max(jnp.where(alive, s, _SMALLEST))
    bottom = jnp.min(jnp.where(alive, s, _LARGEST))
    return jnp.where(alive, s / jnp.sqrt(top * bottom), 1.0)


def _best(
    candidates: list[jax.Array],
    weights: Weights,
    statistics: InputStatistics,
    spec: QuantSpec,
    activation_spec: QuantSpec | None,
    search: Search,
) -> tuple[jax.Array, jax.Array]:
    """The candidate of least loss, the first of equals, and all losses."""
    moment, sample = statistics.second_moment, statistics.sample
    if moment is None:
        raise UserError("the search for smoothing factors needs second moments; calibrate them")
    if activation_spec is not None and sample is None:
        raise UserError("smoothing for quantized activations needs a sample; calibrate one")
    weights = _together(weights, spec)
    energy = jnp.sum(jnp.stack([jnp.sum(w * w, axis=0) for w in weights]), axis=0)

    def loss(s: jax.Array) -> jax.Array:
        error = _weight_error(s, weights, moment, spec)
        if activation_spec is None or sample is None:
            return error
        amax = jnp.max(statistics.channel_amax / s)
        noise = _input_noise(sample / s[None], amax, activation_spec, search)
        return error + jnp.sum(noise * s * s * energy)

    stacked = jnp.stack(candidates)
    losses = jax.lax.map(loss, stacked)
    return stacked[jnp.argmin(losses)], losses


def _together(weights: Weights, spec: QuantSpec) -> Weights:
    """The group as one matrix where no scale spans rows: the same numbers in fewer operations.

    The maximum of a two-level format's global scale is then the group's.
    """
    if spec.granularity in ("channel", "block"):
        return [jnp.concatenate(weights)]
    return weights


def _weight_error(s: jax.Array, weights: Weights, moment: jax.Array, spec: QuantSpec) -> jax.Array:
    """Σ_i tr(ΔW_i H ΔW_iᵀ) with ΔW = Q(W s) / s - W."""
    row, total = s[None], jnp.float32(0)
    for weight in weights:
        scaled = weight * row
        scales = find_scales(scaled, spec)
        error = from_grid(to_grid(scaled, scales, spec), scales, spec) / row - weight
        total += jnp.sum(jnp.matmul(error, moment, precision="highest") * error)
    return total


def _input_noise(x: jax.Array, amax: jax.Array, spec: QuantSpec, search: Search) -> jax.Array:
    """E[e_k²] of e = Q(x) - x over a sample [S, K] of the divided input: [K].

    A static scale takes `amax`, that of all rows and not only of the sample's. Rows of zeros are
    the unfilled places of a sample.
    """
    static = spec.two_level or spec.granularity == "tensor"
    error = InputQuantizer(amax if static else None, spec, search)(x) - x
    filled = jnp.sum(jnp.any(x != 0, axis=-1).astype(jnp.float32))
    return jnp.sum(error * error, axis=0) / jnp.maximum(filled, 1.0)
