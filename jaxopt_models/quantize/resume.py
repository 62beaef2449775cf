"""Layers that are done, on disk, so that a killed run goes on where it stopped.

DIR/run.json            what makes the run: a digest of recipe, architecture and text
DIR/layer_0007.npz      arrays of a finished layer
DIR/layer_0007.json     written last: its structure, its rows, a checksum of what it came from
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.checkpoint import leaf_kinds
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_arrays
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.quantize.layer import TensorReport
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.tree import checksum, fingerprints


def signature(
    config: ModelConfig, recipe: Recipe, batches: Sequence[np.ndarray], embedding: Any
) -> str:
    """Text that tells one run from another: all that decides about layers but their weights.

    Args:
      batches: the calibration text.
      embedding: arrays that make a residual stream of it.
    """
    return json.dumps(
        {
            "config": config.to_json(),
            "recipe": recipe.model_dump(mode="json"),
            "text": fingerprints(batches),
            "embedding": checksum(jax.tree.leaves(embedding)) if batches else None,
            "jax": jax.__version__,
        },
        sort_keys=True,
    )


class LayerStore:
    """Finished layers of one run.

    Args:
      directory: made if it does not exist.
      signature: text that is equal for equal runs.

    Raises:
      UserError: if the directory belongs to another run or cannot be written.
    """

    def __init__(self, directory: Path, signature: str):
        self.directory = Path(directory).expanduser().resolve()
        digest = sha256(signature.encode()).hexdigest()
        marker = self.directory / "run.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if marker.exists():
                self._check(marker, digest)
            elif any(not file.name.startswith(".") for file in self.directory.iterdir()):
                raise UserError(f"{self.directory}: holds other files; choose an empty directory")
            else:
                _write(marker, json.dumps({"run": digest}).encode())
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be used ({error.strerror})") from error

    def _check(self, marker: Path, digest: str) -> None:
        try:
            found = json.loads(marker.read_text())["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{marker}: damaged; remove {self.directory}") from error
        if found != digest:
            raise UserError(
                f"{self.directory}: belongs to another model, recipe or calibration text; "
                "choose another directory, or remove it to start anew"
            )

    def get(self, index: int, source: Any) -> tuple[Any, list[TensorReport]] | None:
        """A finished layer and its rows; None if it is not there yet.

        Raises:
          UserError: if it was made of other weights than `source`, or is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            entry = json.loads(path.read_text())
            with path.with_suffix(".npz").open("rb") as raw, np.load(raw) as file:
                flat = [file[str(i)] for i in range(len(file.files))]
            if checksum(flat) != entry["arrays"]:
                raise ValueError("its arrays have another checksum")
            abstract = leaf_kinds.build(entry["layer"])
            like, structure = jax.tree.flatten(abstract)
            arrays = [_viewed(a, s) for a, s in zip(flat, like, strict=True)]
            rows = [TensorReport(**row | {"shape": tuple(row["shape"])}) for row in entry["rows"]]
        except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile) as error:
            raise UserError(f"{path}: damaged ({error}); remove {self.directory}") from error
        if entry["source"] != checksum(jax.tree.leaves(source)):
            raise UserError(
                f"{path}: was made of other weights; remove {self.directory} to start anew"
            )
        return jax.tree.unflatten(structure, [jnp.asarray(a) for a in arrays]), rows

    def put(self, index: int, source: Any, layer: Any, rows: Sequence[TensorReport]) -> None:
        """Keeps a finished layer; it counts only when its last byte is written."""
        path = self._path(index)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), layer)
        flat = [_raw(a) for a in jax.tree.leaves(layer)]
        entry = {
            "layer": leaf_kinds.describe(shapes),
            "rows": [asdict(row) for row in rows],
            "source": checksum(jax.tree.leaves(source)),
            "arrays": checksum(flat),
        }
        write_arrays(path.with_suffix(".npz"), {str(i): array for i, array in enumerate(flat)})
        _write(path, json.dumps(entry).encode())

    def _path(self, index: int) -> Path:
        return self.directory / f"layer_{index:04d}.json"


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    scratch.write_bytes(data)
    scratch.replace(path)


def _raw(array: Any) -> np.ndarray:
    """Bytes of an array, since NumPy's files do not know all dtypes: uint8 [bytes]."""
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def _viewed(raw: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
    return raw.view(like.dtype).reshape(like.shape)
