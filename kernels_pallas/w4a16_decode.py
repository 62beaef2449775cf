"""4-bit weights times few activations, as fast as the weights can be read.

Each warpgroup streams its part of the weight from global memory straight into registers, `depth`
steps ahead, in the order in which it multiplies (`four_bit`); there is no staging in shared memory,
nothing to wait for but the loads themselves. The few activations stay in shared memory.

A CTA holds `wn · wk` warpgroups: `wn` tiles of 16 weight rows, and for each `wk` parts of K. It
walks over every (number of CTAs)-th group of tiles. The parts of a tile are added in shared memory,
in a fixed order, by one of its warpgroups, each in its turn, while the others go on. With
`split` > 1 CTAs share K as well, and the sum over them is left to XLA.

Up to 4 activations are folded (`Sizes`). A step of the weight then has its activations in one row
of several, and the sums of the others are left as they were; at the end of a tile the rows are
added.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.decode_tiling import (
    MOST_ROWS,
    PADDED,
    Sizes,
    Tiling,
    default_tiling,
    sizes_of,
)
from kernels_pallas.four_bit import ROWS, SCALE_WORDS, STEP, FourBit, Kind
from kernels_pallas.fragments import Fragments
from kernels_pallas.hopper import rounded, tiled_memory


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
    sizes = sizes_of(len(x), weight)
    tiling = tiling or default_tiling(sizes, processors)
    if tiling is None or not tiling.fits(sizes):
        what = f"{weight.tiles} x 16 rows, {weight.columns} columns"
        raise ValueError(f"{tiling or 'no tiling'} fits {what}")
    (m, k), n = x.shape, weight.shape[0]
    plan = _Plan(sizes, weight.kind, tiling, processors, interpret)
    # The hardware reads zeros outside of x, and rows of no use are not written.
    x = x.reshape(m * sizes.folds, k // sizes.folds)
    rows, columns = x.shape
    height, width = rounded(rows, 8), rounded(columns, 64)
    if interpret:
        height, width = plan.rows, sizes.width
    x = jnp.pad(x, ((0, height - rows), (0, width - columns)))
    sums = _kernel(plan)(x, weight.codes, weight.scales, weight.factor)
    out = sums[0] if tiling.split == 1 else jnp.sum(sums, axis=0).astype(x.dtype)
    return out[:m, :n]


@dataclass(frozen=True)
class _Plan:
    """One product: what it multiplies, and how it is cut."""

    sizes: Sizes
    kind: Kind
    tiling: Tiling
    processors: int
    interpret: bool

    @property
    def rows(self) -> int:
        return self.sizes.rows

    @property
    def fragments(self) -> Fragments:
        return Fragments(self.kind, self.rows, self.interpret)

    @property
    def steps(self) -> int:
        return self.tiling.steps(self.sizes.columns)

    @property
    def owners(self) -> int:
        """Parts of the activations in shared memory: of each part of K its own, or one for all."""
        return 1 if self.sizes.folded else self.tiling.wk

    @property
    def pieces(self) -> int:
        """Of 128 columns, in each of those parts."""
        return self.sizes.kept(self.tiling.split) // self.owners // 128

    @property
    def groups(self) -> int:
        """Of tiles, `wn` each."""
        return self.sizes.tiles // self.tiling.wn

    @property
    def ctas(self) -> int:
        return max(1, min(self.processors // self.tiling.split, self.groups))

    @property
    def depth(self) -> int:
        """No more than the steps of the CTA that has least."""
        return min(self.tiling.depth, self.groups // self.ctas * self.steps)

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        dtype = jnp.bfloat16 if self.tiling.split == 1 else jnp.float32
        rows = self.rows // self.sizes.spread if self.interpret else self.sizes.m
        return jax.ShapeDtypeStruct((self.tiling.split, rows, ROWS * self.sizes.tiles), dtype)

    def turns(self) -> Any:
        return (self.groups - lax.axis_index("cta") + self.ctas - 1) // self.ctas

    def place(self) -> tuple[Any, Any]:
        """(of `wn` tiles, of `wk` parts of K) of this warpgroup."""
        me = lax.axis_index("warpgroup")
        return me // self.tiling.wk, lax.rem(me, self.tiling.wk)

    def owner(self) -> Any:
        """Which part of the activations this warpgroup needs."""
        return 0 if self.sizes.folded else self.place()[1]

    def place_in_k(self, step: int) -> Any:
        """Which step of the weight's whole K a warpgroup's step is."""
        part = lax.axis_index("part") if self.tiling.split > 1 else 0
        mine = self.place()[1] if self.tiling.wk > 1 else 0
        return (part * self.tiling.wk + mine) * self.steps + step

    def activations(self, step: int) -> tuple[Any, Any]:
        """(row among `spread`, place in shared memory) of those that a step multiplies."""
        if self.sizes.folded:
            place, each = self.place_in_k(step), self.sizes.width // STEP
            return place // each, place % each
        return 0, self.owner() * self.steps + step

    @property
    def one_place(self) -> bool:
        """Whether that place is the same for all, so that registers can keep it."""
        return self.sizes.folded and self.sizes.width == STEP

    def tile(self, turn: Any) -> Any:
        group = lax.axis_index("cta") + turn * self.ctas
        return group * self.tiling.wn + self.place()[0]


class _Refs(NamedTuple):
    x: Any
    codes: Any
    scales: Any
    factor: Any
    out: Any
    activations: Any
    parts: Any
    ready: Any
    full: Any
    free: Any


def _kernel(plan: _Plan):
    """(x, codes, scales, factor) -> `plan.out`."""
    wn, wk = plan.tiling.wn, plan.tiling.wk
    return plgpu.kernel(
        lambda *refs: _all_tiles(plan, _Refs(*refs)),
        out_type=plan.out,
        scratch_types=(
            tiled_memory((plan.owners * plan.pieces, plan.rows, 128), jnp.bfloat16),
            plgpu.SMEM((wn * wk, wk, plan.rows, PADDED), jnp.float32),
            plgpu.Barrier(num_arrivals=plan.pieces, num_barriers=plan.owners),
            plgpu.Barrier(num_arrivals=wk, num_barriers=wn * wk),
            plgpu.Barrier(num_arrivals=1, num_barriers=wn * wk),
        ),
        grid=(plan.ctas, plan.tiling.split),
        grid_names=("cta", "part"),
        num_threads=wn * wk,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,  # `_hand_over` has those that are needed
        ),
    )


def _all_tiles(plan: _Plan, refs: _Refs) -> None:
    turns = plan.turns()
    loaded = tuple(_fetch(plan, refs, *divmod(step, plan.steps)) for step in range(plan.depth))
    _copy_activations(plan, refs)
    plgpu.barrier_wait(refs.ready.at[plan.owner()])
    held = _load_activations(plan, refs, 0) if plan.one_place else None

    def one_tile(turn, loaded, left=None):
        """`left`: tiles that follow, None for enough."""
        sums, loaded = _one_tile(plan, refs, turn, list(loaded), left, held)
        _hand_over(plan, refs, turn, sums)
        return loaded

    last = -(-plan.depth // plan.steps)  # tiles that have less to load
    loaded = lax.fori_loop(0, turns - last, one_tile, loaded)
    for left in reversed(range(last)):
        loaded = one_tile(turns - 1 - left, loaded, left)

    def drain(turn, _):
        plgpu.barrier_wait(refs.free.at[_buffer(plan, turn)])

    lax.fori_loop(lax.max(turns - plan.tiling.wk, 0), turns, drain, None)


def _fetch(plan: _Plan, refs: _Refs, turn: Any, step: int) -> tuple[jax.Array, jax.Array]:
    """Loads codes and scales of a step."""
    place = plan.place_in_k(step)
    words = 4 * SCALE_WORDS[plan.kind]
    codes = refs.codes.at[plan.tile(turn), pl.ds(place * 2 * STEP, 2 * STEP)]
    scales = refs.scales.at[plan.tile(turn), pl.ds(place * words, words)]
    return plan.fragments.load_codes(codes), plan.fragments.load_scales(scales)


def _copy_activations(plan: _Plan, refs: _Refs) -> None:
    """Warpgroups that need the same part share the work."""
    owner, sharing = plan.owner(), plan.tiling.wn * plan.tiling.wk // plan.owners
    mine = lax.axis_index("warpgroup") if plan.sizes.folded else plan.place()[0]
    part = 0 if plan.sizes.folded else lax.axis_index("part")

    def one_piece(i, _):
        piece = i * sharing + mine

        @pl.when(piece < plan.pieces)
        def _():
            place = owner * plan.pieces + piece
            columns = pl.ds((part * plan.owners * plan.pieces + place) * 128, 128)
            # Traced, since only such a slice may go beyond the array.
            first = lax.min(piece, 0) * plan.rows
            source = refs.x.at[pl.ds(first, plan.rows), columns]
            plgpu.copy_gmem_to_smem(source, refs.activations.at[place], refs.ready.at[owner])

    lax.fori_loop(0, -(-plan.pieces // sharing), one_piece, None)


def _one_tile(
    plan: _Plan, refs: _Refs, turn: Any, loaded: list[Any], left: int | None, held: Any
) -> Any:
    """(sums of this warpgroup's part, what is loaded ahead)."""
    fragments, sizes = plan.fragments, plan.sizes
    sums = fragments.zeros()
    for step in range(plan.steps):
        further, ahead = divmod(step + plan.depth, plan.steps)
        if left is None or further <= left:
            loaded.append(_fetch(plan, refs, turn + further, ahead))
        fold, place = plan.activations(step)
        x = _load_activations(plan, refs, place) if held is None else held
        codes, scales = loaded.pop(0)
        after = fragments.multiply(sums, codes, scales, x)
        sums = fragments.chosen(after, sums, fold, sizes.spread) if sizes.folded else after
    if sizes.folded:
        sums = fragments.added_rows(sums, sizes.spread)
    return sums, tuple(loaded)


def _load_activations(plan: _Plan, refs: _Refs, place: Any) -> jax.Array:
    own = refs.activations.at[pl.ds(4 * place, 4)]
    return plan.fragments.load(own, plan.fragments.activations)


def _hand_over(plan: _Plan, refs: _Refs, turn: Any, sums: jax.Array) -> None:
    """Adds what warps and warpgroups have of a tile; one warpgroup does, each in its turn."""
    fragments, (_, my_part) = plan.fragments, plan.place()
    wk, mine = plan.tiling.wk, _buffer(plan, turn)
    pl.when(turn >= wk)(lambda: plgpu.barrier_wait(refs.free.at[mine]))
    refs.parts[mine, my_part, :, pl.ds(0, 64)] = sums
    plgpu.barrier_arrive(refs.full.at[mine])

    @pl.when(my_part == lax.rem(turn, wk))
    def _():
        plgpu.barrier_wait(refs.full.at[mine])
        total = None
        for i in range(4 * wk):
            own = refs.parts.at[mine, i // 4, :, pl.ds(i % 4 * ROWS, ROWS)]
            one = fragments.load(own, fragments.outputs)
            total = one if total is None else total + one
        plgpu.barrier_arrive(refs.free.at[mine])
        tile = plan.tile(turn)
        total = (total * refs.factor[tile]).astype(refs.out.dtype)
        place = refs.out.at[lax.axis_index("part"), :, pl.ds(tile * ROWS, ROWS)]
        fragments.store(place, total, ROWS * plan.sizes.tiles, plan.sizes.m, plan.sizes.spread)


def _buffer(plan: _Plan, turn: Any) -> Any:
    """Of sums, and its barriers: those of an adder of this warpgroup's tile."""
    return plan.place()[0] * plan.tiling.wk + lax.rem(turn, plan.tiling.wk)
