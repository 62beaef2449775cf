"""8-bit weights and activations: what they stand for, and how activations become codes.

    scale = amax / largest            1 if amax = 0; at least 2^-126
    code  = round(x · (largest / amax))    to even, saturating

amax belongs to a row (`fp8`, `int8`) or to 128 columns of a row (`fp8_block`), or is given, one for
all of `x`; the largest value is 448 for E4M3 and 127 for INT8. All is float32, subnormal inputs
count as zero, and quotients are the nearest float32 on every device, because codes at ties hang on
their last bit.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Kind = Literal["fp8", "fp8_block", "int8"]

KINDS: tuple[Kind, ...] = ("fp8", "fp8_block", "int8")
BLOCK = 128
_TINY = 2.0**-126  # smallest normal float32


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("kind",))
@dataclass(frozen=True)
class EightBit:
    """An 8-bit weight [N, K], K-major.

    Attributes:
      codes: [N, K], float8_e4m3fn or float8_e5m2 for `fp8` and `fp8_block`, int8 for `int8`.
      scales: float32 [N], one for each channel (a scale of the tensor is repeated); for `fp8_block`
        [⌈N / 128⌉, K / 128], one for each 128 x 128 block.
      kind: format; static.
    """

    codes: jax.Array
    scales: jax.Array
    kind: Kind

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns that belong together: what a weight is split and joined by."""
        return (BLOCK, BLOCK) if self.kind == "fp8_block" else (16, 32)

    def dequantize(self) -> jax.Array:
        """The weight, float32 [N, K]."""
        values = self.codes.astype(jnp.float32)
        if self.kind != "fp8_block":
            return values * self.scales[:, None]
        of_rows = jnp.repeat(self.scales, BLOCK, 0)[: self.shape[0]]
        return values * jnp.repeat(of_rows, BLOCK, 1)


def code_dtype(kind: Kind) -> Any:
    """Of activations."""
    return jnp.int8 if kind == "int8" else jnp.float8_e4m3fn


def scale_shape(kind: Kind, m: int, k: int) -> tuple[int, ...]:
    """Of activations [m, k]: [m], or [k / 128, m'], m' being m rounded up to a multiple of 4.

    The rounding lets Hopper copy the scales of a block; what stands beyond m means nothing.
    """
    return (k // BLOCK, -(-m // 4) * 4) if kind == "fp8_block" else (m,)


def encode(x: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of activations [M, K], in jnp: the oracle, and the path without a kernel.

    Returns:
      codes [M, K]; scales float32 in `scale_shape`.
    """
    m, k = x.shape
    largest = largest_of(kind)
    blocks = normal(x).reshape(m, -1, BLOCK if kind == "fp8_block" else k)
    scale, inverse = scale_and_inverse(jnp.max(jnp.abs(blocks), axis=2), largest)
    # So that a compiler computes them once for each block, and rounds them.
    scale, inverse = lax.optimization_barrier((scale, inverse))
    codes = rounded(blocks * inverse[:, :, None], kind).reshape(m, k)
    if kind != "fp8_block":
        return codes, scale[:, 0]
    return codes, jnp.pad(scale.T, ((0, 0), (0, -m % 4)))


def encode_by(x: jax.Array, amax: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of activations [M, K] by a given magnitude; what is beyond it saturates.

    The scale is the same for all rows, but for those with a NaN, which has no code in INT8: there
    it is NaN.

    Args:
      amax: float32 [].
      kind: `fp8` or `int8`.

    Returns:
      codes [M, K]; scales float32 [M].

    Raises:
      ValueError: for shapes or a kind that do not fit.
    """
    if x.ndim != 2 or amax.ndim or kind == "fp8_block":
        raise ValueError(
            f"activations {x.shape} in {kind} by an amax {amax.shape}; needed are [M, K] in fp8 or "
            "int8, and one number"
        )
    scale, inverse = lax.optimization_barrier(scale_and_inverse(amax, largest_of(kind)))
    x = normal(x)
    scales = jnp.broadcast_to(scale, len(x))
    if kind == "int8":
        scales = jnp.where(jnp.any(jnp.isnan(x), axis=1), jnp.nan, scales)
    return rounded(x * inverse, kind), scales


def decode(codes: jax.Array, scales: jax.Array, kind: Kind) -> jax.Array:
    """Activations that codes and scales stand for, float32 [M, K]."""
    values = codes.astype(jnp.float32)
    if kind != "fp8_block":
        return values * scales[:, None]
    return values * jnp.repeat(scales[:, : len(codes)].T, BLOCK, 1)


def largest_of(kind: Kind) -> float:
    """What amax becomes."""
    return 127.0 if kind == "int8" else 448.0


def normal(x: jax.Array) -> jax.Array:
    """float32, with zero for subnormals and negative zero."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < _TINY, 0.0, x)


def scale_and_inverse(amax: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """(scale, what values are multiplied with); NaN if amax is not finite."""
    amax = jnp.where(amax < jnp.inf, amax, jnp.nan)
    scale = jnp.where(amax == 0, 1.0, jnp.maximum(quotient(amax, largest), _TINY))
    safe = amax > 2.0**-110  # below, the quotient could overflow
    top, bottom = jnp.where(safe, largest, 1.0), jnp.where(safe, amax, scale)
    return scale, quotient(top, bottom)


def rounded(y: jax.Array, kind: Kind) -> jax.Array:
    """Codes of float32 values in units of the scale.

    Rounding is arithmetic, and the cast exact, since casts to 8 bits round twice on some devices.
    """
    if kind == "int8":
        return jnp.clip(jnp.round(y), -128, 127).astype(jnp.int8)
    y = jnp.clip(y, -448.0, 448.0)
    exponent = jnp.maximum((_bits(y) >> 23 & 255) - 127, -6) - 3  # of the last mantissa bit
    grid = jnp.round(y * _power_of_two(-exponent)) * _power_of_two(exponent)
    return grid.astype(jnp.float8_e4m3fn)


def quotient(a: jax.Array | float, b: jax.Array | float) -> jax.Array:
    """Nearest float32 to a / b of positive numbers, whatever the device's division does.

    With mantissas a, b in [1, 2) and q ≈ a / b the result is q + (a - q b) / b; halves of 12 bits
    make every product exact, fused or not. Subnormals count as zero, and others divide as usual.

    Reference: Dekker 1971, "A floating-point technique for extending the available precision".
    """
    a, b = jnp.broadcast_arrays(jnp.float32(a), jnp.float32(b))
    top, bottom = _mantissa(a), _mantissa(b)
    q = _float(_bits(top / bottom) & -2)
    (q_high, q_low), (b_high, b_low) = _halves(q), _halves(bottom)
    rest = top - q_high * b_high - q_high * b_low - q_low * b_high - q_low * b_low
    shift = (_bits(a) >> 23) - (_bits(b) >> 23)
    half = shift >> 1  # the whole has no power of two of its own
    exact = (q + rest / bottom) * _power_of_two(half) * _power_of_two(shift - half)
    regular = (a >= _TINY) & (a < jnp.inf) & (b >= _TINY) & (b < jnp.inf)
    return jnp.where(regular, exact, a / b)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = _float(_bits(x) & -4096)
    return high, x - high


def _mantissa(x: jax.Array) -> jax.Array:
    return _float(_bits(x) & 0x7FFFFF | 0x3F800000)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return _float(exponent + 127 << 23)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
