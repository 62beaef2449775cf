"""A tiny model, its NVFP4 twin, and batches of text that can be learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def tiny_params():
    """Random, and as sure of its predictions as a trained model."""
    params = jom.init(CONFIG, jax.random.key(0))
    table = params["embed_tokens"]["weight"]
    return params | {"embed_tokens": {"weight": 20 * table}}


@pytest.fixture(scope="session")
def tiny_quantized(tiny_params):
    def leaf(path, weight):
        inside = tree.is_decoder_matrix(path, weight)
        return jom.quantize_array(weight, "nvfp4") if inside else weight

    return tree.map_with_path(leaf, tiny_params)


@pytest.fixture(scope="session")
def tokens():
    """Rows that count upwards from a random start: int32 [8, 16]."""
    first = np.random.default_rng(0).integers(0, 64, (8, 1))
    return jnp.asarray((first + np.arange(16)) % 64, jnp.int32)
