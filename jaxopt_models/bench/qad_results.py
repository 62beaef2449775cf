"""The result file of the QAD bench: protocol, rows, and the table that people read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxopt_models.bench.peer import circumstances
from jaxopt_models.bench.quality_results import device
from jaxopt_models.bench.result_file import read_results
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.report import empty_table
from jaxopt_models.train.checkpoints import first_difference


class QadResults:
    """Rows in one file, which is rewritten whole whenever a row is added."""

    def __init__(self, file: Path | None, protocol: dict[str, Any]) -> None:
        """Goes on with what the file holds; None keeps everything in memory.

        Raises:
          UserError: if the file holds something else, or figures of another protocol or device.
        """
        self.file = file
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

    def has(self, recipe: str, seed: int) -> bool:
        """Whether that row is measured."""
        return any((row["recipe"], row["seed"]) == (recipe, seed) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Saves a row."""
        self.rows.append(row)
        self.rows.sort(key=lambda row: (row["recipe"], row["seed"]))
        if self.file is not None:
            write_json(self.file, self.document())

    def document(self) -> dict[str, Any]:
        """The file's content."""
        return {"protocol": self.protocol} | circumstances({}) | {"rows": self.rows}


def row_line(row: dict[str, Any]) -> str:
    """A row as a sentence, for those who watch."""
    return (
        f"{_name(row)}, seed {row['seed']}: KL {row['kl_ptq']:.4f} after PTQ, "
        f"{row['kl_qat']:.4f} after QAT, {row['kl_qad']:.4f} after QAD of "
        f"{row['train_tokens']:,} tokens; QAD recovers {row['kl_recovered']:.0%} of KL and "
        f"{row['ppl_recovered']:.0%} of perplexity; {row['minutes']:.1f} min"
    )


def _name(row: dict[str, Any]) -> str:
    """The format, and what training began with if that is not the recipe itself."""
    begin = row["begin"]
    return row["format"] + ("" if begin == row["recipe"] else f" from {begin}")


def qad_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Figures before and after, a row for each recipe and seed."""
    table = empty_table(
        "quantization-aware training and distillation",
        "back: share of what PTQ lost that QAD recovers",
    )
    table.add_column("format", overflow="fold")
    stages = [f"{name} {stage}" for name in ("ppl", "KL") for stage in ("PTQ", "QAT", "QAD")]
    for column in ("seed", "ppl", *stages, "KL back", "ppl back", "min"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            _name(row),
            str(row["seed"]),
            *(f"{row[f'ppl_{stage}']:.2f}" for stage in ("teacher", "ptq", "qat", "qad")),
            *(f"{row[f'kl_{stage}']:.4f}" for stage in ("ptq", "qat", "qad")),
            f"{row['kl_recovered']:.0%}",
            f"{row['ppl_recovered']:.0%}",
            f"{row['minutes']:.1f}",
        )
    return table
