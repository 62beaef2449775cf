"""The grids of values that codes can hold: integers, minifloats, tables of levels.

Rounding is float32 arithmetic and never a cast: a compiler may remove a pair of casts but not a
`round`, and a cast of a value that is already on its grid is exact.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax


class Element(Protocol):
    """The grid of values that one code can hold.

    `largest` is the magnitude that a tile's amax is mapped to, `lowest` the least value of the
    grid, `bits` the size of a code, `storage` the dtype of an unpacked code.
    """

    @property
    def bits(self) -> int: ...
    @property
    def largest(self) -> float: ...
    @property
    def lowest(self) -> float: ...
    @property
    def storage(self) -> str: ...

    def round(self, y: jax.Array) -> jax.Array:
        """Nearest grid value, ties to the even code, saturating; float32 to float32."""
        ...

    def encode(self, grid: jax.Array) -> jax.Array:
        """Code of a value that is on the grid."""
        ...

    def decode(self, codes: jax.Array) -> jax.Array:
        """Grid value of a code, float32."""
        ...


@dataclass(frozen=True)
class Integer:
    """Two's complement integers [-2^(bits-1), 2^(bits-1) - 1]; amax maps to 2^(bits-1) - 1."""

    bits: int
    storage: str = "int8"

    @property
    def largest(self) -> float:
        return 2.0 ** (self.bits - 1) - 1

    @property
    def lowest(self) -> float:
        return -(2.0 ** (self.bits - 1))

    def round(self, y: jax.Array) -> jax.Array:
        rounded = jnp.clip(jnp.round(y), self.lowest, self.largest)
        return jnp.where(rounded == 0, 0.0, rounded)  # an integer code holds no negative zero

    def encode(self, grid: jax.Array) -> jax.Array:
        return grid.astype(jnp.int8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32)


@dataclass(frozen=True)
class Minifloat:
    """Floats of 1 sign, some exponent and `mantissa` bits, subnormals included, no infinities.

    The code of a positive value is its ordinal on the grid, so that `sign << (bits - 1) | ordinal`
    is both the IEEE-like bit pattern and the order. `min_exponent` is that of the smallest normal.
    """

    bits: int
    mantissa: int
    min_exponent: int
    largest: float
    storage: str = "uint8"

    @property
    def lowest(self) -> float:
        return -self.largest

    def round(self, y: jax.Array) -> jax.Array:
        y = jnp.clip(y, self.lowest, self.largest)
        exponent = jnp.maximum(exponent_of(y), self.min_exponent) - self.mantissa
        return jnp.round(y * power_of_two(-exponent)) * power_of_two(exponent)

    def encode(self, grid: jax.Array) -> jax.Array:
        if self.bits == 8:
            return grid.astype(self.storage)
        magnitude = jnp.abs(grid)
        normal = (float_bits(magnitude) >> (23 - self.mantissa)) - self._rebase
        subnormal = (magnitude * 2.0 ** (self.mantissa - self.min_exponent)).astype(jnp.int32)
        ordinal = jnp.where(magnitude < 2.0**self.min_exponent, subnormal, normal)
        sign = jnp.signbit(grid).astype(jnp.int32) << (self.bits - 1)
        return (sign | ordinal).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        if self.bits == 8:
            return codes.astype(jnp.float32)
        codes = codes.astype(jnp.int32)
        ordinal = codes & (2 ** (self.bits - 1) - 1)
        subnormal = ordinal.astype(jnp.float32) * 2.0 ** (self.min_exponent - self.mantissa)
        normal = float_from_bits((ordinal + self._rebase) << (23 - self.mantissa))
        magnitude = jnp.where(ordinal < 2**self.mantissa, subnormal, normal)
        return jnp.where(codes >> (self.bits - 1) == 1, -magnitude, magnitude)

    @property
    def _rebase(self) -> int:
        """Distance from this format's ordinals to float32's, both at this mantissa width."""
        return (self.min_exponent - 1 + 127) << self.mantissa


@dataclass(frozen=True)
class Levels:
    """An arbitrary ascending table of values; a tie goes to the lower level."""

    table: tuple[float, ...]
    bits: int = 4
    storage: str = "uint8"

    @property
    def largest(self) -> float:
        return max(abs(level) for level in self.table)

    @property
    def lowest(self) -> float:
        return self.table[0]

    def round(self, y: jax.Array) -> jax.Array:
        return self.decode(self._nearest(y))

    def encode(self, grid: jax.Array) -> jax.Array:
        return self._nearest(grid).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return jnp.asarray(self.table, jnp.float32)[codes.astype(jnp.int32)]

    def _nearest(self, y: jax.Array) -> jax.Array:
        levels = zip(self.table, self.table[1:], strict=False)
        return sum(((y > (low + high) / 2).astype(jnp.int32) for low, high in levels), jnp.int32(0))


E4M3 = Minifloat(8, 3, -6, 448.0, "float8_e4m3fn")
E5M2 = Minifloat(8, 2, -14, 57344.0, "float8_e5m2")
E3M2 = Minifloat(6, 2, -2, 28.0)
E2M3 = Minifloat(6, 3, 0, 7.5)
E2M1 = Minifloat(4, 1, 0, 6.0)
INT8 = Integer(8)
INT4 = Integer(4)
# The quantiles of N(0, 1) that QLoRA tabulates (Dettmers et al. 2023, arXiv:2305.14314, appendix
# E).
NF4 = Levels(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)


def float_bits(x: jax.Array) -> jax.Array:
    """Bit pattern of float32 numbers, int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def float_from_bits(bits: jax.Array) -> jax.Array:
    """Float32 numbers of int32 bit patterns."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def exponent_of(x: jax.Array) -> jax.Array:
    """floor(log2|x|) of normal float32 numbers; -127 for zero."""
    return ((float_bits(x) >> 23) & 0xFF) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent for exponents in [-126, 127]."""
    return float_from_bits((exponent + 127) << 23)
