"""4-bit weights in the order in which tensor cores consume them, and back.

`mma.m16n8k16` multiplies a 16 x 16 piece of one matrix with a 16 x 8 piece of another, and each of
a warp's 32 lanes holds certain entries of both. A weight [N, K] is stored so that what a lane reads
from memory, 16 bytes at a time, are its own entries, and a few bit operations on each 32-bit word
make bfloat16 of them. Nothing is exchanged between lanes, and a warp reads 512 bytes in one piece.

A *unit* is 16 rows and 64 columns: 128 words. Lane l = 4 g + t holds rows g and g + 8; its four
words serve four instructions. Word j has of both rows columns 16 j + {2 t, 2 t + 1, 2 t + 8, 2 t +
9}, which are those that this lane feeds to `mma.m16n8k16`, as either operand, and to `wgmma` from
registers: one packing for every kernel, and activations in their own order. Units follow one
another along K, then along N.

    INT4    nibble 4 i of each half word is register i; code | 0x4300 is 128 + code in bfloat16.
    E2M1    sign and magnitude sit where a rotation by 0, 3 or 6 bits brings them to bits 15 and
            8..6 of each half word, the place of the same value times 2^-126 in bfloat16 (register
            3 takes what is left, in three pieces).

Register i = 2 h + r holds columns 2 t + 8 h and the next, of row g + 8 r.

Scales, too, are in pairs (row g, row g + 8). INT4 has one bfloat16 for 128 columns: a word a pair.
NVFP4 has one for each 16 columns: a byte with 5 exponent and 3 mantissa bits, which holds every
positive E4M3 number without its subnormals' special case. MXFP4 has a power of two for each 32
columns: a byte, relative to the largest. Of these, the four lanes of a g read the same words.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Kind = Literal["int4", "nvfp4", "mxfp4"]

ROWS = 16  # of a unit
BLOCK_ROWS = 64  # that four warps take together; N is padded to a multiple
STEP = 512  # columns that four warps take at a time; K is padded to a multiple
WORDS_A_GROUP = 256  # codes of 16 rows x 128 columns
SCALE_WORDS = {"int4": 8, "nvfp4": 32, "mxfp4": 16}  # scales of the same
INT4_BLOCK = 128
E2M1_BLOCK = {"nvfp4": 16, "mxfp4": 32}

# E2M1: right rotations that bring a register's bits into place, and the mask of that place.
ROTATIONS = (0, 3, 6)
_PLACE = (6, 7, 8, 15)  # mantissa, exponent, exponent, sign, in each half word
_LEFT_OVER = (0, 3, 4, 1)  # those of register 3

NVFP4_BIAS = 10  # byte = (exponent + 10) << 3 | mantissa
NVFP4_SHIFT = -10  # a product in the kernel is 2^-10 times the value
MXFP4_TOP = 245  # byte of the largest exponent
MXFP4_SHIFT = -8
_MXFP4_LEAST = 127


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "factor"),
    meta_fields=("kind", "shape"),
)
@dataclass(frozen=True)
class FourBit:
    """A 4-bit weight in fragment order.

    Attributes:
      codes: int32 [N' / 16, 2 K'], N' and K' the shape padded to multiples of 64 and 512.
      scales: int32 [N' / 16, K' / 128 · words], see `SCALE_WORDS`.
      factor: float32 [N' / 16], what a kernel's sums are multiplied by, for each 16 rows; 1 for
        INT4.
      kind: format; static.
      shape: (N, K); static.
    """

    codes: jax.Array
    scales: jax.Array
    factor: jax.Array
    kind: Kind
    shape: tuple[int, int]

    @property
    def tiles(self) -> int:
        """N' / 16."""
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        """K'."""
        return self.codes.shape[1] // 2

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns that belong together: what a weight is split and joined by."""
        return BLOCK_ROWS, STEP

    def dequantize(self) -> jax.Array:
        """The weight, float32 [N, K], exact."""
        values = values_of(self.codes, self.scales, self.kind)
        values = values * jnp.repeat(self.factor, ROWS)[:, None]
        return values[: self.shape[0], : self.shape[1]]


def pack_int4(codes: jax.Array, scales: jax.Array) -> FourBit:
    """Symmetric INT4 with a scale for each 128 columns.

    Args:
      codes: integers [N, K] in [-8, 7], K a multiple of 128.
      scales: [N, K / 128]; rounded to bfloat16.

    Raises:
      ValueError: for shapes that do not fit.
    """
    _check(codes, scales, INT4_BLOCK)
    nibbles = _padded((codes + 8).astype(jnp.uint32), STEP, 8)
    halves = lax.bitcast_convert_type(scales.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    halves = _padded(halves, STEP // INT4_BLOCK)
    ordered = halves.reshape(-1, 2, 8, halves.shape[1]).transpose(0, 3, 2, 1)  # [.., g, half]
    words = ordered[..., 0] | ordered[..., 1] << 16
    return FourBit(
        codes=_signed(_packed_codes(nibbles, "int4")),
        scales=_signed(words.reshape(len(words), -1)),
        factor=jnp.ones(len(words), jnp.float32),
        kind="int4",
        shape=_shape(codes),
    )


def pack_nvfp4(codes: jax.Array, scales: jax.Array, tensor_scale: jax.Array) -> FourBit:
    """NVFP4: E2M1 with an E4M3 scale for each 16 columns and a float32 one for the tensor.

    Args:
      codes: E2M1 bit patterns 0..15, integers [N, K], K a multiple of 16.
      scales: [N, K / 16], non-negative E4M3 values in any float type.
      tensor_scale: float32 [].

    Raises:
      ValueError: for shapes that do not fit.
    """
    _check(codes, scales, 16)
    # Behind a barrier, since XLA would drop a rounding to E4M3 that comes just before.
    values = lax.optimization_barrier(scales).astype(jnp.float32)
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    # The upper bits of float32 are exponent and mantissa; zero has neither.
    exponents = (bits >> 20).astype(jnp.int32) - ((127 - NVFP4_BIAS) << 3)
    zero = values == 0
    scale_bytes = jnp.where(zero, 0, exponents).astype(jnp.uint32)
    nibbles = jnp.where(jnp.repeat(zero, 16, axis=1), 0, codes).astype(jnp.uint32)
    words = _scale_words(_padded(scale_bytes, STEP // 16), 16)
    return FourBit(
        codes=_signed(_packed_codes(_padded(nibbles, STEP), "nvfp4")),
        scales=_signed(words),
        factor=jnp.full(len(words), tensor_scale * 2.0**-NVFP4_SHIFT, jnp.float32),
        kind="nvfp4",
        shape=_shape(codes),
    )


def pack_mxfp4(codes: jax.Array, exponents: jax.Array) -> FourBit:
    """MXFP4: E2M1 with a power of two for each 32 columns.

    A block whose exponent is more than 118 below the tensor's largest becomes zero: beside that
    largest, float32 sums would not notice it.

    Args:
      codes: E2M1 bit patterns 0..15, integers [N, K], K a multiple of 32.
      exponents: integers [N, K / 32], e of the scale 2^e.

    Raises:
      ValueError: for shapes that do not fit.
    """
    _check(codes, exponents, 32)
    largest = jnp.max(exponents)
    scale_bytes = exponents.astype(jnp.int32) - largest + MXFP4_TOP
    lost = scale_bytes < _MXFP4_LEAST
    factor = jnp.ldexp(jnp.float32(1), largest - MXFP4_SHIFT)
    nibbles = jnp.where(jnp.repeat(lost, 32, axis=1), 0, codes).astype(jnp.uint32)
    scale_bytes = _padded(jnp.maximum(scale_bytes, _MXFP4_LEAST).astype(jnp.uint32), STEP // 32)
    return FourBit(
        codes=_signed(_packed_codes(_padded(nibbles, STEP), "mxfp4")),
        scales=_signed(_scale_words(scale_bytes, 32)),
        factor=jnp.full(len(scale_bytes) // ROWS, factor),
        kind="mxfp4",
        shape=_shape(codes),
    )


def values_of(codes: jax.Array, scales: jax.Array, kind: Kind) -> jax.Array:
    """Weights of packed words, without the factor: int32 [R, 2 K], [R, …] -> float32 [16 R, K].

    Uses nothing but arithmetic, so that it can stand in for registers inside a kernel.
    """
    nibbles = unpacked_codes(codes, kind)
    if kind == "int4":
        return (nibbles.astype(jnp.float32) - 8) * jnp.repeat(_int4_scales(scales), INT4_BLOCK, 1)
    exponent, mantissa = nibbles >> 1 & 3, (nibbles & 1).astype(jnp.float32)
    magnitude = jnp.where(
        exponent == 0, mantissa / 2, (1 + mantissa / 2) * (1 << exponent).astype(jnp.float32) / 2
    )
    values = jnp.where((nibbles & 8) != 0, -magnitude, magnitude)
    block = E2M1_BLOCK[kind]
    scale_bytes = _scale_bytes(scales, block)
    if kind == "nvfp4":
        bits = (scale_bytes + ((127 - NVFP4_BIAS + NVFP4_SHIFT) << 3)) << 20
    else:  # its top byte stands for 2^0
        bits = (scale_bytes + (127 - MXFP4_TOP + MXFP4_SHIFT)) << 23
    return values * jnp.repeat(lax.bitcast_convert_type(bits, jnp.float32), block, 1)


def unpacked_codes(words: jax.Array, kind: Kind) -> jax.Array:
    """Nibbles of words: int32 [R, 2 K] -> uint32 [16 R, K]."""
    tiles = len(words)
    unsigned = lax.bitcast_convert_type(words, jnp.uint32).reshape(tiles, -1, 8, 4, 4)
    registers = [[_gathered(unsigned, places) for places in pair] for pair in _places(kind)]
    nibbles = jnp.stack([jnp.stack(pair, -1) for pair in registers], -2)  # [.., register, e]
    nibbles = nibbles.reshape(*unsigned.shape, 2, 2, 2)  # [tile, unit, g, t, j, pair, half, e]
    return nibbles.transpose(0, 6, 2, 1, 4, 5, 3, 7).reshape(ROWS * tiles, -1)


def _packed_codes(nibbles: jax.Array, kind: Kind) -> jax.Array:
    rows, columns = nibbles.shape
    ordered = nibbles.reshape(rows // ROWS, 2, 8, columns // 64, 4, 2, 4, 2)
    ordered = ordered.transpose(0, 3, 2, 6, 4, 5, 1, 7)  # [tile, unit, g, t, j, pair, half, e]
    ordered = ordered.reshape(*ordered.shape[:5], 4, 2)
    words = jnp.zeros(ordered.shape[:5], jnp.uint32)
    for register, pair in enumerate(_places(kind)):
        for e, places in enumerate(pair):
            for bit, place in enumerate(places):
                words = words | (ordered[..., register, e] >> bit & 1) << place
    return words.reshape(rows // ROWS, -1)


def _places(kind: Kind) -> list[list[tuple[int, ...]]]:
    """[register][half word] -> where the four bits of a code are in the word, lowest bit first."""
    if kind == "int4":
        return [[tuple(4 * i + 16 * e + b for b in range(4)) for e in range(2)] for i in range(4)]
    rotated = [
        [tuple((place + 16 * e + rotation) % 32 for place in _PLACE) for e in range(2)]
        for rotation in ROTATIONS
    ]
    return [*rotated, [tuple(place + 16 * e for place in _LEFT_OVER) for e in range(2)]]


def _gathered(words: jax.Array, places: tuple[int, ...]) -> jax.Array:
    bits = [(words >> place & 1) << bit for bit, place in enumerate(places)]
    return bits[0] | bits[1] | bits[2] | bits[3]


def _int4_scales(words: jax.Array) -> jax.Array:
    """[R, 8 a group] -> float32 [16 R, groups]."""
    unsigned = lax.bitcast_convert_type(words, jnp.uint32).reshape(len(words), -1, 8)
    pair = jnp.stack([unsigned << 16, unsigned >> 16 << 16], 1)  # [tile, half, group, g]
    ordered = pair.transpose(0, 1, 3, 2).reshape(ROWS * len(words), -1)
    return lax.bitcast_convert_type(ordered, jnp.float32)


def _scale_words(scale_bytes: jax.Array, block: int) -> jax.Array:
    """Bytes [N, K / block] -> [N / 16, words a group · groups]: for each g, (row g, row g + 8) of a
    block, then of the next."""
    tiles, blocks = scale_bytes.shape[0] // ROWS, 128 // block
    ordered = scale_bytes.reshape(tiles, 2, 8, -1, blocks).transpose(0, 3, 2, 4, 1)
    ordered = ordered.reshape(tiles, -1, 4)
    words = ordered[..., 0]
    for i in range(1, 4):
        words = words | ordered[..., i] << 8 * i
    return words


def _scale_bytes(words: jax.Array, block: int) -> jax.Array:
    """The inverse: [R, words a group · groups] -> int32 [16 R, K / block]."""
    unsigned = lax.bitcast_convert_type(words, jnp.uint32)
    parts = jnp.stack([unsigned >> 8 * i & 255 for i in range(4)], -1).astype(jnp.int32)
    parts = parts.reshape(len(words), -1, 8, 128 // block, 2)  # [tile, group, g, block, half]
    return parts.transpose(0, 4, 2, 1, 3).reshape(ROWS * len(words), -1)


def _padded(array: jax.Array, columns: int, value: int = 0) -> jax.Array:
    """Rows to a multiple of 64 and columns to one of `columns`."""
    pads = ((0, -array.shape[0] % BLOCK_ROWS), (0, -array.shape[1] % columns))
    return jnp.pad(array, pads, constant_values=value)


def _signed(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, jnp.int32)


def _shape(codes: jax.Array) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1]


def _check(codes: jax.Array, scales: jax.Array, block: int) -> None:
    if codes.ndim != 2 or codes.shape[1] % block:
        raise ValueError(
            f"codes have shape {codes.shape}; needed is [N, K], K a multiple of {block}"
        )
    expected = (codes.shape[0], codes.shape[1] // block)
    if scales.shape != expected:
        raise ValueError(f"scales have shape {scales.shape}; codes {codes.shape} need {expected}")
