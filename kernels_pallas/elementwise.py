"""What is between two products of a decoder layer, in one kernel each.

    rms_norm(x, w, eps)           x / sqrt(mean(x²) + eps) · w
    add_rms_norm(x, y, w, eps)    x + y, and the norm of it
    silu_mul(gate, up)            gate · sigmoid(gate) · up

XLA makes two or three kernels of a norm, since it does not fuse a reduction with what uses its
result. With few tokens that is a good part of the time. Many rows, and what has no kernel, are left
to XLA, which then also may shard them as it likes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import reference
from kernels_pallas.batching import rows_together
from kernels_pallas.hopper import hopper_processors
from kernels_pallas.partition import Sharing, partitioned, whole_pieces
from kernels_pallas.row_registers import (
    BLOCK,
    LEAST_BLOCKS,
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

_MOST_ROWS = 256  # that take a kernel


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, unit_offset: bool = False) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) · w` over the last axis, or `· (1 + w)`; float32 inside.

    Args:
      x: [..., K].
      weight: [K].
      eps: static.
      unit_offset: static.

    Returns:
      [..., K] in the dtype of `x`. Reference: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    return _rows(_Step("rms_norm", eps, unit_offset), [x], weight)


def add_rms_norm(
    x: jax.Array, y: jax.Array, weight: jax.Array, eps: float, unit_offset: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`x + y`, rounded to their dtype, and `rms_norm` of that; both [..., K]."""
    return _rows(_Step("add_rms_norm", eps, unit_offset), [x, y], weight)


