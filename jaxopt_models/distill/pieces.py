"""Logits a piece at a time: a few positions of each row.

Logits [B, T, V] are the largest array of training by far: 32 sequences of 2048 tokens have 31 GiB
of them with a vocabulary of 128k. What is wanted of them is much smaller, so that they need not be
all alive.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_models.distill import losses
from jaxopt_models.distill.losses import TopK
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import logits

_ENTRIES = 2**28  # logits that exist at a time, on all devices together: 1 GiB in float32


def piece_length(batch: int, length: int, vocab_size: int, chunks: int = 1) -> int:
    """How many of a row's positions make a piece, of so many rows and chunks of the vocabulary."""
    return min(length, max(1, chunks * _ENTRIES // (batch * vocab_size)))


def chunk_count(batch: int, vocab_size: int) -> int:
    """Of the vocabulary: 1, unless one position of so many rows has too many logits."""
    return min(math.ceil(batch * vocab_size / _ENTRIES), vocab_size)


def cut(array: jax.Array, piece: int) -> jax.Array:
    """[B, T, ...] -> [pieces, B, piece, ...], the last one filled up with zeros."""
    batch, length, *rest = array.shape
    count = math.ceil(length / piece)
    padding = [(0, 0), (0, count * piece - length), *[(0, 0)] * len(rest)]
    pieces = jnp.pad(array, padding).reshape(batch, count, piece, *rest)
    return jnp.moveaxis(pieces, 1, 0)


def joined(pieces: jax.Array, length: int) -> jax.Array:
    """[pieces, B, piece, ...] -> [B, length, ...]: what `cut` took apart."""
    array = jnp.moveaxis(pieces, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]


def most_likely(
    config: ModelConfig,
    head: Any,
    hidden: jax.Array,
    k: int,
    temperature: float = 1.0,
    piece: int | None = None,
) -> TopK:
    """The k most likely next tokens at each position, as `losses.top_k` finds them.

    Args:
      config: static.
      head: see `transformer.output_head`.
      hidden: final hidden states [B, T, D].
      k, temperature: static.
      piece: positions of each row whose logits exist at a time; None chooses.

    Returns:
      Of [B, T, k].

    Raises:
      UserError: for a k that the vocabulary does not have.
    """
    batch, length, _ = hidden.shape
    piece = piece or piece_length(batch, length, config.vocab_size)

    def one(states: jax.Array) -> TopK:
        return losses.top_k(logits(config, head, states), k, temperature)

    found = lax.map(one, cut(hidden, piece))
    return jax.tree.map(lambda pieces: joined(pieces, length), found)
