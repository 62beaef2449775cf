"""Rotary embeddings, and what is rotated into the cache, in one kernel.

XLA makes five of it: two rotations, a selection of what is written and two writes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import reference
from kernels_pallas.batching import batches_together
from kernels_pallas.hopper import hopper_processors
from kernels_pallas.partition import Sharing, partitioned
from kernels_pallas.registers import layout

_HEADS = 4  # of a CTA, one for each warp
_MOST_ROWS = 256  # that take a kernel
_HEAD_DIMS = (128, 256)  # halves of whole cache lines, which stores have to fill


def rotate_append(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slots: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rotated queries and keys, and a cache that holds the rotated keys and the values at slots.

    Pairs (i, i + d/2) of each head are rotated, in float32:

        x_i cos_i - x_j sin_i,    x_j cos_i + x_i sin_i,    j = i + d/2

    The cache is written in place where its old contents are not needed any more. Works under
    `vmap`, which adds to the rows, and on arrays that are sharded over B or over heads.

    Args:
      query: [B, T, H, d].
      key, value: [B, T, G, d], H a multiple of G.
      cos, sin: float32 [B, T, d/2].
      slots: int32 [B, T], distinct in a row; what belongs to one >= S is dropped.
      keys, values: [B, G, S, d], in any dtype.

    Returns:
      (query, key, keys, values), each like the argument. Reference: Su et al. 2021,
      arXiv:2104.09864.
    """
    arrays = query, key, value, cos, sin, slots, keys, values
    few = slots.size <= _MOST_ROWS
    if hopper_processors() is None or not few or not has_kernel(*arrays):
        return rotate_append_reference(*arrays)
    return _differentiable(*arrays)


@jax.custom_vjp
def _differentiable(*arrays: jax.Array) -> Any:
    return _batched(*arrays)


