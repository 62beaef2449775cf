"""Canonical packing of codes narrower than a byte, along the last axis.

4 bits: two codes a byte, even index in the low nibble. 6 bits: four codes in three bytes, code i at
bits 6i..6i+5 of the little-endian 24-bit word. A last group that is not full is completed with
zeros; 8-bit codes are stored as they are.
"""

import jax
import jax.numpy as jnp


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [..., K] (one a byte) to bytes: uint8 [..., ceil(K·bits / 8)] up to a full group."""
    if bits == 8:
        return codes
    if bits == 4:
        low, high = _split(codes, 2)
        return low | (high << 4)
    a, b, c, d = _split(codes, 4)
    triple = (a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2))
    return _interleave(triple)


def unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
    """Inverse of `pack`: uint8 codes [..., size], sign bits not extended."""
    if bits == 8:
        return packed
    if bits == 4:
        codes = _interleave((packed & 0xF, packed >> 4))
    else:
        x, y, z = (packed[..., i::3] for i in range(3))
        four = (x, (x >> 6) | (y << 2), (y >> 4) | (z << 4), z >> 2)
        codes = _interleave(tuple(code & 0x3F for code in four))
    return codes if codes.shape[-1] == size else codes[..., :size]


def packed_size(size: int, bits: int) -> int:
    """Bytes that `size` codes take along the last axis."""
    return {8: size, 4: -(-size // 2), 6: -(-size // 4) * 3}[bits]


def padding(size: int, bits: int) -> int:
    """Codes that `pack` adds behind `size` codes to fill the last group."""
    return -size % {8: 1, 4: 2, 6: 4}[bits]


def _split(codes: jax.Array, group: int) -> tuple[jax.Array, ...]:
    mask = 0xF if group == 2 else 0x3F
    codes = codes.astype(jnp.uint8) & mask
    short = -codes.shape[-1] % group
    if short:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    return tuple(codes[..., i::group] for i in range(group))


def _interleave(parts: tuple[jax.Array, ...]) -> jax.Array:
    stacked = jnp.stack(parts, axis=-1)
    return stacked.reshape(*stacked.shape[:-2], -1)
