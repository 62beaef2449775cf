"""Weights that are trained while they act as if they were quantized.

    Ŵ = s · round(clip(W / s)),    s from the weight, fixed, or learnt

The law: `FakeTensor.fold()` is the quantized leaf with the same forward pass, bit for bit. It holds
as both are `numerics.to_grid` and `from_grid` under the same scales.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models import numerics
from jaxopt_models.division import divide
from jaxopt_models.elements import E4M3
from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import Scales, tile_expand, tile_reduce
from jaxopt_models.qtensor import (
    Gradient,
    InputQuantizer,
    LowRank,
    QTensor,
    fake_quant,
    quantize_with,
)
from jaxopt_models.tree import WeightLeaf

_LEAST = 2.0**-100  # of a learnt magnitude, so that nothing is divided by zero


@struct.dataclass
class LearnedAmax:
    """Magnitudes that are trained along with the weight: `s = amax / E`, E the largest grid value.

    With x = W / s and g the gradient of Ŵ, as if rounding were the identity and s were not rounded:

        dL/ds = Σ g · (round(x) - x)  where x is inside the grid,  Σ g · round(x)  outside

    Attributes:
      amax: float32, one a tile. Tiles of two-level scales whose block scale is at an end of its
        range have no gradient.
      rounding: the same, of the s by which W is divided, where it is another one than that by which
        the result is multiplied; None for one s. It is never rounded.
      overall: float32 with all extents 1, of two-level scales; not trained.

    Reference: Esser et al. 2019, arXiv:1902.08153.
    """

    amax: jax.Array
    rounding: jax.Array | None = None
    overall: jax.Array | None = None

    def scales(self, spec: QuantSpec) -> Scales:
        scales = numerics.scales_from_amax(_positive(self.amax), spec, self.overall)
        if self.rounding is None:
            return scales
        inverse = divide(spec.element.largest, _positive(self.rounding))
        return replace(scales, inverse=jax.lax.optimization_barrier(inverse))


@struct.dataclass
class FakeTensor(WeightLeaf):
    """A float weight that computes as the `QTensor` it will become.

    Attributes:
      weight: [..., N, K], float32, of the rotated space; this is trained.
      scales: None takes them from the weight at every step, `Scales` are fixed, and a `LearnedAmax`
        is trained.
      overall: float32 with all extents 1: where scales are None, the magnitude that the second
        level of two-level scales is made of; None takes the weight's. Not trained.
      pre_scale, low_rank, input, rotate: as in `QTensor`.
      spec: number format; static.
      gradient: straight through, or masked to what the grid can represent ("clip"); static.
      dtype: as in `QTensor`; static.
    """

    weight: jax.Array
    scales: Scales | LearnedAmax | None = None
    overall: jax.Array | None = None
    pre_scale: jax.Array | None = None
    low_rank: LowRank | None = None
    input: InputQuantizer | None = None
    spec: QuantSpec = struct.field(pytree_node=False, kw_only=True)
    gradient: Gradient = struct.field(pytree_node=False, default="identity", kw_only=True)
    dtype: str = struct.field(pytree_node=False, default="float32", kw_only=True)
    rotate: int = struct.field(pytree_node=False, default=0, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def weight_bits(self) -> int:
        """Of the folded leaf."""
        return jax.eval_shape(FakeTensor.fold, self).weight_bits

    def current_scales(self) -> Scales:
        """Those of this step."""
        if self.scales is None:
            return numerics.find_scales(self.weight, self.spec, self.overall)
        return _current(self.scales, self.spec)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array that the folded leaf stands for; gradients reach the weight and learnt scales.

        Args:
          dtype: of the result, which is computed in float32; None takes that of the leaf.
        """
        rounded: jax.Array
        if self.scales is None:
            options: dict[str, Any] = {"amax": self.overall, "gradient": self.gradient}
            rounded = fake_quant(self.weight, self.spec, **options)
        else:
            rounded = _rounded(self.weight, self.scales, self.spec, self.gradient)
        return rounded.astype(dtype or self.dtype)

    def fold(self) -> QTensor:
        """The quantized leaf."""
        q = quantize_with(self.weight, self.current_scales(), self.spec)
        return replace(
            q,
            pre_scale=self.pre_scale,
            low_rank=self.low_rank,
            input=self.input,
            dtype=self.dtype,
            rotate=self.rotate,
        )


