"""Arrays that lie in a warpgroup's registers as we say, beside those that Mosaic GPU makes."""

from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu


def layout(tiling: Any, warps: tuple[Any, ...], lanes: tuple[Any, ...]) -> Any:
    """Which registers of which lanes hold an array; the last tile's entries share a register.

    Args:
      tiling: tiles of the array, tiles of those, and so on.
      warps, lanes: dimensions of the tiled shape, from its end, that go over warps and lanes, or
        `plgpu.Replicated`.
    """
    tiled = mgpu.TiledLayout(plgpu.Tiling(tiling), warps, lanes, -1, _check_canonical=False)
    tiled = tiled.canonicalize()
    return plgpu.Layout.TILED(tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim)


def array(registers: Any, layout: Any, shape: tuple[int, ...], *, signed: Any = None) -> Any:
    """The array that an MLIR value for each register makes; `signed` for integers."""
    own = layout.to_mgpu()
    shaped = np.array(registers, dtype=object).reshape(own.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=shaped, _layout=own, _is_signed=signed)
