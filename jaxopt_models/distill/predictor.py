"""What predicts next tokens, and which of its predictions count."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import logits


@struct.dataclass
class Predictor:
    """Final hidden states, and the head that reads them.

    Attributes:
      head: parameters that `transformer.logits` reads, see `transformer.output_head`.
      hidden: [B, T, D], after the final norm.
      config: static.
    """

    head: Any
    hidden: jax.Array
    config: ModelConfig = struct.field(pytree_node=False)

    def logits(self) -> jax.Array:
        """float32 [B, T, V]."""
        return logits(self.config, self.head, self.hidden)


def learnt_positions(mask: jax.Array) -> jax.Array:
    """1 at positions that predict a token to learn, float32 [B, T], of such tokens' mask [B, T].

    A position predicts the token behind it, and the last of a row none.
    """
    return jnp.roll(mask.astype(jnp.float32), -1, axis=1).at[:, -1].set(0.0)
