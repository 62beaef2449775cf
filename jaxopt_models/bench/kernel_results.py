"""The result file of the kernel bench: ceilings, rows, and the table that people read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxopt_models.bench.quality_results import device, today
from jaxopt_models.bench.result_file import read_results
from jaxopt_models.checkpoint.native import package_version
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.report import empty_table

_PACKAGES = ("jaxopt-models", "jax", "jaxlib")


class KernelResults:
    """Ceilings and rows in one file, which is rewritten whole whenever a row is added.

    A file that is there is gone on with: a row takes the place of the earlier one for the same
    kernel, format and sizes, peers' figures stay until they are measured again, and a ceiling is
    the highest rate that was ever measured.

    Attributes:
      ceilings: `{read_tb_s, bf16_tflops, fp8_tflops, int8_tops}`.
      least_us: time of a kernel that does next to nothing, the least ever measured; None before.
      rows: see `bench_kernels`.
      failures: `{op, kernel, format, M, K, N, reason}`, a row for each product that was not timed.
      peers: `{python, versions, device, skipped}` of the last run.
    """

    def __init__(self, file: Path | None) -> None:
        """Goes on with what the file holds; None keeps everything in memory.

        Raises:
          UserError: if the file holds something else, or figures of another device.
        """
        self.file = file
        self.ceilings: dict[str, float] = {}
        self.least_us: float | None = None
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.peers: dict[str, Any] = {}
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        before = read_results(file, ("ceilings", "rows", "failures", "device"), "--json")
        self.ceilings, self.rows = before["ceilings"], before["rows"]
        self.failures, where = before["failures"], before["device"]
        self.least_us = before.get("least_us")
        if where != device():
            raise UserError(
                f"{file} holds figures of {where}, and this is {device()}; choose another --json"
            )

    def raise_ceilings(self, measured: dict[str, float]) -> None:
        """Takes in rates that are higher than those known."""
        for name, value in measured.items():
            self.ceilings[name] = max(value, self.ceilings.get(name, 0.0))

    def lower_least(self, us: float) -> None:
        """Takes in a time that is less than the one known."""
        self.least_us = us if self.least_us is None else min(us, self.least_us)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Saves a row, beside what is known of peers: of the row whose place it takes."""
        known = [kept["peers"] for kept in self.rows if _identity(kept) == _identity(row)]
        figures = known[0] if known else {}
        row = row | best_peer(figures) | {"peers": figures}
        self._forget(row)
        self.rows.append(row)
        self.rows.sort(key=_identity)
        self.save()
        return row

    def set_beside(
        self, form: str, n: int, k: int, figures: dict[int, dict[str, dict[str, Any]]]
    ) -> None:
        """Saves what peers take for a weight, by M and name; bf16 is beside every format."""
        for row in self.rows:
            if (row["N"], row["K"]) == (n, k) and form in ("bf16", row["format"]):
                row["peers"] = row["peers"] | figures.get(row["M"], {})
                row |= best_peer(row["peers"])
        self.save()

    def fail(self, failure: dict[str, Any]) -> None:
        """Saves that a product could not be timed, and why."""
        self._forget(failure)
        self.failures.append(failure)
        self.save()

    def _forget(self, row: dict[str, Any]) -> None:
        same = _identity(row)
        self.rows = [kept for kept in self.rows if _identity(kept) != same]
        self.failures = [kept for kept in self.failures if _identity(kept) != same]

    def save(self) -> None:
        """Writes the file, if there is to be one."""
        if self.file is not None:
            write_json(self.file, self.document())

    def document(self) -> dict[str, Any]:
        """The file's content: fractions are of the ceilings as they are now."""
        for row in self.rows:
            row |= fractions(row, self.ceilings)
        return {
            "ceilings": self.ceilings,
            "least_us": self.least_us,
            "rows": self.rows,
            "failures": self.failures,
            "device": device(),
            "versions": {name: package_version(name) for name in _PACKAGES},
            "peers": self.peers,
            "date": today(),
        }


def fractions(row: dict[str, Any], ceilings: dict[str, float]) -> dict[str, float | None]:
    """Which part of the time reading the weight would take, and multiplying at the full rate.

    The latter is None if that rate could not be measured.
    """
    flops, rate = 2 * row["M"] * row["K"] * row["N"], ceilings.get(row["rate"])
    return {
        "read_fraction": row["weight_bytes"] / ceilings["read_tb_s"] / 1e6 / row["us"],
        "flop_fraction": rate and flops / rate / 1e6 / row["us"],
    }


def best_peer(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`{best_peer, best_peer_us}` of those that were timed; None where none was."""
    timed = {name: found["us"] for name, found in figures.items() if "us" in found}
    best = min(timed, key=lambda name: timed[name], default=None)
    return {"best_peer": best, "best_peer_us": timed[best] if best is not None else None}


def row_line(row: dict[str, Any], ceilings: dict[str, float]) -> str:
    """A row as a sentence, for those who watch."""
    found = fractions(row, ceilings)
    line = (
        f"{row['op']} {row['format']} {row['N']} x {row['K']}, M = {row['M']}: {row['us']:.1f} us, "
        f"{_percent(found['read_fraction'])} of reading, "
        f"{_percent(found['flop_fraction'])} of multiplying, "
        f"{row['bf16_us'] / row['us']:.2f} x XLA's bfloat16"
    )
    if row["best_peer"] is None:
        return line
    ratio = row["us"] / row["best_peer_us"]
    return line + f"; {row['best_peer']} {row['best_peer_us']:.1f} us, ours takes {ratio:.2f} of it"


def kernel_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ours beside XLA, the best peer and the limits, a row for each product."""
    table = empty_table(
        "kernels, microseconds",
        "read, flop: part of the time that reading the weight, or multiplying at the "
        "highest rate, would take; x: our time over the peer's",
    )
    table.add_column("op", no_wrap=True)
    for column in ("N x K", "M", "us", "read", "flop", "bf16", "peer", "x"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("best peer", overflow="fold")
    for row in rows:
        peer = row["best_peer_us"]
        table.add_row(
            f"{row['op']} {row['format']}",
            f"{row['N']} x {row['K']}",
            str(row["M"]),
            f"{row['us']:.1f}",
            _percent(row["read_fraction"]),
            _percent(row["flop_fraction"]),
            f"{row['bf16_us']:.1f}",
            "-" if peer is None else f"{peer:.1f}",
            "-" if peer is None else f"{row['us'] / peer:.2f}",
            row["best_peer"] or "-",
        )
    return table


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("op", "kernel", "format", "N", "K", "M"))
