"""MTP: one more decoder layer of the model's kind, which says the token after the next.

    u_t = W_fc [norm_e(e_{t+1}); norm_h(h_t)]      h_t is what the model's output head reads at t
    x_t = norm(layer(u_0, …, u_t))                 the same output head says token t + 2 by x_t

Where the model has not been, x_t stands for h_{t+1}, so that one layer guesses any number of
tokens. The embedding comes first, as in released heads and the engines that run them; the paper
writes it second. References: DeepSeek-AI 2024, arXiv:2412.19437 (2.2, a module for each token
ahead); Cai et al. 2025, arXiv:2509.18362 (one module, run on its own output).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.models.block import feed_forward
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params, init, output_head
from jaxopt_models.ops import linear
from jaxopt_models.speculative.draft import Target
from jaxopt_models.speculative.recurrent import RecurrentHead
from kernels_pallas import rms_norm


@struct.dataclass
class Mtp(RecurrentHead):
    """A drafter that is such a layer.

    Attributes:
      config: of the layer, see `own_config`.
      params: {pre_fc_norm_embedding, pre_fc_norm_hidden, fc: {weight [D, 2 D]}, layers: (a decoder
        layer,), norm}. With embed_tokens: an embedding of its own. Leaves may be of any kind.
      layers: (L,), the model's last state.
      count: tokens of a guess.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False, default=3)

    def check(self, config: ModelConfig) -> None:
        """Raises UserError unless the head has the model's width and depth."""
        own, width = self.layers[0], self.config.hidden_size
        if (own, width) != (config.num_layers, config.hidden_size):
            raise UserError(
                f"the MTP head is of a model of {own} layers of width {width}, and this one has "
                f"{config.num_layers} of width {config.hidden_size}; it was made for another model"
            )

    @property
    def vocabulary(self) -> None:
        """It may say every token of the model's."""

    def fused(self, features: jax.Array) -> jax.Array:
        """The model's last states, as they are."""
        return features.astype(self.config.dtype)

    def layer(
        self, hidden: jax.Array, embedded: jax.Array, attend: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """x of h and e, where `attend` is the layer's attention on [B, T, D]."""
        (layer,), params = self.params["layers"], self.params
        normed = (
            self._norm(params["pre_fc_norm_embedding"], embedded),
            self._norm(params["pre_fc_norm_hidden"], hidden),
        )
        x = linear(jnp.concatenate(normed, axis=-1), params["fc"]["weight"])
        attended = attend(self._norm(layer["input_layernorm"], x))
        if self.config.sandwich_norm:
            x = x + self._norm(layer["post_attention_layernorm"], attended)
            fed = self._fed(layer, self._norm(layer["pre_feedforward_layernorm"], x))
            x = x + self._norm(layer["post_feedforward_layernorm"], fed)
        else:
            x = x + attended
            x = x + self._fed(layer, self._norm(layer["post_attention_layernorm"], x))
        return self._norm(params["norm"], x)

    def output(self, target: Target) -> tuple[ModelConfig, Any]:
        """The model's."""
        return target.config, output_head(target.params)

    def states(self, x: jax.Array) -> jax.Array:
        """x, which is normed."""
        return x

    def _fed(self, layer: Any, x: jax.Array) -> jax.Array:
        return feed_forward(self.config, layer["mlp"], x)

    def _norm(self, module: Any, x: jax.Array) -> jax.Array:
        own = self.config
        return rms_norm(x, module["weight"], own.rms_norm_eps, own.unit_offset_norm)


def own_config(target: ModelConfig) -> ModelConfig:
    """Of the head of a model: one layer like the model's, with full attention and a dense
    feed-forward network."""
    return replace(target, num_layers=1, attention_kinds=("full",), moe_layers=())


def init_mtp(target: Target, key: jax.Array, count: int = 3) -> Mtp:
    """A head to be trained: random, but for its last norm, which is the model's.

    Args:
      target: the model.
      key: random key.
      count: tokens of a guess.
    """
    config = own_config(target.config)
    start, width = init(_without_vocabulary(config), key, jnp.float32), config.hidden_size
    fc = jax.random.normal(jax.random.fold_in(key, 1), (width, 2 * width), jnp.float32)
    params = {
        "pre_fc_norm_embedding": start["norm"],
        "pre_fc_norm_hidden": {"weight": jnp.array(start["norm"]["weight"])},
        "fc": {"weight": fc * (2 * width) ** -0.5},
        "layers": start["layers"],
        "norm": {"weight": target.params["norm"]["weight"].astype(jnp.float32)},
    }
    return Mtp(config, params, (target.config.num_layers,), count)


def abstract_mtp(config: ModelConfig, dtype: Any) -> Any:
    """Shapes of a head's parameters, but for what it may lack, as `jax.ShapeDtypeStruct`.

    Args:
      config: see `own_config`.
    """
    whole, width = abstract_params(_without_vocabulary(config), dtype), config.hidden_size
    return {
        "pre_fc_norm_embedding": whole["norm"],
        "pre_fc_norm_hidden": whole["norm"],
        "fc": {"weight": jax.ShapeDtypeStruct((width, 2 * width), dtype)},
        "layers": whole["layers"],
        "norm": whole["norm"],
    }


def _without_vocabulary(config: ModelConfig) -> ModelConfig:
    """So that no tables are made that the head does not have."""
    return replace(config, vocab_size=1, tie_word_embeddings=True)
