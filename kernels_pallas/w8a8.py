"""Products of activations with 8-bit weights: what they compute, and where a kernel does.

y = w8a8(x, weight)                                    x [..., K] -> [..., N]

codes, scales = quantize_rms_norm(h, w, eps, "fp8")    once
q = w8a8_product(codes, scales, q_weight)              for each product that reads it
k = w8a8_product(codes, scales, k_weight)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import tuning
from kernels_pallas.batching import one_by_one, rows_together
from kernels_pallas.eight_bit import BLOCK, EightBit, scale_shape
from kernels_pallas.hopper import hopper_processors
from kernels_pallas.partition import Sharing, partitioned, whole_pieces
from kernels_pallas.quantize_rows import quantize_rows
from kernels_pallas.w8a8_kernel import has_kernel, w8a8_kernel
from kernels_pallas.w8a8_tiling import EightBitTiling


def w8a8(x: jax.Array, weight: EightBit, amax: jax.Array | None = None) -> jax.Array:
    """`Q(x) · weightᵀ`, where Q rounds `x` to the weight's kind, as `quantize_rows` does.

    Gradients reach `x` as if there were no rounding (straight through), by the weight's values.
    Works under `vmap`, which adds to the rows, and on sharded arrays, as `w4a16` does.

    Args:
      x: [..., K], any number of rows.
      weight: standing for [N, K].
      amax: float32 [], for static scales; None takes dynamic ones.

    Returns:
      [..., N] in the dtype of `x`; there are kernels for bfloat16.

    Raises:
      ValueError: for shapes that do not fit.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {weight.shape[1]}")
    rows = x.reshape(-1, x.shape[-1])
    return _quantized_product(rows, (weight, amax)).reshape(*x.shape[:-1], weight.shape[0])


def w8a8_product(
    codes: jax.Array, scales: jax.Array, weight: EightBit, dtype: Any = jnp.bfloat16
) -> jax.Array:
    """The product of activations that are quantized already, as `quantize_rows` gives them.

    Args:
      codes: [M, K], int8 for an `int8` weight, else float8_e4m3fn or float8_e5m2.
      scales: float32 [M]; for `fp8_block` [K / 128, M'], M' being M rounded up to a multiple of 4.
      weight: standing for [N, K].
      dtype: of the result; the kernel's is bfloat16.

    Returns:
      [M, N] in `dtype`.

    Raises:
      ValueError: for shapes or dtypes that do not fit.
    """
    _check(codes, scales, weight)
    return one_by_one(partial(_shared, jnp.dtype(dtype)))(codes, scales, weight)


def _shared(dtype: Any, codes: jax.Array, scales: jax.Array, weight: EightBit) -> jax.Array:
    (m, k), (n, _), (rows, columns) = codes.shape, weight.shape, weight.piece

    def local(
        codes: jax.Array, scales: jax.Array, of_weight: jax.Array, weight_scales: jax.Array
    ) -> jax.Array:
        return _local(dtype, codes, scales, EightBit(of_weight, weight_scales, weight.kind))

    blocked = weight.kind == "fp8_block"
    operands = "m k, k m, n k, n k" if blocked else "m k, m, n k, n"
    pieces = whole_pieces("m", m, 4) if blocked else {"m": m}
    pieces |= whole_pieces("n", n, rows) | whole_pieces("k", k, columns)
    sharing = Sharing(operands, "m n", pieces, added="k")
    return partitioned(local, sharing, codes, scales, weight.codes, weight.scales)


def _local(dtype: Any, codes: jax.Array, scales: jax.Array, weight: EightBit) -> jax.Array:
    """The product on one device."""
    processors, reference = hopper_processors(), partial(w8a8_reference, dtype=dtype)
    fits = dtype == jnp.bfloat16 and has_kernel(len(codes), *weight.shape)
    if processors is None or not fits:
        return reference(codes, scales, weight)
    product = weight.kind, len(codes), *weight.shape, jax.devices()[0].device_kind
    blocked = weight.kind == "fp8_block"
    tiling = tuning.find(EightBitTiling, "w8a8", *product, lambda t: t.fits(blocked))

    def kernel(codes: jax.Array, scales: jax.Array, weight: EightBit) -> jax.Array:
        own = weight.codes, weight.scales
        return w8a8_kernel(codes, scales, *own, tiling, processors=processors)

    return lax.platform_dependent(codes, scales, weight, cuda=kernel, default=reference)


