"""The tiny models whose outputs Hugging Face transformers computed."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models.checkpoint.hf_names import hf_names
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.tree import map_with_path

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"


@dataclass(frozen=True)
class Golden:
    """A tiny model with what it should compute.

    Attributes:
      hf, published: its config.json as transformers writes it today and as hubs hold it.
      params: the stored tensors in our tree.
      arrays: tokens [2, 24], logits [2, 24, V], hidden [layers, 2, 24, D], greedy [2, 12].
    """

    hf: dict[str, Any]
    published: dict[str, Any]
    config: ModelConfig
    params: Any
    arrays: Mapping[str, np.ndarray]


def _read(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file}
    hf, published = (json.loads(str(arrays[key])) for key in ("config", "config_published"))
    config = ModelConfig.from_hf(hf)

    def leaf(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        tensors = [arrays[name] for name in hf_names(config, path)]
        array = np.stack(tensors) if "/experts/" in path else tensors[0]
        assert array.shape == shape.shape, path
        return jnp.asarray(array)

    return Golden(hf, published, config, map_with_path(leaf, abstract_params(config)), arrays)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Reads a tiny model by name, once."""
    read: dict[str, Golden] = {}

    def by_name(name: str) -> Golden:
        return read.setdefault(name, _read(name)) if name not in read else read[name]

    return by_name
