"""Draft, verify, accept, commit: speculative decoding as one `lax.while_loop` on the device.

The model is run on a row's last token and the guesses that follow it, in one pass. At each of these
places it takes the token that it would take there anyway, with noise that belongs to the request
and the position. The guesses that equal those tokens are right, up to the first that is not; the
token after the last right one comes for free:

    y_i = choice(logits after d_1..d_i; noise of position length + i)        i = 0..K
    n   = the most for which d_i = y_{i-1} for all i <= n                    commit y_0..y_n

Whatever the draft, the committed tokens are those of generation one by one, at any temperature: a
token depends on what is before it and on its own noise, and on no guess. No probability of the
draft's is needed. References: Leviathan et al. 2022, arXiv:2211.17192; Daliri et al. 2024,
arXiv:2408.07978.

Equality holds to the last bit where a pass over K + 1 tokens computes what K + 1 passes do. In
bfloat16 on a GPU other kernels round in another order, so where two tokens are nearly as likely
either may be taken.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.decoding import ENDLESS, DecodeState, commit, run_passes
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import decode_step
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Drafter


@struct.dataclass
class SpeculativeState:
    """Carry of the loop.

    Attributes:
      decode: as in plain generation. The cache holds positions 0..length-2 of each row; behind them
        are remains of wrong guesses, which are overwritten before a query sees them.
      draft: what the drafter carries.
      passes: int32 [B], runs of the model while the row was not done.
      accepted: int32 [B, K], in how many of them the i-th guess was right, as all before it.
    """

    decode: DecodeState
    draft: Any
    passes: jax.Array
    accepted: jax.Array


def begin(state: DecodeState, drafter: Drafter, prompt_room: int) -> SpeculativeState:
    """The state before the first pass.

    Args:
      state: from `decoding.start`.
      drafter: guesses.
      prompt_room: first columns of the tokens, in which all prompts lie; see
        `decoding.prompt_room`.
    """
    batch, capacity = state.tokens.shape
    prompts = state.tokens[:, :prompt_room]
    return SpeculativeState(
        decode=state,
        draft=_begun(drafter, prompts, state.length - 1, capacity),
        passes=jnp.zeros(batch, jnp.int32),
        accepted=jnp.zeros((batch, drafter.count), jnp.int32),
    )


@partial(jax.jit, static_argnames="capacity")
def _begun(drafter: Drafter, prompts: jax.Array, lengths: jax.Array, capacity: int) -> Any:
    return drafter.begin(prompts, lengths, capacity)


@partial(jax.jit, static_argnames=("config", "stops"), donate_argnames=("state",))
def speculate(
    config: ModelConfig,
    params: Any,
    state: SpeculativeState,
    drafter: Drafter,
    sampler: Sampler,
    stops: tuple[int, ...],
    passes: jax.Array | int = ENDLESS,
) -> SpeculativeState:
    """Generates until every row is done; the state's buffers are reused in place.

    Args:
      config, params: the model that decides; leaves may be of any kind.
      state: from `begin`, with the same drafter.
      drafter: guesses.
      sampler: how tokens are chosen, by the model and by drafters that sample.
      stops: ids that end a row.
      passes: of the model, at most.
    """

    def step(state: SpeculativeState) -> SpeculativeState:
        decode, active = state.decode, ~state.decode.done
        # Tied to the state, so that XLA hoists no dequantized weights out of the loop.
        weights, own, length = jax.lax.optimization_barrier((params, drafter, decode.length))
        guess, draft = own.propose(state.draft, decode.tokens, length, sampler)
        places = length[:, None] + jnp.arange(-1, drafter.count, dtype=jnp.int32)[None]
        last = jnp.take_along_axis(decode.tokens, places[:, :1], axis=1)
        fed = jnp.concatenate([last, guess], axis=1)
        logits, cache = decode_step(config, weights, fed, places, decode.cache)
        chosen = sampler(logits, places + 1)
        right = matches(guess, chosen)
        count = jnp.sum(right, axis=1, dtype=jnp.int32) + 1
        return SpeculativeState(
            decode=commit(replace(decode, cache=cache), chosen, count, stops),
            draft=draft,
            passes=state.passes + active.astype(jnp.int32),
            accepted=state.accepted + (right & active[:, None]).astype(jnp.int32),
        )

    return run_passes(step, state, lambda state: state.decode.done, passes)


def matches(guess: jax.Array, chosen: jax.Array) -> jax.Array:
    """Which guesses are right, as all before them: bool [B, K].

    Args:
      guess: int32 [B, K], of the tokens at places 0..K-1.
      chosen: int32 [B, K + 1], what the model takes at places 0..K, given the guesses before.
    """
    return jax.lax.associative_scan(jnp.logical_and, guess == chosen[:, :-1], axis=1)
