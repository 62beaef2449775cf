"""Writes models for other programs: Hugging Face directories of safetensors.

Layout "bf16" holds weights and nothing else: a quantized weight, or a float one with an adapter,
becomes the bfloat16 rounding of what it computes with (`ops.effective_weight`), so its low-rank
part and the scale and rotation of its inputs are folded in. How inputs are rounded at run
time (`QTensor.input`) and how keys and values are stored (`kv_cache`) have no place in such a
directory and are left out: logits differ from the quantized model's by that much.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.checkpoint.atomic import new_directory
from jaxopt_models.checkpoint.hf_names import hf_names
from jaxopt_models.checkpoint.safetensors_writer import write_sharded
from jaxopt_models.checkpoint.weights import as_weight
from jaxopt_models.errors import UserError
from jaxopt_models.inference import refuse_prepared
from jaxopt_models.kv_quantizer import without_kv_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.ops import effective_weight
from jaxopt_models.qtensor import DenseTensor, QTensor
from jaxopt_models.tree import is_leaf, leaves_with_paths

_LAYOUTS = ("bf16",)


def export_hf(
    directory: str | Path,
    model: Model,
    params: Any = None,
    layout: str = "bf16",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a directory that transformers opens, which appears only when it is complete.

    It holds `config.json`, `generation_config.json`, weights in safetensors under the names of the
    published checkpoints, and the tokenizer's files if the model has one.

    Args:
      directory: must not exist yet.
      model: gives config and tokenizer.
      params: instead of the model's own.
      layout: "bf16", weights alone; see above.
      max_shard_bytes: size at which a new file of weights begins.

    Raises:
      UserError: for an unknown layout, a directory that exists, and a leaf that the config does not
        describe, that is of unknown kind, of `inference.prepare`, or holds NaN or infinity.
    """
    if layout not in _LAYOUTS:
        raise UserError(f"layout {layout!r} is not supported; supported: {', '.join(_LAYOUTS)}")
    target = Path(directory).expanduser().resolve()
    if target.exists():
        raise UserError(f"{target}: already exists; choose another directory")
    params = without_kv_cache(model.params if params is None else params)
    refuse_prepared(params, "exported")
    # The tree decides whether there is a head of its own: training or a transform may untie it.
    tied = "lm_head" not in params
    config = dataclasses.replace(model.config, tie_word_embeddings=tied)
    _check_described(config, params)
    with new_directory(target) as scratch:
        write_sharded(scratch, _tensors(config, params), max_shard_bytes=max_shard_bytes)
        _write_json(scratch / "config.json", _config_json(config))
        _write_json(scratch / "generation_config.json", _generation(config))
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(scratch)


def _check_described(config: ModelConfig, params: Any) -> None:
    """Raises UserError where a config.json would not say what the model is.

    It gives all layers the same widths, which those of a pruned model need not have, and each
    architecture has its own keys.
    """
    fields = dataclasses.asdict(dataclasses.replace(config, dtype="float32"))
    read = dataclasses.asdict(ModelConfig.from_hf(config.to_hf()))
    lost = [key for key, value in fields.items() if read[key] != value]
    if lost:
        raise UserError(
            f"a config.json of a {config.model_type} model cannot say {lost[0]} = "
            f"{fields[lost[0]]!r}; it would be read as {read[lost[0]]!r}"
        )
    expected = {path: leaf.shape for path, leaf in leaves_with_paths(abstract_params(config))}
    found = {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(params)}
    for path in sorted(expected.keys() | found.keys()):
        if found.get(path) != expected.get(path):
            have, describe = _shape(found.get(path)), _shape(expected.get(path))
            raise UserError(
                f"tensor {path!r}: the parameters have {have}, a config.json of this "
                f"{config.model_type} model describes {describe}; give the config that belongs to "
                "the parameters, or use `save` if their layers differ in width"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {list(shape)}"


def _tensors(config: ModelConfig, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and bfloat16 values, one leaf in memory at a time; stacked experts one by one."""
    for path, leaf in leaves_with_paths(params):
        if is_leaf(leaf) and not isinstance(leaf, QTensor | DenseTensor):
            raise UserError(
                f"tensor {path!r} is a {type(leaf).__name__}, which layout 'bf16' cannot hold; "
                "turn it into an array or a quantized array first"
            )
        array = as_weight(f"tensor {path!r}", np.asarray(_exported(leaf)), None)
        names = hf_names(config, path)
        yield from zip(names, array if array.ndim == 3 else [array], strict=True)


@jax.jit
def _exported(leaf: Any) -> jax.Array:
    return effective_weight(leaf).astype(jnp.bfloat16)


def _config_json(config: ModelConfig) -> dict[str, Any]:
    # Both names of the dtype: older readers know only the second.
    return config.to_hf() | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def _generation(config: ModelConfig) -> dict[str, Any]:
    """Where generation begins and ends; a single end token is a number, as transformers has it."""
    ends = config.eos_token_ids
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
