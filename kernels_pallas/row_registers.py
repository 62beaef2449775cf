"""Rows of activations in a warpgroup's registers, as kernels take them that see whole rows.

A row [K] is [K / 128, 128] there, in pieces that registers hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.registers import layout

BLOCK = 128
LEAST_BLOCKS = 4  # a row of a block for each warp
_MOST_BLOCKS = 64  # of a piece, as many registers of a thread


def has_kernel(*arrays: jax.Array) -> bool:
    """Whether there are rows, all bfloat16, and K is a multiple of 512."""
    typed = all(array.dtype == jnp.bfloat16 for array in arrays)
    return typed and arrays[0].size > 0 and arrays[0].shape[-1] % (LEAST_BLOCKS * BLOCK) == 0


def check_kernel(*arrays: jax.Array) -> None:
    """Raises ValueError unless `has_kernel`."""
    if not has_kernel(*arrays):
        raise ValueError(
            f"no kernel for {[f'{array.dtype}{array.shape}' for array in arrays]}; needed are "
            "bfloat16 [M, K], K a multiple of 512"
        )


def pieces(blocks: int, most: int = _MOST_BLOCKS) -> list[Any]:
    """Slices of a row's blocks."""
    sizes = range(min(blocks, most), 0, -1)
    size = next(s for s in sizes if not blocks % s | s % LEAST_BLOCKS)
    return [pl.ds(first, size) for first in range(0, blocks, size)]


def by_blocks(array: jax.Array) -> jax.Array:
    """[…, K] as […, K / 128, 128]."""
    return array.reshape(*array.shape[:-1], -1, BLOCK)


def read(ref: Any) -> jax.Array:
    """float32 [blocks, 128] from global memory."""
    blocks = block_layout(ref.shape[0])
    return plgpu.load(ref, layout=blocks, optimized=False).astype(jnp.float32)


def block_layout(blocks: int) -> Any:
    """[blocks, 128]: 16 lanes, or 32, hold a block's row, and the warps neighbouring ones."""
    vector = 8 if blocks % 8 == 0 else 4
    rows = vector // 4
    return layout(((4 * rows, BLOCK), (rows, BLOCK), (1, vector)), (-6,), (-4, -3))


def total(value: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sum(value, axis=1))


def inverse_rms(value: Callable[[Any], jax.Array], parts: Sequence[Any], eps: float) -> jax.Array:
    """`1 / sqrt(mean(x²) + eps)` of a row, of which `value` gives the parts."""
    squares = [total(jnp.square(value(part))) for part in parts]
    columns = sum(part.size for part in parts) * BLOCK
    return lax.rsqrt(sum(squares[1:], squares[0]) / columns + eps)


def silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


def stored(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounded to `dtype`, by an operation that a compiler does not remove as it does two casts."""
    bits = jnp.finfo(dtype)
    return lax.reduce_precision(x, bits.nexp, bits.nmant)


def kept(x: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    """float32, rounded to `dtype` in a kernel."""
    return stored(x, dtype) if interpret else x.astype(dtype).astype(jnp.float32)
