"""Trees that grow where a head is sure of itself.

Of each level the most likely nodes are continued, each by its most likely tokens; of all that were
seen, the most likely nodes are the guess. How likely a node is, is the product of what the head
gives each token on the way there; where tokens are sampled, after their noise, which is the
model's. Shapes are fixed by the numbers below, so that a tree of each row's own is one program.
Reference: Li et al. 2024, arXiv:2406.16858.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Drafter, Prompted, Seen, Target
from jaxopt_models.speculative.tree import Guess, Topology, topology

# (level, nodes, who they continue) -> log of how likely each token is behind each, float32
# [B, n, V]. Nodes are int32 [B, n], tokens of V; who they continue, numbers of nodes of the level
# before. At level 0 both are None, and n is 1: the root.
Continue = Callable[[int, jax.Array | None, jax.Array | None], jax.Array]


class Grower(Drafter, Protocol):
    """A drafter that can say how likely tokens are, not only which is likeliest."""

    @property
    def vocabulary(self) -> jax.Array | None:
        """int32 [V], which of the model's tokens its own are; None is the model's."""
        ...

    @property
    def reach(self) -> int | None:
        """Levels that it can grow at most; None is any number."""
        ...

    def grower(
        self, target: Target, state: Any, seen: Seen, sampler: Sampler
    ) -> tuple[Continue, Any]:
        """(what continues nodes, the state to go on with, which knows nothing of the tree)."""
        ...


@struct.dataclass
class TreeDrafter:
    """A drafter that grows trees.

    Attributes:
      head: what guesses; its own count is not read.
      width: nodes of a level that are continued, and tokens that each is continued by.
      depth: levels.
      count: nodes of a guess, the most likely ones; more than levels.
    """

    head: Grower
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
        """Raises UserError if the head does not go with the model, or cannot grow such a tree."""
        self.head.check(config)
        own = self.head.vocabulary
        tokens = config.vocab_size if own is None else len(own)
        if self.width > tokens:
            raise UserError(
                f"a tree is {self.width} wide, and the head has {tokens} tokens in its "
                "vocabulary; choose a narrower one"
            )
        if self.head.reach is not None and self.depth > self.head.reach:
            raise UserError(
                f"a tree has {self.depth} levels, and the heads guess {self.head.reach} tokens "
                "ahead; choose as many levels at most"
            )

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> Any:
        """The head's, with room for a tree."""
        room = capacity + (self.depth - 1) * self.width
        return self.head.begin(target, prompts, room)

    def propose(
        self, target: Target, state: Any, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, Any]:
        """See `Drafter`."""
        continued, state = self.head.grower(target, state, seen, sampler)
        tokens, tree = _most_likely(_grown(continued, self.width, self.depth), self)
        own = self.head.vocabulary
        return Guess(tokens if own is None else own[tokens], tree), state


class _Candidates(NamedTuple):
    """Nodes that were seen, level by level, each [B, M].

    Attributes:
      tokens: int32.
      score: float32, log of how likely each is; no more than that of the one that it continues.
      parents: int32, numbers among these, -1 for those behind the root.
    """

    tokens: jax.Array
    score: jax.Array
    parents: jax.Array


def _grown(continued: Continue, width: int, depth: int) -> _Candidates:
    """All that are seen of a tree, `width` behind the root and `width²` in each level after it."""
    score, token = (found[:, 0] for found in lax.top_k(continued(0, None, None), width))
    batch = len(token)
    found = [_Candidates(token, score, jnp.full((batch, width), -1, jnp.int32))]
    number = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    above = jnp.zeros((batch, width), jnp.int32)
    for level in range(1, depth):
        more, tokens = lax.top_k(continued(level, token, above), width)
        more, tokens = (score[:, :, None] + more).reshape(batch, -1), tokens.reshape(batch, -1)
        found.append(_Candidates(tokens, more, jnp.repeat(number, width, axis=1)))
        score, best = lax.top_k(more, width)
        token = jnp.take_along_axis(tokens, best, axis=1)
        number = width + (level - 1) * width**2 + best.astype(jnp.int32)
        above = best // width
    return _Candidates(*(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))


def _most_likely(candidates: _Candidates, shape: TreeDrafter) -> tuple[jax.Array, Topology]:
    """(int32 [B, count] tokens, the tree of them).

    Scores do not rise along a way, and of equal ones `top_k` takes the first: so what a node
    continues is always among the chosen, and before it.
    """
    _, chosen = lax.top_k(candidates.score, shape.count)
    chosen = jnp.sort(chosen, axis=1)

    def of(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, chosen, axis=1)

    place: Any = jax.vmap(jnp.searchsorted)(chosen, of(candidates.parents))
    parents = jnp.where(of(candidates.parents) < 0, 0, place + 1).astype(jnp.int32)
    return of(candidates.tokens), topology(parents, shape.depth)
