"""The GGUF file format: metadata, a table of tensors, then their bytes, many of them quantized.

Only the container is read here; dequantization is that of the `gguf` package. That package has a
reader as well, but it makes a numpy array of every string: half a minute for a large vocabulary.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxopt_models.errors import UserError

# Metadata value types by their number in the file.
_SCALARS = dict(enumerate("u1 i1 u2 i2 u4 i4 f4 ?".split())) | {10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9
_TYPES = frozenset("F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split())
_FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CHUNK = 2**22  # elements dequantized at a time


@dataclass(frozen=True)
class _Tensor:
    """Number of a tensor's type, shape with the contiguous axis last, place of the first byte."""

    type: int
    shape: tuple[int, ...]
    start: int


class GgufFile:
    """A memory-mapped GGUF file.

    Attributes:
      path: of the file.
      metadata: values by key; arrays of numbers are numpy arrays, arrays of strings are lists.
    """

    def __init__(self, path: str | Path):
        """Reads metadata and the table of tensors.

        Raises:
          UserError: for a file that is missing, truncated or not GGUF of version 2 or 3.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; check the path")
        if self.path.stat().st_size < 24:
            raise UserError(f"{path}: truncated or not a GGUF file; download it again")
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._check_magic()
        try:
            self.metadata, self._tensors = _Cursor(self._data).contents()
        except (struct.error, ValueError, LookupError, OverflowError) as error:
            raise UserError(
                f"{path}: truncated or damaged GGUF file ({error}); download it again"
            ) from error

    def _check_magic(self) -> None:
        magic, version = struct.unpack_from("<4sI", self._data)
        if magic != b"GGUF":
            raise UserError(f"{self.path}: not a GGUF file; check the path")
        if version not in (2, 3):
            raise UserError(
                f"{self.path}: GGUF version {version} (or byte order) is not supported; "
                "convert the model again with a current llama.cpp"
            )

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, rows first."""
        return self._find(name).shape

    def type_name(self, name: str) -> str:
        """How a tensor is stored, such as "Q4_K"."""
        from gguf import GGMLQuantizationType

        number = self._find(name).type
        known = number in GGMLQuantizationType
        return GGMLQuantizationType(number).name if known else f"number {number}"

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """A tensor, dequantized in float32 and cast to `dtype`.

        One that is stored in `dtype` is a read-only view of the mapped file; nothing is copied.

        Raises:
          UserError: for a type that is not supported and for data beyond the end of the file.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        tensor, stored = self._find(name), self.type_name(name)
        if stored not in _TYPES:
            raise UserError(
                f"{self.path}: tensor {name!r} has type {stored}; supported are "
                f"{', '.join(sorted(_TYPES))}; take another quantization of the model"
            )
        type_number = GGMLQuantizationType(tensor.type)
        block, block_bytes = GGML_QUANT_SIZES[type_number]
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        row_bytes = columns // block * block_bytes
        if columns % block or tensor.start + rows * row_bytes > len(self._data):
            raise UserError(f"{self.path}: tensor {name!r} is truncated; download the file again")
        data = np.ndarray((rows, row_bytes), np.uint8, buffer=self._data, offset=tensor.start)
        if _FLOATS.get(stored) == np.dtype(dtype):
            return data.view(dtype).reshape(tensor.shape)
        out = np.empty((rows, columns), dtype)
        step = max(1, _CHUNK // columns)
        for i in range(0, rows, step):
            out[i : i + step] = quants.dequantize(data[i : i + step], type_number)
        return out.reshape(tensor.shape)

    def _find(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise UserError(
                f"{self.path}: tensor {name!r} is missing; the file is incomplete, or its "
                "architecture is a variant that is not supported"
            )
        return self._tensors[name]


class _Cursor:
    """Walks through the bytes of the header, which is little-endian and unaligned."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 8

    def contents(self) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        tensor_count, key_count = self._number("u8"), self._number("u8")
        metadata = {}
        for _ in range(key_count):
            key = self._string()
            metadata[key] = self._value(self._number("u4"))
        table = [self._tensor() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", 32))
        base = -(-self._at // alignment) * alignment
        tensors = {name: _Tensor(kind, shape, base + at) for name, kind, shape, at in table}
        if len(tensors) < tensor_count:
            raise ValueError("two tensors have the same name")
        return metadata, tensors

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        shape = tuple(self._number("u8") for _ in range(self._number("u4")))
        return name, self._number("u4"), shape[::-1], self._number("u8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(_SCALARS[kind], 1)[0].item()
        item, count = self._number("u4"), self._number("u8")
        if item in _SCALARS:
            return self._numbers(_SCALARS[item], count)
        return [self._value(item) for _ in range(count)]

    def _number(self, dtype: str) -> int:
        return int(self._numbers(dtype, 1)[0])

    def _numbers(self, dtype: str, count: int) -> np.ndarray:
        values = np.frombuffer(self._data, f"<{dtype}", count, self._at)
        self._at += values.nbytes
        return values

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        start = self._at + 8
        self._at = start + length
        if self._at > len(self._data):
            raise ValueError("a string ends beyond the file")
        return self._data[start : self._at].decode()
