"""The instructions of one lane, as MLIR values in and out: inline PTX, and what is around it.

Words are 32 bits, and hold codes or two bfloat16. Source: PTX ISA 8.7, mma.m16n8k16.
"""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from kernels_pallas.four_bit import (
    MXFP4_SHIFT,
    MXFP4_TOP,
    NVFP4_BIAS,
    NVFP4_SHIFT,
    ROTATIONS,
    Kind,
)

_PLACE = 0x81C081C0  # sign, exponent and mantissa of E2M1 in two bfloat16

# Added to a scale's bits, moved up, to make it a bfloat16: in half words, exponents of
# 2^(126 + shift) more, since codes are read as 2^-126 times their value.
_NVFP4_ADD = (127 + 126 + NVFP4_SHIFT - NVFP4_BIAS) << 7
assert MXFP4_TOP == 127 + 126 + MXFP4_SHIFT  # so that MXFP4 has nothing to add


def int4_registers(word) -> list[Any]:
    """Four pairs of bfloat16: 128 + code, less 136."""
    shifted = [word] + [arith.shrui(word, i32(4 * i)) for i in range(1, 4)]
    text = (
        "{ .reg .b32 u,c; lop3.b32 u,$1,0x000F000F,0x43004300,0xEA; "
        "mov.b32 c,0x43084308; sub.bf16x2 $0,u,c; }"
    )
    return [asm(text, [value]) for value in shifted]


def e2m1_registers(word, factors) -> list[Any]:
    """Four pairs of bfloat16, multiplied with the scale of their row; see `scaled`."""
    raw = [arith.andi(word, i32(_PLACE))]
    for rotation in ROTATIONS[1:]:
        text = "{ .reg .b32 u; shf.r.wrap.b32 u,$1,$1,%d; and.b32 $0,u,0x%X; }"
        raw.append(asm(text % (rotation, _PLACE), [word]))
    text = (
        "{ .reg .b32 a,b,c; shl.b32 a,$1,4; and.b32 a,a,0x01800180; "
        "shl.b32 b,$1,6; lop3.b32 a,b,0x00400040,a,0xEA; "
        "shl.b32 c,$1,14; lop3.b32 $0,c,0x80008000,a,0xEA; }"
    )
    raw.append(asm(text, [word]))
    return scaled(raw, factors)


def scaled(registers: list[Any], factors) -> list[Any]:
    """Registers of a lane's rows g, g + 8, g, g + 8, times the two bfloat16 of `factors`."""
    # Taking a half word twice is free: it is a modifier of the multiplication.
    text = (
        "{ .reg .b16 l,h; .reg .b32 s; mov.b32 {l,h},$2; mov.b32 s,{%s,%s}; mul.bf16x2 $0,$1,s; }"
    )
    halves = ("l", "h", "l", "h")
    return [
        asm(text % (half, half), [value, factors], "=r,r,r")
        for value, half in zip(registers, halves, strict=True)
    ]


def scale_pair(kind: Kind, word: Any, block: int) -> Any:
    """Scales of a lane's two rows as two bfloat16, times 2^(126 + shift)."""
    up, add = (16, _NVFP4_ADD) if kind == "nvfp4" else (128, 0)
    first = 2 * block
    apart = f"0x4{first + 1}4{first}"  # a byte into each half word, zeros above
    text = f"{{ .reg .b32 u; prmt.b32 u,$1,0,{apart}; mad.lo.u32 $0,u,{up},{add | add << 16}; }}"
    return asm(text, [word])


