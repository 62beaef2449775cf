"""QAD beside QAT on a tiny model: what a row says, what is kept, what is compiled."""

import json
import sys
from typing import Any

import pytest
from short_runs import short_run, write_texts

from jaxopt_models import cli, data
from jaxopt_models.bench import qad
from jaxopt_models.bench.qad import bench_qad, figures
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.train import model_job

RECIPE = "int4"


@pytest.fixture
def folder(sure_model, monkeypatch, tmp_path):
    monkeypatch.setattr(qad, "load", lambda name: sure_model)
    return write_texts(tmp_path)


@pytest.fixture(scope="module")
def measured(sure_model, tmp_path_factory):
    """Rows of two seeds with the text in one place, and how often a loss was traced for them."""
    traced = []

    def counting(*arguments: Any) -> Any:
        loss = next_token_loss(*arguments)
        return lambda *own: traced.append(arguments) or loss(*own)

    next_token_loss = model_job.next_token_loss
    with pytest.MonkeyPatch.context() as patch:
        home = write_texts(tmp_path_factory.mktemp("qad"))
        patch.setattr(qad, "load", lambda name: sure_model)
        patch.setattr(model_job, "next_token_loss", counting)
        result = bench_qad(short_run(home), [RECIPE], (0, 1), out=home / "qad.json")
    return home / "qad.json", result, len(traced)


def test_what_a_row_says(measured, sure_model):
    file, result, _ = measured
    assert json.loads(file.read_text()) == result
    assert [(row["format"], row["seed"]) for row in result["rows"]] == [
        ("int4-g128", 0),
        ("int4-g128", 1),
    ]
    text = data.load_text(str(file.parent / "eval.txt"))
    batches = data.token_batches(sure_model, text, 4, 16, 4)
    quantized, _ = quantize(sure_model, Recipe.load(RECIPE))
    ptq = evaluate(sure_model.config, quantized, batches, sure_model.params)
    teacher = evaluate(sure_model.config, sure_model.params, batches)
    for row in result["rows"]:
        assert (row["ppl_teacher"], row["ppl_ptq"]) == (teacher.perplexity, ptq.perplexity)
        assert (row["kl_ptq"], row["train_tokens"]) == (ptq.kl, 6 * 4 * 16)
        for mode in ("qat", "qad"):
            curve = row["runs"][mode]["curve"]
            assert [point["step"] for point in curve] == [0, 3, 6]
            assert curve[0]["kl"] == ptq.kl and curve[-1]["kl"] == row[f"kl_{mode}"]
            assert curve[-1]["perplexity"] == row[f"ppl_{mode}"]
            assert row["runs"][mode]["skipped"] == 0
    first, second = result["rows"]
    assert first["kl_qad"] != second["kl_qad"]  # another order of the text


def test_the_teacher_brings_back_what_the_text_does_not(measured):
    for row in measured[1]["rows"]:
        assert row["kl_qad"] < row["kl_ptq"] and row["kl_qad"] < row["kl_qat"]


def test_seeds_share_what_is_compiled(measured):
    assert measured[2] == 2  # QAT and QAD


def test_training_may_begin_with_a_better_algorithm(folder, sure_model):
    begins = {RECIPE: "int4_gptq"}
    own = short_run(folder, scales="static")  # dynamic ones would not be those of the algorithm
    result = bench_qad(own, [RECIPE], (0,), begins=begins)
    (row,) = result["rows"]
    assert (row["recipe"], row["begin"]) == (RECIPE, "int4_gptq")
    assert result["protocol"]["begins"] == begins

    def measured(recipe: str) -> float | None:
        known = short_run(folder).calibration
        text = data.load_text(known.text, "calibration")
        batches = data.token_batches(sure_model, text, known.windows, known.length, 4)
        quantized, _ = quantize(sure_model, Recipe.load(recipe), batches)
        text = data.load_text(str(folder / "eval.txt"))
        batches = data.token_batches(sure_model, text, 4, 16, 4)
        return evaluate(sure_model.config, quantized, batches, sure_model.params).kl

    assert row["kl_ptq"] == measured(RECIPE)
    for mode in ("qat", "qad"):
        assert row["runs"][mode]["curve"][0]["kl"] == measured("int4_gptq")
    assert measured(RECIPE) != measured("int4_gptq")
    assert row["kl_recovered"] == 1.0 - row["kl_qad"] / row["kl_ptq"]


