"""Draft, verify, accept, commit: speculative decoding as one `lax.while_loop` on the device.

The model is run on a row's last token and the guesses that follow it, a chain or a tree of them, in
one pass. Behind each of them it takes the token that it would take there anyway, with noise that
belongs to the request and the position. From the last token on, the way is followed on which every
guess is the token that was taken; the token behind the last right one comes for free:

    y_i = choice(logits behind node i; noise of position length + depth_i)       i = 0..N
    w   = the longest way 0 = w_0, w_1, …, w_n with tokens w_j = y_{w_(j-1)}     commit y_w0..y_wn

Whatever the draft, the committed tokens are those of generation one by one, at any temperature: a
token depends on what is before it and on its own noise, and on no guess. No probability of the
draft's is needed. Another `verify.Verification` may keep more of guesses that were drawn by noise
of their own, which gives other tokens of the same distribution. References: Leviathan et al. 2022,
arXiv:2211.17192; Miao et al. 2023, arXiv:2305.09781; Daliri et al. 2024, arXiv:2408.07978.

Equality holds to the last bit where a pass over N + 1 tokens computes what N + 1 passes do. In
bfloat16 on a GPU other kernels round in another order, so where two tokens are nearly as likely
either may be taken.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.decoding import ENDLESS, DecodeState, commit, run_passes, start
from jaxopt_models.models.cache import KVCache, moved
from jaxopt_models.models.cached import decode_step_with_features
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.tree_attention import Branches
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.adaptive import Adaptive, run_adapted
from jaxopt_models.speculative.draft import Drafter, Prompted, Seen, Target
from jaxopt_models.speculative.tree import Topology, chain
from jaxopt_models.speculative.verify import COUPLED, Verification


@struct.dataclass
class SpeculativeState:
    """Carry of the loop.

    Attributes:
      decode: as in plain generation. The cache holds positions 0..length-2 of each row; behind them
        are remains of wrong guesses, which are overwritten before a query sees them.
      draft: what the drafter carries.
      features, count: what the drafter is to see next, see `Seen`.
      passes: int32 [B], runs of the model while the row was not done.
      accepted: int32 [B, depth], in how many of them a guess was right so far from the last token.
    """

    decode: DecodeState
    draft: Any
    features: jax.Array
    count: jax.Array
    passes: jax.Array
    accepted: jax.Array


def begin(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    stops: tuple[int, ...],
    drafter: Drafter,
    max_prompt_tokens: int = 1,
) -> SpeculativeState:
    """The state before the first pass: prompts are run, by the model and by the drafter.

    Args:
      config, params, prompts, max_new_tokens, sampler, stops, max_prompt_tokens: see
        `decoding.start`.
      drafter: guesses.
    """
    # A tree's nodes are at slots that its positions do not reach.
    spare = 0 if drafter.depth == drafter.count else drafter.count
    rule = sampler, stops, max_prompt_tokens
    state, features = start(config, params, prompts, max_new_tokens, *rule, drafter.layers, spare)
    draft, last = _begun(Target(config, params), drafter, state.tokens, state.length, features)
    batch = len(prompts)
    return SpeculativeState(
        decode=state,
        draft=draft,
        features=last,
        count=jnp.ones(batch, jnp.int32),
        passes=jnp.zeros(batch, jnp.int32),
        accepted=jnp.zeros((batch, drafter.depth), jnp.int32),
    )


@jax.jit
def _begun(
    target: Target, drafter: Drafter, tokens: jax.Array, length: jax.Array, features: jax.Array
) -> tuple[Any, jax.Array]:
    """(what the drafter carries, the features of each prompt's last token)."""
    prompts, lengths = tokens[:, : features.shape[1]], length - 1
    draft = drafter.begin(target, Prompted(prompts, lengths, features), tokens.shape[1])
    last = jnp.take_along_axis(features, (lengths - 1)[:, None, None], axis=1)
    return draft, jnp.pad(last, ((0, 0), (0, drafter.depth), (0, 0)))


@partial(jax.jit, static_argnames=("config", "stops", "verification"), donate_argnames=("state",))
def speculate(
    config: ModelConfig,
    params: Any,
    state: SpeculativeState,
    drafter: Drafter,
    sampler: Sampler,
    stops: tuple[int, ...],
    passes: jax.Array | int = ENDLESS,
    verification: Verification = COUPLED,
) -> SpeculativeState:
    """Generates until every row is done; the state's buffers are reused in place.

    Args:
      config, params: the model that decides; leaves may be of any kind.
      state: from `begin`, with the same drafter.
      drafter: guesses.
      sampler: how tokens are chosen, by the model and by drafters that sample.
      stops: ids that end a row.
      passes: of the model, at most.
      verification: which guesses are kept; static.
    """
    drawing = verification.drawing(sampler)

    def one_pass(own: Drafter, state: SpeculativeState) -> SpeculativeState:
        decode, active = state.decode, ~state.decode.done
        # Tied to the state, so that XLA hoists no dequantized weights out of the loop.
        weights, own, length = jax.lax.optimization_barrier((params, own, decode.length))
        seen = Seen(decode.tokens, length, state.features, state.count)
        guess, draft = own.propose(Target(config, weights), state.draft, seen, drawing)
        tree = guess.topology or chain(own.count)
        first = length - 1
        places = first[:, None] + tree.depth
        last = jnp.take_along_axis(decode.tokens, first[:, None], axis=1)
        fed = jnp.concatenate([last, guess.tokens], axis=1)
        branches = None if guess.topology is None else _branches(first, tree)
        logits, cache, features = decode_step_with_features(
            config, weights, fed, places, decode.cache, own.layers, branches
        )
        chosen, path, right = verification(guess, tree, logits, places, sampler, own.depth)
        if branches is not None:
            cache = _compacted(cache, first, path, right)
            features = jnp.take_along_axis(features, path[:, :, None], axis=1)
        most = state.features.shape[1] - 1  # of any pass; this one may guess fewer
        reached = jnp.arange(most, dtype=jnp.int32)[None] < right[:, None]
        return SpeculativeState(
            decode=commit(replace(decode, cache=cache), chosen, right + 1, stops),
            draft=draft,
            features=jnp.pad(features, ((0, 0), (0, most - own.depth), (0, 0))),
            count=right + 1,
            passes=state.passes + active.astype(jnp.int32),
            accepted=state.accepted + (reached & active[:, None]).astype(jnp.int32),
        )

    if isinstance(drafter, Adaptive):
        return run_adapted(drafter, one_pass, state, passes)
    return run_passes(partial(one_pass, drafter), state, lambda state: state.decode.done, passes)


def _branches(first: jax.Array, tree: Topology) -> Branches:
    batch, count = len(first), tree.depth.shape[1]
    depth = jnp.broadcast_to(tree.depth, (batch, count))
    return Branches(first, depth, jnp.broadcast_to(tree.ancestors, (batch, count, count)))


def _compacted(cache: KVCache, first: jax.Array, path: jax.Array, right: jax.Array) -> KVCache:
    """What belongs to the nodes of a way, at the slots of their positions."""
    step = jnp.arange(1, path.shape[1], dtype=jnp.int32)[None]
    dropped = cache[0].keys.shape[2]
    slots = jnp.where(step <= right[:, None], first[:, None] + step, dropped)
    return moved(cache, first[:, None] + path[:, 1:], slots)
