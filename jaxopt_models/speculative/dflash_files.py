"""DFlash heads in files: the directories that z-lab publishes, and vLLM and SGLang load.

config.json is that of a Qwen3 model as deep as the head, of architecture "DFlashDraftModel", with
`block_size`, `num_target_layers` and `dflash_config: {mask_token_id, target_layer_ids}`. Tensors
have our names: fc, hidden_norm, layers.{i}.*, norm; embedding and output head are the model's.

A number i of `target_layer_ids` means the residual stream behind layer i of the model, counted from
0: in a list of hidden states that begins with the embedding it is entry i + 1. Ours is i, too.
Positions are turned as the model turns them, which the file repeats.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.speculative.dflash import DFlash
from jaxopt_models.speculative.dflash_params import abstract_dflash
from jaxopt_models.speculative.head_files import (
    HeadTensors,
    config_of,
    read_config,
    stored,
    write_head,
)
from jaxopt_models.tree import leaves_with_paths, map_with_path

_ARCHITECTURE = "DFlashDraftModel"
# What only heads have in their config.json; some publish them beside, and not in, `dflash_config`.
_OWN = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "input_embedding_scale",
    "final_logit_softcapping",
)
# What a head may be made with, and is not here; each as it is without.
_OPTIONS = {
    "is_causal": False,
    "causal": False,
    "use_swa": False,
    "swa_window_size": None,
    "projector_type": "dflash",
    "output_multiplier": 1.0,
}
_BESIDE = ("dflash_config", "num_target_layers", "auto_map")


def is_dflash(directory: Path) -> bool:
    """Whether it holds such a head, by its config.json."""
    return _ARCHITECTURE in (config_of(directory).get("architectures") or ())


def read_dflash(
    directory: str | Path,
    target: ModelConfig,
    *,
    count: int | None = None,
    dtype: str = "float32",
) -> DFlash:
    """A head from a directory.

    Args:
      directory: with config.json and safetensors.
      target: the model that it was made for.
      count: tokens of a guess; None is all that a block says.
      dtype: of its activations; weights keep the stored one.

    Raises:
      UserError: for a file, key or tensor that is missing, misshapen, left over or not finite, for
        options that are not supported, and for a head of another model.
    """
    directory = Path(directory).expanduser()
    file, fields = directory / "config.json", read_config(directory)
    own = _own_fields(file, fields)
    config = replace(_config(file, fields, own), dtype=dtype)
    layers, block = tuple(own["target_layer_ids"]), own["block_size"]
    if fields.get("num_target_layers", target.num_layers) != target.num_layers:
        raise UserError(
            f"{file}: the draft head is of a model of {fields['num_target_layers']} layers, and "
            f"this one has {target.num_layers}; it was made for another model"
        )
    tensors = HeadTensors(directory, "a draft head")
    shapes = abstract_dflash(config, len(layers) * target.hidden_size, jnp.float32)

    def leaf(path: str, expected: Any) -> jax.Array:
        return tensors.weight(path.replace("/", "."), expected.shape)

    guessed = block - 1 if count is None else count
    params = map_with_path(leaf, shapes)
    tensors.check_left_over("a DFlash head")
    head = DFlash(config, params, layers, block, own["mask_token_id"], guessed)
    head.check(target)
    return head


def _own_fields(file: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a head, checked, wherever they stand."""
    inside = fields.get("dflash_config") or {}
    if not isinstance(inside, dict):
        raise UserError(f"{file}: key 'dflash_config' is {inside!r}, and holds no keys of a head")
    own: dict[str, Any] = {key: inside.get(key, fields.get(key)) for key in (*_OWN, *_OPTIONS)}
    for key, without in _OPTIONS.items():
        if own[key] is not None and own[key] != without:
            raise UserError(f"{file}: option {key!r} of a draft head is not supported")
    unknown = sorted(set(inside) - set(own))
    if unknown:
        raise UserError(f"{file}: option {unknown[0]!r} of a draft head is not supported")
    for key in ("block_size", "mask_token_id"):
        if not isinstance(own[key], int):
            raise UserError(f"{file}: key {key!r} of a draft head is {own[key]!r}, not a number")
    ids = own["target_layer_ids"]
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        raise UserError(
            f"{file}: key 'target_layer_ids' of a draft head is {ids!r}, not numbers of layers"
        )
    return own


def _config(file: Path, fields: Mapping[str, Any], own: Mapping[str, Any]) -> ModelConfig:
    ignored = (*_OWN, *_OPTIONS, *_BESIDE)
    config = ModelConfig.from_hf(dict(fields) | {"tie_word_embeddings": False}, ignored)
    if config.model_type != "qwen3" or "sliding" in config.attention_kinds:
        raise UserError(
            f"{file}: the layers of a DFlash head are those of qwen3 with full attention, and these"
            f" are of {config.model_type} with {', '.join(sorted(set(config.attention_kinds)))}"
        )
    scale, cap = own["input_embedding_scale"], own["final_logit_softcapping"]
    return replace(config, embed_scale=float(scale or 1.0), final_softcap=cap and float(cap))


def export_dflash(
    directory: str | Path,
    head: DFlash,
    target: ModelConfig,
    *,
    dtype: Any = jnp.bfloat16,
    overwrite: bool = False,
) -> None:
    """Writes a head; the directory appears only when it is complete.

    Args:
      directory: must not exist yet, unless it may be overwritten.
      head: leaves of any kind, whose values are written.
      target: the model that it was made for.
      dtype: of the weights.
      overwrite: whether a directory may be there.

    Raises:
      UserError: for a directory that exists, and weights that are not finite in the dtype.
    """
    fields = _fields(head, target, jnp.dtype(dtype).name)
    write_head(directory, fields, _tensors(head, np.dtype(dtype)), overwrite=overwrite)


def _tensors(head: DFlash, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in leaves_with_paths(head.params):
        name = path.replace("/", ".")
        yield name, stored(name, leaf, dtype)


def _fields(head: DFlash, target: ModelConfig, dtype: str) -> dict[str, Any]:
    own: dict[str, Any] = {
        "mask_token_id": head.mask_token,
        "target_layer_ids": list(head.layers),
    }
    if head.config.embed_scale != 1.0:
        own["input_embedding_scale"] = head.config.embed_scale
    if head.config.final_softcap is not None:
        own["final_logit_softcapping"] = head.config.final_softcap
    fields = head.config.to_hf() | {
        "architectures": [_ARCHITECTURE],
        "block_size": head.block,
        "dflash_config": own,
        "num_target_layers": target.num_layers,
        "torch_dtype": dtype,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": next(iter(target.eos_token_ids), None),
    }
    return {key: value for key, value in fields.items() if value is not None}
