"""Parameters of a DFlash head: new ones, and their shapes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params, embed_tokens, init
from jaxopt_models.speculative.dflash import DFlash
from jaxopt_models.speculative.draft import Target
from jaxopt_models.speculative.eagle3_params import last_gain


def init_dflash(
    target: Target,
    key: jax.Array,
    *,
    mask_token: int,
    layers: Sequence[int] | None = None,
    depth: int = 5,
    block: int = 16,
    intermediate_size: int | None = None,
) -> DFlash:
    """A head to be trained; its weights are random but for the last norm, which is the model's.

    Args:
      target: the model.
      key: random key.
      mask_token: stands where a token is to be said, best one that texts do not have.
      layers: of the model, whose streams are read; None is as many as the head has, evenly.
      depth: layers of the head.
      block: places of a block, one of which is the last token.
      intermediate_size: of its feed-forward networks; None is the model's.

    Raises:
      UserError: for a block of one place, a mask that is no token, and one whose embedding is zero,
        of which every place would say the same.
    """
    config = target.config
    own = _own_config(config, depth, intermediate_size)
    chosen = default_layers(config.num_layers, depth) if layers is None else tuple(layers)
    width = config.hidden_size
    # Its embedding and output head are the model's.
    made = init(replace(own, vocab_size=1), key, jnp.float32)
    reads = len(chosen) * width
    params = {
        "fc": {"weight": jax.random.normal(key, (width, reads), jnp.float32) * reads**-0.5},
        "hidden_norm": {"weight": jnp.ones(width, jnp.float32)},
        "layers": made["layers"],
        "norm": {"weight": last_gain(target)},
    }
    head = DFlash(own, params, chosen, block, mask_token, block - 1)
    head.check(config)
    if not jnp.any(embed_tokens(own, target.params, jnp.full((1, 1), mask_token, jnp.int32))):
        raise UserError(
            f"mask_token {mask_token} has an embedding of zeros, of which all places of a block "
            "would say the same; choose another token"
        )
    return head


def default_layers(model: int, count: int) -> tuple[int, ...]:
    """Which of so many layers are read: from 1 to n - 3 evenly, where there are as many; one alone
    is that in the middle."""
    if count == 1:
        return (model // 2,)
    first = min(1, model - 1)
    last = max(model - 3, first)
    spread = {round(first + i * (last - first) / (count - 1)) for i in range(count)}
    return tuple(sorted(spread))


def _own_config(config: ModelConfig, depth: int, intermediate_size: int | None) -> ModelConfig:
    """Positions are turned as the model's are; heads are as many and as wide."""
    fields = {
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": intermediate_size or config.intermediate_size,
        "num_hidden_layers": depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": False,
    }
    own = ModelConfig.from_hf(fields)
    return replace(own, rope=config.rope, local_rope=config.rope, dtype=config.dtype)


def abstract_dflash(config: ModelConfig, features: int, dtype: Any) -> Any:
    """Shapes of a head's parameters, as `jax.ShapeDtypeStruct`.

    Args:
      config: of the head.
      features: numbers of a token that it reads.
    """
    whole = abstract_params(config, dtype)
    width = config.hidden_size
    return {
        "fc": {"weight": jax.ShapeDtypeStruct((width, features), dtype)},
        "hidden_norm": whole["norm"],
        "layers": whole["layers"],
        "norm": whole["norm"],
    }
