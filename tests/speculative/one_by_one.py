"""What recurrent heads guess: one token after the other beside a cache, and from a whole text."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.models.cache import empty_cache
from jaxopt_models.models.cached import prefill_with_features
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative import Prompted, Seen, Target
from jaxopt_models.speculative.loop import SpeculativeState
from jaxopt_models.speculative.recurrent import RecurrentHead, cached_layer, embeddings


def one_by_one(
    head: RecurrentHead, own: Target, tokens: jax.Array, features: jax.Array, t: int, steps: int
) -> jax.Array:
    """x of each step from index t on, [steps, D], of tokens int32 [1, T]."""
    return behind(head, own, tokens, features, t)[t : t + steps]


@partial(jax.jit, static_argnames=("room",))
def behind(
    head: RecurrentHead,
    own: Target,
    tokens: jax.Array,
    features: jax.Array,
    last: jax.Array | int,
    room: int = 32,
) -> jax.Array:
    """x of each index, [T - 1, D]: with the model's features up to the index `last`, and with what
    the head says itself from there on."""
    (cache,) = empty_cache(head.config, head.params, 1, room)
    fused, embedded = head.fused(features), embeddings(head, own, tokens)

    def step(carry: Any, place: jax.Array) -> Any:
        x, cache = carry
        hidden = jnp.where(place <= last, fused[:, place][:, None], x)
        read = embedded[:, place + 1][:, None]
        x, cache = cached_layer(head, hidden, read, place[None, None], cache)
        return (x, cache), x[0, 0]

    start = jnp.zeros_like(fused[:, :1]), cache
    return jax.lax.scan(step, start, jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32))[1]


@jax.jit
def guesses(
    head: RecurrentHead, own: Target, state: SpeculativeState, sampler: Sampler
) -> tuple[jax.Array, jax.Array]:
    """Tokens that are guessed behind passes that went before, and those behind the same text where
    the model and the head have just run all of it."""
    tokens, length = state.decode.tokens, state.decode.length
    seen = Seen(tokens, length, state.features, state.count)
    guess, _ = head.propose(own, state.draft, seen, sampler)
    batch, width = tokens.shape
    blank = empty_cache(own.config, own.params, batch, width)
    model = own.config, own.params
    _, _, features = prefill_with_features(*model, tokens, length - 1, blank, head.layers)
    fresh = head.begin(own, Prompted(tokens, length - 1, features), width)
    last = jnp.take_along_axis(features, (length - 2)[:, None, None], axis=1)
    anew = Seen(tokens, length, last, jnp.ones(batch, jnp.int32))
    return guess.tokens, head.propose(own, fresh, anew, sampler)[0].tokens
