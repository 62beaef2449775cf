"""Activations to 8 bits, alone or as the last step of what makes them, in one kernel.

    quantize_rows(x)               x
    quantize_rms_norm(x, w, eps)   x / sqrt(mean(x²) + eps) · w
    quantize_silu_mul(gate, up)    gate · sigmoid(gate) · up

What is computed on the way is float32 and rounded to the dtype of `x` before it is quantized, as if
it had been stored. XLA needs two or three kernels for this (it does not fuse a reduction with what
uses its result), which is most of the time where there are few tokens.

A CTA takes a row [K / 128, 128] in pieces that its registers hold; where there are several it reads
them again, from the cache, once amax is known.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from kernels_pallas import instructions as ptx
from kernels_pallas import reference
from kernels_pallas.batching import one_by_one
from kernels_pallas.eight_bit import (
    BLOCK,
    Kind,
    code_dtype,
    encode,
    encode_by,
    largest_of,
    normal,
    rounded,
    scale_and_inverse,
    scale_shape,
)
from kernels_pallas.hopper import hopper_processors
from kernels_pallas.partition import Sharing, partitioned, whole_pieces
from kernels_pallas.row_registers import (
    block_layout,
    by_blocks,
    check_kernel,
    has_kernel,
    inverse_rms,
    kept,
    pieces,
    read,
    silu,
    stored,
)

Source = Literal["rows", "rms_norm", "silu_mul"]


def quantize_rows(
    x: jax.Array, kind: Kind, amax: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of activations.

    Args:
      x: [M, K]; K a multiple of 128 for `fp8_block`.
      kind: `fp8` or `int8`, a scale for each token, or `fp8_block`, one for 128 columns.
      amax: float32 [], a magnitude that was calibrated, instead of each token's own; not for
        `fp8_block`. XLA then quantizes, as part of what makes `x`: there is nothing to reduce.

    Returns:
      codes: float8_e4m3fn or int8 [M, K].
      scales: float32 [M]; for `fp8_block` [K / 128, M'], M' being M rounded up to a multiple of 4,
        with anything beyond M.

    Raises:
      ValueError: for shapes that do not fit.
    """
    if amax is None:
        return _dispatch("rows", kind, 0.0, x)
    return encode_by(x, amax, kind)


