"""Weights as kernels read them, leaves of a parameter tree.

The law: `pack_leaf(q).dequantize()` equals `q.dequantize()`
    INT8, FP8  bit for bit;
    INT4       bit for bit, once the scales of `q` are rounded to bfloat16;
    NVFP4      up to one rounding of float32, since the tensor's scale comes last;
    MXFP4      bit for bit, blocks aside whose scale is less than 2^-118 of the largest: they are 0.

8-bit weights are multiplied with codes, those of `q.input(x)` bit for bit; scales come after the
sums, or the sums of 128 columns. So in float32 a product is that of `q` up to roundings, and in
bfloat16 closer than that of `q`, which rounds input and weight to bfloat16 once more. (Of sums of
FP8 codes Hopper keeps about 14 bits.)
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxopt_models.formats import QuantSpec, resolve
from jaxopt_models.numerics import Scales, real_scale, tile_expand
from jaxopt_models.qtensor import InputQuantizer, LowRank, QTensor
from jaxopt_models.tree import WeightLeaf, size_in_bits
from kernels_pallas import EightBit, FourBit, pack_int4, pack_mxfp4, pack_nvfp4, w4a16, w8a8
from kernels_pallas.eight_bit import BLOCK, Kind
from kernels_pallas.w8a8_kernel import has_kernel as fits_w8a8

# Columns that share a scale in a kernel for 4 bits, of each format that has one.
KERNEL_BLOCKS = {"int4": 128, "nvfp4": 16, "mxfp4": 32}
# Weights of 8 bits, by format and granularity, and what kernels quantize their inputs to: a format,
# and whether its scales are static.
_KINDS: dict[tuple[str, str], Kind] = {
    ("fp8", "tensor"): "fp8",
    ("fp8", "channel"): "fp8",
    ("fp8", "block2d"): "fp8_block",
    ("int8", "tensor"): "int8",
    ("int8", "channel"): "int8",
}
_INPUTS: dict[Kind, dict[QuantSpec, bool]] = {
    "fp8": {resolve("fp8", granularity="token"): False, resolve("fp8"): True},
    "fp8_block": {resolve("fp8", granularity="block", block_size=BLOCK): False},
    "int8": {resolve("int8", granularity="token"): False, resolve("int8"): True},
}


@struct.dataclass
class PackedTensor(WeightLeaf):
    """A weight [N, K] for kernels, behind the input steps of a `QTensor`.

    Made by `pack_leaf`, to be run and for nothing else: it is not trained, saved or exported. It
    may be sharded, and joined with others along N, but not sliced.

    Attributes:
      weight: codes and scales in the kernels' order; 8 bits have an `input`.
      pre_scale, low_rank, input, rotate: as in `QTensor`.
      dtype: what `dequantize` returns by default; static.
    """

    weight: FourBit | EightBit
    pre_scale: jax.Array | None = None
    low_rank: LowRank | None = None
    input: InputQuantizer | None = None
    dtype: str = struct.field(pytree_node=False, default="float32", kw_only=True)
    rotate: int = struct.field(pytree_node=False, default=0, kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def weight_bits(self) -> int:
        return size_in_bits(replace(self, input=None))

    def product(self, x: jax.Array) -> jax.Array:
        """`input(x) Ŵᵀ` by a kernel, if the device has one: [..., N] in the dtype of `x`.

        Args:
          x: [..., K], after `pre_scale` and `rotate`.
        """
        if isinstance(self.weight, EightBit):
            assert self.input is not None  # or it were not packed
            return w8a8(x, self.weight, self.input.amax)
        return w4a16(x if self.input is None else self.input(x), self.weight)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight [N, K], of the rotated space, in `dtype`."""
        return self.weight.dequantize().astype(dtype or self.dtype)


def has_kernel(
    spec: QuantSpec, shape: tuple[int, ...], input: InputQuantizer | None = None
) -> bool:
    """Whether kernels can hold a weight of this format and shape without quantizing it anew.

    So it is for matrices [N, K] of
      4 bits, if symmetric INT4, NVFP4 or MXFP4 whose scales span whole blocks of 128, 16 or 32
        columns (whole rows, square tiles and the whole matrix among them), K a multiple;
      8 bits, if both weight and input are INT8, or FP8, with scales of the tensor or by channel,
        the input's static or by token; or FP8 with scales of 128 x 128 and of 128 columns of a
        token. N is a multiple of 16 and K of 32, for blocks of 128.
    Stacked experts [E, N, K] have no kernel.
    """
    if len(shape) != 2:
        return False
    if spec.format not in KERNEL_BLOCKS:
        return _eight_bit_kind(spec, shape, input) is not None
    block = KERNEL_BLOCKS[spec.format]
    return spec.symmetric and shape[1] % block == 0 and spec.tile(shape)[1] % block == 0


def pack_leaf(leaf: Any) -> Any:
    """A `QTensor` as `PackedTensor` if `has_kernel`, else the leaf as it is; may be jitted."""
    if not isinstance(leaf, QTensor) or not has_kernel(leaf.spec, leaf.shape, leaf.input):
        return leaf
    return PackedTensor(
        _four_bit(leaf) if leaf.spec.format in KERNEL_BLOCKS else _eight_bit(leaf),
        leaf.pre_scale,
        leaf.low_rank,
        leaf.input,
        dtype=leaf.dtype,
        rotate=leaf.rotate,
    )


def _eight_bit_kind(
    spec: QuantSpec, shape: tuple[int, ...], input: InputQuantizer | None
) -> Kind | None:
    """The kernels' format of a matrix, or None if they have none for it or its input."""
    kind = _KINDS.get((spec.format, spec.granularity))
    if kind is None or input is None or not fits_w8a8(1, *shape):
        return None
    if kind == "fp8_block" and (spec.block_size != BLOCK or shape[1] % BLOCK):
        return None
    static = _INPUTS[kind].get(input.spec)
    return kind if static == (input.amax is not None) and input.search == "max" else None


def _eight_bit(q: QTensor) -> EightBit:
    kind = _eight_bit_kind(q.spec, q.shape, q.input)
    assert kind is not None  # `has_kernel`
    scale = real_scale(Scales(q.scale), q.spec)
    return EightBit(
        q.codes,
        scale if kind == "fp8_block" else jnp.broadcast_to(scale[:, 0], q.shape[0]),
        kind,
    )


def _four_bit(q: QTensor) -> FourBit:
    n, k = q.shape
    block, tile = KERNEL_BLOCKS[q.spec.format], q.spec.tile(q.shape)

    def for_each_block(scale: jax.Array) -> jax.Array:
        return tile_expand(scale, (tile[0], tile[1] // block), (n, k // block))

    codes = q.unpack()
    if q.spec.format == "int4":
        return pack_int4(codes, for_each_block(real_scale(Scales(q.scale), q.spec)))
    if q.spec.format == "mxfp4":
        exponents = lax.bitcast_convert_type(q.scale, jnp.uint8).astype(jnp.int32) - 127
        return pack_mxfp4(codes, for_each_block(exponents))
    assert q.global_scale is not None  # NVFP4 has two levels
    return pack_nvfp4(codes, for_each_block(q.scale), q.global_scale.reshape(()))
