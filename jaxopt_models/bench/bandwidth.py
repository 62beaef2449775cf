"""How fast memory can be read."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.decode_time import seconds_per_turn

_TURNS = (2, 10)


def read_bandwidth(size: int | None = None) -> float:
    """Bytes a second of finding the largest entry of an array.

    Args:
      size: bytes of it, to be far more than caches hold; None is 2 GiB, and 256 MiB on a CPU.
    """
    if size is None:
        size = 2**28 if jax.devices()[0].platform == "cpu" else 2**31
    data = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)

    def start(turns: int) -> Callable[[], jax.Array]:
        return partial(_largest, data, turns)

    return size / seconds_per_turn(start, _TURNS)


@partial(jax.jit, static_argnums=1)
def _largest(data: jax.Array, turns: int) -> jax.Array:
    """Reads the array in every turn, since what it looks for depends on the turn before.

    A number of turns that the compiler knows spares the host's look at a condition in each.
    """

    def turn(_: Any, largest: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(data == largest, 0.0, data))

    return jax.lax.fori_loop(0, turns, turn, jnp.float32(0))
