"""Medusa heads in files: config.json, and medusa_lm_head.safetensors with the tensors

    {head}.{block}.linear.weight, {head}.{block}.linear.bias, {head}.{blocks}.weight

the last of which is the head's output. That is the reference's layout.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.checkpoint.atomic import new_directory
from jaxopt_models.checkpoint.safetensors import open_index
from jaxopt_models.checkpoint.safetensors_writer import write_sharded
from jaxopt_models.checkpoint.weights import as_weight, check_shape
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.ops import effective_weight
from jaxopt_models.speculative.medusa import Medusa
from jaxopt_models.tree import is_leaf

_WEIGHTS = "medusa_lm_head.safetensors"


def is_medusa(directory: Path) -> bool:
    """Whether it holds such heads, by its config.json."""
    try:
        return "medusa_num_heads" in json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def read_medusa(directory: str | Path, target: ModelConfig, *, dtype: str = "float32") -> Medusa:
    """Heads from a directory.

    Args:
      directory: see above.
      target: the model that they were made for.
      dtype: of their activations; weights keep the stored one.

    Raises:
      UserError: for a file or tensor that is missing, misshapen, left over or not finite.
    """
    directory = Path(directory).expanduser()
    file = directory / "config.json"
    try:
        fields = json.loads(file.read_bytes())
        count, blocks = int(fields["medusa_num_heads"]), int(fields.get("medusa_num_layers", 1))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); give the heads' directory") from None
    index = open_index(directory / _WEIGHTS)
    width, used = target.hidden_size, set[str]()

    def read(name: str, *shape: int) -> jax.Array:
        if name not in index.names():
            raise UserError(f"{index.path}: tensor {name!r} of Medusa heads is missing")
        used.add(name)
        where, array = f"{index.path}: tensor {name!r}", index.read(name)
        check_shape(where, array.shape, shape)
        return jnp.asarray(as_weight(where, array, None))

    def block(head: int, number: int) -> dict[str, Any]:
        name = f"{head}.{number}.linear"
        weight, bias = read(f"{name}.weight", width, width), read(f"{name}.bias", width)
        return {"linear": {"weight": weight, "bias": bias}}

    heads = tuple(
        {
            "blocks": tuple(block(head, number) for number in range(blocks)),
            "lm_head": {"weight": read(f"{head}.{blocks}.weight", target.vocab_size, width)},
        }
        for head in range(count)
    )
    left = sorted(set(index.names()) - used)
    if left:
        raise UserError(f"{index.path}: tensor {left[0]!r} has no place in {count} Medusa heads")
    return Medusa(replace(target, dtype=dtype), {"heads": heads}, count)


def export_medusa(
    directory: str | Path,
    medusa: Medusa,
    *,
    dtype: Any = jnp.bfloat16,
    verifier: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes heads; the directory appears only when it is complete.

    Args:
      directory: must not exist yet, unless it may be overwritten.
      medusa: leaves of any kind, whose values are written.
      dtype: of the weights.
      verifier: name or path of the model.
      overwrite: whether a directory may be there.

    Raises:
      UserError: for a directory that exists, and weights that are not finite in the dtype.
    """
    path = Path(directory).expanduser().resolve()
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists; choose another directory")
    heads = medusa.params["heads"]
    fields = {
        "medusa_num_heads": len(heads),
        "medusa_num_layers": len(heads[0]["blocks"]),
        "base_model_name_or_path": verifier,
        "hidden_size": medusa.config.hidden_size,
        "vocab_size": medusa.config.vocab_size,
        "torch_dtype": jnp.dtype(dtype).name,
    }
    with new_directory(path, overwrite=overwrite) as scratch:
        if jax.process_index() == 0:
            (written,) = write_sharded(
                scratch, _tensors(heads, np.dtype(dtype)), max_shard_bytes=2**63
            )
            written.rename(scratch / _WEIGHTS)
            write_json(scratch / "config.json", fields)


def _tensors(heads: Any, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    def tensor(name: str, leaf: Any) -> tuple[str, np.ndarray]:
        values = effective_weight(leaf) if is_leaf(leaf) else leaf
        return name, as_weight(f"tensor {name!r}", np.asarray(values), dtype)

    for i, head in enumerate(heads):
        for j, block in enumerate(head["blocks"]):
            for field in ("weight", "bias"):
                yield tensor(f"{i}.{j}.linear.{field}", block["linear"][field])
        yield tensor(f"{i}.{len(head['blocks'])}.weight", head["lm_head"]["weight"])
