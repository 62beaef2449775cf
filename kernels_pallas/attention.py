"""Attention of new tokens over a cache: a kernel where there are few of them, else XLA's.

There is a kernel for Hopper and bfloat16 (`attention_kernel`), for up to 64 queries of each key.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import reference
from kernels_pallas.attention_kernel import attention_kernel, has_kernel
from kernels_pallas.batching import batches_together
from kernels_pallas.hopper import hopper_processors
from kernels_pallas.partition import Sharing, partitioned


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """`softmax(scale · q kᵀ + mask) v` of grouped queries, slot s of a cache being position s.

    A query at position p sees slots in (p - window, p]. Slots that no query of a row sees have to
    be finite; the kernel does not read most of them. Its weights are rounded to bfloat16 before
    they are divided by their sum, XLA's after, which is all that differs besides the order of sums.
    Works under `vmap`, which adds to the rows, and on arrays that are sharded over B or over heads.

    Args:
      query: [B, T, H, d].
      key, value: [B, G, S, d], H a multiple of G.
      positions: int32 [B, T], of queries.
      scale: factor on q·k; static.
      window: number of slots a query sees, its own included; None is unlimited; static.
      softcap: c of `c · tanh(scores / c)`; None is off; static.

    Returns:
      [B, T, H, d] in the dtype of `query`.

    Raises:
      ValueError: for shapes that do not fit.
    """
    batch, length, heads, dim = query.shape
    groups, slots = key.shape[1:3]
    fits = heads % groups == 0 and positions.shape == (batch, length)
    if not fits or key.shape != (batch, groups, slots, dim) or value.shape != key.shape:
        raise ValueError(
            f"queries {query.shape} at positions {positions.shape} do not fit keys {key.shape} and "
            f"values {value.shape}; needed are [B, T, H, d], [B, T] and twice [B, G, S, d]"
        )
    options = (("scale", scale), ("window", window), ("softcap", softcap))
    if hopper_processors() is None or not has_kernel(query, key):
        return _reference(options, query, key, value, positions)
    return _attention(options, query, key, value, positions)


type _Options = tuple[tuple[str, Any], ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, *arrays: jax.Array) -> jax.Array:
    return _batched(options, *arrays)


def _forward(options: _Options, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _attention(options, *arrays), arrays


def _backward(options: _Options, arrays: tuple[jax.Array, ...], gradient: jax.Array) -> Any:
    *values, positions = arrays
    _, pull = jax.vjp(lambda *values: _reference(options, *values, positions), *values)
    return *pull(gradient), np.zeros(positions.shape, jax.dtypes.float0)


_attention.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=0)  # or calls outside jit would each compile
def _batched(options: _Options, *arrays: jax.Array) -> jax.Array:
    return batches_together(partial(_shared, options))(*arrays)


def _shared(options: _Options, *arrays: jax.Array) -> jax.Array:
    """Rows may be split, and heads in as many pieces as there are keys."""
    pieces = {"b": arrays[1].shape[0], "g": arrays[1].shape[1]}
    sharing = Sharing("b t g d, b g s d, b g s d, b t", "b t g d", pieces)
    return partitioned(partial(_local, options), sharing, *arrays)


def _local(options: _Options, *arrays: jax.Array) -> jax.Array:
    """On one device."""
    otherwise = partial(_reference, options)
    kernel = partial(attention_kernel, processors=hopper_processors(), **dict(options))
    return lax.platform_dependent(*arrays, cuda=kernel, default=otherwise)


def _reference(options: _Options, *arrays: jax.Array) -> jax.Array:
    query, key, value, positions = arrays
    slots = jnp.arange(key.shape[2], dtype=positions.dtype)[None]
    return reference.attention(query, key, value, positions, slots, **dict(options))
