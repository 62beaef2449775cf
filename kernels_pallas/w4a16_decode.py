"""4-bit weights times few activations, as fast as the weights can be read.

Each warpgroup streams its part of the weight from global memory straight into registers, `depth`
steps ahead, in the order in which it multiplies (`four_bit`); there is no staging in shared memory,
nothing to wait for but the loads themselves. The few activations stay in shared memory.

A CTA holds `wn · wk` warpgroups: `wn` tiles of 16 weight rows, and for each `wk` parts of K. It
walks over every (number of CTAs)-th group of tiles, and adds the parts in shared memory, in a fixed
order. With `split` > 1 CTAs share K as well, and the sum over them is left to XLA.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.four_bit import ROWS, SCALE_WORDS, STEP, FourBit, Kind
from kernels_pallas.fragments import Fragments

MOST_ROWS = 16
_SHARED_MEMORY = 232448  # bytes of one CTA on Hopper
_PADDED = 72  # 64 sums and 8 that keep rows in different banks


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; see the module.

    Attributes:
      wn: warpgroups side by side along N.
      wk: warpgroups that share K.
      split: CTAs that share K.
      depth: steps that are loaded ahead of their use, at most those of a tile.
    """

    wn: int
    wk: int
    split: int = 1
    depth: int = 4

    def steps(self, columns: int) -> int:
        """Steps of a warpgroup for each tile."""
        return columns // STEP // (self.split * self.wk)

    def shared_memory(self, rows: int, columns: int) -> int:
        activations = rows * columns // self.split * 2
        return activations + 2 * self.wn * self.wk * rows * _PADDED * 4 + 1024

    def fits(self, rows: int, tiles: int, columns: int) -> bool:
        parts = self.split * self.wk
        even = tiles % self.wn == 0 and columns // STEP % parts == 0
        return even and self.shared_memory(rows, columns) <= _SHARED_MEMORY


def tilings(rows: int, tiles: int, columns: int) -> Iterator[Tiling]:
    """Those worth trying, for activations [rows, columns] and `tiles` of 16 weight rows."""
    for split in (1, 2, 4, 7, 8, 14, 16, 28):
        for wn, wk in ((2, 2), (1, 4), (4, 1), (2, 1), (1, 2), (1, 1), (2, 4), (4, 2), (1, 8)):
            tiling = Tiling(wn, wk, split)
            if tiling.fits(rows, tiles, columns):
                yield tiling


def padded_rows(rows: int) -> int:
    """Rows of activations that the kernel works on."""
    return 8 if rows <= 8 else MOST_ROWS


