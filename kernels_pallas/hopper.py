"""What all kernels share of Hopper: whether it is there, its memory and registers, and a ring."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SHARED_MEMORY = 232448  # bytes of one CTA
# Of a thread that multiplies and one that copies, by warpgroups that multiply: together no more
# than what a CTA starts with, else they wait for each other forever.
REGISTERS = {1: (232, 40), 2: (232, 40), 3: (152, 40), 4: (112, 24)}


def hopper_processors() -> int | None:
    """Streaming multiprocessors of the default device; None if it is no Hopper GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or float(device.compute_capability) != 9.0:
        return None
    return device.core_count


def rounded(size: int, tile: int) -> int:
    """A size that a tiled copy from or to an array can have: below a tile, or whole tiles."""
    return size if size < tile else -(-size // tile) * tile


def tiled_memory(shape: tuple[int, ...], dtype: Any, columns: int = 0) -> Any:
    """Shared memory in tiles of 8 rows of up to 128 bytes, whose 16-byte pieces are permuted.

    So lanes that read a column of pieces find them in different banks.

    Args:
      columns: of the array that it is copied from or to, if they may be no whole 128 bytes.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(128, shape[-1] * itemsize, columns * itemsize)
    transforms = (
        plgpu.TilingTransform((8, swizzle // itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def fill_ring(
    turns: Any, steps: int, stages: int, empty: Any, fill: Callable[[Any, Any, Any], None]
) -> None:
    """Fills slots as they become empty, and leaves when the last one is.

    Args:
      turns: tiles of a CTA.
      steps: slots that a tile passes through.
      stages: slots of the ring.
      empty: a barrier for each.
      fill: is called with turn, step and slot.
    """
    total = turns * steps

    def one_slot(count: Any, _: None) -> None:
        turn, step = lax.div(count, steps), lax.rem(count, steps)
        slot = lax.rem(count, stages)

        @pl.when(count >= stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        @pl.when(count < total)
        def _():
            fill(turn, step, slot)

    lax.fori_loop(0, total + stages, one_slot, None)