def _forward(*arrays: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
    return _differentiable(*arrays), arrays


def _backward(arrays: tuple[jax.Array, ...], gradient: Any) -> Any:
    *before, slots, keys, values = arrays

    def function(*floats: jax.Array) -> Any:
        return rotate_append_reference(*floats[:5], slots, *floats[5:])

    _, pull = jax.vjp(function, *before, keys, values)
    of = pull(gradient)
    return *of[:5], np.zeros(slots.shape, jax.dtypes.float0), *of[5:]


_differentiable.defvjp(_forward, _backward)


@jax.jit  # or calls outside jit would each compile
@batches_together
def _batched(*arrays: jax.Array) -> Any:
    """Rows may be split, and heads in as many pieces as there are keys."""
    pieces = {"b": arrays[1].shape[0], "g": arrays[1].shape[2]}
    tokens, heads, cache = "b t e", "b t g d", "b g s d"
    operands = ", ".join([heads] * 3 + [tokens] * 2 + ["b t"] + [cache] * 2)
    sharing = Sharing(operands, ", ".join([heads] * 2 + [cache] * 2), pieces)
    return partitioned(_local, sharing, *arrays)


def _local(*arrays: jax.Array) -> Any:
    """On one device."""
    if not has_kernel(*arrays):
        return rotate_append_reference(*arrays)
    return lax.platform_dependent(
        *arrays, cuda=rotate_append_kernel, default=rotate_append_reference
    )


def has_kernel(*arrays: jax.Array) -> bool:
    """Whether all are bfloat16, numbers of heads multiples of 4, heads of 128 or 256."""
    query, key, value, _, _, _, keys, values = arrays
    typed = all(array.dtype == jnp.bfloat16 for array in (query, key, value, keys, values))
    by_four = query.shape[2] % _HEADS == key.shape[2] % _HEADS == 0
    return typed and by_four and query.shape[3] in _HEAD_DIMS and query.size > 0


def rotate_append_reference(*arrays: jax.Array) -> Any:
    """What the kernel computes, in jnp."""
    query, key, value, cos, sin, slots, keys, values = arrays
    query, key = (reference.rotate(x, cos, sin) for x in (query, key))
    return query, key, *reference.write_slots((keys, values), (key, value), slots)


@partial(jax.jit, static_argnames=("interpret",))
def rotate_append_kernel(*arrays: jax.Array, interpret: bool = False) -> Any:
    """The kernel, for arrays that `has_kernel`.

    Args:
      interpret: runs in Pallas's interpreter, on any device; static.

    Raises:
      ValueError: for other arrays.
    """
    if not has_kernel(*arrays):
        raise ValueError(
            f"no kernel for {[f'{array.dtype}{array.shape}' for array in arrays]}; needed are "
            "bfloat16, multiples of 4 heads, of 128 or 256"
        )
    query, key, value, cos, sin, slots, keys, values = arrays
    batch, length, heads, dim = query.shape
    groups, rows = key.shape[2], batch * length
    # As these are slices of one product, XLA finds that nothing has to be copied.
    flat = [array.reshape(batch, length, -1) for array in (query, key, value)]
    joined = jnp.concatenate(flat, axis=-1).reshape(rows, heads + 2 * groups, dim)
    inputs = joined, *(angles.reshape(rows, -1) for angles in (cos, sin)), slots.reshape(-1)

    def write(outputs: Sequence[Any]) -> None:
        plgpu.kernel(
            partial(_body, length, interpret),
            grid=(rows, (heads + 2 * groups) // _HEADS),
            grid_names=("row", "block"),
            interpret=plgpu.InterpretGPUParams() if interpret else None,
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
        )(*inputs, *outputs)

    outputs = [lax.empty((rows, n, dim), query.dtype) for n in (heads, groups)]
    # Written in place: what a stateful kernel begins with may be what is there.
    rotated, own_key, keys, values = pl.run_state(write)([*outputs, keys, values])
    return rotated.reshape(query.shape), own_key.reshape(key.shape), keys, values


def _body(length: int, interpret: bool, *refs: Any) -> None:
    x, cos, sin, slots, query, key, keys, values = refs
    row, block = lax.axis_index("row"), lax.axis_index("block")
    of_queries, of_keys = query.shape[1] // _HEADS, key.shape[1] // _HEADS
    slot, half = slots[row], x.shape[2] // 2
    halves = pl.ds(0, half), pl.ds(half, half)
    own = layout(((_HEADS, half), (1, half), (1, half // 32)), (-6,), (-4, -3))

    def read(ref: Any, layout: Any) -> jax.Array:
        loaded = ref[...] if interpret else plgpu.load(ref, layout=layout, optimized=False)
        return loaded.astype(jnp.float32)

    first, second = (read(x.at[row, pl.ds(block * _HEADS, _HEADS), part], own) for part in halves)

    def rotated() -> tuple[jax.Array, jax.Array]:
        c, s = (
            lax.broadcast_in_dim(read(ref.at[row], own.reduce(0)), first.shape, (1,))
            for ref in (cos, sin)
        )
        return first * c - second * s, second * c + first * s

    def write(ref: Any, index: Any, results: tuple[jax.Array, jax.Array]) -> None:
        for part, result in zip(halves, results, strict=True):
            ref[*index, part] = result.astype(ref.dtype)

    def append(ref: Any, block: Any, results: tuple[jax.Array, jax.Array]) -> None:
        @pl.when(slot < ref.shape[2])
        def _():
            write(ref, (row // length, pl.ds(block * _HEADS, _HEADS), slot), results)

    @pl.when(block < of_queries)
    def _():
        write(query, (row, pl.ds(block * _HEADS, _HEADS)), rotated())

    @pl.when((block >= of_queries) & (block < of_queries + of_keys))
    def _():
        results, place = rotated(), block - of_queries
        write(key, (row, pl.ds(place * _HEADS, _HEADS)), results)
        append(keys, place, results)

    @pl.when(block >= of_queries + of_keys)
    def _():
        append(values, block - of_queries - of_keys, (first, second))
