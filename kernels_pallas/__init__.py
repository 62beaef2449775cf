"""Pallas kernels for low-precision weights on NVIDIA Hopper, on plain arrays.

weight = pack_int4(codes, scales)     # once, at load
y = w4a16(x, weight)                  # x [M, K] bfloat16 -> [M, N]

codes, scales = quantize_rows(x, "fp8")
"""

from kernels_pallas.dispatch import w4a16
from kernels_pallas.four_bit import FourBit, pack_int4, pack_mxfp4, pack_nvfp4
from kernels_pallas.quantize_rows import quantize_rms_norm, quantize_rows, quantize_silu_mul

__all__ = [
    "FourBit",
    "pack_int4",
    "pack_mxfp4",
    "pack_nvfp4",
    "quantize_rms_norm",
    "quantize_rows",
    "quantize_silu_mul",
    "w4a16",
]