def default_tiling(rows: int, tiles: int, columns: int, processors: int) -> Tiling | None:
    """The tiling whose busiest processor has least to do.

    Estimated in bytes: the weights that it reads, the activations that it keeps, what its
    warpgroups add at the end of each tile, and partial sums of a split K. A processor with fewer
    than four warpgroups does not have enough loads under way. None if nothing fits: K is too long
    for shared memory, and has no suitable factor.
    """

    def cost(tiling: Tiling) -> float:
        groups = tiles // tiling.wn
        rounds = math.ceil(groups / max(1, min(processors // tiling.split, groups)))
        part = columns // tiling.split
        weights = rounds * tiling.wn * ROWS * part // 2
        adding = rounds * 4096 * tiling.wk
        partial_sums = 0.0
        if tiling.split > 1:  # and another kernel to add them
            partial_sums = 65536 + 8 * tiling.split * rows * ROWS * tiles / processors
        idle = 4 / min(4, tiling.wn * tiling.wk)
        return weights * idle + rows * part * 2 + adding + partial_sums

    return min(tilings(rows, tiles, columns), key=cost, default=None)


@partial(jax.jit, static_argnames=("tiling", "processors", "interpret"))
def w4a16_decode(
    x: jax.Array,
    weight: FourBit,
    tiling: Tiling | None = None,
    *,
    processors: int = 132,
    interpret: bool = False,
) -> jax.Array:
    """`x @ weight.T` for at most 16 rows, accumulated in float32.

    Args:
      x: bfloat16 [M, K].
      weight: standing for [N, K].
      tiling: None takes `default_tiling`; static.
      processors: streaming multiprocessors of the device; static.
      interpret: runs in Pallas's interpreter, on any device; static.

    Returns:
      bfloat16 [M, N].

    Raises:
      ValueError: for another dtype, more rows, or shapes that do not fit.
    """
    if x.dtype != jnp.bfloat16 or x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {x.dtype}{x.shape}; needed is bfloat16 [M, {weight.shape[1]}]")
    if not 0 < x.shape[0] <= MOST_ROWS:
        raise ValueError(f"x has {x.shape[0]} rows; this kernel takes 1 to {MOST_ROWS}")
    tiles, words = weight.codes.shape
    rows, columns = padded_rows(x.shape[0]), words // 2
    padded = jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))
    tiling = tiling or default_tiling(rows, tiles, columns, processors)
    if tiling is None or not tiling.fits(rows, tiles, columns):
        raise ValueError(f"{tiling or 'no tiling'} fits {tiles} x 16 rows, {columns} columns")
    run = _kernel(rows, tiles, columns, weight.kind, tiling, processors, interpret)
    sums = run(padded, weight.codes, weight.scales, weight.factor)
    out = sums[0] if tiling.split == 1 else jnp.sum(sums, axis=0).astype(x.dtype)
    return out[: x.shape[0], : weight.shape[0]]


def _kernel(
    rows: int,
    tiles: int,
    columns: int,
    kind: Kind,
    tiling: Tiling,
    processors: int,
    interpret: bool,
):
    """(x [rows, columns], codes, scales, factor [tiles]) -> [split, rows, 16 tiles]."""
    wn, wk, split = tiling.wn, tiling.wk, tiling.split
    warpgroups, steps = wn * wk, tiling.steps(columns)
    depth = math.gcd(min(tiling.depth, steps), steps)
    pieces = columns // 128 // split  # of x, in a CTA
    groups = tiles // wn
    ctas = max(1, min(processors // split, groups))
    fragments = Fragments(kind, rows, interpret)
    scale_words = 4 * SCALE_WORDS[kind]

    def body(x_ref, codes_ref, scales_ref, factor_ref, out_ref, x_shared, parts, x_ready, added):
        cta, part, me = lax.axis_index("cta"), lax.axis_index("part"), lax.axis_index("warpgroup")
        my_tile, my_part = me // wk, lax.rem(me, wk)

        def tile_of(turn):
            return (cta + turn * ctas) * wn + my_tile

        def fetch(turn, step):
            tile, place = tile_of(turn), (part * wk + my_part) * steps + step
            codes = codes_ref.at[tile, pl.ds(place * 2 * STEP, 2 * STEP)]
            scales = scales_ref.at[tile, pl.ds(place * scale_words, scale_words)]
            return fragments.load_codes(codes), fragments.load_scales(scales)

        def copy_activations(i, _):
            piece = i * warpgroups + me

            @pl.when(piece < pieces)
            def _():
                columns_of_piece = pl.ds((part * pieces + piece) * 128, 128)
                plgpu.copy_gmem_to_smem(x_ref.at[:, columns_of_piece], x_shared.at[piece], x_ready)

        def add_up(turn, sums):
            """Adds what the warps and warpgroups have of a tile."""
            buffer = lax.rem(turn, 2)  # the other one may still be read
            parts[buffer, me, :, pl.ds(0, 64)] = sums
            plgpu.commit_smem()
            plgpu.barrier_arrive(added)
            plgpu.barrier_wait(added)

            @pl.when(my_part == 0)
            def _():
                total = None
                for i in range(4 * wk):
                    own = parts.at[buffer, me + i // 4, :, pl.ds(i % 4 * ROWS, ROWS)]
                    one = fragments.load(own, fragments.outputs)
                    total = one if total is None else total + one
                total = (total * factor_ref[tile_of(turn)]).astype(out_ref.dtype)
                mine = out_ref.at[part, :, pl.ds(tile_of(turn) * ROWS, ROWS)]
                fragments.store(mine, total, ROWS * tiles)

        def one_tile(turn, loaded, last):
            sums = jnp.zeros((rows, 64), jnp.float32)
            if not interpret:
                sums = plgpu.layout_cast(sums, fragments.sums)
            loaded = list(loaded)
            for step in range(steps):
                ahead, following = step + depth, None
                if ahead < steps:
                    following = fetch(turn, ahead)
                elif not last:
                    following = fetch(turn + 1, ahead - steps)
                mine = x_shared.at[pl.ds((my_part * steps + step) * 4, 4)]
                x = fragments.load(mine, fragments.activations)
                codes, scales = loaded[step % depth]
                sums = fragments.multiply(sums, codes, x, scales)
                if following is not None:
                    loaded[step % depth] = following
            add_up(turn, sums)
            return tuple(loaded)

        loaded = tuple(fetch(0, step) for step in range(depth))
        lax.fori_loop(0, math.ceil(pieces / warpgroups), copy_activations, None)
        plgpu.barrier_wait(x_ready)
        turns = (groups - cta + ctas - 1) // ctas
        loaded = lax.fori_loop(0, turns - 1, partial(one_tile, last=False), loaded)
        one_tile(turns - 1, loaded, last=True)

    # In rows of 128 bytes whose 16-byte pieces are permuted, so that lanes read different banks.
    swizzled = (
        plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    dtype = jnp.bfloat16 if split == 1 else jnp.float32
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((split, rows, ROWS * tiles), dtype),
        scratch_types=(
            plgpu.SMEM((pieces, rows, 128), jnp.bfloat16, transforms=swizzled),
            plgpu.SMEM((2, warpgroups, rows, _PADDED), jnp.float32),
            plgpu.Barrier(num_arrivals=pieces),
            plgpu.Barrier(num_arrivals=warpgroups),
        ),
        grid=(ctas, split),
        grid_names=("cta", "part"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,  # `add_up` has those that are needed
        ),
    )
