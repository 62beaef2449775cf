"""A tiny model, its NVFP4 twin, and batches of text that can be learnt."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, quantized, sure_model

from jaxopt_models.generate import generate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.speculative import Target


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
def target(tiny_params) -> Target:
    """That heads are trained for."""
    return Target(CONFIG, tiny_params)


@pytest.fixture(scope="session")
def text(target):
    """What it says, sampled: int32 [32, 24]."""
    prompts = [[i] for i in range(32)]
    said = generate(CONFIG, target.params, prompts, max_new_tokens=23, temperature=0.5)
    return jnp.asarray([p + row for p, row in zip(prompts, said.tokens, strict=True)], jnp.int32)


@pytest.fixture(scope="session")
def tokens():
    """Rows that count upwards from a random start: int32 [8, 16]."""
    first = np.random.default_rng(0).integers(0, 64, (8, 1))
    return jnp.asarray((first + np.arange(16)) % 64, jnp.int32)
