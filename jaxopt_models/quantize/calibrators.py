"""Magnitude of a linear's input that its static scale is made of, from calibration statistics.

All but "max" read the histogram of log2|x|, on the host in float64: they run once a tensor. A bin
holds counts and not values; they are taken as spread evenly, over log2|x| where values are picked
and over |x| where densities are compared.

References: Migacz 2017, "8-bit inference with TensorRT" (entropy); Wu et al. 2020,
arXiv:2004.09602 (percentile, mean squared error).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.elements import Element
from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec
from jaxopt_models.statistics import BINS, BINS_AN_OCTAVE, LOWEST, InputStatistics

InputMethod = Literal["max", "percentile", "entropy", "mse", "headroom"]

_EDGES = np.exp2(LOWEST + np.arange(BINS + 1) / BINS_AN_OCTAVE)
_OCTAVES = 10  # how far below the largest magnitude a clipping point is looked for
_POINTS = 4  # values that stand for a bin
_LINEAR_BINS = 2048
# Block scales in E4M3 keep their precision over 2^14.8; the rest is room for what calibration did
# not see.
_SCALE_RANGE = 16384.0


def input_amax(
    statistics: InputStatistics,
    method: InputMethod = "max",
    *,
    spec: QuantSpec,
    percentile: float = 99.99,
) -> jax.Array:
    """Magnitude to which a static input scale maps the format's largest value, float32 scalar.

    max         the largest |x| seen
    percentile  the magnitude that so many percent of |x| do not exceed
    mse         argmin_a Σ (x - x̂_a)²: rounding against clipping at a
    entropy     argmin_a KL(x clipped at a ‖ x̂_a), over the non-zero values
    headroom    max(16384 · p1, p99.99) of the amax of blocks: small blocks keep their scale's
                precision, and larger ones than were seen do not saturate

    No result exceeds the largest |x| seen, except that of "headroom", whose purpose is to. It knows
    only the elements' histogram, and takes the elements of a block as independent: p of all blocks
    have an amax below a if p^(1/block) of all elements are.

    Args:
      statistics: of the input; of a stack of experts, who share the result.
      method: see above.
      spec: format of the input.
      percentile: in (0, 100].

    Raises:
      UserError: for a method that does not go with the format, or statistics without a histogram.
    """
    _check(statistics, method, spec, percentile)
    amax = float(np.max(np.asarray(statistics.amax, np.float64)))
    if method == "max" or amax == 0:
        return jnp.float32(amax)
    counts = np.asarray(statistics.histogram, np.float64)
    if method == "headroom":
        return jnp.float32(_headroom(counts, spec.block_size))
    if method == "percentile":
        found = _quantile(counts, percentile / 100)
        # Where so many values are zero, it says nothing about the others.
        return jnp.float32(amax if found <= _EDGES[1] else min(found, amax))
    points = _clipping_points(amax)
    loss = {"mse": _squared_error, "entropy": _divergence}[method]
    return jnp.float32(points[np.argmin(loss(counts, spec.element, points))])


def _check(
    statistics: InputStatistics, method: InputMethod, spec: QuantSpec, percentile: float
) -> None:
    if method not in get_args(InputMethod):
        raise UserError(
            f"input method {method!r} is unknown; choose one of {', '.join(get_args(InputMethod))}"
        )
    if method != "max" and statistics.histogram is None:
        raise UserError(
            f"input method {method!r} needs a histogram of the input; "
            "calibrate with one, or choose 'max'"
        )
    if method in ("mse", "entropy") and spec.granularity != "tensor":
        raise UserError(
            f"input method {method!r} is for one static scale, as of fp8 and int8 with granularity "
            f"'tensor', not {spec.format!r} with {spec.granularity!r}; choose 'max'"
        )
    if method == "headroom" and not spec.two_level:
        raise UserError(
            f"input method 'headroom' is for block scales in E4M3, which {spec.format!r} has not; "
            "choose 'max'"
        )
    if not 0 < percentile <= 100:
        raise UserError(f"percentile {percentile} is not in (0, 100]; 99.99 is usual")


def _quantile(counts: np.ndarray, share: float) -> float:
    """Magnitude that a share of the values does not exceed."""
    total = np.cumsum(counts)
    rank = share * total[-1]
    i = min(int(np.searchsorted(total, rank)), BINS - 1)
    inside = (rank - total[i] + counts[i]) / max(counts[i], 1.0)
    return float(np.exp2(LOWEST + (i + inside) / BINS_AN_OCTAVE))


def _headroom(counts: np.ndarray, block: int) -> float:
    low, high = (_quantile(counts, share ** (1 / block)) for share in (0.01, 0.9999))
    return max(_SCALE_RANGE * low, high)


def _clipping_points(amax: float) -> np.ndarray:
    """Candidates a bin's width apart; the largest comes first and wins ties."""
    return amax * np.exp2(-np.arange(_OCTAVES * BINS_AN_OCTAVE + 1) / BINS_AN_OCTAVE)


def _squared_error(counts: np.ndarray, element: Element, points: np.ndarray) -> np.ndarray:
    """Σ (x - x̂)² over all values for each clipping point."""
    # The first bin is left out: it holds the zeros, which cost nothing. Empty bins are not, since
    # for every new shape rounding would be compiled again.
    bins = np.arange(1, BINS)
    inside = (np.arange(_POINTS) + 0.5) / _POINTS
    log2 = LOWEST + (bins[:, None] + inside) / BINS_AN_OCTAVE
    values = np.minimum(np.exp2(log2), points[0]).reshape(-1)
    weights = np.repeat(counts[bins] / _POINTS, _POINTS)
    scale = points[:, None] / element.largest
    error = values - _rounded(values / scale, element) * scale
    return error**2 @ weights


def _divergence(counts: np.ndarray, element: Element, points: np.ndarray) -> np.ndarray:
    """KL divergence of values that are spread evenly over their rounding interval, by point.

    The clipped values belong to the last bin of the true distribution but not to what is spread:
    so clipping has a cost.
    """
    total = np.concatenate([[0.0], np.cumsum(np.r_[0.0, counts[1:]])])
    edges = np.minimum(_EDGES, points[0])
    level = _rounded((np.arange(_LINEAR_BINS) + 0.5) / _LINEAR_BINS * element.largest, element)
    interval = np.unique(level, return_inverse=True)[1]
    return np.array([_divergence_at(point, edges, total, interval) for point in points])


def _divergence_at(
    point: float, edges: np.ndarray, total: np.ndarray, interval: np.ndarray
) -> float:
    """The same for one point; `total` counts the values below each of `edges`."""
    below = np.interp(np.linspace(0.0, point, _LINEAR_BINS + 1), edges, total)
    kept = np.diff(below)
    true = kept.copy()
    true[-1] += total[-1] - below[-1]
    occupied = true > 0
    share = np.bincount(interval, kept) / np.maximum(np.bincount(interval, occupied), 1)
    p, q = true[occupied], share[interval][occupied]
    if not np.all(q > 0):
        return np.inf
    return float(np.sum(p / p.sum() * np.log(p / p.sum() / (q / q.sum()))))


def _rounded(y: np.ndarray, element: Element) -> np.ndarray:
    """The format's own rounding, of float64."""
    return np.asarray(element.round(jnp.asarray(y, jnp.float32)), np.float64)
