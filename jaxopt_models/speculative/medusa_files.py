"""Medusa heads in files: config.json, and medusa_lm_head.safetensors with the tensors

    {head}.{block}.linear.weight, {head}.{block}.linear.bias, {head}.{blocks}.weight

the last of which is the head's output. That is the reference's layout.
"""

from collections.abc import Iterator
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
    write_head,
)
from jaxopt_models.speculative.medusa import Medusa

_WEIGHTS = "medusa_lm_head.safetensors"


def is_medusa(directory: Path) -> bool:
    """Whether it holds such heads, by its config.json."""
    return "medusa_num_heads" in config_of(directory)


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
    fields = read_config(directory)
    try:
        count, blocks = int(fields["medusa_num_heads"]), int(fields.get("medusa_num_layers", 1))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{directory / 'config.json'}: says no number of Medusa heads ({error!r}); give the "
            "heads' directory"
        ) from None
    tensors, width = HeadTensors(directory / _WEIGHTS, "Medusa heads"), target.hidden_size

    def block(head: int, number: int) -> dict[str, Any]:
        name, shapes = f"{head}.{number}.linear", {"weight": (width, width), "bias": (width,)}
        return {"linear": {key: tensors.weight(f"{name}.{key}", shapes[key]) for key in shapes}}

    output = target.vocab_size, width
    heads = tuple(
        {
            "blocks": tuple(block(head, number) for number in range(blocks)),
            "lm_head": {"weight": tensors.weight(f"{head}.{blocks}.weight", output)},
        }
        for head in range(count)
    )
    tensors.check_left_over(f"{count} Medusa heads")
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
    heads = medusa.params["heads"]
    fields = {
        "medusa_num_heads": len(heads),
        "medusa_num_layers": len(heads[0]["blocks"]),
        "base_model_name_or_path": verifier,
        "hidden_size": medusa.config.hidden_size,
        "vocab_size": medusa.config.vocab_size,
        "torch_dtype": jnp.dtype(dtype).name,
    }
    tensors = _tensors(heads, np.dtype(dtype))
    write_head(directory, fields, tensors, overwrite=overwrite, file=_WEIGHTS)


def _tensors(heads: Any, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    for i, head in enumerate(heads):
        named = {
            f"{i}.{j}.linear.{field}": block["linear"][field]
            for j, block in enumerate(head["blocks"])
            for field in ("weight", "bias")
        }
        named[f"{i}.{len(head['blocks'])}.weight"] = head["lm_head"]["weight"]
        for name, leaf in named.items():
            yield name, stored(name, leaf, dtype)
