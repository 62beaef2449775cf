"""Trees that grow where an EAGLE-3 head is sure of itself.

Of each level the most likely nodes are continued, each by its most likely tokens; of all that were
seen, the most likely nodes are the guess. How likely a node is, is the product of what the head
gives each token on the way there; where tokens are sampled, after their noise, which is the
model's. Shapes are fixed by the numbers below, so that a tree of each row's own is one program.
Reference: Li et al. 2024, arXiv:2406.16858.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxopt_models.errors import UserError
from jaxopt_models.models.cache import KVCache, LayerCache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.tree_attention import Branches
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Seen, Target
from jaxopt_models.speculative.eagle3 import Eagle3, cached_layer, caught_up, embeddings, scores
from jaxopt_models.speculative.tree import Guess, Topology, topology


@struct.dataclass
class Eagle3Tree:
    """A drafter that grows trees.

    Attributes:
      head: what guesses; its own count is not read.
      width: nodes of a level that are continued, and tokens that each is continued by.
      depth: levels.
      count: nodes of a guess, the most likely ones; at least as many as levels.
    """

    head: Eagle3
    width: int = struct.field(pytree_node=False, default=8)
    depth: int = struct.field(pytree_node=False, default=6)
    count: int = struct.field(pytree_node=False, default=32)

    def __post_init__(self) -> None:
        most = self.width + (self.depth - 1) * self.width**2
        if min(self.width, self.depth) < 1 or not self.depth < self.count <= most:
            raise UserError(
                f"a tree of {self.depth} levels, {self.width} wide, has {self.depth + 1} to {most} "
                f"nodes, and not {self.count}; choose a count in between, or a chain"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        return self.head.layers

    def check(self, config: ModelConfig) -> None:
        """Raises UserError if the head does not go with the model, or has too few tokens."""
        self.head.check(config)
        if self.width > self.head.config.vocab_size:
            raise UserError(
                f"a tree is {self.width} wide, and the head has {self.head.config.vocab_size} "
                "tokens in its vocabulary; choose a narrower one"
            )

    def begin(
        self,
        target: Target,
        prompts: jax.Array,
        lengths: jax.Array,
        features: jax.Array,
        capacity: int,
    ) -> KVCache:
        """The head's cache, with room for a tree."""
        room = capacity + (self.depth - 1) * self.width
        return self.head.begin(target, prompts, lengths, features, room)

    def propose(
        self, target: Target, state: KVCache, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, KVCache]:
        """See `Drafter`."""
        x, cache = caught_up(self.head, target, state, seen)
        candidates = _grown(self, target, sampler, x, cache, seen.length)
        tokens, tree = _most_likely(candidates, self.count, self.depth)
        return Guess(self.head.params["vocabulary"][tokens], tree), (cache,)


class _Candidates(NamedTuple):
    """Nodes that were seen, level by level, each [B, M].

    Attributes:
      tokens: int32, numbers in the head's vocabulary.
      score: float32, log of how likely each is; no more than that of the one that it continues.
      parents: int32, numbers among these, -1 for those behind the root.
    """

    tokens: jax.Array
    score: jax.Array
    parents: jax.Array


def _grown(
    drafter: Eagle3Tree,
    target: Target,
    sampler: Sampler,
    x: jax.Array,
    cache: LayerCache,
    length: jax.Array,
) -> _Candidates:
    """From x [B, 1, D] of the root on. What is written to the cache meanwhile is forgotten."""
    head, width, batch = drafter.head, drafter.width, len(length)

    def children(x: jax.Array, level: int) -> tuple[jax.Array, jax.Array]:
        """(score, token) of the most likely ones of each node, [B, n, width]."""
        places = jnp.broadcast_to((length + level)[:, None], x.shape[:2])
        log_p = jax.nn.log_softmax(scores(head, target, sampler, x, places), axis=-1)
        return lax.top_k(log_p, width)

    score, token = (found[:, 0] for found in children(x, 0))
    found = [_Candidates(token, score, jnp.full((batch, width), -1, jnp.int32))]
    number = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    hidden, own = jnp.repeat(x, width, axis=1), jnp.eye(width, dtype=bool)[None]
    own = jnp.broadcast_to(own, (batch, width, width))
    before = own
    for level in range(1, drafter.depth):
        depth = jnp.repeat(jnp.arange(level, dtype=jnp.int32), width)
        depth = jnp.broadcast_to(depth, (batch, level * width))
        branches = Branches(length - 1, depth, before)
        embedded = embeddings(head, target, head.params["vocabulary"][token])
        places = branches.positions
        x, cache = cached_layer(head, hidden, embedded, places, cache, branches)
        more, tokens = children(x, level)
        more = (score[:, :, None] + more).reshape(batch, -1)
        tokens = tokens.reshape(batch, -1)
        found.append(_Candidates(tokens, more, jnp.repeat(number, width, axis=1)))
        score, best = lax.top_k(more, width)
        token = jnp.take_along_axis(tokens, best, axis=1)
        number = width + (level - 1) * width**2 + best.astype(jnp.int32)
        above = (best // width)[:, :, None]
        hidden = jnp.take_along_axis(x, above, axis=1)
        before = jnp.concatenate([jnp.take_along_axis(before, above, axis=1), own], axis=2)
    return _Candidates(*(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))


def _most_likely(candidates: _Candidates, count: int, deepest: int) -> tuple[jax.Array, Topology]:
    """(int32 [B, count] tokens, the tree of them).

    Scores do not rise along a way, and of equal ones `top_k` takes the first: so what a node
    continues is always among the chosen, and before it.
    """
    _, chosen = lax.top_k(candidates.score, count)
    chosen = jnp.sort(chosen, axis=1)

    def of(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, chosen, axis=1)

    place: Any = jax.vmap(jnp.searchsorted)(chosen, of(candidates.parents))
    parents = jnp.where(of(candidates.parents) < 0, 0, place + 1).astype(jnp.int32)
    return of(candidates.tokens), topology(parents, deepest)
