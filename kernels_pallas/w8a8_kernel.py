"""Products of 8-bit activations and weights on Hopper's warpgroup tensor cores.

    a scale for each row      y = Σ codes · codes · scale[channel] · scale[token]
    blocks of 128 columns     y = Σ_b (Σ codes · codes) · (scale[b, token] · scale[channel/128, b])

With blocks, each 128 columns are summed by themselves and added to float32 sums, times their scale.
Otherwise the tensor cores sum all of K: exact for INT8; for FP8 with about 14 bits below the
largest product of an instruction (DeepSeek-V3, arXiv:2412.19437, §3.3.2).

Few tokens are bound by reading the weight, for which the ring (`w8a8_cta`) is deep; many by the
tensor cores, for which tiles are large, and CTAs of a cluster share what they read of activations.
TMA reads zeros outside of an array and writes nothing there, so that no shape needs padding; only
the interpreter, which does not know this, is given padded arrays.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import rounded, tiled_memory
from kernels_pallas.w8a8_cta import Cta
from kernels_pallas.w8a8_tiling import STEP, EightBitTiling, default_tiling, scale_places


@partial(jax.jit, static_argnames=("tiling", "processors", "interpret"))
def w8a8_kernel(
    codes: jax.Array,
    scales: jax.Array,
    weight: jax.Array,
    weight_scales: jax.Array,
    tiling: EightBitTiling | None = None,
    *,
    processors: int = 132,
    interpret: bool = False,
) -> jax.Array:
    """The product of quantized activations and a quantized weight.

    Args:
      codes: int8, or float8_e4m3fn or float8_e5m2, [M, K]; K a multiple of 32, of 128 for blocks.
        Where M is more than 8 and no multiple of 8, rows are added, and taken from the result.
      scales: float32 [M]; for blocks [K / 128, M'], M' being M rounded up to a multiple of 4.
      weight: codes [N, K], N a multiple of 16.
      weight_scales: float32 [N]; for blocks [⌈N / 128⌉, K / 128].
      tiling: None takes `default_tiling`; static.
      processors: streaming multiprocessors of the device; static.
      interpret: runs in Pallas's interpreter, on any device; static.

    Returns:
      bfloat16 [M, N].

    Raises:
      ValueError: for shapes or a tiling that do not fit.
    """
    (m, k), n, blocked = codes.shape, weight.shape[0], weight_scales.ndim == 2
    if not has_kernel(m, n, k) or weight.shape[1] != k or (blocked and k % STEP):
        raise ValueError(
            f"codes {codes.shape} and weight {weight.shape} do not fit: K has to be a multiple of "
            f"{STEP if blocked else 32}, N of 16"
        )
    tiling = tiling or default_tiling(m, n, k, processors, blocked)
    if not tiling.fits(blocked):
        raise ValueError(f"{tiling} does not fit a Hopper processor")
    sizes = rounded(m, 8), n, k
    if interpret:
        sizes = _up(m, tiling.tokens), _up(n, tiling.channels * tiling.cluster), _up(k, STEP)
        weight = _padded(weight, sizes[1:])
        scales = _padded(scales, (*scales.shape[:-1], sizes[0]))
        weight_scales = weight_scales if blocked else _padded(weight_scales, sizes[1:2])
    codes = _padded(codes, sizes[::2])
    run = _kernel(sizes, codes.dtype, weight.dtype, blocked, tiling, processors, interpret)
    return run(codes, scales, weight, weight_scales)[:m, :n]


def has_kernel(m: int, n: int, k: int) -> bool:
    """Whether there are rows, and TMA and `wgmma` take them as they are in memory."""
    return m > 0 and n > 0 and k > 0 and n % 16 == 0 and k % 32 == 0


def _kernel(
    sizes: tuple[int, int, int],
    dtype: Any,
    weight_dtype: Any,
    blocked: bool,
    tiling: EightBitTiling,
    processors: int,
    interpret: bool,
):
    m, n, k = sizes
    tiles = -(-m // tiling.tokens), -(-n // (tiling.channels * tiling.cluster))
    clusters = min(processors // tiling.cluster, math.prod(tiles))
    sums = jnp.int32 if dtype == jnp.int8 else jnp.float32

    def body(x, x_scales, weight, weight_scales, out, **scratch):
        arrays = x, x_scales, weight, weight_scales, out
        Cta(tiling, tiles, clusters, -(-k // STEP), blocked, sums, *arrays, scratch).run()

    # Arrays are read and written in tiles of 8 rows, as wide as divides what they have.
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        scratch_types={
            "x_ring": tiled_memory((tiling.stages, tiling.tokens, STEP), dtype, k),
            "weight_ring": tiled_memory((tiling.stages, tiling.channels, STEP), weight_dtype, k),
            "result": tiled_memory((tiling.warpgroups, 2, *tiling.piece), jnp.bfloat16, n),
        }
        | _scales_and_barriers(tiling, blocked),
        grid=(clusters,),
        grid_names=("cta",),
        cluster=(tiling.cluster,),
        cluster_names=("peer",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,  # `Cta` has all that are needed
        ),
    )


def _scales_and_barriers(t: EightBitTiling, blocked: bool) -> dict[str, Any]:
    readers: dict[str, Any] = {"num_arrivals": t.warpgroups}
    released = {**readers, "num_barriers": t.stages}
    scratch = {
        "full": plgpu.Barrier(num_arrivals=3 if blocked else 2, num_barriers=t.stages),
        "empty": plgpu.Barrier(**released)
        if t.cluster == 1
        else plgpu.ClusterBarrier(collective_axes=("peer",), **released),
        "x_scale_ring": plgpu.SMEM(
            (t.stages if blocked else 2, scale_places(t.tokens)), jnp.float32
        ),
    }
    if blocked:
        return scratch
    return scratch | {
        "weight_scale_ring": plgpu.SMEM((2, scale_places(t.channels)), jnp.float32),
        "scaled": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "used": plgpu.Barrier(**readers, num_barriers=2),
    }


def _padded(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros at the ends; nothing is taken away."""
    ends = [(0, max(0, wanted - have)) for wanted, have in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, ends)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
