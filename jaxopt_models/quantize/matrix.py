"""One matrix, or a stack of experts, through the steps of a `Method`.

prepared = prepare(weight, method, factors)     smoothed, rotated, low rank removed
leaf, figures = finish(prepared, statistics, method, …)     scales, rounding, errors
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models import numerics
from jaxopt_models.formats import QuantSpec
from jaxopt_models.hadamard import hadamard
from jaxopt_models.numerics import Scales
from jaxopt_models.qtensor import LowRank, QTensor, from_grid_values
from jaxopt_models.quantize.gptq import gptq
from jaxopt_models.quantize.low_rank import low_rank, residual
from jaxopt_models.quantize.method import Method
from jaxopt_models.quantize.scales import search_scales
from jaxopt_models.statistics import InputStatistics


@struct.dataclass
class Prepared:
    """A matrix in the space in which it is quantized.

    Attributes:
      weight: float32 [N, K] (or [E, N, K]), what is left for the grid to represent.
      low_rank: correction that was taken out of it; None without.
      dtype: that of the original; static.
    """

    weight: jax.Array
    low_rank: LowRank | None
    dtype: str = struct.field(pytree_node=False)


@struct.dataclass
class Figures:
    """What rounding a matrix cost, float32 scalars.

    Attributes:
      weight_error: ||W - Ŵ|| / ||W||, in the space of the stored weight.
      output_error: the same of the product with the calibration sample, activation rounding
        included; NaN without a sample.
      clipped: share of values beyond the range of their scale.
      damping: what GPTQ had to add to the diagonal, relative to its mean; 0 for others.
    """

    weight_error: jax.Array
    output_error: jax.Array
    clipped: jax.Array
    damping: jax.Array


@partial(jax.jit, static_argnames="method")
def prepare(weight: jax.Array, method: Method, factors: jax.Array | None) -> Prepared:
    """Multiplies columns by smoothing factors [K], rotates them, and takes out the low rank."""
    dtype, weight = weight.dtype.name, weight.astype(jnp.float32)
    if factors is not None:
        weight = weight * jnp.expand_dims(factors, -2)
    if method.rotate:
        weight = hadamard(weight, method.rotate)
    if not method.low_rank:
        return Prepared(weight, None, dtype)
    correction = _stacked(weight.ndim, partial(low_rank, rank=method.low_rank))(weight)
    return Prepared(residual(weight, correction), correction, dtype)


@partial(jax.jit, static_argnames="method")
def finish(
    prepared: Prepared,
    statistics: InputStatistics | None,
    method: Method,
    amax: jax.Array | None,
    input_amax: jax.Array | None,
) -> tuple[QTensor, Figures]:
    """Finds scales and rounds.

    Args:
      prepared: the matrix, from `prepare`.
      statistics: of the transformed input; None where the method needs none.
      method: static.
      amax: magnitude for two-level scales that fused matrices share, [] or [E]; None takes the
        matrix's own.
      input_amax: [], calibrated magnitude of the input; None for dynamic scales.

    Returns:
      (leaf without pre_scale, figures).
    """
    scales = find_scales(prepared, statistics, method, amax)
    grid, damping = _rounded(prepared.weight, statistics, scales, method)
    return assemble(prepared, grid, scales, statistics, method, input_amax, damping)


def find_scales(
    prepared: Prepared,
    statistics: InputStatistics | None,
    method: Method,
    amax: jax.Array | None,
) -> Scales:
    """Scales of a prepared matrix by the method's search."""
    find = partial(search_scales, spec=_spec(method), method=method.scales)
    moment = None if statistics is None else statistics.second_moment
    return _stacked(prepared.weight.ndim, find)(prepared.weight, hessian=moment, amax=amax)


def assemble(
    prepared: Prepared,
    grid: jax.Array,
    scales: Scales,
    statistics: InputStatistics | None,
    method: Method,
    input_amax: jax.Array | None,
    damping: jax.Array | None = None,
) -> tuple[QTensor, Figures]:
    """The leaf of chosen grid values, and what they cost."""
    spec, weight = _spec(method), prepared.weight
    quantizer = None
    if method.activation is not None:
        quantizer = method.activation.quantizer(input_amax)
    leaf = replace(
        from_grid_values(grid, scales, spec, prepared.dtype),
        low_rank=prepared.low_rank,
        rotate=method.rotate,
        input=quantizer,
    )
    original = weight
    restored = leaf.dequantize(jnp.float32)
    if prepared.low_rank is not None:
        removed = prepared.low_rank.product()
        original, restored = original + removed, restored + removed
    output_error = jnp.float32(jnp.nan)
    if statistics is not None and statistics.sample is not None:
        exact = _rows_times(statistics.sample, original)
        rounded = statistics.sample if quantizer is None else quantizer(statistics.sample)
        output = _rows_times(rounded, restored)
        if prepared.low_rank is not None and quantizer is not None:
            output = output + _rows_times(statistics.sample - rounded, removed)
        output_error = _relative(exact, output)
    inside = _stacked(weight.ndim, partial(_representable, spec=spec))(weight, scales=scales)
    return leaf, Figures(
        weight_error=_relative(original, restored),
        output_error=output_error,
        clipped=jnp.mean((~inside).astype(jnp.float32)),
        damping=jnp.float32(0) if damping is None else damping,
    )


def _rounded(
    weight: jax.Array, statistics: InputStatistics | None, scales: Scales, method: Method
) -> tuple[jax.Array, jax.Array | None]:
    """Grid values, and GPTQ's largest damping."""
    spec, how = _spec(method), method.rounding
    if how.method != "gptq":
        nearest = partial(_to_grid, spec=spec)
        return _stacked(weight.ndim, nearest)(weight, scales=scales), None
    assert statistics is not None and statistics.second_moment is not None
    solve = partial(gptq, spec=spec, damping=how.damping, block=how.block, act_order=how.act_order)
    grid, damping = _stacked(weight.ndim, solve)(
        weight, hessian=statistics.second_moment, scales=scales
    )
    return grid, jnp.max(damping)


def _spec(method: Method) -> QuantSpec:
    assert method.weight is not None
    return method.weight.spec()


def _to_grid(weight: jax.Array, scales: Scales, spec: QuantSpec) -> jax.Array:
    return numerics.to_grid(weight, scales, spec)


def _representable(weight: jax.Array, scales: Scales, spec: QuantSpec) -> jax.Array:
    return numerics.representable(weight, scales, spec)


def _stacked(ndim: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of one matrix, for each of a stack if there is one."""
    if ndim == 2:
        return function

    def each(weight: jax.Array, **arrays: Any) -> Any:
        return jax.vmap(lambda w, rest: function(w, **rest))(weight, arrays)

    return each


def _rows_times(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(rows, jnp.swapaxes(weight, -1, -2), precision="highest")


def _relative(exact: jax.Array, approximate: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(exact.reshape(-1))
    error = jnp.linalg.norm((exact - approximate).reshape(-1))
    return error / jnp.where(norm == 0, 1.0, norm)
