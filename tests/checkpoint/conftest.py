"""Tiny checkpoints on disk, made of the golden models in the names of Hugging Face."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxopt_models.checkpoint import hub
from jaxopt_models.checkpoint.safetensors_writer import write_sharded
from jaxopt_models.errors import UserError

_HF = Path(__file__).parents[1] / "golden" / "hf"
_MODELS = """gemma3 gemma3_softcap llama2 llama3 llama_bias llama_linear_rope mistral mixtral qwen2
qwen2_sliding qwen3 qwen3_moe qwen3_moe_nonorm smollm2""".split()


@pytest.fixture(params=_MODELS)
def golden_name(request) -> str:
    """The name of each golden tiny model in turn."""
    return request.param


@pytest.fixture
def write_checkpoint(tmp_path) -> Callable[..., Path]:
    """Writes config.json and weights into a new directory."""

    def write(config: Mapping[str, Any], tensors: Mapping[str, Any], **options: Any) -> Path:
        directory = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        write_sharded(directory, tensors, **options)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Config and tensors, under their names in Hugging Face checkpoints, of a golden tiny model."""

    def read(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        with np.load(_HF / f"{name}.npz") as file:
            tensors = {key: file[key] for key in file if "." in key}
            return json.loads(str(file["config_published"])), tensors

    return read


@pytest.fixture
def golden_run() -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Tokens of a golden model and the logits that transformers computes for them."""

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        with np.load(_HF / f"{name}.npz") as file:
            return file["tokens"], file["logits"]

    return read


@pytest.fixture
def real_run() -> Callable[[str], dict[str, np.ndarray]]:
    """Text, tokens and logits of a built-in model, computed by transformers; skips without it."""

    def read(name: str) -> dict[str, np.ndarray]:
        path = _HF / f"{name}_real.npz"
        if not path.exists():
            pytest.skip(f"{path.name} has not been made")
        with np.load(path) as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def builtin() -> Callable[[str], Path]:
    """The file of a built-in model; skips where its package is not installed."""

    def find(name: str) -> Path:
        try:
            return hub.resolve(name)
        except UserError as error:
            pytest.skip(str(error))

    return find
