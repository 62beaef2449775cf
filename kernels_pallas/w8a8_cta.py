"""What the warpgroups of one CTA do: one copies both operands into a ring, the others multiply.

A slot of the ring holds 128 columns of a tile's rows of both operands. `full` says that a slot is
there, `empty` that all who read it (in a cluster, of all its CTAs) are done with it. Scales of rows
come once a tile, in two places that take turns (`scaled`, `used`); of blocks, those of activations
come with each slot, and those of the weight, single numbers, are read from global memory.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import REGISTERS, fill_ring
from kernels_pallas.w8a8_tiling import STEP, EightBitTiling

_BLOCK = 128  # channels, and columns, that share a scale
_WIDEST = 128  # columns of sums that are kept twice


@dataclass(frozen=True)
class Cta:
    """References of the kernel's body, and its parts.

    Attributes:
      tiling: how the product is cut.
      tiles: tiles along the tokens; groups of tiles along the channels, one for each cluster.
      clusters: that walk over them.
      steps: of 128 columns in K.
      blocked: whether scales belong to blocks of 128 columns.
      sums: dtype of what the tensor cores add up, int32 or float32.
      x, x_scales, weight, weight_scales, out: in global memory.
      scratch: in shared memory, by name.
    """

    tiling: EightBitTiling
    tiles: tuple[int, int]
    clusters: int
    steps: int
    blocked: bool
    sums: Any
    x: Any
    x_scales: Any
    weight: Any
    weight_scales: Any
    out: Any
    scratch: dict[str, Any]

    def run(self) -> None:
        pl.when(self.me == self.tiling.warpgroups)(self.copy)
        pl.when(self.me < self.tiling.warpgroups)(self.multiply)

    @cached_property
    def me(self) -> jax.Array:
        return lax.axis_index("warpgroup")

    @property
    def turns(self) -> jax.Array:
        """Tiles of this CTA."""
        clusters = self.clusters
        first = lax.axis_index("cta")
        return (math.prod(self.tiles) - first + clusters - 1) // clusters

    def corner(self, turn: Any) -> tuple[jax.Array, jax.Array]:
        """First token and first channel of a tile."""
        t = self.tiling
        place = lax.axis_index("cta") + turn * self.clusters
        tokens, group = plgpu.planar_snake(place, self.tiles, 0, t.width)
        return tokens * t.tokens, (group * t.cluster + lax.axis_index("peer")) * t.channels

    def copy(self) -> None:
        """Fills slots as they become free, and leaves when the last one is."""
        if self.tiling.warpgroups > 1:  # else all have as many as an instruction can name
            plgpu.set_max_registers(REGISTERS[self.tiling.warpgroups][1], action="decrease")

        def fill(turn, step, slot):
            if not self.blocked:
                pl.when(step == 0)(lambda: self._copy_scales(turn))
            self._copy_slot(turn, step, slot)

        fill_ring(self.turns, self.steps, self.tiling.stages, self.scratch["empty"], fill)
        if not self.blocked:
            self._await_use(self.turns - 2)
            self._await_use(self.turns - 1)

    def _copy_slot(self, turn: Any, step: Any, slot: Any) -> None:
        full = self.scratch["full"].at[slot]
        token, channel = self.corner(turn)
        tokens, columns = pl.ds(token, self.tiling.tokens), pl.ds(step * STEP, STEP)
        plgpu.copy_gmem_to_smem(
            self.x.at[tokens, columns],
            self.scratch["x_ring"].at[slot],
            full,
            collective_axes="peer" if self.tiling.cluster > 1 else None,
        )
        plgpu.copy_gmem_to_smem(
            self.weight.at[pl.ds(channel, self.tiling.channels), columns],
            self.scratch["weight_ring"].at[slot],
            full,
        )
        if self.blocked:
            plgpu.copy_gmem_to_smem(
                self.x_scales.at[step, tokens], self._scale_ring("x", slot), full
            )

    def _copy_scales(self, turn: Any) -> None:
        """Those of a tile, once those of the last tile but one are used."""
        self._await_use(turn - 2)
        place = lax.rem(turn, 2)
        scaled = self.scratch["scaled"].at[place]
        token, channel = self.corner(turn)
        tokens = self.x_scales.at[pl.ds(token, self.tiling.tokens)]
        channels = self.weight_scales.at[pl.ds(channel, self.tiling.channels)]
        plgpu.copy_gmem_to_smem(tokens, self._scale_ring("x", place), scaled)
        plgpu.copy_gmem_to_smem(channels, self._scale_ring("weight", place), scaled)

    def _scale_ring(self, operand: str, place: Any) -> Any:
        """Scales of a tile's tokens or channels: places are wider than they have to be."""
        size = self.tiling.tokens if operand == "x" else self.tiling.channels
        return self.scratch[f"{operand}_scale_ring"].at[place, pl.ds(0, size)]

    def _await_use(self, turn: Any) -> None:
        """Of the scales of a tile, if there is such a tile."""

        @pl.when(turn >= 0)
        def _():
            plgpu.barrier_wait(self.scratch["used"].at[lax.rem(turn, 2)])

    def multiply(self) -> None:
        if self.tiling.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[self.tiling.warpgroups][0], action="increase")

        def one_tile(turn, _):
            if self.blocked:
                pieces = self._sums_of_blocks(turn)
            else:
                pieces = {(0, 0): self._scaled(self._sums(turn), turn)}
            self._store(turn, pieces)

        lax.fori_loop(0, self.turns, one_tile, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _operands(self, slot: Any) -> tuple[Any, Any]:
        """Rows of this warpgroup, of the left operand; the right one."""
        rings = self.scratch["x_ring"].at[slot], self.scratch["weight_ring"].at[slot]
        right, left = rings if self.tiling.weight_left else rings[::-1]
        return left.at[pl.ds(self.me * self.tiling.left, self.tiling.left)], right

    def _sums(self, turn: Any) -> jax.Array:
        """Over all of K: [left, right]. A slot is free when the next one's product has begun."""
        steps, stages = self.steps, self.tiling.stages
        full, empty = self.scratch["full"], self.scratch["empty"]

        def through_k(sums):
            def one_step(step, _):
                count = turn * steps + step
                slot = lax.rem(count, stages)
                plgpu.barrier_wait(full.at[slot])
                left, right = self._operands(slot)
                plgpu.wgmma(sums, left, right.T)
                plgpu.wgmma_wait(1)

                @pl.when(step > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(count - 1, stages)])

            lax.fori_loop(0, steps, one_step, None)
            return sums[...]

        shape = self.tiling.left, self.tiling.right
        total = pl.run_scoped(through_k, plgpu.WGMMAAccumulatorRef(shape, self.sums))
        plgpu.barrier_arrive(empty.at[lax.rem(turn * steps + steps - 1, stages)])
        return total

    def _scaled(self, sums: jax.Array, turn: Any) -> jax.Array:
        """Sums times the scales of their channel, then of their token."""
        place = lax.rem(turn, 2)
        plgpu.barrier_wait(self.scratch["scaled"].at[place])
        tokens, channels = self._scale_ring("x", place), self._scale_ring("weight", place)
        rows = pl.ds(self.me * self.tiling.left, self.tiling.left)
        if self.tiling.weight_left:
            channels, tokens = _load(channels.at[rows], 1), _load(tokens, 0)
        else:
            channels, tokens = _load(channels, 0), _load(tokens.at[rows], 1)
        plgpu.barrier_arrive(self.scratch["used"].at[place])
        axis = 0 if self.tiling.weight_left else 1
        total = sums.astype(jnp.float32)
        total = total * lax.broadcast_in_dim(channels, sums.shape, (axis,))
        return total * lax.broadcast_in_dim(tokens, sums.shape, (1 - axis,))

    def _sums_of_blocks(self, turn: Any) -> dict[tuple[int, int], jax.Array]:
        """(first row, first column) -> scaled sums over all of K: [64, at most 128] of each."""
        t = self.tiling
        width = min(t.right, _WIDEST)
        places = [(i, j) for i in range(0, t.left, 64) for j in range(0, t.right, width)]
        channel = self.corner(turn)[1]

        def channel_scales(step):
            return tuple(self._channel_scale(channel, place, step) for place in places)

        def one_step(step, carry):
            totals, factors = carry
            slot = lax.rem(turn * self.steps + step, t.stages)
            plgpu.barrier_wait(self.scratch["full"].at[slot])
            following = channel_scales(lax.min(step + 1, self.steps - 1))  # long before their use
            tokens = [self._token_scales(slot, place, width) for place in places]
            after = []
            for i, place in enumerate(places):
                sums = self._sums_of_slot(slot, place, width)
                if i == len(places) - 1:
                    if t.cluster > 1:  # where one warp arrives for all four
                        plgpu.commit_smem()
                    plgpu.barrier_arrive(self.scratch["empty"].at[slot])
                axis = 1 if t.weight_left else 0
                scale = lax.broadcast_in_dim(tokens[i] * factors[i], sums.shape, (axis,))
                after.append(totals[i] + sums * scale)
            return tuple(after), following

        zeros = plgpu.layout_cast(jnp.zeros((64, width), jnp.float32), plgpu.Layout.WGMMA)
        start = (zeros,) * len(places), channel_scales(0)
        totals, _ = lax.fori_loop(0, self.steps, one_step, start)
        return dict(zip(places, totals, strict=True))

    def _sums_of_slot(self, slot: Any, place: tuple[int, int], width: int) -> jax.Array:
        left, right = self._operands(slot)

        def scope(sums):
            left_rows, right_rows = pl.ds(place[0], 64), pl.ds(place[1], width)
            plgpu.wgmma(sums, left.at[left_rows], right.at[right_rows].T)
            return sums[...]

        return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((64, width), self.sums))

    def _channel_scale(self, channel: Any, place: tuple[int, int], step: Any) -> jax.Array:
        row, column = place
        t = self.tiling
        own = channel + (self.me * t.left + row if t.weight_left else column)
        # Tiles at the end may have rows that the weight has not.
        block = lax.min(lax.div(own, _BLOCK), self.weight_scales.shape[0] - 1)
        return self.weight_scales[block, step]

    def _token_scales(self, slot: Any, place: tuple[int, int], width: int) -> jax.Array:
        row, column = place
        scales = self._scale_ring("x", slot)
        if self.tiling.weight_left:
            return _load(scales.at[pl.ds(column, width)], 0)
        return _load(scales.at[pl.ds(self.me * self.tiling.left + row, 64)], 1)

    def _store(self, turn: Any, sums: dict[tuple[int, int], jax.Array]) -> None:
        """Writes sums [rows of the left operand, of the right one] that begin at the keys' places.

        They leave through two buffers that take turns.
        """
        t = self.tiling
        token, channel = self.corner(turn)
        wide = t.piece[0] if t.weight_left else t.piece[1]
        pieces = [
            (row, column, i, j, total)
            for (row, column), total in sums.items()
            for i in range(0, total.shape[0], 64)
            for j in range(0, total.shape[1], wide)
        ]
        for count, (row, column, i, j, total) in enumerate(pieces):
            plgpu.wait_smem_to_gmem(min(count, 1), wait_read_only=True)
            buffer = self.scratch["result"].at[self.me, count % 2]
            piece = total[i : i + 64, j : j + wide].astype(jnp.bfloat16)
            left, right = self.me * t.left + row + i, column + j
            if t.weight_left:
                buffer.T[...] = piece
                place = pl.ds(token + right, wide), pl.ds(channel + left, 64)
            else:
                buffer[...] = piece
                place = pl.ds(token + left, 64), pl.ds(channel + right, wide)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, self.out.at[place])


def _load(ref: Any, reduced: int) -> jax.Array:
    """A vector as it goes with the rows (1) or the columns (0) of sums."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(reduced), optimized=False)
