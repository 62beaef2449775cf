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
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from kernels_pallas.four_bit import (
    MXFP4_SHIFT,
    MXFP4_TOP,
    NVFP4_BIAS,
    NVFP4_SHIFT,
    ROTATIONS,
    WORDS_A_GROUP,
    Kind,
    shared_words,
    values_of,
)

_PLACE = 0x81C081C0  # sign, exponent and mantissa of E2M1 in two bfloat16
# Added to a scale's bits, moved up, to make it a bfloat16: in half words, exponents of
# 2^(126 + shift) more, since codes are read as 2^-126 times their value.
_NVFP4_ADD = (127 + 126 + NVFP4_SHIFT - NVFP4_BIAS) << 7
assert MXFP4_TOP == 127 + 126 + MXFP4_SHIFT  # so that MXFP4 has nothing to add


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
        return _layout(((1024,), (WORDS_A_GROUP,), (128,), (4,)), (-4,), (-2,))

    @property
    def scales(self) -> Any:
        """int32: two words for each lane (INT4 [32], by output column), or one ([128])."""
        if self.kind == "int4":
            return _layout(((32,), (8,), (2,)), (-3,), (plgpu.Replicated(8), -2))
        return _layout(((128,), (32,), (1,)), (-3,), (-2,))

    @property
    def activations(self) -> Any:
        """bfloat16 [4, rows, 128]: 16 columns in a row of each 64 for each lane."""
        return _layout(((4, 8, 64), (16,), (8,)), (-5,), (-4, -3))

    @property
    def sums(self) -> Any:
        """float32 [rows, 64]: 16 columns for each warp."""
        return _layout(((8, 64), (8, 16), (8, 8), (2,)), (-6,), (-3, -2))

    @property
    def outputs(self) -> Any:
        """[rows, 16], two in a row for each lane, the same in two pairs of warps."""
        return _layout(((8, 16), (4, 16), (2,)), (plgpu.Replicated(2), -5), (-3, -2))

    def load(self, ref: Any, layout: Any) -> jax.Array:
        return ref[...] if self.interpret else plgpu.load(ref, layout=layout, optimized=False)

    def store(self, ref: Any, value: jax.Array, stride: int) -> None:
        """Writes `outputs` to global memory [rows, 16], rows `stride` entries apart.

        By hand, since Mosaic GPU refuses stores that leave a cache line incomplete.
        """
        if self.interpret:
            ref[...] = value
            return
        itemsize = value.dtype.itemsize

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.outputs))
        def store(_, ref, value):
            base, warp, lane = _base_and_lane(ref)
            copy = arith.shrui(warp, _i32(1))  # the second of equal pairs of warps is silent
            row = _plus(_times(arith.andi(warp, _i32(1)), 4), arith.shrui(lane, _i32(3)))
            column = _times(arith.andi(lane, _i32(7)), 2)
            first = _plus(_times(row, stride), column)
            for block, pair in enumerate(value.registers.reshape(-1)):
                place = _times(_plus(first, _i32(8 * block * stride)), itemsize)
                address = arith.addi(base, arith.extui(_i64(), place))
                words = _parts(_as_words(pair, itemsize // 2), itemsize // 2)
                _store_words(address, words, copy)

        store(ref, value)  # pyright: ignore[reportCallIssue]: the context is inserted

    def load_codes(self, ref: Any) -> jax.Array:
        """A step's words from global memory, int32 [1024]."""
        if self.interpret:
            return ref[...]

        def words(base: Any, warp: Any, lane: Any) -> list[Any]:
            first = _plus(_times(warp, WORDS_A_GROUP), _times(lane, 4))
            # Read once, hence not kept in L1; the second half of 256 bytes is fetched along.
            return [
                _load_words(base, place, 4, ".L1::no_allocate.L2::256B")
                for place in (first, _plus(first, _i32(128)))
            ]

        return _from_global(ref, self.codes, (1024,), words)

    def load_scales(self, ref: Any) -> jax.Array:
        """A step's scales from global memory, int32 [4 · `SCALE_WORDS`], as `scales` has them."""
        if self.interpret:
            return shared_words(ref[...][None])[0] if self.kind == "mxfp4" else ref[...]

        def words(base: Any, warp: Any, lane: Any) -> list[Any]:
            if self.kind == "int4":
                pair = _times(arith.andi(lane, _i32(3)), 2)
                return [_load_words(base, _plus(_times(warp, 8), pair), 2, "")]
            if self.kind == "nvfp4":
                return [_load_words(base, _plus(_times(warp, 32), lane), 1, "")]
            # Two warps share 32 words, and lanes t, t ^ 1 hold one of each; see `pack_mxfp4`.
            place = _plus(_times(arith.shrui(warp, _i32(1)), 32), lane)
            odd = arith.andi(warp, _i32(1))
            owner = arith.ori(arith.andi(lane, _i32(30)), odd)
            return [[_from_lane(word, owner)] for word in _load_words(base, place, 1, "")]

        return _from_global(ref, self.scales, (32,) if self.kind == "int4" else (128,), words)

    def multiply(
        self, sums: jax.Array, codes: jax.Array, activations: jax.Array, scales: jax.Array
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
            arg_types=(self.sums, self.codes, self.activations, self.scales),
            return_type=plgpu.ShapeDtypeStruct((self.rows, 64), jnp.float32, self.sums),
        )
        def multiply(_, sums, codes, activations, scales):
            before = sums.registers.reshape(self.rows // 8, 2)
            before = {index: _parts(value, 2) for index, value in np.ndenumerate(before)}
            scale_words = _parts(scales.registers.reshape(1)[0], 2 if self.kind == "int4" else 1)
            words = [_parts(unit, 4) for unit in codes.registers.reshape(2)]
            after = self._multiply_units(
                before, words, self._activation_words(activations), scale_words
            )
            registers = [_vector(after[index], ir.F32Type.get()) for index in sorted(after)]
            return _array(registers, self.sums, (self.rows, 64))

        return multiply(sums, codes, activations, scales)  # pyright: ignore[reportCallIssue]

    def _activation_words(self, activations) -> list[list[list[Any]]]:
        """[unit][rows / 8] -> eight words of two bfloat16."""
        pieces = activations.registers.reshape(self.rows // 8, 2, 2)
        return [
            [
                [word for piece in rows[unit] for word in _parts(_as_words(piece, 4), 4)]
                for rows in pieces
            ]
            for unit in range(2)
        ]

    def _multiply_units(self, before, words, x, scale_words) -> dict[tuple[int, int], list[Any]]:
        """Sums by (rows / 8, columns / 8): two a lane."""
        zero = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), 0.0))
        groups = range(self.rows // 8)
        start = dict.fromkeys(before, [zero, zero]) if self.kind == "int4" else before
        # The instruction has 16 rows; where there are 8 the others are zero, and dropped.
        sums = {
            n: [*start[0, n], *(start[1, n] if self.rows == 16 else [zero, zero])] for n in (0, 1)
        }
        for unit in range(2):
            factors = None if self.kind == "int4" else self._scale_pairs(scale_words[0], unit)
            for step in range(4):
                if factors is None:
                    weight = _int4_registers(words[unit][step])
                else:
                    weight = _e2m1_registers(words[unit][step], factors)
                low, high = ([x[unit][m][2 * step + pair] for m in groups] for pair in (0, 1))
                if self.rows == 8:
                    low, high = [*low, _i32(0)], [*high, _i32(0)]
                for n in (0, 1):
                    sums[n] = _mma(sums[n], [*low, *high], [weight[n], weight[2 + n]])
        after = {(m, n): sums[n][2 * m : 2 * m + 2] for m in groups for n in (0, 1)}
        if self.kind != "int4":
            return after
        return {
            (m, n): [
                _fma(value, factor, old)
                for value, factor, old in zip(
                    after[m, n], _halves(scale_words[n]), before[m, n], strict=True
                )
            ]
            for m, n in after
        }

    def _scale_pairs(self, word, unit: int) -> list[Any]:
        """Scales of a lane's two rows as pairs of equal bfloat16, times 2^(126 + shift)."""
        up, add = (16, _NVFP4_ADD) if self.kind == "nvfp4" else (128, 0)

        def pair(byte: int) -> Any:
            both = f"0x4{byte}4{byte}"  # that byte into both half words, zeros above
            add_both = add | add << 16
            return _asm(
                f"{{ .reg .b32 u; prmt.b32 u,$1,0,{both}; mad.lo.u32 $0,u,{up},{add_both}; }}",
                [word],
            )

        return [pair(2 * unit + half) for half in range(2)]


def _int4_registers(word) -> list[Any]:
    """Four pairs of bfloat16: 128 + code, less 136."""
    shifted = [word] + [arith.shrui(word, _i32(4 * i)) for i in range(1, 4)]
    text = (
        "{ .reg .b32 u,c; lop3.b32 u,$1,0x000F000F,0x43004300,0xEA; "
        "mov.b32 c,0x43084308; sub.bf16x2 $0,u,c; }"
    )
    return [_asm(text, [value]) for value in shifted]


def _e2m1_registers(word, factors) -> list[Any]:
    """Four pairs of bfloat16, multiplied with the scale of their row."""
    raw = [arith.andi(word, _i32(_PLACE))]
    for rotation in ROTATIONS[1:]:
        text = "{ .reg .b32 u; shf.r.wrap.b32 u,$1,$1,%d; and.b32 $0,u,0x%X; }"
        raw.append(_asm(text % (rotation, _PLACE), [word]))
    text = (
        "{ .reg .b32 a,b,c; shl.b32 a,$1,4; and.b32 a,a,0x01800180; "
        "shl.b32 b,$1,6; lop3.b32 a,b,0x00400040,a,0xEA; "
        "shl.b32 c,$1,14; lop3.b32 $0,c,0x80008000,a,0xEA; }"
    )
    raw.append(_asm(text, [word]))
    return [
        _asm("mul.bf16x2 $0,$1,$2;", [value, factors[i % 2]], "=r,r,r")
        for i, value in enumerate(raw)
    ]


def _mma(sums, x, weight) -> list[Any]:
    """One mma.m16n8k16: four sums, four words of activations, two of the weight."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};"
    )
    struct = ir.Type.parse("!llvm.struct<(f32,f32,f32,f32)>")
    constraints = ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 6)
    found = llvm.inline_asm(struct, [*sums, *x, *weight], text, constraints)
    return [_extract(ir.F32Type.get(), found, i) for i in range(4)]


def _fma(value, factor, addend):
    f32 = ir.F32Type.get()
    return llvm.inline_asm(f32, [value, factor, addend], "fma.rn.f32 $0,$1,$2,$3;", "=f,f,f,f")


def _halves(word) -> list[Any]:
    """Two bfloat16 as float32."""
    f32 = ir.F32Type.get()
    low, high = arith.shli(word, _i32(16)), arith.andi(word, _i32(0xFFFF0000))
    return [mgpu.utils.bitcast(half, f32) for half in (low, high)]


def _from_global(ref: Any, layout: Any, shape: tuple[int, ...], words: Any) -> jax.Array:
    """An int32 array of what each lane loads: `words(warp, lane)` gives its registers.

    Loads stay in program order: a compiler that delays them to their use undoes the prefetch.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout),
    )
    def load(_, ref):
        base, warp, lane = _base_and_lane(ref)
        registers = [_vector(values, _i32_type()) for values in words(base, warp, lane)]
        return _array(registers, layout, shape, is_signed=True)

    return load(ref)  # pyright: ignore[reportCallIssue]: the context is inserted


