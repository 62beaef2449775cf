"""Plain autoregressive generation: prompts in, tokens out, one `lax.while_loop` on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.models.cache import KVCache, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import decode_step, prefill
from jaxopt_models.sampling import Sampler, make_sampler

# Prompts and buffers are padded to multiples of this, so that few lengths are compiled.
_BUCKET = 64


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: new ids of each row, an end-of-sequence id included.
    """

    tokens: list[list[int]]


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


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float | list[float] = 0.0,
    top_p: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    key: jax.Array | None = None,
    request_ids: list[int] | None = None,
    eos_token_ids: Sequence[int] | None = None,
    max_prompt_tokens: int = 1,
) -> Generation:
    """Continues prompts.

    Args:
      config, params: the model; leaves may be of any kind.
      prompts: token ids of each row, of any lengths.
      max_new_tokens: where a row stops unless an end-of-sequence id comes first.
      temperature: 0 is greedy; a number or one for each row.
      top_p, top_k: see `sampling.keep_most_likely`; likewise.
      key: random key of sampled rows; None is `jax.random.key(0)`.
      request_ids: identity of each row, which its noise is keyed by; 0, 1, … by default. A request
        gets the same tokens in every batch.
      eos_token_ids: ids that end a row; the model's own by default.
      max_prompt_tokens: prompts that buffers have room for at least. Batches of the same room share
        one compilation, however long their prompts are.

    Returns:
      `Generation`.

    Raises:
      UserError: for an empty batch or prompt, ids outside the vocabulary, or a sampling value out
        of range.
    """
    _check_prompts(config, prompts, max_new_tokens)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampler = make_sampler(len(prompts), key=key, request_ids=request_ids, **options)
    stops = tuple(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
    state = start(config, params, prompts, max_new_tokens, sampler, stops, max_prompt_tokens)
    state = decode_loop(config, params, state, sampler, stops)
    tokens, ends = np.asarray(state.tokens), np.asarray(state.length)
    new = [tokens[i, len(p) : ends[i]].tolist() for i, p in enumerate(prompts)]
    return Generation(tokens=new)


def start(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    stops: tuple[int, ...],
    max_prompt_tokens: int = 1,
) -> DecodeState:
    """Runs the prompts and chooses each row's first token."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    longest = max(int(lengths.max()), max_prompt_tokens)
    width, capacity = _round_up(longest), _round_up(longest + max_new_tokens)
    buffer = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens, length = jnp.asarray(buffer), jnp.asarray(lengths)
    cache = empty_cache(config, params, len(prompts), capacity)
    logits, cache = prefill(config, params, tokens[:, :width], length, cache)
    state = DecodeState(
        tokens=tokens,
        length=length,
        limit=length + max_new_tokens,
        done=jnp.zeros(len(prompts), bool),
        cache=cache,
    )
    return _commit(state, sampler(logits[:, None], length[:, None])[:, 0], stops)


@partial(jax.jit, static_argnames=("config", "stops"), donate_argnames=("state",))
def decode_loop(
    config: ModelConfig, params: Any, state: DecodeState, sampler: Sampler, stops: tuple[int, ...]
) -> DecodeState:
    """Feeds last tokens until every row is done; the state's buffers are reused in place."""

    def unfinished(state: DecodeState) -> jax.Array:
        return jnp.any(~state.done)

    def step(state: DecodeState) -> DecodeState:
        place = (state.length - 1)[:, None]
        # Tied to the state, so that XLA does not hoist dequantized weights out of the loop, which
        # would keep a full-precision copy of the model beside the quantized one.
        weights, place = jax.lax.optimization_barrier((params, place))
        last = jnp.take_along_axis(state.tokens, place, axis=1)
        logits, cache = decode_step(config, weights, last, place, state.cache)
        chosen = sampler(logits, place + 1)[:, 0]
        return _commit(replace(state, cache=cache), chosen, stops)

    return jax.lax.while_loop(unfinished, step, state)


def _commit(state: DecodeState, chosen: jax.Array, stops: tuple[int, ...]) -> DecodeState:
    """Appends one token to each row that is not done."""
    rows, past_the_end = jnp.arange(chosen.shape[0]), state.tokens.shape[1]
    slot = jnp.where(state.done, past_the_end, state.length)
    length = state.length + (~state.done).astype(jnp.int32)
    ended = length >= state.limit
    if stops:
        ended = ended | jnp.any(chosen[:, None] == jnp.asarray(stops, jnp.int32)[None], axis=1)
    return replace(
        state,
        tokens=state.tokens.at[rows, slot].set(chosen, mode="drop"),
        length=length,
        done=state.done | ended,
    )


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def _check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if not prompts:
        raise UserError("there is nothing to generate from: no prompts were given")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1; it is {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(
                f"prompt {i} has no tokens; begin it with the beginning-of-sequence id "
                f"{config.bos_token_id}"
            )
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise UserError(
                f"prompt {i} holds ids outside the vocabulary of {config.vocab_size}; "
                "tokenize it with the model's own tokenizer"
            )
