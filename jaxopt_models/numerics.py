"""The one numeric definition: how scales are found, and how values go to a grid and back.

    scales = find_scales(x, spec)            which grid
    grid   = to_grid(x, scales, spec)        nearest grid value, in units of the scale
    x_hat  = from_grid(grid, scales, spec)   back to real values

Fake quantization, packing, dequantization, kernels and export are all made of these three. All
arithmetic is float32. Inputs smaller than 2^-126 in magnitude (float32 subnormals) count as zero on
every backend, since some flush them and some do not. Scales and their reciprocals pass an
`optimization_barrier`, so that a compiler neither moves rounding between them and what they scale
nor computes them once for each value. A NaN or an infinity makes every value that
shares a scale with it NaN; `qtensor.quantize_array` refuses them outside jit.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxopt_models.division import divide
from jaxopt_models.elements import E4M3, exponent_of, power_of_two
from jaxopt_models.formats import QuantSpec

_TINY = 2.0**-126  # smallest normal float32
_SLACK = 1 + 2.0**-21


@struct.dataclass
class Scales:
    """What maps grid values to real values: `x = (grid - zero_point) * scale * global_scale`.

    Attributes:
      scale: [tiles of each axis], in the spec's scale dtype; same rank as the array it belongs to.
      global_scale: float32 of the same rank with all extents 1, for two-level scales; else None.
      zero_point: int8 of scale's shape for asymmetric formats; else None.
      inverse: float32 of scale's shape, `largest / amax` with one rounding where `1 / scale` has
        two; it steers the rounding of ties only and is not stored. None takes `1 / scale`.
    """

    scale: jax.Array
    global_scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    inverse: jax.Array | None = None


def tile_reduce(x: jax.Array, tile: tuple[int, ...], reduce: Callable = jnp.max) -> jax.Array:
    """Reduces each tile of `x` to one number; edge tiles are completed with zeros."""
    counts = tuple(-(-n // t) for n, t in zip(x.shape, tile, strict=True))
    pads = [(0, c * t - n) for n, t, c in zip(x.shape, tile, counts, strict=True)]
    split = [extent for c, t in zip(counts, tile, strict=True) for extent in (c, t)]
    padded = jnp.pad(x, pads) if any(after for _, after in pads) else x
    return reduce(padded.reshape(split), axis=tuple(range(1, 2 * x.ndim, 2)))


def tile_expand(values: jax.Array, tile: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Repeats each entry of `values` over its tile of an array of `shape`; inverse of the above.

    An axis with as many entries as elements has one each, whatever the tile: a stack of arrays,
    each with a scale of its own.
    """
    extents = zip(values.shape, tile, shape, strict=True)
    tile = tuple(1 if count == size else extent for count, extent, size in extents)
    interleaved = [extent for c in values.shape for extent in (c, 1)]
    split = [extent for c, t in zip(values.shape, tile, strict=True) for extent in (c, t)]
    full = tuple(c * t for c, t in zip(values.shape, tile, strict=True))
    expanded = jnp.broadcast_to(values.reshape(interleaved), split).reshape(full)
    return expanded if full == shape else expanded[tuple(slice(n) for n in shape)]


def find_scales(x: jax.Array, spec: QuantSpec, amax: jax.Array | None = None) -> Scales:
    """Scales from the largest magnitude of each tile ("max" calibration).

    With E = the element's largest value and a = amax of a tile:
      one level:  scale = a / E, rounded to the scale's dtype
      two levels: global = amax(x) / (E · 448),  scale = e4m3(clip(a / (E · global), 2^-9, 448))
      E8M0:       scale = 2^k, k = ceil(log2(a / E)) or floor(log2 a) - floor(log2 E)
    A tile of zeros has scale 1.

    Args:
      x: any float array; the last axis is the blocked one.
      spec: the format.
      amax: a calibrated magnitude instead of that of `x`: the global one (a scalar) for two-level
        scales and for granularity "tensor", else one a tile.
    """
    if not spec.symmetric:
        return scales_from_range(*tile_range(x, spec), spec)
    tiles, overall = tile_amax(x, spec, amax)
    return scales_from_amax(tiles, spec, overall)


