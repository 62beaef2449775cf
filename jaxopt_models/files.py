"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_models.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
      UserError: if the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
      UserError: if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes an .npz file whole or not at all."""
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
