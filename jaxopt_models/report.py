"""What people see: tables and progress on the terminal, metrics as JSON files."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import Metrics
from jaxopt_models.quantize.ptq import Report

out = Console()
err = Console(stderr=True)


def progress(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A bar with the time left on standard error; nothing where that is not a terminal."""
    items = list(items)
    return track(items, description, console=err, transient=True, disable=not err.is_terminal)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner for a step of unknown length."""
    with err.status(what):
        yield


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
      UserError: if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def metrics_table(title: str, rows: Sequence[tuple[str, Metrics, float | None]]) -> Table:
    """Format, size, quality and quantization seconds, a row for each model."""
    table = _table(title, "format", ("bits/weight", "MiB", "perplexity", "KL", "top-1", "seconds"))
    for name, metrics, seconds in rows:
        table.add_row(
            name,
            f"{metrics.bits_per_weight:.3f}",
            f"{metrics.bytes / 2**20:.1f}",
            f"{metrics.perplexity:.3f}",
            _or_dash(metrics.kl, ".4f"),
            _or_dash(metrics.top1_agreement, ".3f"),
            _or_dash(seconds, ".1f"),
        )
    return table


def worst_tensors_table(report: Report, count: int = 5) -> Table:
    """The tensors with the largest relative weight error."""
    table = _table("largest weight errors", "tensor", ("format", "bits", "error"))
    worst = sorted(report.tensors, key=lambda row: row.weight_error, reverse=True)
    for row in worst[:count]:
        table.add_row(row.path, row.format, f"{row.bits:.3f}", f"{row.weight_error:.4f}")
    return table


def _table(title: str, name: str, columns: Sequence[str]) -> Table:
    """An empty table: names on the left, figures on the right."""
    table = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column(name, justify="left", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