def tile_amax(
    x: jax.Array, spec: QuantSpec, amax: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """What `scales_from_amax` takes, of an array: (amax of each tile, amax of the whole or None).

    `amax` is as for `find_scales`.
    """
    x = _normal_f32(x)
    tile = spec.tile(x.shape)
    if amax is None:
        return tile_reduce(jnp.abs(x), tile), None
    if not (spec.two_level or spec.granularity == "tensor"):
        return amax.astype(jnp.float32), None
    ones = (1,) * x.ndim
    overall = jnp.broadcast_to(amax.astype(jnp.float32), ones) if amax.ndim == 0 else amax
    return (tile_reduce(jnp.abs(x), tile) if spec.two_level else overall), overall


def tile_range(x: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """What `scales_from_range` takes, of an array: (least, largest) value of each tile."""
    x, tile = _normal_f32(x), spec.tile(x.shape)
    return tile_reduce(x, tile, jnp.min), tile_reduce(x, tile, jnp.max)


def scales_from_amax(tiles: jax.Array, spec: QuantSpec, overall: jax.Array | None = None) -> Scales:
    """Scales from magnitudes alone; see `find_scales`.

    Args:
      tiles: float32 amax of each tile.
      overall: float32 amax of the whole array with all extents 1 (two-level scales); None takes the
        largest of `tiles`.
    """
    largest = spec.element.largest
    # An infinite scale would leave some values finite; NaN spreads to all.
    tiles = jnp.where(jnp.isfinite(tiles), tiles, jnp.nan)
    if spec.two_level:
        overall = jnp.max(tiles, keepdims=True) if overall is None else overall
        # 2^-117 keeps block · global a normal float32 down to the smallest block scale, 2^-9.
        raw = jnp.maximum(divide(overall, largest * E4M3.largest), 2.0**-117)
        global_scale = lax.optimization_barrier(jnp.where(overall == 0, 1.0, raw))
        block = E4M3.round(jnp.clip(divide(tiles, largest * global_scale), 2.0**-9, E4M3.largest))
        return Scales(E4M3.encode(jnp.where(tiles == 0, 1.0, block)), global_scale)
    if spec.power_of_two:
        return Scales(_to_e8m0(jnp.where(tiles == 0, 0, _mx_exponent(tiles, spec))))
    raw = jnp.where(tiles == 0, 1.0, jnp.maximum(divide(tiles, largest), _TINY))
    scale = lax.optimization_barrier(_round_scale(raw, spec.scale_dtype))
    if spec.scale_dtype != "float32":
        return Scales(scale)
    safe = tiles > 2.0**-110  # below, the quotient could overflow
    inverse = jnp.where(safe, divide(largest, jnp.where(safe, tiles, 1.0)), divide(1.0, scale))
    return Scales(scale, inverse=lax.optimization_barrier(inverse))


def scales_from_range(low: jax.Array, high: jax.Array, spec: QuantSpec) -> Scales:
    """scale = (high - low) / 15 and zero_point = -8 - round(low / scale), with low <= 0 <= high.

    Args:
      low, high: float32 least and largest value of each tile; the range is widened to hold zero.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    bottom = spec.element.lowest
    raw = jnp.maximum(divide(high, 15.0) - divide(low, 15.0), _TINY)
    raw = jnp.where(high == low, 1.0, jnp.where(jnp.isfinite(raw), raw, jnp.nan))
    scale = lax.optimization_barrier(_round_scale(raw, spec.scale_dtype))
    zero = spec.element.round(bottom - jnp.round(divide(low, scale.astype(jnp.float32))))
    return Scales(scale, None, jnp.where(high == low, 0.0, zero).astype(jnp.int8))


def real_scale(scales: Scales, spec: QuantSpec) -> jax.Array:
    """Both levels multiplied out, float32, one number a tile."""
    if spec.power_of_two:
        return _from_e8m0(scales.scale)
    scale = scales.scale.astype(jnp.float32)
    return scale if scales.global_scale is None else scale * scales.global_scale


def overall_amax(scales: Scales, spec: QuantSpec) -> jax.Array | None:
    """The `overall` that `scales_from_amax` makes a global scale of; None for one level."""
    if scales.global_scale is None:
        return None
    return scales.global_scale * spec.element.largest * E4M3.largest


def inverse_scale(scales: Scales, spec: QuantSpec) -> jax.Array:
    """What values are multiplied with on their way to the grid, float32, one number a tile."""
    if scales.inverse is not None:
        return scales.inverse
    return lax.optimization_barrier(divide(1.0, real_scale(scales, spec)))


def expand(scales: Scales, spec: QuantSpec, shape: tuple[int, ...]) -> Scales:
    """The same scales with an entry for each value of an array of `shape`.

    Rows and columns of an array and of its expanded scales may be taken apart and reordered:
    `to_grid` and `from_grid` of a part are that part of the whole, bit for bit.
    """
    scale = scales.scale if spec.power_of_two else real_scale(scales, spec)
    one_level = Scales(scale, None, scales.zero_point, inverse_scale(scales, spec))
    tile = spec.tile(shape)
    return jax.tree.map(lambda entries: tile_expand(entries, tile, shape), one_level)


def to_grid(x: jax.Array, scales: Scales, spec: QuantSpec) -> jax.Array:
    """Nearest grid values of `x / scale (+ zero_point)`, float32."""
    x, tile = _normal_f32(x), spec.tile(x.shape)
    y = _scaled(x, scales, spec)
    if scales.zero_point is not None:
        zero = tile_expand(scales.zero_point.astype(jnp.float32), tile, x.shape)
        return spec.element.round(jnp.round(y) + zero)
    return spec.element.round(y)


def from_grid(grid: jax.Array, scales: Scales, spec: QuantSpec) -> jax.Array:
    """Real values of grid values, float32."""
    tile = spec.tile(grid.shape)
    if scales.zero_point is not None:
        grid = grid - tile_expand(scales.zero_point.astype(jnp.float32), tile, grid.shape)
    return grid * tile_expand(real_scale(scales, spec), tile, grid.shape)


def _scaled(x: jax.Array, scales: Scales, spec: QuantSpec) -> jax.Array:
    """`x / scale`, float32, before rounding: a product with the reciprocal, one a tile."""
    return x * tile_expand(inverse_scale(scales, spec), spec.tile(x.shape), x.shape)


def _round_scale(scale: jax.Array, dtype: str) -> jax.Array:
    """Rounds in float32 first, so that removing a pair of casts cannot change the result."""
    if dtype == "float32":
        return scale
    bits = jnp.finfo(dtype)
    rounded = lax.reduce_precision(scale, bits.nexp, bits.nmant)
    # float16 has no room for the scale of a tiny tile: the smallest it can hold, not zero.
    smallest = float(bits.smallest_subnormal) if dtype == "float16" else _TINY
    return jnp.clip(rounded, smallest, float(bits.max)).astype(dtype)


def _mx_exponent(amax: jax.Array, spec: QuantSpec) -> jax.Array:
    """Exponent of an E8M0 scale by comparing mantissas: exact where log2 in float32 is not.

    The range ends below at 2^-126, since 2^-127 would be a float32 subnormal, which some backends
    flush, and above where the largest grid value is the last finite one: an amax beyond saturates.
    """
    largest = spec.element.largest
    offset = math.frexp(largest)[1] - 1
    k = jnp.clip(exponent_of(amax) - offset, -126, 127 - offset)
    if spec.mx_rule == "ceil":
        k = jnp.minimum(k + (amax > largest * power_of_two(k)).astype(jnp.int32), 127 - offset)
    return jnp.where(jnp.isfinite(amax), k, 128)  # 128 is E8M0's NaN


def _to_e8m0(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent + 127).astype(jnp.uint8), jnp.float8_e8m0fnu)


def _from_e8m0(scale: jax.Array) -> jax.Array:
    codes = lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
    return jnp.where(codes == 255, jnp.nan, power_of_two(codes - 127))


def _normal_f32(x: jax.Array) -> jax.Array:
    """Float32 with subnormals and negative zeros replaced by zero."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < _TINY, 0.0, x)


def representable(x: jax.Array, scales: Scales, spec: QuantSpec) -> jax.Array:
    """Where `x` lies between the smallest and the largest grid value; boolean of x's shape.

    The slack is for the rounding of `x / scale`, which may carry the amax itself past the end.
    """
    element, tile = spec.element, spec.tile(x.shape)
    y = _scaled(_normal_f32(x), scales, spec)
    if scales.zero_point is not None:
        y = y + tile_expand(scales.zero_point.astype(jnp.float32), tile, x.shape)
    return (y >= element.lowest * _SLACK) & (y <= element.largest * _SLACK)
