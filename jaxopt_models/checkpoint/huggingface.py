"""Reads a Hugging Face model directory: `config.json` and safetensors weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxopt_models.checkpoint import hf_names
from jaxopt_models.checkpoint.hf_fp8 import Fp8Scheme, read_scheme
from jaxopt_models.checkpoint.safetensors import TensorIndex, open_index
from jaxopt_models.checkpoint.weights import Place, as_weight, check_shape, copy_to_device
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.qtensor import QTensor
from jaxopt_models.tree import map_with_path

_EMBEDDING = "model.embed_tokens.weight"


def read_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json`, and end-of-sequence ids from `generation_config.json` if there.

    Raises:
      UserError: for a missing or malformed file, and for what `ModelConfig.from_hf` refuses.
    """
    config = ModelConfig.from_hf(_read_json(Path(directory) / "config.json"))
    generation = Path(directory) / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if eos is None:
        return config
    # Chat models stop at more tokens than the base model's config lists.
    return dataclasses.replace(config, eos_token_ids=tuple(np.atleast_1d(eos).tolist()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the directory of a model") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return value


def read_params(
    directory: str | Path,
    config: ModelConfig,
    *,
    dtype: Any = None,
    place: Place | None = None,
) -> Any:
    """Reads the weights into the tree of `abstract_params(config)`.

    Tensors are read and placed one leaf at a time, so the host holds little beside the result.
    Shapes are checked against the config, values for NaN and infinity; no tensor may be left over.

    Args:
      directory: with `model.safetensors` or its sharded form, and `config.json`.
      config: the architecture, from `read_config`.
      dtype: of the float weights; None keeps the stored one, float64 excepted, which JAX narrows.
      place: `place(path, array)` decides where an array goes; the parts of a quantized weight come
        one by one, as ".../weight/codes" and ".../weight/scale".

    Returns:
      The parameter tree. The matrices of FP8 checkpoints (`hf_fp8`) become `QTensor`s as they are.

    Raises:
      UserError: naming the tensor that is missing, misshapen, left over or not finite.
    """
    directory = Path(directory)
    description = directory / "config.json"
    reader = _Reader(
        open_index(directory),
        config,
        read_scheme(description, _read_json(description)),
        None if dtype is None else jnp.dtype(dtype),
        place or copy_to_device,
    )
    params = map_with_path(reader.leaf, abstract_params(config))
    reader.check_left_over()
    return params


class _Reader:
    """Reads the leaves of one checkpoint and remembers which tensors it has used."""

    def __init__(
        self,
        index: TensorIndex,
        config: ModelConfig,
        scheme: Fp8Scheme | None,
        dtype: np.dtype | None,
        place: Place,
    ):
        self._index, self._config, self._scheme = index, config, scheme
        self._dtype, self._place = dtype, place
        self._stored = hf_names.text_tensors(index.names())
        self._used: set[str] = set()

    def leaf(self, path: str, expected: jax.ShapeDtypeStruct) -> Any:
        """The leaf at a path, an array or a `QTensor`, of the shape of `expected`."""
        names = hf_names.hf_names(self._config, path)
        if self._scheme is not None and self._is_fp8(names[0]):
            return self._quantized(path, names, expected.shape, self._scheme)
        return self._place(path, self._gather(names, expected.shape, self._dtype))

    def _is_fp8(self, name: str) -> bool:
        stored = self._stored.get(name)
        return stored is not None and self._index.dtype(stored) == ml_dtypes.float8_e4m3fn

    def _quantized(
        self, path: str, names: tuple[str, ...], shape: tuple[int, ...], scheme: Fp8Scheme
    ) -> QTensor:
        spec = scheme.spec
        scale_names = tuple(name + scheme.suffix for name in names)
        scale_shape = (*shape[:-2], *scheme.scale_shape(shape[-2:]))
        scale = self._gather(scale_names, scale_shape, np.dtype(np.float32))
        if len(shape) == 3 and spec.granularity == "tensor":
            # A scale for each expert is, in the stack of them, the same scale for all its rows.
            spec = dataclasses.replace(spec, granularity="channel")
            scale = np.repeat(scale, shape[1], axis=1)
        return QTensor(
            self._place(f"{path}/codes", self._gather(names, shape, None)),
            self._place(f"{path}/scale", scale),
            input=scheme.input,
            spec=spec,
            dtype="bfloat16" if self._dtype is None else self._dtype.name,
        )

    def _gather(
        self, names: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype | None
    ) -> np.ndarray:
        """One tensor, or those of all experts stacked: [E, N, K]."""
        if len(shape) < 3:
            return self._read(names[0], shape, dtype)
        first = self._read(names[0], shape[1:], dtype)
        stack = np.empty(shape, first.dtype)
        for part, name in zip(stack, names, strict=True):
            expert = self._read(name, shape[1:], dtype)
            if expert.dtype != first.dtype:
                raise UserError(
                    f"{self._index.path}: tensor {name!r} is {expert.dtype} where {names[0]!r} is "
                    f"{first.dtype}; convert all experts to one dtype"
                )
            part[...] = expert
        return stack

    def _read(self, name: str, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
        if name not in self._stored:
            raise UserError(
                f"{self._index.path}: tensor {name!r} is missing; "
                "download the checkpoint again, or give the config.json that belongs to it"
            )
        stored = self._stored[name]
        where = f"{self._index.file(stored)}: tensor {stored!r}"
        array = self._index.read(stored)
        if shape == array.shape + (1,) * (len(shape) - array.ndim):
            array = array.reshape(shape)  # scales of a whole tensor or of rows lack trailing axes
        check_shape(where, array.shape, shape)
        self._used.add(name)
        return as_weight(where, array, dtype)

    def check_left_over(self) -> None:
        """Raises UserError for a tensor that no leaf has asked for, known repetitions excepted."""
        for name in sorted(self._stored.keys() - self._used):
            if not hf_names.may_be_ignored(self._config, name):
                raise UserError(
                    f"{self._index.path}: tensor {self._stored[name]!r} has no place in a "
                    f"{self._config.model_type} model with this config.json; "
                    "the files are of different models, or the model has parts not supported here"
                )
            if name == "lm_head.weight":
                self._check_tied()

    def _check_tied(self) -> None:
        head, embedding = (
            self._index.read(self._stored[name]) for name in ("lm_head.weight", _EMBEDDING)
        )
        if head.shape != embedding.shape or not np.array_equal(head, embedding):
            raise UserError(
                f"{self._index.path}: tensor 'lm_head.weight' differs from the embedding although "
                "config.json ties them; set tie_word_embeddings to false there"
            )
