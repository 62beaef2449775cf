"""What a recurrent head guesses one token after the other, beside a cache."""

import jax
import jax.numpy as jnp

from jaxopt_models.models.cache import empty_cache
from jaxopt_models.speculative import Target
from jaxopt_models.speculative.recurrent import RecurrentHead, cached_layer, embeddings


def one_by_one(
    head: RecurrentHead, own: Target, tokens: jax.Array, features: jax.Array, t: int, steps: int
) -> jax.Array:
    """x of each step from index t on, [steps, D], of tokens int32 [1, T]."""
    (cache,) = empty_cache(head.config, head.params, 1, 32)
    places = jnp.arange(t + 1, dtype=jnp.int32)[None]
    e = embeddings(head, own, tokens[:, 1 : t + 2])
    x, cache = cached_layer(head, head.fused(features[:, : t + 1]), e, places, cache)
    out = [x[:, -1:]]
    for s in range(1, steps):
        e = embeddings(head, own, tokens[:, t + 1 + s : t + 2 + s])
        x, cache = cached_layer(head, out[-1], e, jnp.full((1, 1), t + s, jnp.int32), cache)
        out.append(x)
    return jnp.concatenate(out)[:, 0]