def silu_mul(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`gate · sigmoid(gate) · up` [..., K]; the kernel rounds once, XLA may after each factor.

    It reads them as one array: the two halves of one product are not copied, others are.
    """
    return _rows(_Step("silu_mul"), [gate, up], ())


@dataclass(frozen=True)
class _Step:
    kind: Literal["rms_norm", "add_rms_norm", "silu_mul"]
    eps: float = 0.0
    unit_offset: bool = False


def _rows(step: _Step, arrays: Sequence[jax.Array], weight: Any) -> Any:
    x = arrays[0]
    shapes = [array.shape for array in arrays]
    if any(shape != x.shape for shape in shapes) or (
        step.kind != "silu_mul" and weight.shape != x.shape[-1:]
    ):
        of_weight = f" and a weight {weight.shape}" if step.kind != "silu_mul" else ""
        raise ValueError(f"{step.kind} of {shapes}{of_weight}: the last axes differ")
    few = x.size // max(1, x.shape[-1]) <= _MOST_ROWS
    operands = [*arrays, *jax.tree.leaves(weight)]
    if hopper_processors() is None or not few or not has_kernel(*operands):
        return step_reference(step, *operands)
    out = _differentiable(step, [array.reshape(-1, x.shape[-1]) for array in arrays], weight)
    return jax.tree.map(lambda array: array.reshape(x.shape), out)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(step: _Step, arrays: Sequence[jax.Array], weight: Any) -> Any:
    return _batched(step, *arrays, weight)


def _forward(step: _Step, arrays: Sequence[jax.Array], weight: Any) -> tuple[Any, Any]:
    return _differentiable(step, arrays, weight), (arrays, weight)


def _backward(step: _Step, kept: Any, gradient: Any) -> Any:
    _, pull = jax.vjp(lambda arrays, weight: step_reference(step, *arrays, weight), *kept)
    return pull(gradient)


_differentiable.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=0)  # or calls outside jit would each compile
def _batched(step: _Step, *arguments: Any) -> Any:
    return rows_together(partial(_shared, step))(*arguments)


def _shared(step: _Step, *arguments: Any) -> Any:
    """Rows may be split, and columns that need nothing of one another."""
    *arrays, weight = arguments
    m, k = arrays[0].shape
    if step.kind == "silu_mul":
        sharing = Sharing("m k, m k", "m k", {"m": m} | whole_pieces("k", k, LEAST_BLOCKS * BLOCK))
        return partitioned(partial(_local, step), sharing, *arrays)
    operands = ", ".join(["m k"] * len(arrays) + ["k"])
    results = ", ".join(["m k"] * len(arrays))
    sharing = Sharing(operands, results, {"m": m})
    return partitioned(partial(_local, step), sharing, *arrays, weight)


def _local(step: _Step, *arrays: jax.Array) -> Any:
    """On one device."""
    otherwise = partial(step_reference, step)
    if not has_kernel(*arrays):
        return otherwise(*arrays)
    return lax.platform_dependent(*arrays, cuda=partial(step_kernel, step), default=otherwise)


def step_reference(step: _Step, *arrays: Any) -> Any:
    """What the kernels compute, in jnp."""
    if step.kind == "silu_mul":
        return jax.nn.silu(arrays[0]) * arrays[1]
    *rows, weight = arrays
    x = rows[0] if len(rows) == 1 else stored(rows[0] + rows[1], rows[0].dtype)
    normed = reference.rms_norm(x, weight, step.eps, step.unit_offset)
    return normed if len(rows) == 1 else (x, normed)


@partial(jax.jit, static_argnums=0, static_argnames=("interpret",))
def step_kernel(step: _Step, *arrays: jax.Array, interpret: bool = False) -> Any:
    """The kernel, for arrays [M, K], and a weight [K], that `has_kernel`.

    Args:
      interpret: runs in Pallas's interpreter, on any device; static.

    Raises:
      ValueError: for other arrays.
    """
    check_kernel(*arrays)
    (m, k), split = arrays[0].shape, step.kind == "silu_mul"
    if split:  # XLA finds that slices of one product make up that product
        arrays = (jnp.concatenate(arrays, axis=1),)
    views = [by_blocks(array) for array in arrays]
    out = jax.ShapeDtypeStruct((m, k // BLOCK, BLOCK), jnp.bfloat16)
    parts = [len(pieces(k // BLOCK, most=2 * LEAST_BLOCKS))] if split else []
    found = plgpu.kernel(
        _silu_mul if split else partial(_norm, step, interpret),
        out_type=(out, out) if step.kind == "add_rms_norm" else out,
        grid=(m, *parts),
        grid_names=("row", "part") if split else ("row",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*views)
    return jax.tree.map(lambda array: array.reshape(m, k), found)


def _norm(step: _Step, interpret: bool, *references: Any) -> None:
    count = 2 if step.kind == "add_rms_norm" else 1
    inputs, weight, outputs = references[:count], references[count], references[count + 1 :]
    row, parts = lax.axis_index("row"), pieces(weight.shape[0])

    def value(part: Any) -> jax.Array:
        first, *more = (read(ref.at[row, part]) for ref in inputs)
        return kept(first + more[0], jnp.bfloat16, interpret) if more else first

    def factor(part: Any) -> jax.Array:
        own = read(weight.at[part])
        return 1.0 + own if step.unit_offset else own

    if len(parts) == 1:  # read at once: nothing waits for memory when the sum is known
        only, only_factor = value(parts[0]), factor(parts[0])
        value, factor = lambda part: only, lambda part: only_factor
    scale = inverse_rms(value, parts, step.eps)
    for part in parts:
        summed = value(part)
        results = [summed] * (count - 1) + [summed * scale * factor(part)]
        for ref, result in zip(outputs, results, strict=True):
            ref[row, part] = result.astype(ref.dtype)


def _silu_mul(gate_up: Any, out: Any) -> None:
    row, blocks = lax.axis_index("row"), out.shape[1] // lax.axis_size("part")
    first = lax.axis_index("part") * blocks
    gate, up = (
        read(gate_up.at[row, pl.ds(half * out.shape[1] + first, blocks)]) for half in (0, 1)
    )
    out[row, pl.ds(first, blocks)] = (silu(gate) * up).astype(out.dtype)
