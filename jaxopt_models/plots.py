"""Pictures of results, as matplotlib figures; the caller saves or shows them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxopt_models.errors import UserError
from jaxopt_models.prune import sizes
from jaxopt_models.prune.candidates import BASELINE
from jaxopt_models.prune.search import Scored, frontier
from jaxopt_models.quantize.groups import GROUPS
from jaxopt_models.quantize.layer import TensorReport
from jaxopt_models.quantize.options import UNITS, Point, Unit
from jaxopt_models.quantize.ptq import Report

ErrorKind = Literal["output_error", "weight_error"]
_ERRORS: dict[ErrorKind, str] = {
    "output_error": "relative error of the product\n||y - ŷ|| / ||y||",
    "weight_error": "relative error of the weight\n||W - Ŵ|| / ||W||",
}


def pareto_plot(
    points: Sequence[Point], uniform: Mapping[str, Point] | None = None, unit: Unit = "bits"
) -> Figure:
    """Predicted divergence of the best mixtures by what they cost, beside uniform formats.

    Args:
      points: from `Scores.pareto`.
      uniform: from `Scores.uniform`.
      unit: that both were made with.
    """
    figure = _figure()
    axes = figure.add_subplot()
    drawn = _positive(points)
    axes.step(
        [p.cost for p in drawn],
        [p.score for p in drawn],
        where="post",
        marker="o",
        markersize=3,
        label="best mixture",
    )
    for name, point in (uniform or {}).items():
        if point.score > 0:
            axes.scatter([point.cost], [point.score], marker="x", label=f"{name} everywhere")
    axes.set_yscale("log")
    axes.set_title("Mixed precision: what a budget buys")
    axes.set_xlabel(f"cost ({UNITS[unit]})")
    axes.set_ylabel("predicted KL to the original (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def candidates_plot(scored: Sequence[Scored], unit: sizes.Unit = "parameters") -> Figure:
    """Divergence of pruning candidates by what they cost; the line joins those that no other beats
    in both, of those measured on the most text. Others are grey.

    Args:
      scored: from `prune.search.halve`.
      unit: of their costs.
    """
    figure = _figure()
    axes = figure.add_subplot()
    most = max(one.windows for one in scored)
    best, (factor, label) = frontier(scored), sizes.SHOWN[unit]
    axes.step(
        [factor * one.candidate.cost for one in best],
        [one.damage.kl for one in best],
        where="post",
        color="tab:blue",
        label="best within a cost",
    )
    groups = {
        f"measured on {most} windows": [one for one in scored if one.windows == most],
        "measured on fewer": [one for one in scored if one.windows < most],
        BASELINE: [one for one in scored if one.candidate.name == BASELINE],
    }
    colors = ("tab:blue", "lightgrey", "tab:red")
    for (name, some), color in zip(groups.items(), colors, strict=True):
        if some:
            costs = [factor * one.candidate.cost for one in some]
            kls = [one.damage.kl for one in some]
            axes.scatter(costs, kls, label=name, color=color)
    axes.set_yscale("log")
    axes.set_title("Pruning: candidates within a budget")
    axes.set_xlabel(label)
    axes.set_ylabel("KL to the original (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def error_heat_map(
    report: Report | Sequence[TensorReport], value: ErrorKind = "output_error"
) -> Figure:
    """The error of every quantized linear: a row for each kind, a column for each layer up to the
    last that has one.

    Colours are logarithmic. Grey is what was not quantized, or has no such error; no error at all
    has the colour of the smallest. Tensors outside the layers are in the title.

    Args:
      report: what `quantize` returned, or only its rows.
      value: which error; the colour bar defines it. That of the product needs calibration text.

    Raises:
      UserError: if no decoder layer has such an error.
    """
    rows = report.tensors if isinstance(report, Report) else tuple(report)
    linears, table = _by_layer(rows, value)
    if not np.isfinite(table).any():
        raise UserError(
            f"no linear of a decoder layer has a {value} to draw; "
            "quantize with calibration text, or ask for 'weight_error'"
        )
    figure = _figure()
    width, height = max(7.0, 3.0 + 0.25 * table.shape[1]), 2.5 + 0.3 * len(linears)
    figure.set_size_inches(width, height)
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    low, high = _log_range(table)
    image = axes.imshow(
        # A logarithm of zero would be drawn like a missing one.
        np.maximum(table, low),
        norm=LogNorm(low, high),
        cmap="viridis",
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_yticks(range(len(linears)), linears)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_title(_heat_map_title(report, rows, value), fontsize="medium")
    ticks = np.geomspace(low, high, 5).tolist()
    bar = figure.colorbar(image, label=_ERRORS[value], ticks=ticks, format="%.3g")
    bar.minorticks_off()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure whole or not at all, in the format that the file's name ends with.

    Raises:
      UserError: for a format that does not exist, or a file that cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        temporary.replace(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {path}: {error}") from error


def _figure() -> Figure:
    """An empty figure without a window or global state."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _positive(points: Sequence[Point]) -> list[Point]:
    """Those that a logarithmic axis can show: the untouched original has no divergence."""
    return [point for point in points if point.score > 0]


def _by_layer(rows: Sequence[TensorReport], value: ErrorKind) -> tuple[list[str], np.ndarray]:
    """(linears in the order in which a layer uses them, errors [linears, layers] or NaN)."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if not row.path.startswith("layers/"):
            continue
        _, layer, *linear, _ = row.path.split("/")
        error = getattr(row, value)
        found.setdefault("/".join(linear), {})[int(layer)] = np.nan if error is None else error
    linears = [name for group in GROUPS for name in group if name in found]
    count = 1 + max((layer for errors in found.values() for layer in errors), default=-1)
    table = [[found[name].get(layer, np.nan) for layer in range(count)] for name in linears]
    return [_short(name) for name in linears], np.array(table).reshape(len(linears), count)


def _short(linear: str) -> str:
    """How a linear is called on an axis: "q", "experts down"."""
    inside = linear.partition("/")[2]
    return inside.removesuffix("_proj").replace("/", " ")


def _log_range(table: np.ndarray) -> tuple[float, float]:
    """From the smallest error above zero to the largest; never empty."""
    positive = table[np.isfinite(table) & (table > 0)]
    if not positive.size:
        return 1e-8, 1e-7
    low, high = float(positive.min()), float(positive.max())
    return low, max(high, 1.01 * low)


def _heat_map_title(
    report: Report | Sequence[TensorReport], rows: Sequence[TensorReport], value: ErrorKind
) -> str:
    title = value.replace("_", " ")
    if all(row.output_error is None for row in rows):
        title += ", no calibration text"
    if isinstance(report, Report):
        seconds = report.calibration_seconds + report.quantization_seconds
        title = f"{report.recipe}: {title}\n{len(rows)} tensors, "
        title += f"{report.bits_per_weight:.3f} bits a weight, {seconds:.1f} s"
    outside = [row for row in rows if not row.path.startswith("layers/")]
    known = [(row.path.partition("/")[0], getattr(row, value)) for row in outside]
    return title + "".join(f"\n{name} {error:.4f}" for name, error in known if error is not None)
