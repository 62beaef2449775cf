"""The result files of the quality bench: protocol, rows, and the table that people read."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from jaxopt_models.bench.result_file import read_results
from jaxopt_models.checkpoint.native import package_version
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.report import empty_table
from kernels_pallas.tuning import slug

# What decides whether two figures compare.
_DECISIVE = ("calibration_text", "evaluation_text", "windows", "length")


def results_file(out: Path, model: str, models: int) -> Path:
    """Where a model's rows go: `out` itself if it is a .json file, else a file in it.

    Raises:
      UserError: for one file and several models, or if the directory cannot be made.
    """
    if out.suffix == ".json":
        if models > 1:
            raise UserError(f"{out} is one file, and there are {models} models; name a directory")
        file = out
    else:
        file = out / f"quality_{Path(model).name.split('-')[0]}.json"
    return _in_directory(file)


def device_file(out: Path, what: str) -> Path:
    """Where figures of this device go: `out` if it is a .json file, else `<what>_<device>.json` in
    it.

    Raises:
      UserError: if the directory cannot be made.
    """
    name = slug(jax.devices()[0].device_kind)
    return _in_directory(out if out.suffix == ".json" else out / f"{what}_{name}.json")


def _in_directory(file: Path) -> Path:
    """The file, its directory made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {file.parent}: {error.strerror}") from error
    return file


class Results:
    """The rows in one file, which is rewritten whole whenever a row is added."""

    def __init__(self, file: Path, protocol: dict[str, Any]) -> None:
        """Goes on with what the file holds.

        Raises:
          UserError: the file holds something else, or rows measured under another protocol.
        """
        self.file = file
        self.protocol = protocol
        self.teachers: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        if file.exists():
            self._read()

    def _read(self) -> None:
        keys = "protocol", "teachers", "rows"
        before = read_results(self.file, keys, "--out")
        protocol, self.teachers, self.rows = (before[key] for key in keys)
        for key in _DECISIVE:
            if protocol.get(key) != self.protocol[key]:
                raise UserError(
                    f"{self.file} holds rows with another {key} ({protocol.get(key)}, now "
                    f"{self.protocol[key]}), which do not compare; choose another --out"
                )

    def add(self, row: dict[str, Any]) -> None:
        """Saves a row in place of that of the same model, recipe and device, if there is one."""
        self.rows = [kept for kept in self.rows if _identity(kept) != _identity(row)] + [row]
        self.rows.sort(key=_identity)
        write_json(self.file, self._document())

    def _document(self) -> dict[str, Any]:
        packages = ("jaxopt-models", "jax", "jaxlib", "numpy")
        versions = {name: package_version(name) for name in packages}
        return {
            "protocol": self.protocol,
            "versions": versions | {"python": platform.python_version()},
            "device": device(),
            "date": today(),
            "teachers": self.teachers,
            "rows": self.rows,
        }


def device() -> str:
    """What this process measures on."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{platform.machine()}, {os.cpu_count()} cores, cpu"
    return f"{len(devices)} x {devices[0].device_kind}"


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def quality_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ours beside the reference's, where there is one, a row for each model and recipe."""
    table = empty_table(
        "quality, ours beside the reference's",
        "s: calibration and quantization; x: ours over theirs; *: the reference has no "
        "such configuration, this is its best of the format",
    )
    table.add_column("recipe", overflow="fold")
    figures = ("bits", "ppl", "top-1", "KL", "theirs", "x", "s", "theirs", "x", "MiB")
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    model = None
    for row in rows:
        if row["model"] != model:
            model = row["model"]
            table.add_row(f"[bold]{model}")
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    theirs = row["reference"] or {}
    star = "*" if theirs.get("best_of_format") else ""
    return [
        row["recipe"],
        f"{row['bits_per_weight']:.2f}",
        f"{row['ppl']:.4g}",
        f"{row['top1']:.3f}",
        f"{row['kl']:.4f}",
        _or_dash(theirs.get("kl"), ".4f") + star,
        _or_dash(row["ratio_kl"], ".2f"),
        f"{row['calib_seconds']:.0f}",
        _or_dash(theirs.get("calib_seconds"), ".0f"),
        _or_dash(row["ratio_seconds"], ".2f"),
        _or_dash(row["peak_bytes"] and row["peak_bytes"] / 2**20, ".0f"),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _identity(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["recipe"], row["device"]
