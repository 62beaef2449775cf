"""The loop of generation on the device: its state, how it begins, and how tokens are committed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxopt_models.models.cache import KVCache, empty_cache
from jaxopt_models.models.cached import decode_step, prefill_with_features
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import Sampler

# Prompts and buffers are padded to multiples of this, so that few lengths are compiled.
_BUCKET = 64

ENDLESS = 2**31 - 1  # passes of a loop that ends with its last row


@struct.dataclass
class DecodeState:
    """Carry of the decode loop.

    Invariant: the cache holds positions 0..length-2 of each row; the last committed token is fed
    next. Finished rows are frozen by dropping their writes, never by selecting old buffers.

    Attributes:
      tokens: int32 [B, S], prompt and new ids.
      length: int32 [B], committed ids.
      limit: int32 [B], length at which the row stops.
      done: bool [B].
      cache: keys and values, capacity S.
    """

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    done: jax.Array
    cache: KVCache


def start(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    stops: tuple[int, ...],
    max_prompt_tokens: int = 1,
    layers: tuple[int, ...] = (),
    spare: int = 0,
) -> tuple[DecodeState, jax.Array]:
    """Runs the prompts and chooses each row's first token.

    Args:
      config, params, prompts, max_new_tokens, max_prompt_tokens: as of `generate`.
      sampler: how tokens are chosen.
      stops: ids that end a row.
      layers: whose features are wanted, see `cached.decode_step_with_features`.
      spare: slots of the cache besides those of each row's positions.

    Returns:
      (state, features of the prompts' tokens, [B, W, len(layers) · D]).
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    width = prompt_room(prompts, max_prompt_tokens)
    capacity = _round_up(_longest(prompts, max_prompt_tokens) + max_new_tokens + spare)
    buffer = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens, length = jnp.asarray(buffer), jnp.asarray(lengths)
    cache = empty_cache(config, params, len(prompts), capacity)
    logits, cache, features = prefill_with_features(
        config, params, tokens[:, :width], length, cache, layers
    )
    state = DecodeState(
        tokens=tokens,
        length=length,
        limit=length + max_new_tokens,
        done=jnp.zeros(len(prompts), bool),
        cache=cache,
    )
    return commit(state, sampler(logits[:, None], length[:, None]), 1, stops), features


@partial(jax.jit, static_argnames=("config", "stops"), donate_argnames=("state",))
def decode_loop(
    config: ModelConfig,
    params: Any,
    state: DecodeState,
    sampler: Sampler,
    stops: tuple[int, ...],
    passes: jax.Array | int = ENDLESS,
) -> DecodeState:
    """Feeds last tokens until every row is done, or for so many passes of the model; the state's
    buffers are reused in place."""

    def step(state: DecodeState) -> DecodeState:
        place = (state.length - 1)[:, None]
        # Tied to the state, so that XLA does not hoist dequantized weights out of the loop, which
        # would keep a full-precision copy of the model beside the quantized one.
        weights, place = jax.lax.optimization_barrier((params, place))
        last = jnp.take_along_axis(state.tokens, place, axis=1)
        logits, cache = decode_step(config, weights, last, place, state.cache)
        chosen = sampler(logits, place + 1)
        return commit(replace(state, cache=cache), chosen, 1, stops)

    return run_passes(step, state, lambda state: state.done, passes)


def run_passes[State](
    step: Callable[[State], State],
    state: State,
    done: Callable[[State], jax.Array],
    passes: jax.Array | int,
) -> State:
    """Steps until every row is done, but no more than so many, in one loop on the device."""

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        state, left = carry
        return jnp.any(~done(state)) & (left > 0)

    def one(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, left = carry
        return step(state), left - 1

    return jax.lax.while_loop(unfinished, one, (state, jnp.asarray(passes, jnp.int32)))[0]


def commit(
    state: DecodeState, chosen: jax.Array, count: jax.Array | int, stops: tuple[int, ...]
) -> DecodeState:
    """Appends tokens to each row that is not done, up to its limit and its first stop.

    Args:
      chosen: int32 [B, N].
      count: int32 [B] or a number, how many of them each row is to take at most.
      stops: ids that end a row, and are its last token.
    """
    rows, past_the_end = jnp.arange(chosen.shape[0])[:, None], state.tokens.shape[1]
    place = jnp.arange(chosen.shape[1])[None]
    most = jnp.where(state.done, 0, jnp.minimum(count, state.limit - state.length))
    taken = place < most[:, None]
    ends = jnp.zeros_like(taken)
    if stops:
        ends = jnp.any(chosen[..., None] == jnp.asarray(stops, jnp.int32)[None, None], axis=-1)
        ended = jax.lax.associative_scan(jnp.logical_or, ends, axis=1)
        taken = taken & ~jnp.pad(ended[:, :-1], ((0, 0), (1, 0)))
    slots = jnp.where(taken, state.length[:, None] + place, past_the_end)
    length = state.length + jnp.sum(taken, axis=1, dtype=jnp.int32)
    return replace(
        state,
        tokens=state.tokens.at[rows, slots].set(chosen, mode="drop"),
        length=length,
        done=state.done | (length >= state.limit) | jnp.any(taken & ends, axis=1),
    )


def prompt_room(prompts: Sequence[Sequence[int]], max_prompt_tokens: int = 1) -> int:
    """Columns that prompts take in a batch, those that are left empty included."""
    return _round_up(_longest(prompts, max_prompt_tokens))


def new_tokens(state: DecodeState, begun: Sequence[int]) -> list[list[int]]:
    """What was committed to each row behind its first tokens, as many as `begun` says."""
    tokens, ends = np.asarray(state.tokens), np.asarray(state.length)
    return [tokens[i, first : ends[i]].tolist() for i, first in enumerate(begun)]


def _longest(prompts: Sequence[Sequence[int]], max_prompt_tokens: int) -> int:
    return max(max_prompt_tokens, *map(len, prompts))


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET
