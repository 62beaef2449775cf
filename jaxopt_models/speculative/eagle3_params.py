"""Parameters of an EAGLE-3 head: new ones, and their shapes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params, init, output_head
from jaxopt_models.ops import effective_weight
from jaxopt_models.speculative.draft import Target
from jaxopt_models.speculative.eagle3 import Eagle3


def init_eagle3(
    target: Target,
    key: jax.Array,
    *,
    layers: Sequence[int] | None = None,
    vocabulary: jax.Array | None = None,
    intermediate_size: int | None = None,
    count: int = 5,
) -> Eagle3:
    """A head to be trained; its output is the model's, its other weights are random.

    Args:
      target: the model.
      key: random key.
      layers: of the model; None is one early, one in the middle, one late.
      vocabulary: int32 [V], rising, the tokens that it may say; None is all.
      intermediate_size: of its feed-forward network; None is the model's.
      count: tokens of a guess.
    """
    config = target.config
    vocabulary = jnp.arange(config.vocab_size) if vocabulary is None else jnp.asarray(vocabulary)
    own = _own_config(config, len(vocabulary), intermediate_size)
    chosen = default_layers(config.num_layers) if layers is None else tuple(layers)
    start = init(own, key, jnp.float32)
    (layer,) = start["layers"]
    width = own.hidden_size
    keys = iter(jax.random.split(key, 4))

    def drawn(rows: int, columns: int) -> dict[str, jax.Array]:
        values = jax.random.normal(next(keys), (rows, columns), jnp.float32)
        return {"weight": values * columns**-0.5}

    projections = {
        name: drawn(layer["self_attn"][name]["weight"].shape[0], 2 * width)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    layer = layer | {
        "hidden_norm": {"weight": jnp.ones(width, jnp.float32)},
        "self_attn": layer["self_attn"] | projections,
    }
    params = {
        "fc": drawn(width, len(chosen) * config.hidden_size),
        "layers": (layer,),
        "norm": {"weight": last_gain(target)},
        "lm_head": {"weight": head_rows(target, vocabulary, jnp.float32)},
        "vocabulary": vocabulary.astype(jnp.int32),
    }
    return Eagle3(own, params, chosen, count)


def default_layers(count: int) -> tuple[int, ...]:
    """Layers of a model of so many that are read: 1, n / 2 - 1 and n - 4, where there are as
    many."""
    return tuple(min(max(i, 0), count - 1) for i in (1, count // 2 - 1, count - 4))


def head_rows(target: Target, vocabulary: jax.Array, dtype: Any) -> jax.Array:
    """Of the model's output head, [V, D], those of some tokens."""
    (head,) = output_head(target.params).values()
    weight = head["weight"]
    rows = weight if isinstance(weight, jax.Array) else effective_weight(weight)
    return rows[vocabulary].astype(dtype)


def last_gain(target: Target) -> jax.Array:
    """Of the model's last norm, float32 [D], as norms without an offset have it."""
    gain = target.params["norm"]["weight"].astype(jnp.float32)
    return 1.0 + gain if target.config.unit_offset_norm else gain


def _own_config(config: ModelConfig, tokens: int, intermediate_size: int | None) -> ModelConfig:
    fields = {
        "model_type": "llama",
        "vocab_size": tokens,
        "hidden_size": config.hidden_size,
        "intermediate_size": intermediate_size or config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": False,
    }
    return replace(ModelConfig.from_hf(fields), dtype=config.dtype)


def abstract_eagle3(config: ModelConfig, features: int, dtype: Any) -> Any:
    """Shapes of a head's parameters, but for what it may lack, as `jax.ShapeDtypeStruct`.

    Args:
      config: of the head.
      features: numbers of a token that it reads.
    """
    whole = abstract_params(config, dtype)
    (layer,) = whole["layers"]

    def array(*shape: int) -> dict[str, Any]:
        return {"weight": jax.ShapeDtypeStruct(shape, dtype)}

    attention = {
        name: array(module["weight"].shape[0], 2 * config.hidden_size)
        for name, module in layer["self_attn"].items()
        if name != "o_proj"
    } | {"o_proj": layer["self_attn"]["o_proj"]}
    layer = layer | {"self_attn": attention, "hidden_norm": array(config.hidden_size)}
    return {
        "fc": array(config.hidden_size, features),
        "layers": (layer,),
        "norm": whole["norm"],
        "lm_head": whole["lm_head"],
        "vocabulary": jax.ShapeDtypeStruct((config.vocab_size,), jnp.int32),
    }
