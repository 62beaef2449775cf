"""What AutoRound tunes of one matrix: an offset for each weight, a shrinking for each scale.

    Ŵ = s · round(W / s + V · δ),    s = scale of (m · amax),    V in [-1/2, 1/2],  m in [1/2, 1]

δ is the distance between the grid values on either side of W / s. Gradients pass the rounding
straight through. Functions take one matrix [N, K]; map a stack of experts with `jax.vmap`.

Reference: Cheng et al. 2023, arXiv:2309.05516.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxopt_models.elements import Element, Levels, Minifloat, exponent_of, power_of_two
from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import (
    Scales,
    from_grid,
    overall_amax,
    real_scale,
    scales_from_amax,
    tile_expand,
    tile_reduce,
    to_grid,
)

_HALF_STEP = 0.5
_MOST_SHRUNK = 0.5
# E4M3 scales lie up to an eighth apart, so that at the full rate blocks flip between two of them.
# Half of it left 0.47 of the nearest rounding's error on unseen text, the full rate 0.49, a quarter
# 0.47 (nvfp4, 100 steps, mean of three layers of SmolLM2-135M).
_E4M3_RATE = 0.5


@struct.dataclass
class Matrix:
    """A matrix [N, K], or a stack of them, with the scales it starts from."""

    weight: jax.Array
    scales: Scales
    spec: QuantSpec = struct.field(pytree_node=False)


@struct.dataclass
class RoundedMatrix:
    """Grid values, float32 of the matrix's shape, and the scales they belong to."""

    grid: jax.Array
    scales: Scales


@struct.dataclass
class Tuned:
    """What is optimised for one matrix, or its gradient.

    Attributes:
      offset: V, of the matrix's shape, in local grid steps.
      shrink: m, of the scale's shape; None where scales stay.
    """

    offset: jax.Array
    shrink: jax.Array | None


def begin(matrix: Matrix, tune_scales: bool) -> Tuned:
    """What rounds to nearest under the given scales."""
    shrink = jnp.ones(matrix.scales.scale.shape, jnp.float32) if tune_scales else None
    return Tuned(jnp.zeros(matrix.weight.shape, jnp.float32), shrink)


def round_matrix(matrix: Matrix, tuned: Tuned) -> RoundedMatrix:
    """Nearest grid values of the weight moved by its offset, under the shrunk scales.

    Moving the weight, and not the quotient, leaves the rounding to `to_grid`.
    """
    scales = _shrink(matrix, tuned)
    scale, _, y = _in_steps(matrix, scales)
    offset = tuned.offset * _spacing(y, matrix.spec.element) * scale
    weight = matrix.weight.astype(jnp.float32) + offset
    return RoundedMatrix(to_grid(weight, scales, matrix.spec), scales)


def dense_matrix(matrix: Matrix, rounded: RoundedMatrix) -> jax.Array:
    """Ŵ in the dtype of the weight."""
    return from_grid(rounded.grid, rounded.scales, matrix.spec).astype(matrix.weight.dtype)


def gradient_of(
    matrix: Matrix, tuned: Tuned, rounded: RoundedMatrix, cotangent: jax.Array
) -> Tuned:
    """Gradient at `tuned` of a loss that has the gradient `cotangent` at the dense matrix Ŵ.

    With y = W / s and g = round(y + V δ), the rounding taken for the identity inside the range:
        dŴ/dV = s δ                 inside, else 0
        dŴ/dm = (g - y) ds/dm       inside, else (g - zero point) ds/dm
    The rounding of a scale to its dtype is taken for the identity as well, so that ds/dm is the
    scale at m = 1.
    """
    element, cotangent = matrix.spec.element, cotangent.astype(jnp.float32)
    scale, zero, y = _in_steps(matrix, rounded.scales)
    spacing = _spacing(y, element)
    moved, reach = y + tuned.offset * spacing, _HALF_STEP * spacing
    inside = (moved >= element.lowest - reach) & (moved <= element.largest + reach)
    offset = jnp.where(inside, cotangent * scale * spacing, 0.0)
    if tuned.shrink is None:
        return Tuned(offset, None)
    error = rounded.grid - jnp.where(inside, y, zero)
    tile = matrix.spec.tile(y.shape)
    by_scale = tile_reduce(cotangent * error, tile, jnp.sum)
    return Tuned(offset, by_scale * real_scale(matrix.scales, matrix.spec))


