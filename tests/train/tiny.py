"""Models that are made and trained in seconds."""

from dataclasses import replace
from typing import Any

import jax

import jaxopt_models as jom
from jaxopt_models import tree
from jaxopt_models.models.config import ModelConfig

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }
)
ONE_LAYER = replace(CONFIG, num_layers=1, attention_kinds=("full",))


def sure_model(config: ModelConfig) -> Any:
    """Random parameters, as sure of their predictions as those of a trained model."""
    params = jom.init(config, jax.random.key(0))
    return params | {"embed_tokens": {"weight": 20 * params["embed_tokens"]["weight"]}}


def quantized(params: Any, format: str = "nvfp4", **extra: Any) -> Any:
    """Matrices of the decoder in a format; `extra` are fields of the leaves."""

    def leaf(path: str, weight: Any) -> Any:
        if not tree.is_decoder_matrix(path, weight):
            return weight
        return replace(jom.quantize_array(weight, format), **extra)

    return tree.map_with_path(leaf, params)
