"""Pruning and distillation on a tiny model: what a row says, what is kept, what is refused."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from short_runs import short_run, write_texts

from jaxopt_models import data
from jaxopt_models.bench import pruning
from jaxopt_models.bench.pruning import bench_pruning, figures
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate
from jaxopt_models.prune import importance, slice_model
from jaxopt_models.prune.candidates import BASELINE, explicit
from jaxopt_models.prune.choose import Target
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.sizes import cost_of
from jaxopt_models.train.settings import RunSettings


@pytest.fixture
def folder(sure_model, monkeypatch, tmp_path):
    monkeypatch.setattr(pruning, "load", lambda name: sure_model)
    return write_texts(tmp_path)


def settings(folder, **more: Any) -> RunSettings:
    evaluation = {"text": str(folder / "eval.txt"), "windows": 4, "length": 16, "every": 6}
    known = {"steps": 12, "optimizer": {"learning_rate": 3e-3}, "evaluation": evaluation}
    return short_run(folder, **known | more)


def plan(folder, **more: Any) -> PruneSettings:
    known = {
        "budget": {"parameters": 0.9},
        "axes": ["neurons", "hidden"],
        "multiple": 8,
        "text": str(folder / "train.txt"),
        "windows": 4,
        "length": 16,
        "batch": 4,
        "search": {"candidates": 3, "first": 4},
        "evaluation": {"windows": 4},
    }
    return PruneSettings.model_validate(known | more)


@pytest.fixture(scope="module")
def measured(sure_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = write_texts(tmp_path_factory.mktemp("pruning"))
        patch.setattr(pruning, "load", lambda name: sure_model)
        out = home / "pruning.json"
        return out, bench_pruning(settings(home), {"width": plan(home)}, (0,), out=out)


def test_what_rows_say(measured, sure_model):
    file, result = measured
    assert json.loads(file.read_text()) == result
    assert [(row["axis"], row["method"], row["seed"]) for row in result["rows"]] == [
        ("width", "search", 0),
        ("width", BASELINE, 0),
    ]
    whole = cost_of(sure_model.params, "parameters")
    evaluation = data.token_batches(
        sure_model, data.load_text(str(file.parent / "eval.txt")), 4, 16, 4
    )
    teacher = evaluate(sure_model.config, sure_model.params, evaluation).perplexity
    for row in result["rows"]:
        assert row["params"] == row["kept"]["cost"] <= 0.9 * whole
        assert row["share"] == row["params"] / whole and row["ppl_teacher"] == teacher
        curve = row["run"]["curve"]
        assert [point["step"] for point in curve] == [0, 6, 12]
        assert (row["kl_pruned"], row["kl_distilled"]) == (curve[0]["kl"], curve[-1]["kl"])
        assert row["kl_distilled"] < 0.9 * row["kl_pruned"]
        assert row["train_tokens"] == 12 * 4 * 16


def test_a_model_in_bfloat16_is_trained_in_float32(folder, sure_model, monkeypatch):
    narrow = jax.tree.map(lambda array: array.astype(jnp.bfloat16), sure_model.params)
    monkeypatch.setattr(pruning, "load", lambda name: replace(sure_model, params=narrow))
    result = bench_pruning(settings(folder), {"width": plan(folder)}, (0,))
    for row in result["rows"]:
        assert row["kl_distilled"] < 0.9 * row["kl_pruned"]


def test_the_uniform_row_is_of_the_uniform_candidate(measured, sure_model):
    """Cut out here by hand, it is measured as the row says."""
    file, result = measured
    home = file.parent
    row = next(row for row in result["rows"] if row["method"] == BASELINE)
    text = data.load_text(str(home / "train.txt"), "calibration")
    calibration = data.token_batches(sure_model, text, 4, 16, 4)
    scores = importance(sure_model.config, sure_model.params, calibration)
    masks = explicit(Target(**row["kept"]["keep"], multiple=8), scores).masks(scores)
    config, params = slice_model(sure_model.config, sure_model.params, masks, uniform=True)
    evaluation = data.token_batches(sure_model, data.load_text(str(home / "eval.txt")), 4, 16, 4)
    found = evaluate(config, params, evaluation, sure_model.params)
    assert found.perplexity == pytest.approx(row["ppl_pruned"], rel=1e-5)


def test_shares_of_what_was_lost():
    found = figures(30.0, [{"perplexity": 50.0, "kl": 0.5}, {"perplexity": 34.0, "kl": 0.1}])
    assert found["ppl_recovered"] == pytest.approx(0.8)
    assert (found["kl_pruned"], found["kl_distilled"]) == (0.5, 0.1)
    assert (found["ppl_pruned"], found["ppl_distilled"]) == (50.0, 34.0)


@pytest.fixture
def untaught(folder, monkeypatch):
    """The folder, with runs that end where they begin."""
    run = {"learning_rate": 1e-3, "tokens_per_second": 1.0, "skipped": 0}

    def trained(*arguments: Any) -> dict[str, Any]:
        start = {"step": 0} | arguments[7]
        return run | {"curve": [start, start]}

    monkeypatch.setattr(pruning, "trained", trained)
    return folder


def test_a_bench_that_was_cut_off_goes_on(untaught, measured, monkeypatch):
    before = measured[1]
    file = untaught / "pruning.json"
    uniform = [row for row in before["rows"] if row["method"] == BASELINE]
    file.write_text(json.dumps(before | {"rows": uniform}))  # the text is elsewhere now
    said = []
    plans = {"width": plan(untaught)}
    after = bench_pruning(settings(untaught), plans, (0,), out=file, say=said.append)
    assert [line.partition(":")[0] for line in said] == ["width, search, seed 0"]
    assert after["rows"][1] == uniform[0] and after["rows"][0]["ppl_recovered"] == 0.0
    monkeypatch.setattr(pruning, "Cutter", None)  # all of it is there: nothing is pruned
    assert bench_pruning(settings(untaught), plans, (0,), out=file) == after


def test_plans_have_a_budget(folder):
    plans = {"thin": plan(folder, budget=None, axes=None, search={}, keep={"layers": 1})}
    with pytest.raises(UserError, match="plan 'thin'.*give a 'budget'"):
        bench_pruning(settings(folder), plans)


def test_other_plans_do_not_mix(folder, measured):
    plans = {"width": plan(folder, multiple=16)}
    with pytest.raises(UserError, match="another plans"):
        bench_pruning(settings(folder), plans, out=measured[0])


def test_the_command(untaught, run):
    text, evaluation = (str(untaught / name) for name in ("train.txt", "eval.txt"))
    file = untaught / "plan.yaml"
    told = plan(untaught).model_dump(mode="json", exclude_unset=True)
    file.write_text(json.dumps(told))  # which is YAML
    command = ["bench", "pruning", "--text", text, "--evaluation", evaluation, "--seed", "3"]
    sizes = ["--length", "16", "--batch", "4", "--windows", "4"]
    code, out, _ = run(*command, *sizes, "--plan", f"width={file}")
    assert code == 0 and "width, search, seed 3" in out
    code, _, error = run(*command, "--plan", str(file))
    assert code == 2 and "NAME=FILE" in error