def mma(sums, x, weight) -> list[Any]:
    """One mma.m16n8k16: four sums, four words of activations, two of the weight."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};"
    )
    struct = ir.Type.parse("!llvm.struct<(f32,f32,f32,f32)>")
    constraints = ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 6)
    found = llvm.inline_asm(struct, [*sums, *x, *weight], text, constraints)
    return [extract(ir.F32Type.get(), found, i) for i in range(4)]


def fma(value, factor, addend):
    f32 = ir.F32Type.get()
    return llvm.inline_asm(f32, [value, factor, addend], "fma.rn.f32 $0,$1,$2,$3;", "=f,f,f,f")


def plus_of(value, distance: int):
    """A float32 plus that of the lane whose number differs in the bit `distance`."""
    return arith.addf(value, mgpu.utils.shfl_bfly(value, distance))


def halves(word) -> list[Any]:
    """Two bfloat16 as float32."""
    f32 = ir.F32Type.get()
    low, high = arith.shli(word, i32(16)), arith.andi(word, i32(0xFFFF0000))
    return [mgpu.utils.bitcast(half, f32) for half in (low, high)]


def base_and_lane(ref: Any) -> tuple[Any, Any, Any]:
    """Address of a reference; which warp of its warpgroup this is, and which lane of it."""
    base = llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(ref))
    tid = arith.remui(mgpu.utils.thread_idx(), i32(128))
    return base, arith.shrui(tid, i32(5)), arith.andi(tid, i32(31))


def store_words(address: Any, words: list[Any], silent: Any) -> None:
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


def load_words(base: Any, place: Any, size: int, hint: str) -> list[Any]:
    """`size` words from the place, counted in words from the base."""
    address = arith.addi(base, arith.extui(i64(), times(place, 4)))
    i32 = i32_type()
    if size == 1:
        text = f"ld.global.nc{hint}.b32 $0, [$1];"
        return [llvm.inline_asm(i32, [address], text, "=r,l", has_side_effects=True)]
    names = ",".join(f"${i}" for i in range(size))
    text = f"ld.global.nc{hint}.v{size}.b32 {{{names}}}, [${size}];"
    struct = ir.Type.parse(f"!llvm.struct<({','.join(['i32'] * size)})>")
    constraints = "=r," * size + "l"
    found = llvm.inline_asm(struct, [address], text, constraints, has_side_effects=True)
    return [extract(i32, found, i) for i in range(size)]


def packed(values: list[Any], element: ir.Type) -> Any:
    """A vector of values."""
    whole = llvm.mlir_undef(ir.VectorType.get((len(values),), element))
    for i, value in enumerate(values):
        whole = vector.insert(value, whole, dynamic_position=[], static_position=position(i))
    return whole


def parts(whole: Any, count: int) -> list[Any]:
    """The values of a vector, or the value itself."""
    if not isinstance(whole.type, ir.VectorType):
        return [whole]
    return [
        vector.extract(whole, dynamic_position=[], static_position=position(i))
        for i in range(count)
    ]


def as_words(value: Any, count: int) -> Any:
    """The same bits as a vector of words."""
    return mgpu.utils.bitcast(value, ir.VectorType.get((count,), i32_type()))


def extract(kind: ir.Type, struct: Any, index: int) -> Any:
    """One result of an instruction that has several."""
    return llvm.extractvalue(kind, struct, position(index))


def position(index: int) -> Any:
    return ir.DenseI64ArrayAttr.get([index])


def asm(text: str, inputs: list[Any], constraints: str = "=r,r") -> Any:
    """Inline PTX with one word as its result."""
    return llvm.inline_asm(i32_type(), inputs, text, constraints)


def times(value: Any, factor: int) -> Any:
    return arith.muli(value, i32(factor))


def plus(left: Any, right: Any) -> Any:
    return arith.addi(left, right)


def at_least(value: Any, bound: int) -> Any:
    """1 or 0."""
    found = arith.cmpi(arith.CmpIPredicate.uge, value, i32(bound))
    return arith.extui(i32_type(), found)


def i32(value: int) -> Any:
    """A constant word."""
    signed = value - (1 << 32) if value >= 1 << 31 else value
    return arith.constant(i32_type(), ir.IntegerAttr.get(i32_type(), signed))


def i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def f32_type() -> ir.Type:
    return ir.F32Type.get()


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)
