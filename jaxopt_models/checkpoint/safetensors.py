"""The safetensors file format: 8 bytes of header length, a JSON header, then the tensors' bytes.

The reader maps the file and returns views, so a tensor costs memory only while it is used. The
`safetensors` package's own numpy interface knows neither the 8-bit floats nor their power-of-two
scales, which is why the format is read here, and written by `safetensors_writer`.

Reference: https://huggingface.co/docs/safetensors, section "Format".
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxopt_models.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100_000_000  # the format's own limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class _Tensor:
    """Where one tensor lies: `file[start:stop]`, counted from the beginning of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass
class TensorIndex:
    """The tensors of one checkpoint, over all of its files.

    Attributes:
      path: the file or directory that was opened.
      tensors: where each tensor lies.
    """

    path: Path
    tensors: dict[str, _Tensor]
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self.tensors))

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of a tensor; 8-bit floats and bfloat16 are those of `ml_dtypes`."""
        return self._find(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._find(name).shape

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._find(name).file

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor's bytes in the mapped file; nothing is copied."""
        tensor = self._find(name)
        if tensor.file not in self._maps:
            with tensor.file.open("rb") as file:
                self._maps[tensor.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer = self._maps[tensor.file]
        return np.ndarray(tensor.shape, tensor.dtype, buffer=buffer, offset=tensor.start)

    def _find(self, name: str) -> _Tensor:
        if name not in self.tensors:
            raise UserError(
                f"{self.path}: tensor {name!r} is missing; the checkpoint is incomplete"
            )
        return self.tensors[name]


def open_index(path: str | Path) -> TensorIndex:
    """Opens a `.safetensors` file, or a directory with `model.safetensors` or its sharded form.

    Only headers are read, and they are checked in full: every tensor's bytes lie inside the file,
    touch their neighbours without gap or overlap, and match its shape and dtype.

    Raises:
      UserError: for a missing or damaged file, a shard that the index names but is not there, and
        for directories that hold only pickled weights, which could run code when opened.
    """
    path = Path(path)
    if path.is_dir():
        return TensorIndex(path, _read_directory(path))
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: not a .safetensors file; convert the checkpoint to safetensors first"
        )
    return TensorIndex(path, _read_header(path))


def _read_directory(path: Path) -> dict[str, _Tensor]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return _read_header(single)
    if index.exists():
        return _read_shards(index)
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise UserError(
            f"{path / pickles[0]}: pickled weights are not read because opening them can run code; "
            "convert the checkpoint to safetensors first"
        )
    raise UserError(
        f"{path}: holds neither model.safetensors nor model.safetensors.index.json; "
        "give a directory that has one of them"
    )


def _read_shards(index: Path) -> dict[str, _Tensor]:
    """Tensors of all shards; the index and the shards' own headers must agree on who holds what."""
    weight_map = _parse_json(index, index.read_bytes(), "it").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no 'weight_map'; download the file again")
    tensors: dict[str, _Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if file.name != shard:
            raise UserError(f"{index}: names {shard!r}, which lies outside its directory; fix it")
        if not file.exists():
            raise UserError(f"{file}: listed in {index.name} but missing; download it")
        for name, tensor in _read_header(file).items():
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{file}: holds tensor {name!r}, which {index.name} does not place there; "
                    "the files are of different checkpoints"
                )
            tensors[name] = tensor
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise UserError(
            f"{index.parent / weight_map[lost[0]]}: tensor {lost[0]!r} is listed in {index.name} "
            "but missing; download the shard again"
        )
    return tensors


def _read_header(path: Path) -> dict[str, _Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(
                f"{path}: truncated or not a safetensors file (its header claims {length} bytes, "
                f"the file has {size}); download it again"
            )
        header = _parse_json(path, file.read(length), "its header")
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _read_entry(path, name, entry, base) for name, entry in header.items()}
    _check_layout(path, tensors, base, size)
    return tensors


def _parse_json(path: Path, text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:  # JSON and UTF-8 errors are both ValueErrors
        raise UserError(f"{path}: {what} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} is not a JSON object; download it again")
    return value


def _read_entry(path: Path, name: str, entry: Any, base: int) -> _Tensor:
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("sizes and offsets are natural numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: tensor {name!r} has a malformed header entry; download it again"
        ) from error
    if code not in DTYPES:
        raise UserError(
            f"{path}: tensor {name!r} has dtype {code!r}; supported are {', '.join(DTYPES)}"
        )
    dtype = DTYPES[code]
    expected = math.prod(shape) * dtype.itemsize
    if stop - start != expected:
        raise UserError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {code} needs {expected} "
            f"bytes but its offsets span {stop - start}; download the file again"
        )
    return _Tensor(path, dtype, shape, base + start, base + stop)


def _check_layout(path: Path, tensors: Mapping[str, _Tensor], base: int, size: int) -> None:
    end = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.stop > size:
            raise UserError(
                f"{path}: truncated: tensor {name!r} ends at byte {tensor.stop} but the file has "
                f"{size}; download it again"
            )
        if tensor.start != end:
            problem = "overlaps its neighbour" if tensor.start < end else "leaves a gap before it"
            raise UserError(f"{path}: tensor {name!r} {problem}; download the file again")
        end = tensor.stop
    if end != size:
        raise UserError(f"{path}: {size - end} bytes belong to no tensor; download the file again")
