"""The one door: whatever a user names a model by, out comes a `Model`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_models.checkpoint import gguf, hub, huggingface, native, tokenizer
from jaxopt_models.checkpoint.weights import keep_on_host
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.sharding import DEFAULT_RULES, Rules, shard, shardings
from jaxopt_models.tree import leaves_with_paths

_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    host: bool = False,
) -> Model:
    """Loads a pretrained model with its tokenizer.

    Args:
      path: a checkpoint of this library, a directory with config.json and safetensors, a .gguf
        file, a Hugging Face hub id, or a built-in name (`hub.resolve`).
      dtype: compute dtype of activations; None is the one a checkpoint of this library was saved
        with, else float32. Weights keep the dtype they are stored in.
      mesh: devices to spread the weights over, each as it is read; None takes the default device.
      rules: how, on a mesh; see `sharding`.
      host: leaves the weights in host memory, as NumPy arrays, for a model that is larger than the
        accelerator's memory: `quantize` takes it layer by layer. Weights that a safetensors or GGUF
        file holds in their final form are views of that file, which must stay as it is; experts are
        stacked and GGUF's block formats dequantized, which copies.

    Raises:
      UserError: for what cannot be found or read, naming file, key or tensor.
    """
    if host and mesh is not None:
        raise UserError(
            "weights stay on the host or go onto a mesh, not both; leave out 'host' or 'mesh'"
        )
    if dtype is not None and dtype not in _COMPUTE_DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(_COMPUTE_DTYPES)}")
    found = hub.resolve(path)
    if (found / native.MARKER).is_file():
        model = native.restore(found, mesh=mesh, rules=rules, host=host)
    elif found.suffix == ".gguf":
        config = gguf.read_config(found)
        params = _placed(gguf.read_params, found, config, mesh, rules, host)
        model = Model(config, params, tokenizer.from_gguf(found))
    elif (found / "config.json").is_file():
        config = huggingface.read_config(found)
        params = _placed(huggingface.read_params, found, config, mesh, rules, host)
        model = Model(config, params, _tokenizer_beside(found))
    else:
        raise UserError(
            f"{found}: not a model; give a directory with config.json and safetensors weights, "
            "a .gguf file, or a checkpoint of this library"
        )
    config = dataclasses.replace(model.config, dtype=dtype or model.config.dtype)
    return dataclasses.replace(model, config=config, source=str(path))


def _placed(
    read: Callable[..., Any],
    path: Path,
    config: ModelConfig,
    mesh: Mesh | None,
    rules: Rules,
    host: bool,
) -> Any:
    """Reads parameters tensor by tensor onto the default device, a mesh or neither."""
    if host:
        return read(path, config, place=keep_on_host)
    if mesh is None:
        return read(path, config)
    places = dict(leaves_with_paths(shardings(abstract_params(config), mesh, rules)))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(name: str, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, places.get(name, everywhere))

    # Codes and scales of quantized leaves have no place of their own before they are one leaf.
    return shard(read(path, config, place=place), mesh, rules)


def _tokenizer_beside(directory: Path) -> object | None:
    """The directory's tokenizer; None where it has none at all, as for models of other data."""
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return None
    return tokenizer.from_directory(directory)
