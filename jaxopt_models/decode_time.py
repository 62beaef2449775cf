"""How long a model takes for one more token of each row, on the device that runs this.

What is timed is the loop of `generate` on the device: cache reads and sampling are in it, the
prompt and compilation are not. Tokens are of the cache's last positions, so that it is nearly full.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.decoding import DecodeState, decode_loop
from jaxopt_models.models.cache import LayerCache, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import make_sampler


def decode_seconds(
    config: ModelConfig, params: Any, batch: int, context: int, steps: tuple[int, int]
) -> float:
    """Of one step at the end of the context.

    Args:
      config: the architecture.
      params: the model; leaves may be of any kind.
      batch: rows that are decoded together.
      context: positions that the cache holds.
      steps: of the shorter and the longer loop, see `seconds_per_turn`; at most the context.
    """
    sampler, length = make_sampler(batch), jnp.full(batch, context - max(steps), jnp.int32)

    def start(count: int) -> Callable[[], DecodeState]:
        keys = jax.random.split(jax.random.key(1), config.num_layers)
        filled = partial(_filled, config, batch, context)
        state = DecodeState(
            tokens=jnp.zeros((batch, context), jnp.int32),
            length=length + 0,  # the loop takes its buffers over
            limit=length + count,
            done=jnp.zeros(batch, bool),
            cache=tuple(map(filled, params["layers"], keys)),
        )
        return partial(decode_loop, config, params, jax.block_until_ready(state), sampler, ())

    return seconds_per_turn(start, steps)


def seconds_per_turn(
    start: Callable[[int], Callable[[], Any]], turns: tuple[int, int], repeats: int = 3
) -> float:
    """Time of one turn of a loop: what more turns take longer, so that starting it cancels.

    Args:
      start: makes ready a loop of so many turns, untimed, and returns what runs it.
      turns: of the shorter and the longer loop.
      repeats: the least time of so many runs counts, of each.
    """

    def seconds(count: int) -> float:
        run = start(count)
        begin = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - begin

    few, many = turns
    for count in turns:  # compiles
        seconds(count)
    times = [(seconds(few), seconds(many)) for _ in range(repeats)]
    shorter, longer = (min(column) for column in zip(*times, strict=True))
    return (longer - shorter) / (many - few)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _filled(
    config: ModelConfig, batch: int, context: int, layer: Any, key: jax.Array
) -> LayerCache:
    """A layer's cache of random keys and values."""
    (cache,) = empty_cache(config, {"layers": (layer,)}, batch, context)
    shape = (2, batch, context, cache.keys.shape[1], config.head_dim)
    keys, values = jax.random.normal(key, shape, config.dtype)
    slots = jnp.broadcast_to(jnp.arange(context), (batch, context))
    return cache.append(keys, values, slots, layer["self_attn"].get("kv_cache"))
