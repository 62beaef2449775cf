"""A tiny model, its NVFP4 twin, and batches of text that can be learnt."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, quantized, sure_model

from jaxopt_models import data
from jaxopt_models.builtin_text import builtin_text
from jaxopt_models.generate import generate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.speculative import Target


@pytest.fixture(scope="module", autouse=True)
def short_builtin_text() -> Iterator[None]:
    """Parts of it that are read and tokenized at once, for runs that name no text."""

    def part(split: str = "calibration") -> str:
        whole = builtin_text("evaluation")
        return whole[:30_000] if split == "calibration" else whole[-30_000:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "builtin_text", part)
        yield


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
