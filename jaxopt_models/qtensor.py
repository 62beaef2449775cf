"""Quantized arrays as pytree leaves, and the four functions around them.

The law, for every format and every finite array, bit for bit:
    fake_quant(x) == dequantize(quantize(x)) == dequantize(unpack(pack(quantize(x))))
It holds by construction: all of them are `numerics.to_grid` followed by `numerics.from_grid`.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer

from jaxopt_models import numerics, packing
from jaxopt_models.block_search import Search, find_block_scales
from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec, resolve
from jaxopt_models.numerics import Scales
from jaxopt_models.tree import WeightLeaf, size_in_bits

Gradient = Literal["identity", "clip"]


@struct.dataclass
class InputQuantizer:
    """How a linear's input is fake-quantized before the product.

    Attributes:
      amax: float32 scalar, the calibrated magnitude of a static scale; None takes the scale of each
        token from the token itself. NVFP4 and MX block scales always come from the block.
      spec: the number format; static.
      search: how block scales are chosen; static, see `block_search`.
    """

    amax: jax.Array | None
    spec: QuantSpec = struct.field(pytree_node=False)
    search: Search = struct.field(pytree_node=False, default="max")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations [..., K] rounded to the format, same dtype, straight-through gradient."""
        return _straight_through(x, self.amax, self.spec, "identity", self.search)


@struct.dataclass
class LowRank:
    """A high-precision part `x @ down.T @ up.T` beside a product: a correction, or an adapter.

    Attributes:
      down: [R, K].
      up: [N, R].
    """

    down: jax.Array
    up: jax.Array

    def product(self) -> jax.Array:
        """`up · down`, float32 [..., N, K]: what is added to the weight."""
        up, down = (part.astype(jnp.float32) for part in (self.up, self.down))
        return jnp.matmul(up, down, precision="highest")


@struct.dataclass
class QTensor(WeightLeaf):
    """A quantized weight: `(codes - zero_point) * scale * global_scale`, shape [..., N, K].

    Invariants: `scale` has the rank of the array with an entry for each tile; `codes` are packed
    along the last axis (`packing`), `pad` codes of which lie beyond K. No shape is stored: the
    leaf may be sliced, stacked, vmapped, scanned and sharded along every axis but a padded last
    one.

    Attributes:
      codes: packed codes; uint8 for formats under 8 bits, else int8, float8_e4m3fn, float8_e5m2.
      scale: one a tile, in `spec.scale_dtype`.
      global_scale: float32 with all extents 1, second level of the scale; None for one level.
      zero_point: int8 like `scale`; None for symmetric formats.
      pre_scale: [K], multiplies the *input* of the product before all else; None is 1.
      low_rank: correction added to the product, of the input before its quantizer; None is 0.
      input: quantizer of the product's input; None leaves it alone.
      spec: number format; static.
      dtype: dtype of the array that was quantized, and the one `dequantize` returns; static.
      pad: codes added behind the last axis to fill a byte; static, 0 but for odd sizes.
      rotate: block of a Hadamard rotation (`hadamard`) of the input, after `pre_scale` and before
        `low_rank` and `input`; static, 0 is none. What is stored is the weight of the rotated
        space, `hadamard(W / pre_scale, rotate)`, and `dequantize` returns that.
    """

    codes: jax.Array
    scale: jax.Array
    global_scale: jax.Array | None = None
    zero_point: jax.Array | None = None
    pre_scale: jax.Array | None = None
    low_rank: LowRank | None = None
    input: InputQuantizer | None = None
    spec: QuantSpec = struct.field(pytree_node=False, kw_only=True)
    dtype: str = struct.field(pytree_node=False, default="float32", kw_only=True)
    pad: int = struct.field(pytree_node=False, default=0, kw_only=True)
    rotate: int = struct.field(pytree_node=False, default=0, kw_only=True)

    @property
    def scales(self) -> Scales:
        return Scales(self.scale, self.global_scale, self.zero_point)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the leaf stands for."""
        bits = self.spec.element.bits
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // bits - self.pad)

    @property
    def weight_bits(self) -> int:
        return size_in_bits(replace(self, input=None))

    def unpack(self) -> jax.Array:
        """Codes one a byte, [..., N, K], in the element's storage dtype (int4 sign-extended)."""
        return unpack(self.codes, self.spec, self.shape[-1])

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array that the codes stand for, in float32 arithmetic, cast to `dtype`."""
        return dequantize(self, dtype)


@struct.dataclass
class DenseTensor(WeightLeaf):
    """A float weight behind the input steps of a `QTensor`: optimised as what it will become, or
    frozen beside an adapter.

    Attributes:
      weight: [..., N, K], of the rotated space.
      pre_scale, low_rank, input, rotate: as in `QTensor`.
    """

    weight: jax.Array
    pre_scale: jax.Array | None = None
    low_rank: LowRank | None = None
    input: InputQuantizer | None = None
    rotate: int = struct.field(pytree_node=False, default=0, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight in `dtype`."""
        return self.weight.astype(dtype or self.weight.dtype)