def descend(matrix: Matrix, tuned: Tuned, gradient: Tuned, rate: jax.Array) -> Tuned:
    """A step of signed gradient descent, kept in bounds."""
    offset = tuned.offset - rate * jnp.sign(gradient.offset)
    offset = jnp.clip(offset, -_HALF_STEP, _HALF_STEP)
    if tuned.shrink is None or gradient.shrink is None:
        return Tuned(offset, None)
    rate = rate * _E4M3_RATE if matrix.spec.two_level else rate
    shrink = tuned.shrink - rate * jnp.sign(gradient.shrink)
    return Tuned(offset, jnp.clip(shrink, _MOST_SHRUNK, 1.0))


def _in_steps(matrix: Matrix, scales: Scales) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(scale, zero point, weight in units of the grid), each float32 [N, K]."""
    shape = matrix.weight.shape
    expand = partial(tile_expand, tile=matrix.spec.tile(shape), shape=shape)
    scale = expand(real_scale(scales, matrix.spec))
    zero = jnp.zeros_like(scale)
    if scales.zero_point is not None:
        zero = expand(scales.zero_point.astype(jnp.float32))
    return scale, zero, matrix.weight.astype(jnp.float32) / scale + zero


def _shrink(matrix: Matrix, tuned: Tuned) -> Scales:
    """Scales of the shrunk amax.

    An entry that has not moved keeps its given scale bit for bit, and the global scale, which other
    matrices may share, stays. A zero point stays too: both ends of its range shrink alike.
    """
    given, spec = matrix.scales, matrix.spec
    if tuned.shrink is None:
        return given
    new = scales_from_amax(tuned.shrink * _amax(matrix), spec, overall_amax(given, spec))
    still = tuned.shrink == 1
    inverse = None
    if given.inverse is not None and new.inverse is not None:
        inverse = jnp.where(still, given.inverse, new.inverse)
    scale = jnp.where(still, given.scale, new.scale)
    return Scales(scale, given.global_scale, given.zero_point, inverse)


def _amax(matrix: Matrix) -> jax.Array:
    """A magnitude of each tile whose scale is the given one.

    It is what the given scale maps to the largest grid value, except under an E8M0 scale that is
    the rule's for the tile's own amax: then that, so that a tile which barely needs its scale is
    the first to leave it.
    """
    spec, weight = matrix.spec, matrix.weight.astype(jnp.float32)
    scale = real_scale(matrix.scales, spec)
    covered = scale * spec.element.largest
    if not spec.power_of_two:
        return covered
    own = tile_reduce(jnp.abs(weight), spec.tile(weight.shape))
    return jnp.where(real_scale(scales_from_amax(own, spec), spec) == scale, own, covered)


def _spacing(y: jax.Array, element: Element) -> jax.Array:
    """Distance between the grid values on either side of `y`."""
    y = jnp.clip(y, element.lowest, element.largest)
    if isinstance(element, Minifloat):
        exponent = jnp.maximum(exponent_of(y), element.min_exponent)
        return power_of_two(exponent - element.mantissa)
    if isinstance(element, Levels):
        gaps = jnp.asarray(np.diff(np.asarray(element.table)), jnp.float32)
        above = (y > level for level in element.table[1:-1])
        return gaps[sum((a.astype(jnp.int32) for a in above), jnp.int32(0))]
    return jnp.ones_like(y)
