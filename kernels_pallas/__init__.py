"""Pallas kernels for low-precision weights on NVIDIA Hopper, on plain arrays.

weight = pack_int4(codes, scales)     # once, at load
y = w4a16(x, weight)                  # x [M, K] bfloat16 -> [M, N]

weight = EightBit(codes, scales, "fp8")
y = w8a8(x, weight)                   # activations quantized, then multiplied

mixed = cached_attention(query, key, value, positions, scale=d**-0.5)
"""

from kernels_pallas.attention import cached_attention
from kernels_pallas.dispatch import w4a16
from kernels_pallas.eight_bit import EightBit
from kernels_pallas.elementwise import add_rms_norm, rms_norm, silu_mul
from kernels_pallas.four_bit import FourBit, pack_int4, pack_mxfp4, pack_nvfp4
from kernels_pallas.joining import concatenate
from kernels_pallas.quantize_rows import quantize_rms_norm, quantize_rows, quantize_silu_mul
from kernels_pallas.rotary import rotate_append
from kernels_pallas.w8a8 import w8a8, w8a8_product

__all__ = [
    "EightBit",
    "FourBit",
    "add_rms_norm",
    "cached_attention",
    "concatenate",
    "pack_int4",
    "pack_mxfp4",
    "pack_nvfp4",
    "quantize_rms_norm",
    "quantize_rows",
    "quantize_silu_mul",
    "rms_norm",
    "rotate_append",
    "silu_mul",
    "w4a16",
    "w8a8",
    "w8a8_product",
]
