"""One decoder layer, smoothed already: its matrices quantized, and a row of the report for each.

A layer is quantized as a whole because its parts constrain each other: smoothing factors are folded
into the norm or the linear before (`layer_smoothing`), and matrices that engines fuse share a
global scale.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.numerics import Scales
from jaxopt_models.qtensor import QTensor
from jaxopt_models.quantize.calibrators import input_amax
from jaxopt_models.quantize.groups import Plan, group_of, weight_of
from jaxopt_models.quantize.layer_smoothing import LayerJob
from jaxopt_models.quantize.matrix import Figures, Prepared, assemble, finish, prepare
from jaxopt_models.quantize.method import Method
from jaxopt_models.statistics import InputStatistics


@dataclass(frozen=True)
class TensorReport:
    """What was done to one weight.

    Attributes:
      path: its leaf path.
      format, granularity, algorithm: how it was quantized.
      activation: format of its input, or "".
      shape: of the weight.
      bits: stored bits for each weight, scales included.
      weight_error: relative error ||W - Ŵ|| / ||W||, after smoothing.
      output_error: that of the product with a sample of the calibration text, the rounding of the
        input included; None without text.
      clipped: share of weights beyond the range of their scale.
      damping: what GPTQ added to the Hessian's diagonal, relative to its mean; None without GPTQ.
      seconds: wall time of scale search and rounding, compilation included.
    """

    path: str
    format: str
    granularity: str
    algorithm: str
    activation: str
    shape: tuple[int, ...]
    bits: float
    weight_error: float
    output_error: float | None
    clipped: float
    damping: float | None
    seconds: float


@dataclass(frozen=True)
class Rounded:
    """What AutoRound chose for one matrix: grid values and scales of the prepared weight."""

    grid: jax.Array
    scales: Scales


def check_weights(layer: Any, plan: Plan, prefix: str) -> None:
    """Refuses weights that cannot be rounded, before all that would spread them.

    Raises:
      UserError: naming the first of the plan that holds NaN or infinity.
    """
    finite = _finite({name: weight_of(layer, name) for name in plan})
    for name in plan:
        if not bool(finite[name]):
            raise _not_finite(f"{prefix}{name}/weight")


@jax.jit
def _finite(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda weight: jnp.all(jnp.isfinite(weight)), weights)


def _not_finite(path: str) -> UserError:
    return UserError(f"{path} holds NaN or infinity; repair the checkpoint before quantizing")


def prepare_layer(job: LayerJob, plan: Plan) -> tuple[dict[str, Prepared], dict[str, jax.Array]]:
    """(matrices in the space in which they are quantized, magnitudes that some of them share)."""
    prepared = {
        name: prepare(weight_of(job.layer, name), method, job.factors.get(name))
        for name, method in plan.items()
    }
    return prepared, shared_amax({name: p.weight for name, p in prepared.items()}, plan)


def quantize_layer(
    job: LayerJob, plan: Plan, prefix: str, rounded: Mapping[str, Rounded]
) -> tuple[Any, list[TensorReport]]:
    """Quantizes every matrix of the plan.

    Args:
      job: from `smooth_layer`.
      plan: method by linear.
      prefix: of the layer's paths, for reports and errors ("layers/3/").
      rounded: what has been rounded already, by linear.

    Returns:
      (layer with `QTensor` leaves, a row for each).

    Raises:
      UserError: where GPTQ finds no factorisation.
    """
    prepared, shared = prepare_layer(job, plan)
    leaves, rows = {}, []
    for name, method in plan.items():
        began = time.perf_counter()
        statistics = job.statistics.get(name)
        amax = static_amax(statistics, method)
        statistics = _for_method(statistics, method)
        if name in rounded:
            grid, scales = rounded[name].grid, rounded[name].scales
            leaf, figures = assemble(prepared[name], grid, scales, statistics, method, amax)
        else:
            leaf, figures = finish(prepared[name], statistics, method, shared.get(name), amax)
        figures = jax.block_until_ready(figures)
        path = f"{prefix}{name}/weight"
        rows.append(report_row(path, method, leaf, figures, time.perf_counter() - began))
        leaf = replace(leaf, pre_scale=job.pre_scale.get(name), dtype=job.dtypes[name])
        leaves[f"{name}/weight"] = leaf
    return tree.replace(job.layer, leaves), rows


def shared_amax(weights: Mapping[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    """Common magnitude of matrices that are fused, for formats with two-level scales."""
    shared: dict[str, jax.Array] = {}
    for name, method in plan.items():
        if name in shared or method.weight is None or not method.weight.spec().two_level:
            continue
        fused = [n for n in group_of(name) if n in plan and plan[n].weight == method.weight]
        amax = [jnp.max(jnp.abs(weights[n]), axis=(-2, -1)) for n in fused]
        shared |= dict.fromkeys(fused, jnp.max(jnp.stack(amax), axis=0))
    return shared


def static_amax(statistics: InputStatistics | None, method: Method) -> jax.Array | None:
    """Magnitude of a static input scale, one for all experts; None for dynamic scales."""
    activation = method.activation
    if activation is None or not activation.calibrated:
        return None
    assert statistics is not None  # else the scale would be that of whatever batch comes
    spec = activation.spec()
    whole = replace(statistics, amax=jnp.max(statistics.amax))
    return input_amax(whole, activation.calibrator, percentile=activation.percentile, spec=spec)


def report_row(
    path: str, method: Method, leaf: QTensor, figures: Figures, seconds: float
) -> TensorReport:
    """The figures as a row.

    Raises:
      UserError: if they are not finite.
    """
    weight_error, output_error = float(figures.weight_error), float(figures.output_error)
    damping = float(figures.damping)
    if damping != damping:
        raise UserError(
            f"{path}: the Hessian of its input has no Cholesky factor at any damping; "
            "use more calibration text, or rounding 'nearest' for it"
        )
    if weight_error != weight_error or weight_error == float("inf"):
        raise _not_finite(path)
    return TensorReport(
        path=path,
        format=leaf.spec.format,
        granularity=leaf.spec.granularity,
        algorithm=method.algorithm,
        activation=method.activation.format if method.activation else "",
        shape=tuple(leaf.shape),
        bits=leaf.weight_bits / leaf.size,
        weight_error=weight_error,
        output_error=None if output_error != output_error else output_error,
        clipped=float(figures.clipped),
        damping=damping if method.rounding.method == "gptq" else None,
        seconds=seconds,
    )


def _for_method(statistics: InputStatistics | None, method: Method) -> InputStatistics | None:
    """Only what `finish` reads, so that it is compiled once whatever else was remembered."""
    if statistics is None:
        return None
    needed = method.rounding.method == "gptq" or method.scales in ("hessian", "clip")
    return replace(
        statistics,
        histogram=None,
        second_moment=statistics.second_moment if needed else None,
    )