def quantize_rms_norm(
    x: jax.Array, weight: jax.Array, eps: float, kind: Kind
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of `x / sqrt(mean(x²) + eps) · weight`; see `quantize_rows`.

    Args:
      x: [M, K].
      weight: [K].
      eps: static.
      kind: as for `quantize_rows`.

    Reference: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {weight.shape}; x of shape {x.shape} needs its last")
    return _dispatch("rms_norm", kind, eps, x, weight)


def quantize_silu_mul(gate: jax.Array, up: jax.Array, kind: Kind) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of `gate · sigmoid(gate) · up`, both [M, K]; see `quantize_rows`."""
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {gate.shape}, up {up.shape}")
    return _dispatch("silu_mul", kind, 0.0, gate, up)


def _dispatch(source: Source, kind: Kind, eps: float, *arrays: jax.Array):
    x = arrays[0]
    if x.ndim != 2 or (kind == "fp8_block" and x.shape[1] % BLOCK):
        raise ValueError(
            f"activations have shape {x.shape}; needed is [M, K]"
            + (", K a multiple of 128" if kind == "fp8_block" else "")
        )
    return one_by_one(partial(_shared, source, kind, eps))(*arrays)


def _shared(source: Source, kind: Kind, eps: float, *arrays: jax.Array):
    """Rows may be split, and blocks of 128 columns that need nothing of one another."""
    m, k = arrays[0].shape
    blocked = kind == "fp8_block"
    pieces = whole_pieces("m", m, 4) if blocked else {"m": m}
    if blocked and source != "rms_norm":
        pieces |= whole_pieces("k", k, BLOCK)
    operands = {"rows": "m k", "rms_norm": "m k, k", "silu_mul": "m k, m k"}[source]
    sharing = Sharing(operands, "m k, k m" if blocked else "m k, m", pieces)
    return partitioned(partial(_local, source, kind, eps), sharing, *arrays)


def _local(source: Source, kind: Kind, eps: float, *arrays: jax.Array):
    """On one device."""
    reference = partial(quantize_reference, source, kind, eps)
    if hopper_processors() is None or not has_kernel(*arrays):
        return reference(*arrays)
    kernel = partial(quantize_kernel, source, kind, eps)
    return lax.platform_dependent(*arrays, cuda=kernel, default=reference)


@partial(jax.jit, static_argnums=(0, 1, 2))
def quantize_reference(
    source: Source, kind: Kind, eps: float, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the kernel computes, in jnp."""
    x, *more = (array.astype(jnp.float32) for array in arrays)
    if source == "rms_norm":
        x = reference.rms_norm(x, more[0], eps)
    if source == "silu_mul":
        x = silu(x) * more[0]
    return encode(stored(x, arrays[0].dtype), kind)


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("interpret",))
def quantize_kernel(
    source: Source, kind: Kind, eps: float, *arrays: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The kernel, for arrays that `has_kernel`; see the functions above.

    Args:
      interpret: runs in Pallas's interpreter, on any device; static.

    Raises:
      ValueError: for other arrays.
    """
    check_kernel(*arrays)
    m, k = arrays[0].shape
    codes, scales = plgpu.kernel(
        partial(_body, source, kind, eps, interpret),
        out_type=(
            jax.ShapeDtypeStruct((m, k // BLOCK, BLOCK), code_dtype(kind)),
            jax.ShapeDtypeStruct(scale_shape(kind, m, k), jnp.float32),
        ),
        grid=(m,),
        grid_names=("row",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*map(by_blocks, arrays))
    return codes.reshape(m, k), scales


def _body(source: Source, kind: Kind, eps: float, interpret: bool, *references: Any) -> None:
    *inputs, codes, scales = references
    row, blocks = lax.axis_index("row"), codes.shape[1]
    parts = pieces(blocks)
    values = _source(source, eps, row, inputs, parts, interpret)
    if len(parts) == 1:
        only = values(parts[0])
        values = lambda part: only  # noqa: E731

    def write(part: Any, amax: jax.Array, value: jax.Array) -> jax.Array:
        """Codes of a part; returns the scales of its blocks."""
        scale, inverse = scale_and_inverse(amax, largest_of(kind))
        inverse = lax.broadcast_in_dim(inverse, value.shape, (0,))
        codes[row, part] = _codes(value * inverse, kind, interpret)
        return scale

    if kind == "fp8_block":
        for part in parts:
            value = values(part)
            scale = write(part, _largest(value), value)
            _store_column(scales.at[part, pl.ds(row, 1)], scale, scales.shape[1], interpret)
        return
    amax = reduce(jnp.maximum, [_largest(values(part)) for part in parts])
    # Each block gets the row's: Mosaic GPU reinterprets bits of vectors only.
    amax = jnp.broadcast_to(jnp.max(amax), amax.shape)
    for part in parts:
        scale = write(part, amax, values(part))
    scales[row] = jnp.max(scale)


def _source(
    source: Source,
    eps: float,
    row: Any,
    inputs: Sequence[Any],
    parts: Sequence[Any],
    interpret: bool,
) -> Callable[[Any], jax.Array]:
    """part -> what is to be quantized of it, float32 [blocks, 128]."""
    x, *more = inputs

    def ready(value: jax.Array) -> jax.Array:
        return normal(kept(value, x.dtype, interpret))

    if source == "silu_mul":
        (up,) = more
        return lambda part: ready(silu(read(x.at[row, part])) * read(up.at[row, part]))
    if source == "rms_norm":
        (weight,) = more
        scale = inverse_rms(lambda part: read(x.at[row, part]), parts, eps)
        return lambda part: ready(read(x.at[row, part]) * scale * read(weight.at[part]))
    return lambda part: normal(read(x.at[row, part]))


def _codes(y: jax.Array, kind: Kind, interpret: bool) -> jax.Array:
    if kind == "int8" or interpret:
        return rounded(y, kind)
    return jnp.clip(y, -448.0, 448.0).astype(jnp.float8_e4m3fn)  # Hopper rounds once


def _largest(value: jax.Array) -> jax.Array:
    """Of each block."""
    return jnp.max(jnp.abs(value), axis=1)


def _store_column(ref: Any, scale: jax.Array, stride: int, interpret: bool) -> None:
    """Writes the scales of blocks to global memory, `stride` entries apart.

    By hand, since Mosaic GPU refuses stores that leave a sector of 32 bytes incomplete.
    """
    if interpret:
        ref[...] = scale[:, None]
        return
    blocks = scale.shape[0]
    rows = 2 if blocks % 8 == 0 else 1  # of a warp, in `block_layout`

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), block_layout(blocks).reduce(1)))
    def store(_, ref, scale):
        base, warp, lane = ptx.base_and_lane(ref)
        lanes = 32 // rows  # that hold the same block
        own = ptx.plus(ptx.times(warp, rows), arith.divui(lane, ptx.i32(lanes)))
        silent = arith.remui(lane, ptx.i32(lanes))
        for i, value in enumerate(scale.registers.reshape(-1)):
            place = ptx.times(ptx.plus(own, ptx.i32(4 * rows * i)), 4 * stride)
            address = arith.addi(base, arith.extui(ptx.i64(), place))
            (single,) = ptx.parts(value, 1)
            word = mgpu.utils.bitcast(single, ptx.i32_type())
            ptx.store_words(address, [word], silent)

    store(ref, scale)  # pyright: ignore[reportCallIssue]: the context is inserted
