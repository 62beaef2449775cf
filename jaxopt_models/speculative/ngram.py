"""Guesses copied from where the same words stood before (prompt lookup), on the device.

The last tokens of a row are looked up in the row itself; what followed them there is the guess.
Worth most where the answer repeats the prompt: summaries, edits, retrieved passages. References:
Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; Yang et al. 2023, arXiv:2304.04487.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Prompted, Seen, Target
from jaxopt_models.speculative.tree import Guess


@struct.dataclass
class NGram:
    """A drafter without parameters.

    Attributes:
      count: tokens of a guess.
      longest: tokens that are looked up at most. The longest match wins, and the latest of equal
        ones.
    """

    count: int = struct.field(pytree_node=False, default=8)
    longest: int = struct.field(pytree_node=False, default=4)

    def __post_init__(self) -> None:
        for name in ("count", "longest"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; it is {getattr(self, name)}")

    def check(self, config: ModelConfig) -> None:
        """It goes with every model."""

    @property
    def depth(self) -> int:
        return self.count

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> None:
        """It carries nothing."""

    def propose(
        self, target: Target, state: None, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, None]:
        """See `Drafter`. Without a match the last token is repeated."""
        return Guess(copied(seen.tokens, seen.length, self.count, self.longest)), None


def copied(tokens: jax.Array, length: jax.Array, count: int, longest: int) -> jax.Array:
    """What followed the latest of the longest matches of each row's last tokens.

    A match that ends just before the end is continued by repeating what is between.

    Args:
      tokens: int32 [B, S].
      length: int32 [B], tokens that count, at least 1.
      count: tokens to return.
      longest: tokens of a match at most.

    Returns:
      int32 [B, count]; the last token again and again if it stands nowhere else.
    """
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    end = length[:, None]
    # Of every place that a continuation may begin at: how many tokens before it match the row's.
    matched = jnp.zeros_like(tokens)
    so_far = (place > 0) & (place < end)
    for back in range(1, longest + 1):
        own = jnp.take_along_axis(tokens, jnp.maximum(end - back, 0), axis=1)
        so_far = so_far & (place >= back) & (jnp.roll(tokens, back, axis=1) == own)
        matched = matched + so_far.astype(jnp.int32)
    best = jnp.max(matched, axis=1, keepdims=True)
    latest = jnp.max(jnp.where(matched == best, place, 0), axis=1, keepdims=True)
    begin = jnp.where(best > 0, latest, end - 1)
    ahead = jnp.arange(count, dtype=jnp.int32)[None] % (end - begin)
    return jnp.take_along_axis(tokens, begin + ahead, axis=1)
