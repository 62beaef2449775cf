"""The last step of attention that several CTAs share: their sums, weighted and added."""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.registers import layout

_ROWS = 4  # of a CTA, one for each warp


def add_parts(
    mixed: jax.Array, most: jax.Array, sums: jax.Array, rows: int, *, interpret: bool = False
) -> jax.Array:
    """`Σ mixed · 2^(most - top) / Σ sums · 2^(most - top)` over parts, `top` being the largest.

    One kernel, of which XLA makes two or three.

    Args:
      mixed: float32 [heads, parts, rows', d], weighted values.
      most: float32 [heads, parts, rows'], what their weights are relative to, as powers of 2.
      sums: float32 [heads, parts, rows'], of weights.
      rows: of those rows' to return; rows' is a multiple of 4.
      interpret: runs in Pallas's interpreter, on any device.

    Returns:
      bfloat16 [heads, rows, d].
    """
    heads, parts, _, dim = mixed.shape
    blocks = -(-rows // _ROWS)
    found = plgpu.kernel(
        partial(_body, parts, dim),
        out_type=jax.ShapeDtypeStruct((heads, blocks * _ROWS, dim), jnp.bfloat16),
        grid=(heads, blocks),
        grid_names=("head", "block"),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(mixed, most, sums)
    return found[:, :rows]


def _body(parts: int, dim: int, mixed: Any, most: Any, sums: Any, out: Any) -> None:
    head, rows = lax.axis_index("head"), pl.ds(lax.axis_index("block") * _ROWS, _ROWS)
    of_values = layout(((_ROWS, dim), (1, dim), (1, dim // 32)), (-6,), (-4, -3))

    def read(ref: Any) -> list[jax.Array]:
        own = of_values if len(ref.shape) == 4 else of_values.reduce(1)
        loads = (ref.at[head, part, rows] for part in range(parts))
        return [plgpu.load(load, layout=own, optimized=False) for load in loads]

    values, tops, weights = map(read, (mixed, most, sums))
    top = reduce(jnp.maximum, tops)
    factors = [jnp.exp2(one - top) for one in tops]
    whole = reduce(jnp.add, [one * factor for one, factor in zip(weights, factors, strict=True)])
    added = reduce(
        jnp.add,
        [
            value * lax.broadcast_in_dim(factor / whole, value.shape, (0,))
            for value, factor in zip(values, factors, strict=True)
        ],
    )
    out[head, rows] = added.astype(out.dtype)