def quantize_array(
    x: jax.Array,
    format: str | QuantSpec,
    *,
    granularity: str | None = None,
    block_size: int | None = None,
    scale_dtype: str | None = None,
    symmetric: bool = True,
    mx_rule: Literal["ceil", "floor"] = "ceil",
    amax: jax.Array | float | None = None,
) -> QTensor:
    """Quantizes an array by rounding to nearest.

    Args:
      x: float array, at least 1-D; the last axis is the blocked (contraction) axis.
      format: a name in `formats.FORMATS`, or a resolved `QuantSpec` (then no option may follow).
      granularity, block_size, scale_dtype, symmetric, mx_rule: see `formats.QuantSpec`; None takes
        the format's default.
      amax: a magnitude to scale by instead of that of `x`; see `numerics.find_scales`.

    Returns:
      A `QTensor` of the same shape.

    Raises:
      UserError: for an unknown format or option, an array that is not float, or (outside jit) one
        that holds NaN or infinity. Inside jit these spread over what shares their scale.
    """
    spec = _resolve(format, granularity, block_size, scale_dtype, symmetric, mx_rule)
    x = _checked(x, spec)
    amax = None if amax is None else jnp.asarray(amax, jnp.float32)
    scales = numerics.find_scales(x, spec, amax)
    return quantize_with(x, scales, spec)


def quantize_with(x: jax.Array, scales: Scales, spec: QuantSpec) -> QTensor:
    """Quantizes by rounding to nearest under given scales."""
    return from_grid_values(numerics.to_grid(x, scales, spec), scales, spec, x.dtype.name)


def from_grid_values(grid: jax.Array, scales: Scales, spec: QuantSpec, dtype: str) -> QTensor:
    """Makes the leaf of grid values that an algorithm chose itself (GPTQ, AutoRound)."""
    bits = spec.element.bits
    return QTensor(
        packing.pack(spec.element.encode(grid), bits),
        scales.scale,
        scales.global_scale,
        scales.zero_point,
        spec=spec,
        dtype=dtype,
        pad=packing.padding(grid.shape[-1], bits),
    )


def dequantize(q: QTensor, dtype: Any = None) -> jax.Array:
    """The array that a quantized leaf stands for, [..., N, K]; see `QTensor.dequantize`."""
    grid = q.spec.element.decode(q.unpack())
    return numerics.from_grid(grid, q.scales, q.spec).astype(dtype or q.dtype)


def unpack(packed: jax.Array, spec: QuantSpec, size: int) -> jax.Array:
    """Canonical bytes to codes [..., size] in the element's storage dtype."""
    element = spec.element
    codes = packing.unpack(packed, element.bits, size)
    if element.bits == 4 and element.storage == "int8":
        # Shifting the nibble to the top and back down extends its sign.
        return jax.lax.bitcast_convert_type(codes << 4, jnp.int8) >> 4
    return codes


