"""Rows of one protocol in one file, which is rewritten whole whenever a row is added."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxopt_models.bench.peer import circumstances
from jaxopt_models.bench.quality_results import device
from jaxopt_models.bench.result_file import read_results
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.settings import first_difference


class ResultRows:
    """What is measured already, and where it is kept."""

    def __init__(self, file: Path | None, protocol: dict[str, Any], keys: Sequence[str]) -> None:
        """Goes on with what the file holds.

        Args:
          file: .json; None keeps everything in memory.
          protocol: what figures depend on.
          keys: that tell rows apart, and order them.

        Raises:
          UserError: if the file holds something else, or figures of another protocol or device.
        """
        self.file, self.keys = file, tuple(keys)
        # As it is read back, so that both compare.
        self.protocol = json.loads(json.dumps(protocol))
        self.rows: list[dict[str, Any]] = []
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        before = read_results(file, ("protocol", "rows", "device"), "--json")
        theirs, self.rows, where = before["protocol"], before["rows"], before["device"]
        key = first_difference(theirs, self.protocol)
        if key is not None:
            raise UserError(
                f"{file} holds rows with another {key} ({theirs.get(key)}, now "
                f"{self.protocol.get(key)}), which do not compare; choose another --json"
            )
        if where != device():
            raise UserError(
                f"{file} holds figures of {where}, and this is {device()}; choose another --json"
            )

    def has(self, *values: Any) -> bool:
        """Whether the row with these values of the keys is measured."""
        return any(self._of(row) == values for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Saves a row."""
        self.rows.append(row)
        self.rows.sort(key=self._of)
        if self.file is not None:
            write_json(self.file, self.document())

    def document(self) -> dict[str, Any]:
        """The file's content."""
        return {"protocol": self.protocol} | circumstances({}) | {"rows": self.rows}

    def _of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in self.keys)
