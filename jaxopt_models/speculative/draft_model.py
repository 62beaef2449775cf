"""Guesses by another, smaller model of the same vocabulary.

It samples with the noise that the checking model will sample with, so that both take the same token
far more often than two independent samples would agree: with a probability of at least
(1 - d) / (1 + d), d being the total variation between their distributions. References: Leviathan et
al. 2022, arXiv:2211.17192; Daliri et al. 2024, arXiv:2408.07978.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxopt_models.errors import UserError
from jaxopt_models.models.cache import KVCache, empty_cache
from jaxopt_models.models.cached import decode_step, prefill
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Prompted, Seen, Target
from jaxopt_models.speculative.tree import Guess


@struct.dataclass
class DraftModel:
    """A drafter that is a model.

    Attributes:
      config, params: of the model; leaves may be of any kind.
      count: tokens of a guess.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any
    count: int = struct.field(pytree_node=False, default=4)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count must be at least 1; it is {self.count}")

    def check(self, config: ModelConfig) -> None:
        """Raises UserError unless both have as many tokens."""
        if config.vocab_size != self.config.vocab_size:
            raise UserError(
                f"the draft model has {self.config.vocab_size} tokens in its vocabulary and the "
                f"model {config.vocab_size}; they have to share a tokenizer"
            )

    @property
    def depth(self) -> int:
        return self.count

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> KVCache:
        """Its cache, with the prompts."""
        cache = empty_cache(self.config, self.params, len(prompts.lengths), capacity)
        return prefill(self.config, self.params, prompts.tokens, prompts.lengths, cache)[1]

    def propose(
        self, target: Target, state: KVCache, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, KVCache]:
        """See `Drafter`.

        Of the last guess, if all of it was taken, the last token was never fed. So the last two
        tokens are fed, always: what is there already is written again.
        """
        length = seen.length
        places = length[:, None] + jnp.arange(-2, 0, dtype=jnp.int32)[None]
        known = jnp.take_along_axis(seen.tokens, places, axis=1)
        logits, cache = decode_step(self.config, self.params, known, places, state)
        first = sampler(logits[:, -1:], length[:, None])

        def step(carry: tuple[jax.Array, KVCache], ahead: jax.Array) -> Any:
            token, cache = carry
            place = length[:, None] + ahead
            logits, cache = decode_step(self.config, self.params, token, place, cache)
            chosen = sampler(logits, place + 1)
            return (chosen, cache), (chosen[:, 0], logits[:, 0])

        ahead = jnp.arange(self.count - 1, dtype=jnp.int32)
        (_, cache), (more, behind) = lax.scan(step, (first, cache), ahead)
        tokens = jnp.concatenate([first, more.T], axis=1)
        drawn_by = jnp.concatenate([logits[:, -1:], jnp.swapaxes(behind, 0, 1)], axis=1)
        return Guess(tokens, logits=drawn_by), cache
