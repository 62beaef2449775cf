"""A tiny model, its NVFP4 twin, and batches of text that can be learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, quantized

import jaxopt_models as jom
from jaxopt_models.models.config import ModelConfig


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
    return quantized(tiny_params)


@pytest.fixture(scope="session")
def tokens():
    """Rows that count upwards from a random start: int32 [8, 16]."""
    first = np.random.default_rng(0).integers(0, 64, (8, 1))
    return jnp.asarray((first + np.arange(16)) % 64, jnp.int32)
