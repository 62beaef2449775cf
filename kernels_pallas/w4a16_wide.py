"""4-bit weights times many activations, on Hopper's warpgroup tensor cores.

The product is computed as its transpose, weight · xᵀ: `wgmma` takes its first operand from
registers, which is where codes become bfloat16, and the second, activations, from shared memory as
they are. While one warpgroup widens its next codes another keeps the tensor cores busy.

A CTA works on a tile of `64 · across · warpgroups` weight rows and `tokens` activation rows, and
walks over every (number of CTAs)-th tile. One warpgroup does nothing but copy activations into a
ring of `stages` slots, each `span` units of 64 columns wide; the others read their codes and scales
from global memory, `depth` units ahead of their use. With `split` > 1 CTAs share K as well, and the
sum over them is left to XLA.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.four_bit import ROWS, STEP, FourBit, Kind
from kernels_pallas.hopper import REGISTERS, fill_ring, rounded, tiled_memory
from kernels_pallas.wide_fragments import UNIT, WideFragments
from kernels_pallas.wide_tiling import WideTiling, default_wide_tiling

_UNROLLED = STEP // UNIT  # units of a loop's turn


@partial(jax.jit, static_argnames=("tiling", "processors", "interpret"))
def w4a16_wide(
    x: jax.Array,
    weight: FourBit,
    tiling: WideTiling | None = None,
    *,
    processors: int = 132,
    interpret: bool = False,
) -> jax.Array:
    """`x @ weight.T`, accumulated in float32.

    Where M, N or K is no multiple of 8, 64 or 64, XLA pads x or cuts the product.

    INT4 weights are rounded to bfloat16 behind their scales; E2M1's products with theirs are exact.

    Args:
      x: bfloat16 [M, K].
      weight: standing for [N, K].
      tiling: None takes `default_wide_tiling`; static.
      processors: streaming multiprocessors of the device; static.
      interpret: runs in Pallas's interpreter, on any device; static.

    Returns:
      bfloat16 [M, N].

    Raises:
      ValueError: for another dtype, or shapes that do not fit.
    """
    (m, k), (n, wanted) = x.shape, weight.shape
    if x.dtype != jnp.bfloat16 or k != wanted:
        raise ValueError(f"x is {x.dtype}{x.shape}; needed is bfloat16 [M, {wanted}]")
    tiles, columns = weight.tiles, weight.columns
    tiling = tiling or default_wide_tiling(m, tiles, columns, processors)
    if tiling is None or not tiling.fits(tiles, columns):
        raise ValueError(f"{tiling or 'no tiling'} fits {tiles} x 16 rows, {columns} columns")
    plan = _Plan(
        rounded(m, 8), rounded(n, 64), tiles, columns, weight.kind, tiling, processors, interpret
    )
    # The hardware reads zeros outside of an array, and writes nothing there.
    rows, width = (plan.padded_m, columns) if interpret else (plan.m, rounded(k, 64))
    x = jnp.pad(x, ((0, rows - m), (0, width - k)))
    out = _kernel(plan)(x, weight.codes, weight.scales, weight.factor)
    if tiling.split > 1:
        out = jnp.sum(out, axis=0).astype(x.dtype)
    return out[:m, :n]


@dataclass(frozen=True)
class _Plan:
    """Sizes of one product, `m` and `n` rounded up."""

    m: int
    n: int
    tiles: int
    columns: int
    kind: Kind
    tiling: WideTiling
    processors: int
    interpret: bool

    @property
    def fragments(self) -> WideFragments:
        return WideFragments(self.kind, self.tiling.across, self.interpret)

    @property
    def padded_m(self) -> int:
        return self.m_tiles * self.tiling.tokens

    @property
    def m_tiles(self) -> int:
        return -(-self.m // self.tiling.tokens)

    @property
    def n_tiles(self) -> int:
        return -(-self.tiles * ROWS // self.tiling.weight_rows)

    @property
    def ctas(self) -> int:
        return max(1, min(self.processors // self.tiling.split, self.m_tiles * self.n_tiles))

    @property
    def units(self) -> int:
        """Of a CTA's part of K."""
        return self.columns // UNIT // self.tiling.split

    @property
    def slots(self) -> int:
        """Of the ring, that a tile passes through."""
        return self.units // self.tiling.span

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        rows, whole = self.padded_m, ROWS * self.tiles
        if self.tiling.split > 1:
            return jax.ShapeDtypeStruct((self.tiling.split, rows, whole), jnp.float32)
        shape = (rows, whole) if self.interpret else (self.m, self.n)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def tile(self, turn: Any) -> tuple[Any, Any]:
        """(of activations, of weight rows), in an order that finds both in the L2 cache."""
        index = lax.axis_index("cta") + turn * self.ctas
        shape = (self.m_tiles, self.n_tiles)
        return plgpu.planar_snake(index, shape, 1, self.tiling.width)

    def turns(self) -> Any:
        return (self.m_tiles * self.n_tiles - lax.axis_index("cta") + self.ctas - 1) // self.ctas


class _Refs(NamedTuple):
    x: Any
    codes: Any
    scales: Any
    factor: Any
    out: Any
    ring: Any
    result: Any
    full: Any
    empty: Any
    spare: Any


