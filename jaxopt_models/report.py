"""What people see: tables and progress on the terminal, metrics as JSON files."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxopt_models.checkpoint.atomic import new_directory
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import Metrics
from jaxopt_models.files import write_json, write_text
from jaxopt_models.progress import Description
from jaxopt_models.quantize.layer import TensorReport
from jaxopt_models.quantize.mixture import Scores
from jaxopt_models.quantize.options import Choice
from jaxopt_models.quantize.ptq import Report

out = Console()
err = Console(stderr=True)


def progress(items: Iterable[Any], description: Description) -> Iterable[Any]:
    """A bar with the time left on standard error; nothing where that is not a terminal."""
    items = list(items)

    def now() -> str:
        return description() if callable(description) else description

    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(now(), total=len(items))
        for item in items:
            yield item
            bar.update(task, advance=1, description=now())


def say(line: str) -> None:
    """A line on standard output as it is, whatever the terminal's width."""
    out.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner for a step of unknown length."""
    with err.status(what):
        yield


@contextmanager
def new_report(directory: str | Path) -> Iterator[Path]:
    """A directory for the files of a report, which appears under its name when complete.

    Raises:
      UserError: if something is there already, or cannot be written.
    """
    target = Path(directory).expanduser().resolve()
    if target.exists():
        raise UserError(f"{directory} exists already; choose another directory or remove it")
    try:
        with new_directory(target) as scratch:
            yield scratch
    except OSError as error:
        raise UserError(f"cannot write the report {target}: {error.strerror}") from error


def save_report(directory: str | Path, report: Report) -> None:
    """Writes what `quantize` reported as files, in a directory that appears only when complete.

    report.json  the whole report
    tensors.csv  a row for each tensor; its columns are the fields of `TensorReport`
    errors.png   heat map of output errors, of weight errors without calibration text; absent where
                 no decoder layer was quantized

    Raises:
      UserError: if something is there already, or cannot be written.
    """
    from jaxopt_models import plots  # matplotlib is slow to import, and few commands draw

    inside = [row for row in report.tensors if row.path.startswith("layers/")]
    known = any(row.output_error is not None for row in inside)
    with new_report(directory) as scratch:
        write_json(scratch / "report.json", report.as_dict())
        write_text(scratch / "tensors.csv", _csv(report.tensors))
        if inside:
            figure = plots.error_heat_map(report, "output_error" if known else "weight_error")
            plots.save_figure(figure, scratch / "errors.png")


def _csv(rows: Sequence[TensorReport]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(TensorReport)])
    table.writeheader()
    for row in rows:
        table.writerow(asdict(row) | {"shape": "x".join(map(str, row.shape))})
    return text.getvalue()


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
    """The tensors with the largest relative error, of the product where text was read."""
    with_text = any(row.output_error is not None for row in report.tensors)
    kind = "output" if with_text else "weight"
    columns = ("format", "bits", "weight error", "output error")
    table = _table(f"largest {kind} errors", "tensor", columns)
    worst = sorted(report.tensors, key=lambda row: getattr(row, f"{kind}_error") or 0, reverse=True)
    for row in worst[:count]:
        errors = (f"{row.weight_error:.4f}", _or_dash(row.output_error, ".4f"))
        table.add_row(row.path, row.format, f"{row.bits:.3f}", *errors)
    return table


def totals_line(report: Report) -> str:
    """How much was quantized, to what size, how long it took, and from which seeds."""
    parts = [
        f"{len(report.tensors)} tensors",
        f"{report.bits_per_weight:.3f} bits a weight",
        f"{report.calibration_seconds:.1f} s calibration",
        f"{report.quantization_seconds:.1f} s quantization",
    ]
    seeds = ", ".join(f"{name} {seed}" for name, seed in report.seeds.items())
    return ", ".join(parts) + (f", seeds: {seeds}" if seeds else "")


def mixture_table(scores: Scores, choice: Choice) -> Table:
    """What a choice gives to each candidate."""
    table = _table("mixture", "candidate", ("groups", "weights", "predicted KL"))
    weights = sum(group.weights for group in scores.groups)
    for name in scores.candidates:
        picked = zip(scores.groups, choice.picks, strict=True)
        mine = [group for group, pick in picked if pick == name]
        options = [option for g in mine for option in g.options if option.candidate == name]
        table.add_row(
            name,
            str(len(mine)),
            f"{sum(group.weights for group in mine) / weights:.1%}",
            f"{sum(option.score for option in options):.4f}",
        )
    return table


def mixture_line(choice: Choice) -> str:
    """What a choice costs, and what it is expected to."""
    parts = [f"{choice.bits:.4f} bits a weight", f"{choice.bytes / 2**20:.2f} MiB"]
    parts += [f"{choice.latency * 1e3:.3f} ms"] if choice.latency is not None else []
    parts += [f"cache {choice.kv_cache.format}"] if choice.kv_cache else []
    return f"{', '.join(parts)}, predicted KL {choice.score:.4f} nats a token"


def empty_table(title: str, caption: str | None = None) -> Table:
    """A table as all of ours look; columns and rows are the caller's."""
    return Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )


def _table(title: str, name: str, columns: Sequence[str]) -> Table:
    """An empty table: names on the left, figures on the right."""
    table = empty_table(title)
    table.add_column(name, justify="left", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
