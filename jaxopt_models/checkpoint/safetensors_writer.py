"""Writes safetensors files: tensors one at a time, in shards that appear when all are complete."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_models.checkpoint.safetensors import DTYPES
from jaxopt_models.errors import UserError

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_sharded(
    directory: str | Path,
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    max_shard_bytes: int = 5 * 2**30,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes `model.safetensors`, or numbered shards with `model.safetensors.index.json`.

    Tensors are taken one at a time, so a generator that computes them needs memory for one. A shard
    is closed when the next tensor would exceed `max_shard_bytes`; a larger tensor gets a shard of
    its own. The files appear under their names only once all of them are complete.

    Args:
      directory: created if it does not exist; must not hold weights yet.
      tensors: names with arrays, of numpy or JAX.
      metadata: the header's `__metadata__`; readers of torch checkpoints expect the default.

    Returns:
      The files written, the index last.

    Raises:
      UserError: for a name that occurs twice and for dtypes that the format lacks (4-bit types:
        pack them into uint8), and when the directory already holds weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    old = next(directory.glob("model*.safetensors*"), None)
    if old is not None:
        raise UserError(f"{old}: already exists; write into a new directory")
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    pairs: Iterable[Any] = tensors.items() if isinstance(tensors, Mapping) else tensors
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
        parts, placed, total = _write_parts(Path(scratch), pairs, max_shard_bytes, metadata)
        names = _shard_names(len(parts))
        if len(parts) > 1:
            index = Path(scratch, "index")
            weight_map = {name: names[part] for name, part in sorted(placed.items())}
            text = {"metadata": {"total_size": total}, "weight_map": weight_map}
            index.write_text(json.dumps(text, indent=2) + "\n")
            parts, names = [*parts, index], [*names, "model.safetensors.index.json"]
        return [part.replace(directory / name) for part, name in zip(parts, names, strict=True)]


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_parts(
    scratch: Path,
    pairs: Iterable[tuple[str, Any]],
    max_shard_bytes: int,
    metadata: dict[str, str],
) -> tuple[list[Path], dict[str, int], int]:
    """Writes shards `0, 1, ...`; returns the files, each tensor's shard and the bytes of data."""
    parts: list[Path] = []
    placed: dict[str, int] = {}
    total = 0
    shard = _Shard(scratch)

    def close() -> None:
        parts.append(scratch / str(len(parts)))
        shard.write(parts[-1], metadata)

    for name, value in pairs:
        array = np.asarray(value)
        if name in placed:
            raise UserError(f"tensor {name!r} would be written twice; give each leaf its own name")
        if shard.nbytes and shard.nbytes + array.nbytes > max_shard_bytes:
            close()
            shard = _Shard(scratch)
        shard.add(name, array)
        placed[name] = len(parts)
        total += array.nbytes
    close()
    return parts, placed, total


class _Shard:
    """A file in the making, whose header is known only once the last tensor has come.

    Data wait in one file for each item size, and the widest types go first: so every tensor starts
    at a multiple of its item size, which torch needs to map it.
    """

    def __init__(self, scratch: Path):
        self.nbytes = 0
        self._spools = {size: scratch / f"spool-{size}" for size in (8, 4, 2, 1)}
        self._entries: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {
            size: {} for size in self._spools
        }

    def add(self, name: str, array: np.ndarray) -> None:
        if array.dtype not in _CODES:
            raise UserError(
                f"tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold; "
                "pack it into uint8"
            )
        size = array.dtype.itemsize
        with self._spools[size].open("ab") as spool:
            spool.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._entries[size][name] = (_CODES[array.dtype], array.shape)
        self.nbytes += array.nbytes

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        stop = 0
        for size, entries in self._entries.items():
            for name, (code, shape) in entries.items():
                start, stop = stop, stop + math.prod(shape) * size
                header[name] = {"dtype": code, "shape": shape, "data_offsets": (start, stop)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for size in (size for size, entries in self._entries.items() if entries):
                with self._spools[size].open("rb") as spool:
                    shutil.copyfileobj(spool, file, 2**24)
                self._spools[size].unlink()