def _kernel(plan: _Plan):
    """(x, codes, scales, factor) -> `plan.out`."""
    tiling = plan.tiling
    multiplying, height = tiling.warpgroups, plan.fragments.height

    def body(*refs):
        refs = _Refs(*refs[:9], spare=list(refs[9:]))
        me = lax.axis_index("warpgroup")

        @pl.when(me == multiplying)
        def _():
            plgpu.set_max_registers(REGISTERS[multiplying][1], action="decrease")
            _copy_activations(plan, refs)

        @pl.when(me < multiplying)
        def _():
            plgpu.set_max_registers(REGISTERS[multiplying][0], action="increase")
            lax.fori_loop(0, plan.turns(), lambda turn, _: _one_tile(plan, refs, turn), None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    ring = (tiling.stages, tiling.span, tiling.tokens, UNIT)
    result = (multiplying, tiling.across, tiling.tokens if tiling.split == 1 else 8, 64)
    sums = [plgpu.SMEM((multiplying, height, tiling.tokens), jnp.float32)]
    return plgpu.kernel(
        body,
        out_type=plan.out,
        scratch_types=(
            tiled_memory(ring, jnp.bfloat16),
            tiled_memory(result, jnp.bfloat16),
            plgpu.Barrier(num_arrivals=tiling.span, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=multiplying, num_barriers=tiling.stages),
            *(sums if plan.interpret else []),
        ),
        grid=(plan.ctas, tiling.split),
        grid_names=("cta", "part"),
        num_threads=multiplying + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=True,  # `full` and `empty` are those that are needed
        ),
    )


def _copy_activations(plan: _Plan, refs: _Refs) -> None:
    """Fills the ring, for all tiles, as slots become empty."""
    tokens, stages, span = plan.tiling.tokens, plan.tiling.stages, plan.tiling.span
    first = lax.axis_index("part") * plan.units

    def fill(turn, place, slot):
        rows = pl.ds(plan.tile(turn)[0] * tokens, tokens)
        for i in range(span):
            unit = first + place * span + i
            part = refs.x.at[rows, pl.ds(unit * UNIT, UNIT)]
            plgpu.copy_gmem_to_smem(part, refs.ring.at[slot, i], refs.full.at[slot])

    fill_ring(plan.turns(), plan.slots, stages, refs.empty, fill)


def _one_tile(plan: _Plan, refs: _Refs, turn: Any) -> None:
    tiling, fragments = plan.tiling, plan.fragments
    me, part = lax.axis_index("warpgroup"), lax.axis_index("part")
    m_tile, n_tile = plan.tile(turn)
    # Where rows run out, the last warpgroups compute some that others have as well.
    row = (n_tile * tiling.warpgroups + me) * fragments.height
    row = lax.min(row, ROWS * plan.tiles - fragments.height)
    add = partial(_through_columns, plan, refs, turn, row // ROWS)
    sums = fragments.accumulated(tiling.tokens, add, [ref.at[me] for ref in refs.spare])
    if tiling.in_flight:
        plgpu.barrier_arrive(refs.empty.at[_slot(plan, turn, plan.units - 1)])
    total = fragments.scaled(sums, refs.factor, row // ROWS)
    rows = pl.ds(m_tile * tiling.tokens, tiling.tokens)
    if tiling.split > 1:
        place = refs.out.at[part, rows, pl.ds(row, fragments.height)]
        fragments.store_sums(place, total, ROWS * plan.tiles)
        return
    total = total.astype(jnp.bfloat16)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for block in range(tiling.across):
        refs.result.at[me, block].T[...] = total[64 * block : 64 * block + 64]
    plgpu.commit_smem()
    for block in range(tiling.across):
        place = refs.out.at[rows, pl.ds(row + 64 * block, 64)]
        plgpu.copy_smem_to_gmem(refs.result.at[me, block], place)


def _slot(plan: _Plan, turn: Any, unit: Any) -> Any:
    return lax.rem(turn * plan.slots + lax.div(unit, plan.tiling.span), plan.tiling.stages)


def _through_columns(plan: _Plan, refs: _Refs, turn: Any, tile: Any, sums: Any) -> None:
    """Adds to `sums` the product of a warpgroup's rows with a tile's activations."""
    fragments, span, in_flight = plan.fragments, plan.tiling.span, plan.tiling.in_flight
    first = lax.axis_index("part") * plan.units

    def load(unit):
        return fragments.load(refs.codes, refs.scales, tile, first + unit)

    def several_units(i, loaded):
        loaded = list(loaded)
        for j in range(_UNROLLED):
            unit = i * _UNROLLED + j
            loaded.append(load(lax.min(unit + plan.tiling.depth, plan.units - 1)))
            codes, scales = loaded.pop(0)
            weight = fragments.widen(codes, scales, j % 2)
            slot = _slot(plan, turn, unit)
            if j % span == 0:
                plgpu.barrier_wait(refs.full.at[slot])
            fragments.multiply(sums, weight, refs.ring.at[slot, j % span], in_flight)
            done = unit - in_flight
            if (j + 1 - in_flight) % span == 0:  # that was the last of its slot

                def release(done=done):
                    plgpu.barrier_arrive(refs.empty.at[_slot(plan, turn, done)])

                if in_flight and j == 0:
                    pl.when(done >= 0)(release)
                else:
                    release()
        return tuple(loaded)

    start = tuple(load(unit) for unit in range(plan.tiling.depth))
    lax.fori_loop(0, plan.units // _UNROLLED, several_units, start)
