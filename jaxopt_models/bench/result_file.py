"""Result files that benches go on with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxopt_models.errors import UserError


def read_results(file: Path, keys: Sequence[str], option: str) -> dict[str, Any]:
    """What a bench wrote before.

    Args:
      file: that is there.
      keys: that it has to have.
      option: of the command, which names another file.

    Raises:
      UserError: if it cannot be read or lacks a key.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found | {key: found[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} exists and holds no results of this bench; choose another {option}"
        ) from error