def test_training_begins_with_the_same_format(folder):
    with pytest.raises(UserError, match=r"'int4' \(int4-g128\) cannot begin with 'nvfp4_awq'"):
        bench_qad(short_run(folder), [RECIPE], begins={RECIPE: "nvfp4_awq"})


def test_shares_of_what_was_lost():
    ends = [{"perplexity": 40.0, "kl": 0.3}, {"perplexity": 32.0, "kl": 0.1}]
    runs: dict[Any, Any] = {"qad": {"curve": ends}, "qat": {"curve": [ends[0], ends[0]]}}
    found = figures(30.0, {"perplexity": 50.0, "kl": 0.5}, runs)
    assert found["kl_recovered"] == pytest.approx(0.8)
    assert found["ppl_recovered"] == pytest.approx(0.9)
    assert (found["ppl_qat"], found["kl_qat"]) == (40.0, 0.3)
    assert (found["ppl_ptq"], found["kl_ptq"]) == (50.0, 0.5)


@pytest.fixture
def untrained(folder, monkeypatch):
    """The folder, with runs that end where they begin."""
    run = {"learning_rate": 1e-3, "tokens_per_second": 1.0, "skipped": 0}
    monkeypatch.setattr(qad._Bench, "_run", lambda *own: run | {"curve": [own[-1]] * 2})
    return folder


def test_a_run_that_was_cut_off_goes_on(untrained, measured, monkeypatch):
    before = measured[1]
    file = untrained / "qad.json"
    file.write_text(json.dumps(before | {"rows": before["rows"][:1]}))  # the text is elsewhere now
    said = []
    after = bench_qad(short_run(untrained), [RECIPE], (0, 1), out=file, say=said.append)
    assert after["rows"][0] == before["rows"][0]
    assert [line.partition(":")[0] for line in said] == ["int4-g128, seed 1"]
    assert after["rows"][1]["kl_recovered"] == 0.0 and json.loads(file.read_text()) == after
    monkeypatch.setattr(qad, "student_of", None)  # all of it is there: nothing is quantized
    assert bench_qad(short_run(untrained), [RECIPE], (1, 0), out=file) == after


def test_the_limit_is_kept_by_what_the_row_before_took(untrained):
    result = bench_qad(short_run(untrained), [RECIPE], (0, 1), limit=1e-3)
    assert [row["seed"] for row in result["rows"]] == [0]


@pytest.mark.parametrize(
    "more, key",
    [
        ({"steps": 5}, "settings"),
        ({"optimizer": {"learning_rate": 1e-2}}, "learning_rates"),
        ({"text": "eval.txt"}, "rows_of_text"),
    ],
)
def test_other_protocols_do_not_mix(folder, measured, more, key):
    if "text" in more:
        more = {"text": str(folder / "eval.txt")}
    with pytest.raises(UserError, match=f"another {key}"):
        bench_qad(short_run(folder, **more), [RECIPE], out=measured[0])


def test_other_files_are_refused(folder):
    (folder / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other.json.*no results of this bench"):
        bench_qad(short_run(folder), [RECIPE], out=folder / "other.json")


def test_the_command(untrained, monkeypatch, capsys):
    text, evaluation = (str(untrained / name) for name in ("train.txt", "eval.txt"))
    command = ["bench", "qad", "--text", text, "--evaluation", evaluation, "--format", RECIPE]
    sizes = ["--length", "16", "--batch", "4", "--windows", "4", "--seed", "3", "--hidden", "2"]
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", *command, *sizes])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "int4-g128, seed 3" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", *command, "--learning-rate", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "optimizer.learning_rate" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", *command, "--begin", "int4_gptq"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "FORMAT=PRESET" in capsys.readouterr().err
