"""Models that are made and trained in seconds."""

from dataclasses import replace
from typing import Any

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


def quantized(params: Any, format: str = "nvfp4", **extra: Any) -> Any:
    """Matrices of the decoder in a format; `extra` are fields of the leaves."""

    def leaf(path: str, weight: Any) -> Any:
        if not tree.is_decoder_matrix(path, weight):
            return weight
        return replace(jom.quantize_array(weight, format), **extra)

    return tree.map_with_path(leaf, params)
