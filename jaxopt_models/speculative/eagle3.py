"""EAGLE-3: a head of one layer, which reads what the model thought of the text so far.

Of each token t the model's residual stream is taken behind three of its layers, early, middle and
late. With the embedding e of the token behind it

    g_t = W_fc [f_low; f_mid; f_high]
    z_t = [norm(e_{t+1}); norm(a_t)]                       a_t = g_t, or the head's own x_{t-1}
    x_t = a_t + attention(z_0..z_t);   x_t <- x_t + mlp(norm(x_t))

the head's output norm(x_t) says token t + 2, in a vocabulary of its own, the most frequent tokens.
Where the model has not been, x_t stands for the features of the next place. Reference: Li et al.
2025, arXiv:2503.01840.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.models.block import feed_forward
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import output_head
from jaxopt_models.ops import linear
from jaxopt_models.speculative.draft import Target, check_layers
from jaxopt_models.speculative.recurrent import RecurrentHead
from kernels_pallas import rms_norm


@struct.dataclass
class Eagle3(RecurrentHead):
    """A drafter that is such a head.

    Attributes:
      config: of the head; its vocabulary is the head's own.
      params: {fc: {weight [D, 3 D]}, layers: ({input_layernorm, hidden_norm, self_attn,
        post_attention_layernorm, mlp},), norm, lm_head, vocabulary int32 [V]}: which of the model's
        tokens each of the head's is; attention reads 2 D. With embed_tokens: an embedding of its
        own. Leaves may be of any kind.
      layers: of the model, whose streams are read.
      count: tokens of a guess.
      norm_before_residual: whether the attention is added to norm(a) in place of a.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False, default=5)
    norm_before_residual: bool = struct.field(pytree_node=False, default=False)

    def check(self, config: ModelConfig) -> None:
        """Raises UserError unless the model has the layers and the width that the head reads."""
        check_layers(self.layers, config)
        reads = self.params["fc"]["weight"].shape[-1]
        if reads != len(self.layers) * config.hidden_size:
            raise UserError(
                f"the draft head reads {reads} features, and {len(self.layers)} layers of the "
                f"model have {len(self.layers) * config.hidden_size}; it was made for another model"
            )

    @property
    def vocabulary(self) -> jax.Array:
        return self.params["vocabulary"]

    def fused(self, features: jax.Array) -> jax.Array:
        """g of the three streams side by side."""
        return linear(features.astype(self.config.dtype), self.params["fc"]["weight"])

    def layer(
        self, hidden: jax.Array, embedded: jax.Array, attend: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """x of a and e, where `attend` maps z [B, T, 2 D] to what is added."""
        (layer,) = self.params["layers"]
        normed = self._norm(layer["hidden_norm"], hidden)
        z = jnp.concatenate([self._norm(layer["input_layernorm"], embedded), normed], axis=-1)
        x = (normed if self.norm_before_residual else hidden) + attend(z)
        after = self._norm(layer["post_attention_layernorm"], x)
        return x + feed_forward(self.config, layer["mlp"], after)

    def output(self, target: Target) -> tuple[ModelConfig, Any]:
        """The head's own."""
        return self.config, output_head(self.params)

    def states(self, x: jax.Array) -> jax.Array:
        """norm(x)."""
        return self._norm(self.params["norm"], x)

    def _norm(self, module: Any, x: jax.Array) -> jax.Array:
        return rms_norm(x, module["weight"], self.config.rms_norm_eps)
