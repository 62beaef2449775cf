"""MTP heads in files: tensors mtp.*, as Qwen3-Next and Qwen3.5 keep them beside those of the model.

    mtp.pre_fc_norm_embedding.weight, mtp.pre_fc_norm_hidden.weight, mtp.fc.weight [D, 2 D],
    mtp.layers.0.*, named as the model's layers, mtp.norm.weight

A directory is of a head alone, or of a model that brings one; its config.json says
mtp_num_hidden_layers. What the layer is made of is read from the model that the head is for.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.speculative.head_files import (
    HeadTensors,
    config_of,
    read_config,
    stored,
    with_own_embedding,
    write_head,
)
from jaxopt_models.speculative.mtp import Mtp, abstract_mtp, own_config
from jaxopt_models.tree import leaves_with_paths, map_with_path

_PREFIX = "mtp."


def is_mtp(directory: Path) -> bool:
    """Whether it holds such a head, by its config.json."""
    return bool(config_of(directory).get("mtp_num_hidden_layers"))


def read_mtp(
    directory: str | Path, target: ModelConfig, *, count: int = 3, dtype: str = "float32"
) -> Mtp:
    """A head from a directory.

    Args:
      directory: with config.json and safetensors.
      target: the model that it was made for.
      count: tokens of a guess.
      dtype: of its activations; weights keep the stored one.

    Raises:
      UserError: for a file or tensor that is missing, misshapen, left over or not finite, and for
        more than one layer.
    """
    directory = Path(directory).expanduser()
    fields = read_config(directory)
    if fields.get("mtp_num_hidden_layers") != 1:
        raise UserError(
            f"{directory / 'config.json'}: mtp_num_hidden_layers is "
            f"{fields.get('mtp_num_hidden_layers')}, and heads of 1 layer are supported"
        )
    config = replace(own_config(target), dtype=dtype)
    tensors, shapes = HeadTensors(directory, "an MTP head"), abstract_mtp(config, jnp.float32)
    table = f"{_PREFIX}embed_tokens.weight"
    shapes = with_own_embedding(shapes, tensors, table, target.vocab_size)
    params = map_with_path(lambda path, leaf: tensors.weight(_name(path), leaf.shape), shapes)
    others = {name for name in tensors.names if not name.startswith(_PREFIX)}
    tensors.check_left_over("an MTP head of this model", others)
    return Mtp(config, params, (target.num_layers,), count)


def export_mtp(
    directory: str | Path,
    head: Mtp,
    target: ModelConfig,
    *,
    dtype: Any = jnp.bfloat16,
    verifier: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a head alone; the directory appears only when it is complete.

    Args:
      directory: must not exist yet, unless it may be overwritten.
      head: leaves of any kind, whose values are written.
      target: the model that it was made for.
      dtype: of the weights.
      verifier: name or path of the model.
      overwrite: whether a directory may be there.

    Raises:
      UserError: for a directory that exists, and weights that are not finite in the dtype.
    """
    fields = target.to_hf() | {
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": "embed_tokens" in head.params,
        "base_model_name_or_path": verifier,
        "torch_dtype": jnp.dtype(dtype).name,
    }
    names = ((_name(path), leaf) for path, leaf in leaves_with_paths(head.params))
    tensors = ((name, stored(name, leaf, np.dtype(dtype))) for name, leaf in names)
    write_head(directory, fields, tensors, overwrite=overwrite)


def _name(path: str) -> str:
    """In a file, of a path in the parameters."""
    return _PREFIX + path.replace("/", ".")
