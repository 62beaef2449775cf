"""Pictures: what is drawn, and that a file comes out."""

from dataclasses import replace

import numpy as np
import pytest

from jaxopt_models.errors import UserError
from jaxopt_models.plots import error_heat_map, pareto_plot, save_figure
from jaxopt_models.quantize.layer import TensorReport
from jaxopt_models.quantize.options import Point, Unit
from jaxopt_models.quantize.ptq import Report

POINTS = [Point(4.5, 4.5, 0.3), Point(6.0, 5.9, 0.05), Point(16.0, 16.0, 0.0)]
UNIFORM = {"nvfp4": Point(4.5, 4.5, 0.3), "original": Point(16.0, 16.0, 0.0)}


def test_a_pareto_curve_has_costs_scores_and_uniform_formats():
    (axes,) = pareto_plot(POINTS, UNIFORM).axes
    (curve,) = axes.get_lines()
    # What has no divergence has no place on a logarithmic axis.
    np.testing.assert_array_equal(curve.get_xydata(), [[4.5, 0.3], [5.9, 0.05]])
    legend = axes.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == [
        "best mixture",
        "nvfp4 everywhere",
    ]
    assert axes.get_title() and "nats a token" in axes.get_ylabel()
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize(
    "unit, said", [("bits", "bits a weight"), ("bytes", "bytes"), ("latency", "seconds")]
)
def test_the_axis_names_its_unit(unit: Unit, said):
    (axes,) = pareto_plot(POINTS, unit=unit).axes
    assert said in axes.get_xlabel()


def test_a_figure_becomes_a_file(tmp_path):
    save_figure(pareto_plot(POINTS, UNIFORM), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[1:4] == b"PNG"
    for name in ("curve.nosuch", "missing/curve.png"):
        with pytest.raises(UserError, match="cannot write the picture"):
            save_figure(pareto_plot(POINTS), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def row(path: str, weight_error: float, output_error: float | None) -> TensorReport:
    return TensorReport(
        f"{path}/weight", "int4", "block", "rtn", "", (8, 8), 4.25, weight_error, output_error,
        clipped=0.0, damping=None, seconds=0.1,
    )  # fmt: skip


ROWS = (
    row("layers/0/mlp/down_proj", 0.3, 0.02),
    row("layers/0/self_attn/q_proj", 0.2, 0.01),
    row("layers/2/mlp/experts/up_proj", 0.1, 0.0),
    row("layers/2/self_attn/q_proj", 0.2, None),
    row("lm_head", 0.1, 0.04),
)
REPORT = Report("mine", ROWS, 4.25, 512, 1.0, 2.0, {})


def drawn(figure) -> tuple[list[str], np.ma.MaskedArray]:
    axes = figure.axes[0]
    (image,) = axes.get_images()
    return [label.get_text() for label in axes.get_yticklabels()], image.get_array()


def test_a_heat_map_has_linears_by_layers():
    figure = error_heat_map(REPORT)
    linears, errors = drawn(figure)
    assert linears == ["q", "down", "experts up"]  # as a layer uses them
    gone = np.nan
    # What was not quantized stays empty; no error is not nothing, but the end of the scale.
    expected = [[0.01, gone, gone], [0.02, gone, gone], [gone, gone, 0.01]]
    np.testing.assert_array_equal(errors.filled(np.nan), expected)


def test_a_heat_map_says_what_it_shows():
    axes, bar = error_heat_map(REPORT).axes
    title = axes.get_title()
    assert "mine: output error" in title and "5 tensors, 4.250 bits a weight, 3.0 s" in title
    assert "lm_head 0.04" in title  # in no layer
    assert axes.get_xlabel() == "layer"
    assert "||y - ŷ|| / ||y||" in bar.get_ylabel() and bar.get_yscale() == "log"


def test_without_text_weight_errors_are_drawn_where_they_are_asked_for():
    rows = [replace(row, output_error=None) for row in ROWS]
    with pytest.raises(UserError, match="'weight_error'"):
        error_heat_map(rows)
    figure = error_heat_map(rows, "weight_error")
    assert "weight error, no calibration text" in figure.axes[0].get_title()
    assert drawn(figure)[1].max() == 0.3


@pytest.mark.parametrize("error", [0.0, 1e-7, 0.5])
def test_a_heat_map_of_one_error_can_be_drawn(tmp_path, error):
    save_figure(error_heat_map([row("layers/0/mlp/up_proj", error, error)]), tmp_path / "one.png")
