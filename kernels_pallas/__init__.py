"""Pallas kernels for low-precision weights on NVIDIA Hopper, on plain arrays.

weight = pack_int4(codes, scales)     # once, at load
y = w4a16(x, weight)                  # x [M, K] bfloat16 -> [M, N]
"""

from kernels_pallas.dispatch import w4a16
from kernels_pallas.four_bit import FourBit, concatenate, pack_int4, pack_mxfp4, pack_nvfp4

__all__ = ["FourBit", "concatenate", "pack_int4", "pack_mxfp4", "pack_nvfp4", "w4a16"]
