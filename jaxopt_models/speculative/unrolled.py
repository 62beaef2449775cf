"""The steps of a recurrent head from every place of a text at once, as it will guess from there.

At step s the head stands s tokens ahead of where the model has been: index t reads the token
t + 1 + s, what the head itself said at step s - 1 in place of features, and says token t + 2 + s.
It sees what the head sees when it guesses: features up to t, and its own steps behind them,

    scores_s[t] = [q_s[t] · k_0[u], u <= t;   q_s[t] · k_1[t], …, q_s[t] · k_s[t]]

one softmax over all of them. The tokens are the text's, also where the head would say others.
Reference: Li et al. 2025, arXiv:2503.01840 (training-time test).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.models.attention import rotate
from jaxopt_models.models.block import queries_keys_values
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import positions_of
from jaxopt_models.ops import linear
from jaxopt_models.speculative.draft import Target
from jaxopt_models.speculative.recurrent import RecurrentHead, embeddings

type _Pairs = list[tuple[jax.Array, jax.Array]]


def unrolled(
    head: RecurrentHead,
    target: Target,
    tokens: jax.Array,
    features: jax.Array,
    steps: int,
    starts: jax.Array | None = None,
    remat: bool = False,
) -> list[jax.Array]:
    """x [B, T, D] of each step; at index t of step s it is to say token t + 2 + s.

    Args:
      head: EAGLE-3 or MTP head.
      target: the model, whose embedding it reads.
      tokens: int32 [B, T].
      features: [B, T, F], of the model on the tokens.
      steps: static.
      starts: int32 [B, T], where in its row the document of each token begins. What is said behind
        a document's end is not defined.
      remat: whether a step is computed again for gradients, static.
    """
    places = positions_of(tokens)
    places = places if starts is None else places - starts
    taken: _Pairs = []

    def step(hidden: jax.Array, s: int, taken: _Pairs) -> tuple[jax.Array, Any]:
        embedded = embeddings(head, target, jnp.roll(tokens, -(1 + s), axis=1))
        found: _Pairs = []

        def attend(z: jax.Array) -> jax.Array:
            (layer,), config = head.params["layers"], head.config
            query, key, value = queries_keys_values(config, layer["self_attn"], z)
            query, key = (rotate(x, places + s, config.rope) for x in (query, key))
            found.append((key, value))
            mixed = _mixed(config, query, [*taken, *found], starts)
            o_proj = layer["self_attn"]["o_proj"]
            return linear(mixed.reshape(*z.shape[:2], -1), o_proj["weight"], o_proj.get("bias"))

        return head.layer(hidden, embedded, attend), found[0]

    hidden, out = head.fused(features), []
    run = jax.checkpoint(step, static_argnums=1) if remat else step
    for s in range(steps):
        hidden, pair = run(hidden, s, taken)
        taken = [*taken, pair]
        out.append(hidden)
    return out


def _mixed(
    config: ModelConfig, query: jax.Array, pairs: _Pairs, starts: jax.Array | None
) -> jax.Array:
    """Attention of [B, T, H, d] to the first keys causally, and of later ones to the own alone."""
    batch, length, heads, dim = query.shape
    (key, value), groups = pairs[0], pairs[0][0].shape[2]
    query = query.reshape(batch, length, groups, heads // groups, dim)
    wide: Any = {"preferred_element_type": jnp.float32}
    cap = config.attention_softcap

    def scaled(scores: jax.Array) -> jax.Array:
        scores = scores * config.query_scale
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    at = jnp.arange(length, dtype=jnp.int32)
    seen = (at[:, None] >= at[None])[None]
    if starts is not None:
        seen = seen & (at[None, None] >= starts[:, :, None])
    scores = jnp.einsum("btgrd,bsgd->bgrts", query, key, **wide)
    scores = jnp.where(seen[:, None, None], scaled(scores), jnp.finfo(jnp.float32).min)
    own = [
        scaled(jnp.einsum("btgrd,btgd->bgrt", query, k, **wide)[..., None]) for k, _ in pairs[1:]
    ]
    weights = jax.nn.softmax(jnp.concatenate([scores, *own], axis=-1), axis=-1)
    weights = weights.astype(value.dtype)
    mixed = jnp.einsum("bgrts,bsgd->btgrd", weights[..., :length], value, **wide)
    for i, (_, v) in enumerate(pairs[1:], length):
        mixed += jnp.einsum("bgrt,btgd->btgrd", weights[..., i], v, **wide)
    return mixed.astype(query.dtype).reshape(batch, length, heads, dim)
