"""The one door: whatever a user names a model by, out comes a `Model`."""

import dataclasses
from pathlib import Path

from jaxopt_models.checkpoint import gguf, hub, huggingface, tokenizer
from jaxopt_models.checkpoint.weights import Place
from jaxopt_models.errors import UserError
from jaxopt_models.models.model import Model

_NATIVE = "jaxopt_models.json"
_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load(path: str | Path, *, dtype: str = "float32", place: Place | None = None) -> Model:
    """Loads a pretrained model with its tokenizer.

    Args:
      path: a checkpoint of this library, a directory with config.json and safetensors, a .gguf
        file, a Hugging Face hub id, or a built-in name (`hub.resolve`).
      dtype: compute dtype of activations; weights keep the dtype they are stored in.
      place: `place(path, array) -> jax.Array` puts each weight onto its devices.

    Raises:
      UserError: for what cannot be found or read, naming file, key or tensor.
    """
    if dtype not in _COMPUTE_DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(_COMPUTE_DTYPES)}")
    found = hub.resolve(path)
    if (found / _NATIVE).is_file():
        from jaxopt_models.checkpoint import native

        model = native.restore(found, place=place)
    elif found.suffix == ".gguf":
        config = gguf.read_config(found)
        params = gguf.read_params(found, config, place=place)
        model = Model(config, params, tokenizer.from_gguf(found))
    elif (found / "config.json").is_file():
        config = huggingface.read_config(found)
        params = huggingface.read_params(found, config, place=place)
        model = Model(config, params, _tokenizer_beside(found))
    else:
        raise UserError(
            f"{found}: not a model; give a directory with config.json and safetensors weights, "
            "a .gguf file, or a checkpoint of this library"
        )
    config = dataclasses.replace(model.config, dtype=dtype)
    return dataclasses.replace(model, config=config, source=str(path))


def _tokenizer_beside(directory: Path) -> object | None:
    """The directory's tokenizer; None where it has none at all, as for models of other data."""
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return None
    return tokenizer.from_directory(directory)