def pack(codes: jax.Array, spec: QuantSpec) -> jax.Array:
    """Codes [..., K] to canonical bytes; inverse of `unpack`."""
    return packing.pack(codes, spec.element.bits)


def fake_quant(
    x: jax.Array,
    format: str | QuantSpec,
    *,
    granularity: str | None = None,
    block_size: int | None = None,
    scale_dtype: str | None = None,
    symmetric: bool = True,
    mx_rule: Literal["ceil", "floor"] = "ceil",
    amax: jax.Array | float | None = None,
    gradient: Gradient = "identity",
) -> jax.Array:
    """Rounds an array to a format's grid and back: what the quantized array would compute with.

    Straight-through gradient: dL/dx = dL/dy ("identity"), or the same masked to values inside the
    representable range ("clip"). Scales get no gradient.

    Args:
      x: float array; the last axis is the blocked axis.
      gradient: "identity" or "clip".
      format, granularity, block_size, scale_dtype, symmetric, mx_rule, amax: see `quantize_array`.

    Returns:
      Array of the shape and dtype of `x`, equal bit for bit to `quantize_array(x, …).dequantize()`.

    Reference: Bengio et al. 2013, arXiv:1308.3432.
    """
    spec = _resolve(format, granularity, block_size, scale_dtype, symmetric, mx_rule)
    if gradient not in ("identity", "clip"):
        raise UserError(f"gradient {gradient!r} is unknown; choose 'identity' or 'clip'")
    amax = None if amax is None else jnp.asarray(amax, jnp.float32)
    return _straight_through(_checked(x, spec), amax, spec, gradient, "max")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _straight_through(
    x: jax.Array,
    amax: jax.Array | None,
    spec: QuantSpec,
    gradient: Gradient,
    search: Search = "max",
) -> jax.Array:
    scales = find_block_scales(x, spec, amax, search)
    return numerics.from_grid(numerics.to_grid(x, scales, spec), scales, spec).astype(x.dtype)


def _forward(x, amax, spec, gradient, search):
    inside = None
    if gradient == "clip":
        scales = find_block_scales(x, spec, amax, search)
        inside = numerics.representable(x, scales, spec)
    return _straight_through(x, amax, spec, gradient, search), (inside, amax)


def _backward(spec, gradient, search, residuals, cotangent):
    inside, amax = residuals
    grad = cotangent if inside is None else jnp.where(inside, cotangent, jnp.zeros_like(cotangent))
    return grad, None if amax is None else jnp.zeros_like(amax)


_straight_through.defvjp(_forward, _backward)


_DEFAULT_OPTIONS = {
    "granularity": None,
    "block_size": None,
    "scale_dtype": None,
    "symmetric": True,
    "mx_rule": "ceil",
}


def _resolve(format: str | QuantSpec, *values: Any) -> QuantSpec:
    """Spec of a format's name with the options above in their order, or the spec that was given."""
    options = dict(zip(_DEFAULT_OPTIONS, values, strict=True))
    if isinstance(format, str):
        return resolve(format, **options)
    if options != _DEFAULT_OPTIONS:
        raise UserError("a QuantSpec is complete; options go with a format's name")
    return format


def _checked(x: jax.Array, spec: QuantSpec) -> jax.Array:
    x = jnp.asarray(x)
    least = 2 if spec.granularity == "block2d" else 1
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < least or x.size == 0:
        raise UserError(
            f"format {spec.format!r} quantizes non-empty float arrays of rank {least} or more; "
            f"this one is {x.dtype.name}{list(x.shape)}"
        )
    if not isinstance(x, Tracer) and not bool(jnp.all(jnp.isfinite(x))):
        raise UserError(
            f"the array {x.dtype.name}{list(x.shape)} holds NaN or infinity; "
            "find where it comes from before quantizing"
        )
    return x
