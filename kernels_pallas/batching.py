"""Kernels under `vmap`, which cannot look into a call that devices share (`partition`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def rows_together(
    product: Callable[[jax.Array, Any], jax.Array],
) -> Callable[[jax.Array, Any], jax.Array]:
    """A product [M, K] and a weight to [M, N] that takes the rows of a whole batch at once.

    A batch of weights is gone through one by one.
    """
    batched = jax.custom_batching.custom_vmap(product)

    @batched.def_vmap
    def _(size: int, has: Any, x: jax.Array, weight: Any) -> tuple[jax.Array, bool]:
        of_x, of_weight = has
        if any(jax.tree.leaves(of_weight)):
            return _each(batched, size, has, (x, weight)), True
        assert of_x  # something is batched
        return batched(x.reshape(-1, x.shape[-1]), weight).reshape(size, x.shape[1], -1), True

    return batched


def batches_together(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of arrays [B, …] that takes a batch of them as [batch · B, …]."""
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def _(size: int, has: Any, *arguments: jax.Array) -> tuple[jax.Array, bool]:
        def merged(array: jax.Array, own: bool) -> jax.Array:
            whole = array if own else jnp.broadcast_to(array, (size, *array.shape))
            return whole.reshape(-1, *whole.shape[2:])

        out = batched(*map(merged, arguments, has))
        return out.reshape(size, -1, *out.shape[1:]), True

    return batched


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that goes through a batch one by one."""
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def _(size: int, has: Any, *arguments: Any) -> tuple[Any, Any]:
        out = _each(batched, size, has, arguments)
        return out, jax.tree.map(lambda _: True, out)

    return batched


def _each(function: Callable[..., Any], size: int, has: Any, arguments: tuple[Any, ...]) -> Any:
    def example(i: jax.Array) -> Any:
        return function(
            *jax.tree.map(lambda leaf, own: leaf[i] if own else leaf, arguments, tuple(has))
        )

    return lax.map(example, jnp.arange(size))
