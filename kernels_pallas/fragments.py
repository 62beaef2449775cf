"""What a warpgroup holds of a 4-bit weight, activations and sums, and how it multiplies them.

A step of a warpgroup is 16 rows and 512 columns of the weight, 128 of them for each of its four
warps. The warps' sums lie side by side, [M, 64], 16 columns a warp, to be added at the end.

Each operation has two bodies: instructions for the GPU, and arithmetic that means the same where
kernels are interpreted (`interpret`), since no interpreter runs inline assembly. The second is
`four_bit.values_of`, so an interpreted kernel checks everything but which lane holds what; that is
checked in NumPy, lane by lane, and on the GPU.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels_pallas import instructions as ptx
from kernels_pallas.four_bit import (
    E2M1_BLOCK,
    SCALE_WORDS,
    WORDS_A_GROUP,
    Kind,
    values_of,
)
from kernels_pallas.registers import array, layout


@dataclass(frozen=True)
class Fragments:
    """Layouts and operations of one warpgroup.

    Attributes:
      kind: format of the weight.
      rows: of activations, 8 or 16.
      interpret: whether arrays have no layout, and instructions no meaning.
    """

    kind: Kind
    rows: int
    interpret: bool

    @property
    def codes(self) -> Any:
        """int32 [1024]: two units of four words for each lane."""
        return layout(((1024,), (WORDS_A_GROUP,), (128,), (4,)), (-4,), (-2,))

    @property
    def scales(self) -> Any:
        """int32: INT4 [32], two words by output columns; else two or four, of the lane's rows."""
        if self.kind == "int4":
            return layout(((32,), (8,), (2,)), (-3,), (plgpu.Replicated(8), -2))
        words = SCALE_WORDS[self.kind]
        return layout(((4 * words,), (words,), (words // 8,)), (-3,), (-2, plgpu.Replicated(4)))

    @property
    def activations(self) -> Any:
        """bfloat16 [4, rows, 128]: two columns of each 8 for each lane."""
        return layout(((4, 8, 8), (2,)), (-4,), (-3, -2))

    @property
    def sums(self) -> Any:
        """float32 [rows, 64]: 16 columns for each warp."""
        return layout(((8, 64), (8, 16), (8, 8), (2,)), (-6,), (-3, -2))

    @property
    def outputs(self) -> Any:
        """[rows, 16], two in a row for each lane, the same in two pairs of warps."""
        return layout(((8, 16), (4, 16), (2,)), (plgpu.Replicated(2), -5), (-3, -2))

    def load(self, ref: Any, layout: Any) -> jax.Array:
        return ref[...] if self.interpret else plgpu.load(ref, layout=layout, optimized=False)

    def zeros(self) -> jax.Array:
        """`sums` to begin with."""
        zeros = jnp.zeros((self.rows, 64), jnp.float32)
        return zeros if self.interpret else plgpu.layout_cast(zeros, self.sums)

    def chosen(self, new: jax.Array, old: jax.Array, row: Any, spread: int) -> jax.Array:
        """New `sums` in that row of every `spread`, old ones in the others."""
        rows = lax.broadcasted_iota(jnp.int32, (self.rows, 64), 0)
        if not self.interpret:
            rows = plgpu.layout_cast(rows, self.sums)
        return jnp.where(rows % spread == row, new, old)

    def added_rows(self, sums: jax.Array, spread: int) -> jax.Array:
        """`sums` of 8 rows: in each row the sum of the `spread` that it belongs to."""
        if self.interpret:
            return jnp.repeat(sums.reshape(-1, spread, 64).sum(1), spread, axis=0)

        @plgpu.inline_mgpu(
            arg_types=(self.sums,),
            return_type=plgpu.ShapeDtypeStruct((self.rows, 64), jnp.float32, self.sums),
        )
        def added(_, sums):
            registers = [ptx.parts(register, 2) for register in sums.registers.reshape(-1)]
            distance = 1
            while distance < spread:  # a row is four lanes
                registers = [[ptx.plus_of(v, 4 * distance) for v in pair] for pair in registers]
                distance *= 2
            whole = [ptx.packed(pair, ir.F32Type.get()) for pair in registers]
            return array(whole, self.sums, (self.rows, 64))

        return added(sums)  # pyright: ignore[reportCallIssue]: the context is inserted

    def store(self, ref: Any, value: jax.Array, stride: int, rows: int, spread: int = 1) -> None:
        """Writes `outputs` to global memory [rows, 16], `stride` entries apart.

        By hand, since Mosaic GPU refuses stores that leave a cache line incomplete.

        Args:
          ref: where to.
          value: every row, or the same in `spread` of them.
          stride: entries from a row in memory to the next.
          rows: that are written.
          spread: rows of `value` to one in memory, a power of two.
        """
        if self.interpret:
            ref[...] = value[::spread]
            return
        itemsize = value.dtype.itemsize

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.outputs))
        def store(_, ref, value):
            base, warp, lane = ptx.base_and_lane(ref)
            # The second of equal pairs of warps is silent.
            copy = arith.shrui(warp, ptx.i32(1))
            row = ptx.plus(
                ptx.times(arith.andi(warp, ptx.i32(1)), 4), arith.shrui(lane, ptx.i32(3))
            )
            column = ptx.times(arith.andi(lane, ptx.i32(7)), 2)
            if spread > 1:
                copy = arith.ori(copy, arith.andi(row, ptx.i32(spread - 1)))
                row = arith.divui(row, ptx.i32(spread))
            first = ptx.plus(ptx.times(row, stride), column)
            for block, pair in enumerate(value.registers.reshape(-1)):
                place = ptx.times(ptx.plus(first, ptx.i32(8 * block * stride)), itemsize)
                address = arith.addi(base, arith.extui(ptx.i64(), place))
                words = ptx.parts(ptx.as_words(pair, itemsize // 2), itemsize // 2)
                outside = ptx.at_least(ptx.plus(row, ptx.i32(8 * block)), rows)
                ptx.store_words(address, words, arith.ori(copy, outside))

        store(ref, value)  # pyright: ignore[reportCallIssue]: the context is inserted

    def load_codes(self, ref: Any) -> jax.Array:
        """A step's words from global memory, int32 [1024]."""
        if self.interpret:
            return ref[...]

        def words(base: Any, warp: Any, lane: Any) -> list[Any]:
            first = ptx.plus(ptx.times(warp, WORDS_A_GROUP), ptx.times(lane, 4))
            # Read once, hence not kept in L1; the second half of 256 bytes is fetched along.
            return [
                ptx.load_words(base, place, 4, ".L1::no_allocate.L2::256B")
                for place in (first, ptx.plus(first, ptx.i32(128)))
            ]

        return _from_global(ref, self.codes, (1024,), words)

    def load_scales(self, ref: Any) -> jax.Array:
        """A step's scales from global memory, int32 [4 · `SCALE_WORDS`], as `scales` has them."""
        if self.interpret:
            return ref[...]
        size = SCALE_WORDS[self.kind]

        def words(base: Any, warp: Any, lane: Any) -> list[Any]:
            if self.kind == "int4":
                place, count = ptx.times(arith.andi(lane, ptx.i32(3)), 2), 2
            else:
                place, count = ptx.times(arith.shrui(lane, ptx.i32(2)), size // 8), size // 8
            return [ptx.load_words(base, ptx.plus(ptx.times(warp, size), place), count, "")]

        return _from_global(ref, self.scales, (4 * size,), words)

    def multiply(
        self, sums: jax.Array, codes: jax.Array, scales: jax.Array, activations: jax.Array
    ) -> jax.Array:
        """sums + activations · weightᵀ: the step of a warpgroup.

        INT4's integers are summed over the 128 columns that share a scale, and multiplied with it
        then; of E2M1 the products with the scale are exact in bfloat16.
        """
        if self.interpret:
            weight = values_of(codes[None], scales[None], self.kind).reshape(16, 4, 128)
            x = activations.astype(jnp.float32)
            product = jnp.einsum("kmc,nkc->mkn", x, weight, precision="highest")
            return sums + product.reshape(self.rows, 64)

        @plgpu.inline_mgpu(
            arg_types=(self.sums, self.codes, self.scales, self.activations),
            return_type=plgpu.ShapeDtypeStruct((self.rows, 64), jnp.float32, self.sums),
        )
        def multiply(_, sums, codes, scales, activations):
            before = sums.registers.reshape(self.rows // 8, 2)
            before = {index: ptx.parts(value, 2) for index, value in np.ndenumerate(before)}
            scale_words = ptx.parts(scales.registers.reshape(1)[0], self._words_a_lane)
            words = [ptx.parts(unit, 4) for unit in codes.registers.reshape(2)]
            after = self._multiply_units(
                before, words, self._activation_words(activations), scale_words
            )
            registers = [ptx.packed(after[index], ir.F32Type.get()) for index in sorted(after)]
            return array(registers, self.sums, (self.rows, 64))

        return multiply(sums, codes, scales, activations)  # pyright: ignore[reportCallIssue]

    @property
    def _words_a_lane(self) -> int:
        return 2 if self.kind == "int4" else SCALE_WORDS[self.kind] // 8

    def _activation_words(self, activations) -> list[list[Any]]:
        """[rows / 8][columns / 8] -> a word of two bfloat16."""
        pieces = activations.registers.reshape(self.rows // 8, 16)
        return [[ptx.parts(ptx.as_words(piece, 1), 1)[0] for piece in rows] for rows in pieces]

    def _multiply_units(self, before, words, x, scale_words) -> dict[tuple[int, int], list[Any]]:
        """Sums by (rows / 8, columns / 8): two a lane."""
        zero = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), 0.0))
        groups = range(self.rows // 8)
        start = dict.fromkeys(before, [zero, zero]) if self.kind == "int4" else before
        # The instruction has 16 rows; where there are 8 the others are zero, and dropped.
        sums = {
            n: [*start[0, n], *(start[1, n] if self.rows == 16 else [zero, zero])] for n in (0, 1)
        }
        for step in range(8):
            word = words[step // 4][step % 4]
            if self.kind == "int4":
                weight = ptx.int4_registers(word)
            else:
                block = step * 16 // E2M1_BLOCK[self.kind]
                factors = ptx.scale_pair(self.kind, scale_words[block // 2], block % 2)
                weight = ptx.e2m1_registers(word, factors)
            low, high = ([x[m][2 * step + pair] for m in groups] for pair in (0, 1))
            if self.rows == 8:
                low, high = [*low, ptx.i32(0)], [*high, ptx.i32(0)]
            for n in (0, 1):
                sums[n] = ptx.mma(sums[n], [*low, *high], [weight[n], weight[2 + n]])
        after = {(m, n): sums[n][2 * m : 2 * m + 2] for m in groups for n in (0, 1)}
        if self.kind != "int4":
            return after
        pairs = [ptx.halves(word) for word in scale_words]  # of rows g, g + 8, for two g
        return {
            (m, n): [
                ptx.fma(value, pair[n], old)
                for value, pair, old in zip(after[m, n], pairs, before[m, n], strict=True)
            ]
            for m, n in after
        }


def _from_global(ref: Any, layout: Any, shape: tuple[int, ...], words: Any) -> jax.Array:
    """An int32 array of what each lane loads: `words(warp, lane)` gives its registers.

    Loads stay in program order: a compiler that delays them to their use undoes the prefetch.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout),
    )
    def load(_, ref):
        base, warp, lane = ptx.base_and_lane(ref)
        registers = [ptx.packed(values, ptx.i32_type()) for values in words(base, warp, lane)]
        return array(registers, layout, shape, signed=True)

    return load(ref)  # pyright: ignore[reportCallIssue]: the context is inserted
