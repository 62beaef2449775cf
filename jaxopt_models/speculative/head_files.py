"""Files of draft heads: config.json, tensors all of which are read, and values to write."""

import json
from collections.abc import Collection, Iterable, Mapping
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
from jaxopt_models.ops import effective_weight
from jaxopt_models.tree import is_leaf


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a directory.

    Raises:
      UserError: if it cannot be read, or holds something else than fields.
    """
    file = directory / "config.json"
    try:
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give the directory of a head") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: cannot be read (no JSON object); give the directory of a head")
    return fields


def config_of(directory: Path) -> dict[str, Any]:
    """The config.json of what may be a head; without fields where none can be read."""
    try:
        return read_config(directory)
    except UserError:
        return {}


class HeadTensors:
    """The tensors of a file or directory, and which of them have been asked for."""

    def __init__(self, path: Path, whose: str) -> None:
        """Opens them; `whose` they are says what is missing of what."""
        self._index, self._whose, self._used = open_index(path), whose, set[str]()
        self.path = self._index.path
        self.names = frozenset(self._index.names())

    def raw(self, name: str) -> np.ndarray:
        """A tensor as it is stored.

        Raises:
          UserError: if it is not there.
        """
        if name not in self.names:
            raise UserError(f"{self.path}: tensor {name!r} of {self._whose} is missing")
        self._used.add(name)
        return self._index.read(name)

    def weight(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """A float tensor of a shape, in its own dtype.

        Raises:
          UserError: if it is not there, of another shape, no float or not finite.
        """
        where, array = f"{self.path}: tensor {name!r}", self.raw(name)
        check_shape(where, array.shape, shape)
        return jnp.asarray(as_weight(where, array, None))

    def check_left_over(self, place: str, known: Collection[str] = ()) -> None:
        """Raises UserError for a tensor that was not asked for and has no place in such a head."""
        left = sorted(self.names - self._used - set(known))
        if left:
            raise UserError(f"{self.path}: tensor {left[0]!r} has no place in {place}")


def stored(name: str, leaf: Any, dtype: np.dtype) -> np.ndarray:
    """The values of a leaf of any kind.

    Raises:
      UserError: if they are not finite in the dtype.
    """
    values = effective_weight(leaf) if is_leaf(leaf) else leaf
    return as_weight(f"tensor {name!r}", np.asarray(values), dtype)


def with_own_embedding(shapes: Any, tensors: HeadTensors, name: str, vocab_size: int) -> Any:
    """Shapes of a head's parameters, with an embedding if the file has one under this name."""
    if name not in tensors.names:
        return shapes
    size = vocab_size, shapes["norm"]["weight"].shape[0]
    return shapes | {"embed_tokens": {"weight": jax.ShapeDtypeStruct(size, jnp.float32)}}


def write_head(
    directory: str | Path,
    fields: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    overwrite: bool,
    file: str | None = None,
) -> None:
    """Writes a head; the directory appears only when it is complete.

    Args:
      directory: as a user gave it.
      fields: of its config.json.
      tensors: names and values; asked for in the first process alone.
      overwrite: whether a directory may be there.
      file: name of the one file of tensors; None is safetensors in shards.

    Raises:
      UserError: for a directory that exists, unless it may be overwritten.
    """
    path = Path(directory).expanduser().resolve()
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists; choose another directory")
    with new_directory(path, overwrite=overwrite) as scratch:
        if jax.process_index() == 0:
            if file is None:
                write_sharded(scratch, tensors)
            else:
                (written,) = write_sharded(scratch, tensors, max_shard_bytes=2**63)
                written.rename(scratch / file)
            write_json(scratch / "config.json", fields)
