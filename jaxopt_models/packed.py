"""4-bit weights in the order in which kernels read them, as leaves of a parameter tree.

The law: `pack_leaf(q).dequantize()` equals `q.dequantize()`
    INT4     bit for bit, once the scales of `q` are rounded to bfloat16;
    NVFP4    up to one rounding of float32, since the tensor's scale comes last;
    MXFP4    bit for bit, blocks aside whose scale is less than 2^-118 of the largest: they are 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import Scales, real_scale, tile_expand
from jaxopt_models.qtensor import InputQuantizer, LowRank, QTensor
from jaxopt_models.tree import WeightLeaf
from kernels_pallas import FourBit, pack_int4, pack_mxfp4, pack_nvfp4

# Columns that share a scale in a kernel, of each format that has one.
KERNEL_BLOCKS = {"int4": 128, "nvfp4": 16, "mxfp4": 32}


@struct.dataclass
class PackedTensor(WeightLeaf):
    """A 4-bit weight [N, K] for kernels, behind the input steps of a `QTensor`.

    Made by `pack_leaf`, to be run and for nothing else: it is not trained, saved or exported. It
    may be sharded, and joined with others along N, but not sliced.

    Attributes:
      weight: codes and scales in the kernels' order.
      pre_scale, low_rank, input, rotate: as in `QTensor`.
      dtype: what `dequantize` returns by default; static.
    """

    weight: FourBit
    pre_scale: jax.Array | None = None
    low_rank: LowRank | None = None
    input: InputQuantizer | None = None
    dtype: str = struct.field(pytree_node=False, default="float32", kw_only=True)
    rotate: int = struct.field(pytree_node=False, default=0, kw_only=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return 2

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight [N, K], of the rotated space, in `dtype`."""
        return self.weight.dequantize().astype(dtype or self.dtype)


def has_kernel(spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Whether kernels can hold a weight of this format and shape without quantizing it anew.

    So it is for symmetric INT4, NVFP4 and MXFP4 matrices [N, K] whose scales span whole blocks of
    128, 16 or 32 columns (whole rows, square tiles and the whole matrix among them), K a multiple.
    Stacked experts [E, N, K] have no kernel.
    """
    block = KERNEL_BLOCKS.get(spec.format)
    if block is None or not spec.symmetric or len(shape) != 2:
        return False
    return shape[1] % block == 0 and spec.tile(shape)[1] % block == 0


def pack_leaf(leaf: Any) -> Any:
    """A `QTensor` as `PackedTensor` if `has_kernel`, else the leaf as it is; may be jitted."""
    if not isinstance(leaf, QTensor) or not has_kernel(leaf.spec, leaf.shape):
        return leaf
    return PackedTensor(
        _four_bit(leaf),
        leaf.pre_scale,
        leaf.low_rank,
        leaf.input,
        dtype=leaf.dtype,
        rotate=leaf.rotate,
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
