"""Guesses that branch: tokens of which several may continue the same one, and the walk among them.

Node 0 is the last committed token, which is no guess; node i continues node parents[i] < i. A chain
is the tree in which each continues the one before.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Topology:
    """Which node continues which, for each row, or the same for all (b = 1).

    Attributes:
      depth: int32 [b, N], nodes between each and the root; 0 of the root.
      ancestors: bool [b, N, N], whether node j is node i or one that it continues.
    """

    depth: jax.Array
    ancestors: jax.Array


@struct.dataclass
class Guess:
    """What a drafter proposes.

    Attributes:
      tokens: int32 [B, N], of nodes 1..N. Those that continue the same node should differ.
      topology: of nodes 0..N; None is a chain.
      logits: float32 [B, N, V], what each token was drawn by, before temperature and filters, -inf
        of what cannot be said; None if it was not drawn. Read where guesses are verified by
        rejection, and not computed elsewhere.
    """

    tokens: jax.Array
    topology: Topology | None = None
    logits: jax.Array | None = None


def topology(parents: jax.Array | np.ndarray, deepest: int) -> Topology:
    """Of a tree whose nodes come after those that they continue.

    Args:
      parents: int32 [b, N - 1], of nodes 1..N - 1.
      deepest: no node is farther from the root; static.
    """
    parents = jnp.pad(jnp.asarray(parents, jnp.int32), ((0, 0), (1, 0)))
    count = parents.shape[1]
    ancestors = jnp.broadcast_to(jnp.eye(count, dtype=bool), (len(parents), count, count))
    above = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), parents.shape)
    for _ in range(deepest):
        above = jnp.take_along_axis(parents, above, axis=1)
        ancestors |= jax.nn.one_hot(above, count, dtype=bool)
    return Topology(jnp.sum(ancestors, axis=2, dtype=jnp.int32) - 1, ancestors)


def chain(count: int) -> Topology:
    """Of so many guesses, one behind the other."""
    places = np.arange(count + 1, dtype=np.int32)
    seen = places[:, None] >= places[None]
    return Topology(jnp.asarray(places[None]), jnp.asarray(seen[None]))


def follow(
    tokens: jax.Array, tree: Topology, chosen: jax.Array, deepest: int
) -> tuple[jax.Array, jax.Array]:
    """The longest way from the root on which every guess is what the model takes there.

    A guess is right if it is the token that the model takes behind the node that it continues, and
    reached if all that it continues are right, too.

    Args:
      tokens: int32 [B, N], the guesses.
      tree: of nodes 0..N.
      chosen: int32 [B, N + 1], what the model takes behind each node.
      deepest: of the tree; static.

    Returns:
      (int32 [B, deepest + 1], nodes of the way from the root on, and anything behind its end;
      int32 [B], guesses on it).
    """
    batch, count = chosen.shape
    depth = jnp.broadcast_to(tree.depth, (batch, count))
    ancestors = jnp.broadcast_to(tree.ancestors, (batch, count, count))
    continues = ancestors & (depth[:, None] == depth[:, :, None] - 1)
    before = jnp.sum(jnp.where(continues, chosen[:, None], 0), axis=2)  # of one node, its parent
    right = jnp.pad(tokens == before[:, 1:], ((0, 0), (1, 0)), constant_values=True)
    reached = jnp.all(right[:, None] | ~ancestors, axis=2)
    last = jnp.argmax(jnp.where(reached, depth, -1), axis=1)
    on_way = jnp.take_along_axis(ancestors, last[:, None, None], axis=1)
    steps = jnp.arange(deepest + 1, dtype=jnp.int32)[None, :, None]
    path = jnp.argmax(on_way & (depth[:, None] == steps), axis=2).astype(jnp.int32)
    return path, jnp.take_along_axis(depth, last[:, None], axis=1)[:, 0]
