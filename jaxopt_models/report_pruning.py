"""What people see of pruning: the candidates, what was measured, and files of both."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxopt_models.files import write_json, write_text
from jaxopt_models.prune.candidates import BASELINE, Candidate
from jaxopt_models.prune.prune_report import Latency, PruneReport, scored_dict
from jaxopt_models.prune.sizes import SHOWN, Unit
from jaxopt_models.report import empty_table, new_report


def candidates_table(report: PruneReport, count: int = 10) -> Table:
    """The best candidates, and the uniform one in any case."""
    assert report.budget is not None  # it is of a search
    table = empty_table(
        f"candidates within {_cost(report.budget, report.unit)} {SHOWN[report.unit][1]}",
        f"{len(report.candidates)} candidates; KL in nats a token, of those measured the longest "
        "the best first",
    )
    timed = report.latency is not None
    taught = any(one.taught is not None for one in report.candidates)
    for column in ("candidate", "keeps"):
        table.add_column(column, justify="left", overflow="fold")
    figures = [SHOWN[report.unit][1], *(["measured"] if timed else []), "windows", "KL", "top-1"]
    figures += ["KL, taught"] if taught else []
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    for place, one in enumerate(report.candidates):
        if place >= count and one.candidate.name != BASELINE:
            continue
        table.add_row(
            one.candidate.name,
            kept_text(one.candidate),
            _cost(one.candidate.cost, report.unit),
            *([_cost(one.measured, report.unit)] if timed else []),
            str(one.windows),
            f"{one.damage.kl:.4f}",
            f"{one.damage.top1_agreement:.3f}",
            *(["-" if one.taught is None else f"{one.taught.kl:.4f}"] if taught else []),
        )
    return table


def _cost(cost: int | None, unit: Unit) -> str:
    if cost is None:
        return "-"
    return f"{cost * SHOWN[unit][0]:,.3f}" if unit == "nanoseconds" else f"{cost:,}"


def kept_text(candidate: Candidate) -> str:
    """ "hidden 512, neurons 512-1024, without layers 3, 7-9" """
    fields = candidate.as_dict()
    parts = [f"{axis} {_range(count, candidate.dropped)}" for axis, count in fields["keep"].items()]
    if candidate.dropped:
        parts.append(f"without layers {_runs(candidate.dropped)}")
    return ", ".join(parts)


def _range(count: int | Sequence[int], dropped: Sequence[int]) -> str:
    """A number, or the least and the most of the layers that stay."""
    if isinstance(count, int):
        return str(count)
    own = [number for i, number in enumerate(count) if i not in dropped]
    return f"{min(own)}-{max(own)}" if min(own) < max(own) else str(own[0])


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours as first-last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def evaluation_table(report: PruneReport) -> Table:
    """Original, pruned and uniform model on text that nothing was chosen by."""
    title = f"on other text, {report.original.positions} positions"
    table = empty_table(title)
    table.add_column("model", justify="left")
    for column in ("perplexity", "KL", "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("original", f"{report.original.perplexity:.3f}", "-", "-")
    rows = [("pruned", report.pruned), (BASELINE, report.uniform)]
    for name, found in rows:
        if found is not None:
            figures = f"{math.exp(found.nll):.3f}", f"{found.kl:.4f}", f"{found.top1_agreement:.3f}"
            table.add_row(name, *figures)
    return table


def totals_line(report: PruneReport) -> str:
    """How much went, what is left, and what that cost."""
    before, after = report.parameters
    parts = [f"{before:,} -> {after:,} parameters ({after / before:.1%})"]
    if report.sparsity:
        zeros = sum(row.sparsity for row in report.sparsity) / len(report.sparsity)
        parts.append(f"{len(report.sparsity)} matrices with {zeros:.1%} zeros on average")
    if report.latency is not None:
        parts.append(_times(report, report.latency))
    parts.append(f"perplexity {report.original.perplexity:.3f} -> {report.pruned.perplexity:.3f}")
    parts.append(f"KL {report.pruned.kl:.4f} nats a token")
    parts.append(f"{sum(report.seconds.values()):.1f} s")
    return ", ".join(parts)


def _times(report: PruneReport, latency: Latency) -> str:
    """Of the original and of what was chosen, as measured and as its parts add up to."""
    chosen = report.candidates[0]
    times = (latency.original, chosen.measured, chosen.candidate.cost)
    before, after, predicted = (_cost(time, report.unit) for time in times)
    missed = ", over the budget, as all finalists are" if chosen.over else ""
    return f"{before} -> {after} ms a step ({predicted} predicted{missed}) on {latency.device}"


def save_report(directory: str | Path, report: PruneReport) -> None:
    """Writes a report as files, in a directory that appears only when complete.

    report.json     the whole report
    candidates.csv  a row for each candidate; absent without a search, as is
    candidates.png  KL of each by its cost

    Raises:
      UserError: if something is there already, or cannot be written.
    """
    from jaxopt_models import plots  # matplotlib is slow to import, and few commands draw

    with new_report(directory) as scratch:
        write_json(scratch / "report.json", report.as_dict())
        if report.candidates:
            write_text(scratch / "candidates.csv", _csv(report))
            figure = plots.candidates_plot(report.candidates, report.unit)
            plots.save_figure(figure, scratch / "candidates.png")


def _csv(report: PruneReport) -> str:
    rows = [scored_dict(one) for one in report.candidates]
    flat = [{k: v for k, v in row.items() if k != "keep"} | row["keep"] for row in rows]
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)))
    table.writeheader()
    for row in flat:
        table.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Of several numbers all, with spaces between them."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
