"""Attention of tokens that form a tree behind what a cache holds.

Several tokens may continue the same one. Each is written at a slot of its own, sees what is before
the tree, those that it continues and itself, and stands at the position that it would have if its
branch were the text. Reference: Miao et al. 2023, arXiv:2305.09781.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas import reference

_HIDDEN = 2**30  # a position past every query


@struct.dataclass
class Branches:
    """Where the tokens of a tree lie, and which of them each one sees.

    The N that are run are the last of M; the others are in the cache already.

    Attributes:
      first: int32 [B], slot of the tree's first token; the others follow it, slot by slot.
      depth: int32 [B, M], position of each less `first`.
      seen: bool [B, N, M], whether a token sees another: itself and those that it continues.
    """

    first: jax.Array
    depth: jax.Array
    seen: jax.Array

    @property
    def positions(self) -> jax.Array:
        """Of those that are run, int32 [B, N]."""
        return self.first[:, None] + self.depth[:, -self.seen.shape[1] :]

    @property
    def slots(self) -> jax.Array:
        """Of those that are run, int32 [B, N]."""
        count, size = self.seen.shape[1:]
        return self.first[:, None] + jnp.arange(size - count, size, dtype=jnp.int32)[None]


def tree_attend(
    query: jax.Array, key: jax.Array, value: jax.Array, branches: Branches, **options: Any
) -> jax.Array:
    """`attention.cached_attend` of a tree: [B, N, H, d].

    Args:
      query: [B, N, H, d].
      key, value: [B, G, S, d], with the tree's own in their slots.
      branches: see there.
      options: scale, window and softcap, as of `cached_attend`.
    """
    slot, size = jnp.arange(key.shape[2], dtype=jnp.int32)[None], branches.seen.shape[2]
    number = slot - branches.first[:, None]
    inside, own = (number >= 0) & (number < size), jnp.clip(number, 0, size - 1)
    position = branches.first[:, None] + jnp.take_along_axis(branches.depth, own, axis=1)
    position = jnp.where(inside, position, jnp.where(number < 0, slot, _HIDDEN))
    mask = jnp.take_along_axis(branches.seen, own[:, None], axis=2) | ~inside[:, None]
    at = branches.positions
    return reference.attention(query, key, value, at, position, mask=mask, **options)