def learned_amax(scales: Scales, spec: QuantSpec, untied: bool = False) -> LearnedAmax:
    """What stands for given scales, to be trained from there.

    Args:
      scales: of a weight.
      untied: a second magnitude, for the division alone.

    Raises:
      UserError: for a format whose scales are powers of two, or that has a zero point.
    """
    if spec.power_of_two or scales.zero_point is not None:
        what = "powers of two" if spec.power_of_two else "zero points"
        raise UserError(
            f"the scales of {spec.format!r} have {what} and cannot be learnt; choose 'static' or "
            "'dynamic' ones, or another format"
        )
    amax = numerics.real_scale(scales, spec) * spec.element.largest
    return LearnedAmax(amax, amax if untied else None, numerics.overall_amax(scales, spec))


def _current(scales: Scales | LearnedAmax, spec: QuantSpec) -> Scales:
    return scales.scales(spec) if isinstance(scales, LearnedAmax) else scales


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounded(
    weight: jax.Array, scales: Scales | LearnedAmax, spec: QuantSpec, gradient: Gradient
) -> jax.Array:
    """Ŵ under given scales, float32."""
    found = _current(scales, spec)
    return numerics.from_grid(numerics.to_grid(weight, found, spec), found, spec)


def _forward(weight: Any, scales: Any, spec: QuantSpec, gradient: Gradient) -> Any:
    out = _rounded(weight, scales, spec, gradient)
    if isinstance(scales, LearnedAmax):
        return out, (weight, scales, None)
    inside = numerics.representable(weight, scales, spec) if gradient == "clip" else None
    return out, (None, None, inside)


def _backward(spec: QuantSpec, gradient: Gradient, residuals: Any, cotangent: jax.Array) -> Any:
    weight, learned, inside = residuals
    if learned is None:
        masked = cotangent if inside is None else jnp.where(inside, cotangent, 0.0)
        return masked, None
    return _learned_gradients(weight, learned, spec, gradient, cotangent)


_rounded.defvjp(_forward, _backward)


def _learned_gradients(
    weight: jax.Array,
    learned: LearnedAmax,
    spec: QuantSpec,
    gradient: Gradient,
    cotangent: jax.Array,
) -> tuple[jax.Array, LearnedAmax]:
    scales, tile = learned.scales(spec), spec.tile(weight.shape)
    grid = numerics.to_grid(weight, scales, spec)
    inverse = tile_expand(numerics.inverse_scale(scales, spec), tile, weight.shape)
    inside = numerics.representable(weight, scales, spec)
    steps = jnp.where(inside, weight * inverse, 0.0)

    def of_tiles(each: jax.Array, free: jax.Array | bool) -> jax.Array:
        summed = tile_reduce(cotangent * each, tile, jnp.sum) / spec.element.largest
        return jnp.where(free, summed, 0.0)

    of_weight = jnp.where(inside, cotangent, 0.0) if gradient == "clip" else cotangent
    free = _free(learned, spec)
    if learned.rounding is None:
        return of_weight, LearnedAmax(of_tiles(grid - steps, free), None, _zeros(learned.overall))
    ratio = tile_expand(numerics.real_scale(scales, spec), tile, weight.shape) * inverse
    of_amax, of_rounding = of_tiles(grid, free), of_tiles(-steps * ratio, True)
    return of_weight * ratio, LearnedAmax(of_amax, of_rounding, _zeros(learned.overall))


def _free(learned: LearnedAmax, spec: QuantSpec) -> jax.Array | bool:
    """Tiles whose scale is not at an end of its range."""
    if learned.overall is None:
        return True
    block = learned.amax * E4M3.largest / learned.overall
    return (block > 2.0**-9) & (block < E4M3.largest)


def _positive(amax: jax.Array) -> jax.Array:
    return jnp.maximum(amax, _LEAST)


def _zeros(array: jax.Array | None) -> jax.Array | None:
    return None if array is None else jnp.zeros_like(array)
