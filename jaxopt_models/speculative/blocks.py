"""Blocks of a DFlash head at many places of a text at once, as it will fill them in from there.

The keys and values of the text are those of every block: one pass of `fc` and of each layer's
projections. A block whose anchor is token t sees those of the tokens before t, which is what is
known when t has just been chosen, and its own places,

    scores = [q_i · k_u, start <= u < t;   q_i · k_j, j = 0..n-1]        i = 0..n-1

one softmax over both. Blocks see nothing of each other. Reference: Chen et al. 2026,
arXiv:2602.06036.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_models.models.transformer import positions_of
from jaxopt_models.speculative.dflash import (
    DFlash,
    block_layer,
    embedded_block,
    final_hidden,
    fused,
    keys_values,
    queries,
)
from jaxopt_models.speculative.draft import Target

_SCORES = 2**26  # that exist at a time, on all devices together: 256 MiB in float32


def blocks(
    head: DFlash,
    target: Target,
    tokens: jax.Array,
    features: jax.Array,
    anchors: jax.Array,
    starts: jax.Array | None = None,
) -> jax.Array:
    """Hidden states [B, A, n, D]: place i of a block, i > 0, is to say token anchor + i.

    A few blocks of each row are computed at a time, and again for gradients, so that memory does
    not grow with A but by what is returned.

    Args:
      head: DFlash head.
      target: the model, whose embedding it reads.
      tokens: int32 [B, T].
      features: [B, T, F], of the model on the tokens.
      anchors: int32 [B, A], places of a row.
      starts: int32 [B, T], where in its row the document of each token begins; None is one document
        a row. What a block says behind a document's end is not to be learnt.
    """
    batch, length = tokens.shape
    config, layers = head.config, head.params["layers"]
    first = jnp.zeros_like(tokens) if starts is None else starts
    at, c = positions_of(tokens), fused(head, features)
    pairs = [keys_values(config, layer["self_attn"], c, at - first) for layer in layers]

    def one(anchor: jax.Array) -> jax.Array:
        """Of anchors int32 [B]: [B, n, D]."""
        token, start = (
            jnp.take_along_axis(row, anchor[:, None], axis=1)[:, 0] for row in (tokens, first)
        )
        seen = (at >= start[:, None]) & (at < anchor[:, None])
        places = (anchor - start)[:, None] + jnp.arange(head.block, dtype=jnp.int32)[None]
        x = embedded_block(head, target, token)
        for layer, pair in zip(layers, pairs, strict=True):

            def attend(weights: Any, normed: jax.Array, pair: Any = pair) -> jax.Array:
                query = queries(config, weights, normed, places)
                own = keys_values(config, weights, normed, places)
                return _mixed(query, pair, own, seen, config.query_scale)

            x = block_layer(config, layer, x, attend)
        return final_hidden(head, x)

    count, each = anchors.shape[1], batch * config.num_heads * head.block * (length + head.block)
    pieces = math.ceil(count / max(1, _SCORES // each))
    together = math.ceil(count / pieces)
    # Pieces of one size, or the last one is a program and memory of its own.
    filled = jnp.pad(anchors, ((0, 0), (0, pieces * together - count)))
    found = lax.map(jax.checkpoint(one), filled.T, batch_size=together)
    return jnp.moveaxis(found[:count], 0, 1)


type _Pair = tuple[jax.Array, jax.Array]


def _mixed(query: jax.Array, text: _Pair, own: _Pair, seen: jax.Array, scale: float) -> jax.Array:
    """Attention of [B, n, H, d] to what is seen of the text, bool [B, T], and to the whole block.

    The text's keys and values are not joined with the block's, of which there would be a copy for
    each block.
    """
    batch, count, heads, dim = query.shape
    groups, length = own[0].shape[2], seen.shape[1]
    query = query.reshape(batch, count, groups, heads // groups, dim)
    wide: Any = {"preferred_element_type": jnp.float32}
    scores, inside = (
        jnp.einsum("bngrd,bsgd->bgrns", query, key, **wide) * scale for key in (text[0], own[0])
    )
    scores = jnp.where(seen[:, None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(jnp.concatenate([scores, inside], axis=-1), axis=-1)
    weights = weights.astype(query.dtype)
    parts = (weights[..., :length], text[1]), (weights[..., length:], own[1])
    mixed = sum(jnp.einsum("bgrns,bsgd->bngrd", part, value, **wide) for part, value in parts)
    return jnp.asarray(mixed).astype(query.dtype).reshape(batch, count, heads, dim)
