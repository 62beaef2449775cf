"""All steps on a tiny model: what rows say, where each begins, what is gone on with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from short_runs import write_texts

import jaxopt_models as jom
from jaxopt_models import data
from jaxopt_models.bench import compression
from jaxopt_models.bench.compression import STAGES, bench_compression
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.train.settings import RunSettings

DECODING: dict[str, Any] = {"context": 16, "steps": 10}
RECIPE = "nvfp4_weight_only"


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the three steps."""
    train, other = str(folder / "train.txt"), str(folder / "eval.txt")
    run = {
        "model": str(folder / "model"),
        "text": train,
        "length": 16,
        "batch": 4,
        "steps": 8,
        "save": 4,
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {"text": other, "windows": 4, "length": 16},
    }
    plan = {
        "budget": {"parameters": 0.92},
        "axes": ["neurons"],
        "multiple": 16,
        "text": train,
        "windows": 4,
        "length": 16,
        "batch": 4,
        "search": {"candidates": 2, "first": 4},
        "evaluation": {"text": other, "windows": 4},
    }
    return {"plan": plan, "distill": run, "qad": run | {"recipe": RECIPE}}


def settings(folder: Path) -> tuple[PruneSettings, RunSettings, RunSettings]:
    told = files(folder)
    plan = PruneSettings.model_validate(told["plan"])
    return plan, RunSettings.of(told["distill"]), RunSettings.of(told["qad"])


@pytest.fixture(scope="module")
def folder(sure_model, tmp_path_factory) -> Path:
    home = write_texts(tmp_path_factory.mktemp("compression"))
    jom.save(home / "model", sure_model.config, sure_model.params, sure_model.tokenizer)
    return home


@pytest.fixture(scope="module")
def measured(folder):
    out = folder / "rows.json"
    return bench_compression(*settings(folder), folder / "run", **DECODING, out=out)


def test_what_rows_say(folder, measured):
    assert json.loads((folder / "rows.json").read_text()) == measured
    rows = measured["rows"]
    assert tuple(row["stage"] for row in rows) == STAGES
    original, pruned, distilled, quantized, qad = rows
    assert original["kl"] == pytest.approx(0.0, abs=1e-6) and original["share"] == 1.0
    assert pruned["params"] == distilled["params"] == quantized["params"] < original["params"]
    assert original["bytes"] == 2 * original["params"]  # bfloat16
    assert original["bytes"] > distilled["bytes"] > quantized["bytes"] == qad["bytes"]
    assert distilled["kl"] < 0.9 * pruned["kl"] and qad["kl"] < quantized["kl"]
    for row in rows:
        assert row["tokens_per_s"] * row["ms_per_step"] == pytest.approx(1e3 * row["batch"])


def test_each_step_begins_with_the_one_before(folder, measured):
    """Made here by hand of the models on disk, they are measured as the rows say."""
    run = folder / "run"
    original = jom.load(folder / "model")
    text = data.load_text(str(folder / "eval.txt"), "evaluation")
    batches = data.token_batches(original, text, 4, 16, 4)
    before = reference(original.config, original.params, batches)
    taught = jom.load(run / "distilled" / "model")
    models = {
        "pruned": jom.load(run / "pruned"),
        "distilled": taught,
        "qad": jom.load(run / "qad" / "model"),
    }
    rows = {row["stage"]: row for row in measured["rows"]}
    for stage, model in models.items():
        found = evaluate(model.config, model.params, batches, before)
        assert (rows[stage]["kl"], rows[stage]["perplexity"]) == (found.kl, found.perplexity)
    codes, _ = quantize(taught, Recipe.load(RECIPE))
    found = evaluate(taught.config, codes, batches, before)
    assert rows["quantized"]["kl"] == pytest.approx(found.kl, rel=1e-5)


def test_a_bench_that_was_cut_off_goes_on(folder, measured, tmp_path, monkeypatch):
    """Rows that are missing are measured of what is on disk; with all rows nothing is made."""
    run, out, said = folder / "run", tmp_path / "rows.json", []
    shutil.rmtree(run / "qad" / "model")
    out.write_text(json.dumps(measured | {"rows": measured["rows"][:2]}))
    monkeypatch.setattr(compression, "prune_checkpoint", None)
    again = bench_compression(*settings(folder), run, **DECODING, out=out, say=said.append)
    assert [line.partition(":")[0] for line in said] == ["distilled", "quantized", "qad"]
    for old, new in zip(measured["rows"], again["rows"], strict=True):
        assert (old["kl"], old["bytes"]) == (new["kl"], new["bytes"])
    monkeypatch.setattr(compression, "train", None)
    assert bench_compression(*settings(folder), run, **DECODING, out=out) == again


def test_what_does_not_go_together(folder, measured, tmp_path):
    plan, distill, qad = settings(folder)
    other = distill.model_copy(update={"model": "other"})
    with pytest.raises(UserError, match="taught by other and qad by .*; name one original"):
        bench_compression(plan, other, qad, tmp_path / "run")
    with pytest.raises(UserError, match="10 steps at the end of a context of 9"):
        bench_compression(plan, distill, qad, tmp_path / "run", context=9, steps=10)
    with pytest.raises(UserError, match="qad needs a 'recipe'"):
        bench_compression(plan, distill, distill, tmp_path / "run", **DECODING)
    wider = plan.model_copy(update={"multiple": 8})
    with pytest.raises(UserError, match="pruned was pruned with another multiple"):
        bench_compression(wider, distill, qad, folder / "run", **DECODING)


def test_the_command(folder, measured, run, tmp_path):
    told = {name: tmp_path / f"{name}.yaml" for name in ("plan", "distill", "qad")}
    for name, file in told.items():
        file.write_text(json.dumps(files(folder)[name]))  # which is YAML
    command = ["bench", "compression", "--out", folder / "run", "--json", folder / "rows.json"]
    command += ["--steps", DECODING["steps"]]
    for name, file in told.items():
        command += [f"--{name}", file]
    known = [*command, "--context", DECODING["context"]]
    code, out, _ = run(*known, "--set", "distill.seed=0")
    assert code == 0 and "distilled" in out
    code, _, error = run(*known, "--set", "qad.seed=1")
    assert code == 2 and "rows with another qad" in error
    code, _, error = run(*command, "--context", "17")
    assert code == 2 and "rows with another decoding" in error
    code, _, error = run(*command, "--set", "seed=1")
    assert code == 2 and "is of none of plan, distill, qad" in error
