"""The command that cuts: its checkpoint goes everywhere, its files say what was done."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from pruned_models import CONFIGS

from jaxopt_models import Model, export_hf, init, load
from jaxopt_models.checkpoint.native import read_metadata
from jaxopt_models.errors import UserError
from jaxopt_models.prune.cut import Cutter
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.train import run as training
from jaxopt_models.train.settings import RunSettings

_WORDS = "All that is gold does not glitter, not all those who wander are lost. "


@pytest.fixture(scope="module")
def files(tmp_path_factory, byte_tokenizer) -> Path:
    """A tiny model with a byte-level tokenizer, two texts and settings."""
    directory = tmp_path_factory.mktemp("prune")
    config = dataclasses.replace(CONFIGS["tied"], vocab_size=256)
    params = init(config, jax.random.key(0), jnp.bfloat16)
    export_hf(directory / "model", Model(config, params, byte_tokenizer))
    (directory / "own.txt").write_text(_WORDS * 4)
    (directory / "other.txt").write_text(_WORDS[::-1] * 20)
    (directory / "prune.yaml").write_text(
        f"budget: {{parameters: 0.75}}\ntext: {directory / 'own.txt'}\n"
        "windows: 4\nlength: 16\nbatch: 2\nmultiple: 4\n"
        "search: {candidates: 3, first: 2, finalists: 2}\n"
        f"evaluation: {{text: {directory / 'other.txt'}, windows: 2}}\n"
    )
    return directory


def test_what_was_pruned_is_reported_loaded_exported_quantized_and_taught(
    run, files, tmp_path, monkeypatch
):
    out, report = tmp_path / "out", tmp_path / "report"
    given = files / "model", "--config", files / "prune.yaml"
    to = "--out", out, "--json", tmp_path / "a.json", "--report", report
    lesson = "--set", "search.distill={steps: 1, batch: 2}"
    with monkeypatch.context() as patch:  # the disk is full, say, when all but the last is done
        patch.setattr(Cutter, "reference", _full)
        code, _, error = run("prune", *given, *lesson, *to)
    partial = tmp_path / "out.partial"
    assert code == 2 and error.endswith("no space\n") and partial.is_dir() and not out.exists()
    code, printed, _ = run("prune", *given, *lesson, *to)
    assert code == 0 and not partial.exists() and "KL, taught" in printed
    said = json.loads((report / "report.json").read_text())
    assert said == json.loads((tmp_path / "a.json").read_text())
    assert said == read_metadata(out)["report"]
    before, after = said["parameters"]["before"], said["parameters"]["after"]
    closing = printed.splitlines()[-1]
    assert closing.startswith(f"{before:,} -> {after:,} parameters") and closing.endswith(str(out))
    assert f"KL {said['evaluation']['pruned']['kl']:.4f}" in closing and "uniform" in printed
    assert after <= 0.75 * before and said["chosen"]["cost"] == after
    with (report / "candidates.csv").open() as rows:
        table = list(csv.DictReader(rows))
    assert [row["name"] for row in table] == [one["name"] for one in said["candidates"]]
    assert {"kl", "cost", "windows", "dropped"} <= table[0].keys()
    assert (report / "candidates.png").stat().st_size > 1000
    again = PruneSettings.model_validate(read_metadata(out)["recipe"])
    assert again == PruneSettings.load(files / "prune.yaml", lesson[1:])

    small = load(out)
    assert sum(x.size for x in jax.tree.leaves(small.params)) == after
    assert run("export", out, "--out", tmp_path / "hf")[0] == 0
    assert load(tmp_path / "hf").config.hidden_size == small.config.hidden_size
    assert run("quantize", out, "--recipe", "int8_weight_only", "--out", tmp_path / "q")[0] == 0
    fields = {"model": str(files / "model"), "student": str(out), "text": str(files / "own.txt")}
    fields |= {"steps": 2, "length": 16, "batch": 2, "log": 1}
    evaluation = {"text": str(files / "other.txt"), "windows": 2, "every": 2}
    settings = RunSettings.of(fields | {"evaluation": evaluation})
    result = training.train("distill", settings, tmp_path / "taught")
    assert result.log[-1]["kl"] > 0
    assert load(tmp_path / "taught" / "model").config == small.config


def _full(cutter):
    raise UserError("no space")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["windows=0"], "windows: Input should be greater than or equal to 1"),
        (["windows=500"], "use a longer text, fewer windows"),
        (["axes=[experts]"], "axes: the model has no experts"),
        (["budget.parameters=7"], "the smallest candidate has"),
        (["budget=", "search={}", "keep.layers=9"], "keep.layers: cannot keep 9 of 3"),
        (["budget=", "search={}", "keep.hidden=900"], "hidden: cannot keep 900 of 32"),
        (["budget=", "keep.layers=2"], "'search' is for a search; give a 'budget'"),
        (["evaluation.text=OWN"], "is the text that is pruned by"),
        (["depth=3"], "unknown key 'depth'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, files, tmp_path, changes, says):
    out, own = tmp_path / "out", str(files / "own.txt")
    sets = [word for change in changes for word in ("--set", change.replace("OWN", own))]
    given = files / "model", "--config", files / "prune.yaml", "--out", out
    code, _, error = run("prune", *given, *sets)
    assert code == 2 and error.count("\n") == 1 and error.startswith("jaxopt-models: ")
    assert says in error and not out.exists()


def test_nothing_is_overwritten(run, files, tmp_path):
    given = files / "model", "--config", files / "prune.yaml", "--out"
    code, _, error = run("prune", *given, tmp_path)
    assert code == 2 and "exists already; choose another --out" in error
    code, _, error = run("prune", *given, tmp_path / "new", "--report", tmp_path)
    assert code == 2 and "exists already; choose another --report" in error
