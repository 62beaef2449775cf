"""Kernels under `vmap`, which cannot look into a call that devices share (`partition`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def rows_together(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of several [M, …] and a weight to [M, …] that takes a whole batch's rows at once.

    A batch of weights is gone through one by one.
    """
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def _(size: int, has: Any, *arguments: Any) -> tuple[Any, Any]:
        *rows, weight = arguments
        if any(jax.tree.leaves(has[-1])):
            out = _each(batched, size, has, arguments)
        else:
            out = batched(*map(partial(_merged, size), rows, has), weight)
            out = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return batched


def batches_together(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays [B, …] that takes a batch of them as [batch · B, …]."""
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def _(size: int, has: Any, *arguments: jax.Array) -> tuple[Any, Any]:
        out = batched(*map(partial(_merged, size), arguments, has))
        out = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return batched


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that goes through a batch one by one."""
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def _(size: int, has: Any, *arguments: Any) -> tuple[Any, Any]:
        out = _each(batched, size, has, arguments)
        return out, jax.tree.map(lambda _: True, out)

    return batched


def _merged(size: int, array: jax.Array, own: bool) -> jax.Array:
    """[size, M, …], or the same [M, …] for each, as [size · M, …]."""
    whole = array if own else jnp.broadcast_to(array, (size, *array.shape))
    return whole.reshape(-1, *whole.shape[2:])


def _each(function: Callable[..., Any], size: int, has: Any, arguments: tuple[Any, ...]) -> Any:
    def example(i: jax.Array) -> Any:
        return function(
            *jax.tree.map(lambda leaf, own: leaf[i] if own else leaf, arguments, tuple(has))
        )

    return lax.map(example, jnp.arange(size))
