"""A tiny model, its NVFP4 twin, and batches of text that can be learnt."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, quantized, sure_model

from jaxopt_models.models.config import ModelConfig


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def tiny_params():
    return sure_model(CONFIG)


@pytest.fixture(scope="session")
def tiny_quantized(tiny_params):
    return quantized(tiny_params)


@pytest.fixture(scope="session")
def tokens():
    """Rows that count upwards from a random start: int32 [8, 16]."""
    first = np.random.default_rng(0).integers(0, 64, (8, 1))
    return jnp.asarray((first + np.arange(16)) % 64, jnp.int32)
