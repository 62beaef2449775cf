"""Reports as tables and as files."""

import csv
import json
from dataclasses import replace

import pytest
from rich.console import Console

from jaxopt_models.errors import UserError
from jaxopt_models.quantize.layer import TensorReport
from jaxopt_models.quantize.ptq import Report
from jaxopt_models.report import save_report, totals_line, worst_tensors_table


def row(path: str, weight_error: float, output_error: float | None) -> TensorReport:
    return TensorReport(
        f"{path}/weight", "int4", "block", "rtn", "", (8, 16), 4.25, weight_error, output_error,
        clipped=0.0, damping=None, seconds=0.1,
    )  # fmt: skip


ROWS = (row("layers/0/mlp/down_proj", 0.3, 0.02), row("layers/1/mlp/down_proj", 0.2, 0.04))
REPORT = Report("mine", ROWS, 4.25, 512, 1.0, 2.0, {"rotation": 3})
WITHOUT_TEXT = replace(REPORT, tensors=tuple(replace(row, output_error=None) for row in ROWS))


def printed(table) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_saved_report_is_json_a_table_and_a_picture(tmp_path):
    save_report(tmp_path / "report", REPORT)
    files = {path.name: path for path in (tmp_path / "report").iterdir()}
    assert files.keys() == {"report.json", "tensors.csv", "errors.png"}
    assert json.loads(files["report.json"].read_text()) == json.loads(json.dumps(REPORT.as_dict()))
    with files["tensors.csv"].open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["path"] == "layers/0/mlp/down_proj/weight" and first["shape"] == "8x16"
    assert float(second["output_error"]) == 0.04 and second["damping"] == ""
    assert files["errors.png"].read_bytes()[1:4] == b"PNG"


def test_nothing_is_written_over(tmp_path):
    save_report(tmp_path / "report", REPORT)
    with pytest.raises(UserError, match="exists already"):
        save_report(tmp_path / "report", REPORT)


def test_a_report_without_text_has_a_picture_too(tmp_path):
    save_report(tmp_path / "report", WITHOUT_TEXT)
    assert (tmp_path / "report" / "errors.png").exists()


def test_a_report_of_the_cache_alone_has_no_picture(tmp_path):
    save_report(tmp_path / "report", replace(REPORT, tensors=()))
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"report.json", "tensors.csv"}


def test_a_directory_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        save_report(tmp_path / "file" / "report", REPORT)


def test_the_worst_tensors_are_those_of_the_largest_output_error():
    shown = printed(worst_tensors_table(REPORT, count=1))
    assert "largest output errors" in shown and "0.0400" in shown and "layers/1" in shown


def test_without_text_they_are_those_of_the_largest_weight_error():
    shown = printed(worst_tensors_table(WITHOUT_TEXT, count=1))
    assert "largest weight errors" in shown and "0.3000" in shown and "layers/0" in shown


def test_totals_name_sizes_times_and_seeds():
    line = totals_line(REPORT)
    assert line.startswith("2 tensors, 4.250 bits a weight, 1.0 s calibration, 2.0 s quantization")
    assert line.endswith("seeds: rotation 3")