def _base_and_lane(ref: Any) -> tuple[Any, Any, Any]:
    """Address of a reference; which warp of its warpgroup this is, and which lane of it."""
    base = llvm.ptrtoint(_i64(), mgpu.utils.memref_ptr(ref))
    tid = arith.remui(mgpu.utils.thread_idx(), _i32(128))
    return base, arith.shrui(tid, _i32(5)), arith.andi(tid, _i32(31))


def _store_words(address: Any, words: list[Any], silent: Any) -> None:
    """Stores one or two words, unless `silent` is not zero."""
    names = ",".join(f"${i + 2}" for i in range(len(words)))
    target = f".b32 [$0], {names}" if len(words) == 1 else f".v2.b32 [$0], {{{names}}}"
    text = f"{{ .reg .pred p; setp.eq.u32 p,$1,0; @p st.global{target}; }}"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, silent, *words],
        text,
        ",".join(["l", "r"] + ["r"] * len(words)),
        has_side_effects=True,
    )


def _load_words(base: Any, place: Any, size: int, hint: str) -> list[Any]:
    """`size` words from the place, counted in words from the base."""
    address = arith.addi(base, arith.extui(_i64(), _times(place, 4)))
    i32 = _i32_type()
    if size == 1:
        text = f"ld.global.nc{hint}.b32 $0, [$1];"
        return [llvm.inline_asm(i32, [address], text, "=r,l", has_side_effects=True)]
    names = ",".join(f"${i}" for i in range(size))
    text = f"ld.global.nc{hint}.v{size}.b32 {{{names}}}, [${size}];"
    struct = ir.Type.parse(f"!llvm.struct<({','.join(['i32'] * size)})>")
    constraints = "=r," * size + "l"
    found = llvm.inline_asm(struct, [address], text, constraints, has_side_effects=True)
    return [_extract(i32, found, i) for i in range(size)]


