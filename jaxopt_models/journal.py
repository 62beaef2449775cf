"""A run's finished pieces of work, a JSON line each, so that a killed run goes on behind them.

The first line says what the run is. A line that a kill has cut in half is forgotten.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxopt_models.errors import UserError


class Journal:
    """The entries of one run, in memory and on disk.

    Args:
      path: goes on with it if it is there.
      run: JSON values that equal runs have in common.

    Attributes:
      entries: JSON values, those that were found and those that were added.

    Raises:
      UserError: if the file is of another run, is no journal or cannot be written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]):
        self.path, self._run = path, json.loads(json.dumps(run))
        self.entries: list[Any] = []
        try:
            lines = _complete_lines(path)
        except OSError as error:
            raise UserError(f"cannot use {path}: {error.strerror}") from error
        if lines:
            self._read(lines)

    def _read(self, lines: list[str]) -> None:
        try:
            header, *self.entries = [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{self.path} is damaged ({error}); remove it to begin anew") from error
        self._check(header)

    def _check(self, header: Any) -> None:
        if not isinstance(header, dict) or header.keys() != self._run.keys():
            raise UserError(f"{self.path} is not of such a run; remove it or name another file")
        for key, value in self._run.items():
            if header[key] != value:
                raise UserError(
                    f"{self.path} was begun with another {key}; go on with the same, or remove the "
                    "file to begin anew"
                )

    def append(self, entries: Iterable[Any]) -> None:
        """Adds entries, on disk first; the file is made with the first of them."""
        added = list(entries)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                lines = added if file.tell() else [self._run, *added]
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.entries += added

    def remove(self) -> None:
        """Removes the file, once the run has what it was for."""
        self.path.unlink()


def _complete_lines(path: Path) -> list[str]:
    """The file's lines, after a last one without its end has been cut off."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    if len(complete) < len(whole):
        with path.open("r+b") as file:
            file.truncate(len(complete))
    return complete.decode("utf-8", "replace").splitlines()