@partial(jax.jit, static_argnames="dtype")
def w8a8_reference(
    codes: jax.Array, scales: jax.Array, weight: EightBit, dtype: Any = jnp.bfloat16
) -> jax.Array:
    """What the kernels compute, in jnp: sums of INT8 are exact, of FP8 float32's."""
    if weight.kind == "fp8_block":
        return _blocked_reference(codes, scales, weight).astype(dtype)
    if weight.kind == "int8":
        sums = jnp.matmul(codes, weight.codes.T, preferred_element_type=jnp.int32)
    else:
        sums = _float32_product(codes, weight.codes)
    product = sums.astype(jnp.float32) * weight.scales[None] * scales[:, None]
    return product.astype(dtype)


def _blocked_reference(codes: jax.Array, scales: jax.Array, weight: EightBit) -> jax.Array:
    (m, k), n = codes.shape, weight.shape[0]

    def add_block(sums, block):
        x, x_scale, of_weight, weight_scale = block
        of_channels = jnp.repeat(weight_scale, BLOCK)[:n]
        product = _float32_product(x, of_weight)
        return sums + product * (x_scale[:, None] * of_channels[None]), None

    def by_blocks(array: jax.Array) -> jax.Array:
        return array.reshape(len(array), k // BLOCK, BLOCK).transpose(1, 0, 2)

    blocks = by_blocks(codes), scales[:, :m], by_blocks(weight.codes), weight.scales.T
    sums, _ = lax.scan(add_block, jnp.zeros((m, n), jnp.float32), blocks)
    return sums


def _float32_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32), weight.astype(jnp.float32).T
    return jnp.matmul(*wide, precision=lax.Precision.HIGHEST)


type _Scaled = tuple[EightBit, jax.Array | None]  # a weight, amax


@jax.custom_vjp
def _quantized_product(x: jax.Array, scaled: _Scaled) -> jax.Array:
    return _batched(x, scaled)


@rows_together
def _batched(x: jax.Array, scaled: _Scaled) -> jax.Array:
    weight, amax = scaled
    return w8a8_product(*quantize_rows(x, weight.kind, amax), weight, x.dtype)


def _forward(x: jax.Array, scaled: _Scaled) -> tuple[jax.Array, _Scaled]:
    return _quantized_product(x, scaled), scaled


def _backward(scaled: _Scaled, gradient: jax.Array) -> tuple[jax.Array, _Scaled]:
    dense = scaled[0].dequantize().astype(gradient.dtype)
    of_x = jnp.matmul(gradient, dense, preferred_element_type=jnp.float32)
    return of_x.astype(gradient.dtype), jax.tree.map(_no_gradient, scaled)


_quantized_product.defvjp(_forward, _backward)


def _no_gradient(array: jax.Array):
    if jnp.issubdtype(array.dtype, jnp.integer):
        return np.zeros(array.shape, jax.dtypes.float0)
    return jnp.zeros_like(array)


def _check(codes: jax.Array, scales: jax.Array, weight: EightBit) -> None:
    n, k = weight.shape
    blocked, integral = weight.kind == "fp8_block", weight.kind == "int8"
    of_weight = (-(-n // BLOCK), k // BLOCK) if blocked else (n,)
    if weight.scales.shape != of_weight or (blocked and k % BLOCK):
        raise ValueError(
            f"a {weight.kind} weight {weight.shape} has scales {weight.scales.shape}; "
            f"needed are {of_weight}" + (", K a multiple of 128" if blocked else "")
        )
    if codes.ndim != 2 or codes.shape[1] != k:
        raise ValueError(f"codes have shape {codes.shape}; needed is [M, {k}]")
    for name, array in (("codes", codes), ("the weight's codes", weight.codes)):
        if (array.dtype == jnp.int8) != integral or array.dtype.itemsize != 1:
            raise ValueError(f"{name} are {array.dtype}; the weight is {weight.kind}")
    wanted = scale_shape(weight.kind, len(codes), k)
    if scales.shape != wanted:
        raise ValueError(f"scales have shape {scales.shape}; codes {codes.shape} need {wanted}")