def _from_lane(value, lane):
    text = "shfl.sync.idx.b32 $0,$1,$2,31,0xFFFFFFFF;"
    return llvm.inline_asm(_i32_type(), [value, lane], text, "=r,r,r", has_side_effects=True)


def _layout(tiling, warps, lanes) -> Any:
    tiled = mgpu.TiledLayout(plgpu.Tiling(tiling), warps, lanes, -1, _check_canonical=False)
    tiled = tiled.canonicalize()
    return plgpu.Layout.TILED(tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim)


def _array(registers: list[Any], layout: Any, shape: tuple[int, ...], is_signed=None) -> Any:
    own = layout.to_mgpu()
    shaped = np.array(registers, dtype=object).reshape(own.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=shaped, _layout=own, _is_signed=is_signed)


def _vector(values: list[Any], element: ir.Type) -> Any:
    whole = llvm.mlir_undef(ir.VectorType.get((len(values),), element))
    for i, value in enumerate(values):
        whole = vector.insert(value, whole, dynamic_position=[], static_position=_position(i))
    return whole


def _parts(whole: Any, count: int) -> list[Any]:
    if not isinstance(whole.type, ir.VectorType):
        return [whole]
    return [
        vector.extract(whole, dynamic_position=[], static_position=_position(i))
        for i in range(count)
    ]


def _as_words(value: Any, count: int) -> Any:
    return mgpu.utils.bitcast(value, ir.VectorType.get((count,), _i32_type()))


def _extract(kind: ir.Type, struct: Any, index: int) -> Any:
    return llvm.extractvalue(kind, struct, _position(index))


def _position(index: int) -> Any:
    return ir.DenseI64ArrayAttr.get([index])


def _asm(text: str, inputs: list[Any], constraints: str = "=r,r") -> Any:
    return llvm.inline_asm(_i32_type(), inputs, text, constraints)


def _times(value: Any, factor: int) -> Any:
    return arith.muli(value, _i32(factor))


def _plus(left: Any, right: Any) -> Any:
    return arith.addi(left, right)


def _i32(value: int) -> Any:
    signed = value - (1 << 32) if value >= 1 << 31 else value
    return arith.constant(_i32_type(), ir.IntegerAttr.get(_i32_type(), signed))


def _i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)
