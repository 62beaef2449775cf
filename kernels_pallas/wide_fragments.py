"""What a warpgroup holds of a 4-bit weight for `wgmma`, and how it widens and multiplies it.

A warpgroup works on 64 · `across` rows of the weight, of each 64 on 16 for each of its four warps,
and on a unit of 64 columns at a time. As in `fragments`, each operation has a second body for
interpreted kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels_pallas import instructions as ptx
from kernels_pallas.four_bit import E2M1_BLOCK, ROWS, SCALE_WORDS, Kind, values_of
from kernels_pallas.registers import array, layout

UNIT = 64  # columns
_UNIT_WORDS = 128
_LANE_SCALES = {"int4": 1, "nvfp4": 2, "mxfp4": 1}  # words of a lane and unit


@dataclass(frozen=True)
class WideFragments:
    """Layouts and operations of one warpgroup.

    Attributes:
      kind: format of the weight.
      across: times 64 rows of the weight.
      interpret: whether arrays have no layout, and instructions no meaning.
    """

    kind: Kind
    across: int
    interpret: bool

    @property
    def tiles(self) -> int:
        """Of 16 weight rows."""
        return 4 * self.across

    @property
    def height(self) -> int:
        """Weight rows."""
        return ROWS * self.tiles

    @property
    def codes(self) -> Any:
        """int32 [tiles, 128]: four words for each lane and 64 rows."""
        return layout(((4, _UNIT_WORDS), (4,)), (-3,), (-2,))

    @property
    def scales(self) -> Any:
        """int32 [tiles, 8 · words]: those of a lane's two rows, shared by four lanes."""
        words = _LANE_SCALES[self.kind]
        return layout(((4, 8 * words), (words,)), (-3,), (-2, plgpu.Replicated(4)))

    def load(self, codes_ref: Any, scales_ref: Any, tile: Any, unit: Any) -> Any:
        """A unit's codes and scales from global memory, of rows from 16 · `tile` on."""
        size, words = SCALE_WORDS[self.kind], _LANE_SCALES[self.kind]
        group, half = lax.div(unit, 2), lax.rem(unit, 2)  # of 128 columns
        columns = pl.ds(unit * _UNIT_WORDS, _UNIT_WORDS)
        if self.interpret:  # scales of both halves
            rows = pl.ds(tile, self.tiles)
            return codes_ref[rows, columns], scales_ref[rows, pl.ds(group * size, size)]
        shapes = (self.tiles, _UNIT_WORDS), (self.tiles, 8 * words)
        strides = codes_ref.shape[1], scales_ref.shape[1]
        first = group * size + (0 if self.kind == "int4" else half * words)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType()),
            return_type=(
                plgpu.ShapeDtypeStruct(shapes[0], jnp.int32, self.codes),
                plgpu.ShapeDtypeStruct(shapes[1], jnp.int32, self.scales),
            ),
        )
        def load(_, codes, scales):
            base, warp, lane = ptx.base_and_lane(codes)
            scale_base, _, _ = ptx.base_and_lane(scales)
            rows = [ptx.plus(warp, ptx.i32(4 * block)) for block in range(self.across)]
            place = ptx.times(lane, 4)
            # Read once, hence not kept in L1; the second half of 256 bytes is fetched along.
            hint = ".L1::no_allocate.L2::256B"
            own = [ptx.plus(ptx.times(row, strides[0]), place) for row in rows]
            code_words = [ptx.load_words(base, place, 4, hint) for place in own]
            place = ptx.times(arith.shrui(lane, ptx.i32(2)), size // 8)
            own = [ptx.plus(ptx.times(row, strides[1]), place) for row in rows]
            scale_words = [ptx.load_words(scale_base, place, words, "") for place in own]
            return _words(code_words, self.codes, shapes[0]), _words(
                scale_words, self.scales, shapes[1]
            )

        own_scales = scales_ref.at[tile, pl.ds(first, words)]
        return load(codes_ref.at[tile, columns], own_scales)  # pyright: ignore[reportCallIssue]

    def widen(self, codes: jax.Array, scales: jax.Array, half: int) -> jax.Array:
        """bfloat16 [height, 64], E2M1 times 2^shift; `half`: which 64 of 128 columns."""
        if self.interpret:
            both = jnp.concatenate([codes, codes], axis=1)
            values = values_of(both, scales, self.kind)
            return values[:, UNIT * half : UNIT * half + UNIT].astype(jnp.bfloat16)
        shape = (self.height, UNIT)

        @plgpu.inline_mgpu(
            arg_types=(self.codes, self.scales),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, plgpu.Layout.WGMMA),
        )
        def widen(_, codes, scales):
            pair = ir.VectorType.get((2,), ir.BF16Type.get())
            registers = np.empty((self.across, 8, 2), dtype=object)  # [.., columns / 8, rows / 8]
            for block in range(self.across):
                words = ptx.parts(codes.registers.reshape(-1)[block], 4)
                own = scales.registers.reshape(-1)[block]
                scale_words = ptx.parts(own, _LANE_SCALES[self.kind])
                for step, word in enumerate(words):
                    for i, value in enumerate(self._widened(word, scale_words, step)):
                        registers[block, 2 * step + i // 2, i % 2] = mgpu.utils.bitcast(value, pair)
            return array(registers, plgpu.Layout.WGMMA, shape)

        return widen(codes, scales)  # pyright: ignore[reportCallIssue]: the context is inserted

    def _widened(self, word: Any, scale_words: list[Any], step: int) -> list[Any]:
        """Four pairs of bfloat16, of 16 columns."""
        if self.kind == "int4":
            return ptx.scaled(ptx.int4_registers(word), scale_words[0])
        block = step * 16 // E2M1_BLOCK[self.kind]
        factors = ptx.scale_pair(self.kind, scale_words[block // 2], block % 2)
        return ptx.e2m1_registers(word, factors)

    def accumulated(self, tokens: int, add: Callable[[Any], None], spare: list[Any]) -> jax.Array:
        """What `add` adds to an accumulator of zeros, float32 [height, tokens].

        `spare` is memory for it where kernels are interpreted, which have no accumulators.
        """
        if self.interpret:
            spare[0][...] = jnp.zeros_like(spare[0])
            add(spare[0])
            return spare[0][...]

        def scope(sums: Any) -> jax.Array:
            add(sums)
            return sums[...]

        kind = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
        return pl.run_scoped(scope, kind((self.height, tokens), jnp.float32))

    def multiply(self, sums: Any, weight: jax.Array, x_ref: Any, in_flight: int) -> None:
        """Adds weight · xᵀ to the accumulator; waits until `in_flight` products are left."""
        if self.interpret:
            x = x_ref[...].astype(jnp.float32)
            w = weight.astype(jnp.float32)
            sums[...] += jnp.einsum("nk,mk->nm", w, x, precision="highest")
            return
        plgpu.wgmma(sums, weight, x_ref.T)
        plgpu.wgmma_wait(in_flight)

    def scaled(self, total: jax.Array, factor_ref: Any, tile: Any) -> jax.Array:
        """Sums [height, tokens] times the factors of their tiles."""
        own = factor_ref.at[pl.ds(tile, self.tiles)]
        if self.interpret:
            return total * jnp.repeat(own[...], ROWS)[:, None]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
            return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, plgpu.Layout.WGMMA),
        )
        def scaled(_, total, factors):
            base, warp, _ = ptx.base_and_lane(factors)
            registers = total.registers.reshape(self.across, -1)
            product = np.empty_like(registers)
            for block in range(self.across):
                place = ptx.plus(warp, ptx.i32(4 * block))
                factor = mgpu.utils.bitcast(ptx.load_words(base, place, 1, "")[0], ptx.f32_type())
                for i, value in enumerate(registers[block]):
                    both = [arith.mulf(part, factor) for part in ptx.parts(value, 2)]
                    product[block, i] = ptx.packed(both, ptx.f32_type())
            return array(product, plgpu.Layout.WGMMA, total.shape)

        return scaled(total, own)  # pyright: ignore[reportCallIssue]: the context is inserted

    def store_sums(self, ref: Any, total: jax.Array, stride: int) -> None:
        """Writes sums [height, tokens] to [tokens, height], rows `stride` entries apart."""
        if self.interpret:
            ref[...] = total.T
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def store(_, ref, total):
            base, warp, lane = ptx.base_and_lane(ref)
            row = ptx.plus(ptx.times(warp, ROWS), arith.shrui(lane, ptx.i32(2)))
            token = ptx.times(arith.andi(lane, ptx.i32(3)), 2)
            first = ptx.plus(ptx.times(token, stride), row)
            registers = total.registers.reshape(self.across, -1, 2)  # [.., tokens / 8, rows / 8]
            for (block, group, half), value in np.ndenumerate(registers):
                for i, part in enumerate(ptx.parts(ptx.as_words(value, 2), 2)):
                    further = (8 * group + i) * stride + 64 * block + 8 * half
                    place = ptx.times(ptx.plus(first, ptx.i32(further)), 4)
                    address = arith.addi(base, arith.extui(ptx.i64(), place))
                    ptx.store_words(address, [part], ptx.i32(0))

        store(ref, total)  # pyright: ignore[reportCallIssue]: the context is inserted


def _words(words: list[list[Any]], layout: Any, shape: tuple[int, ...]) -> Any:
    return array([ptx.packed(w, ptx.i32_type()) for w in words], layout, shape, signed=True)
