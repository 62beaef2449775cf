"""The training bench: what it runs and what a row says. No time is measured here."""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxopt_models import cli, tree
from jaxopt_models.bench import training
from jaxopt_models.bench.training import MODES, Setting, bench_training, random_masters
from jaxopt_models.bench.training_results import TrainingResults, row_line
from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.train import flops

SETTING = Setting("tiny", batch=1, length=16, parts=2, steps=1)


@pytest.fixture
def timed(monkeypatch):
    """A step takes a second for each mode before it, and one more."""
    asked = []

    def seconds(setting, mode, gpus):
        asked.append((mode, gpus))
        part = 1 / 3 if mode in ("qad_nvfp4", "distill") else None
        return training._Timed(float(len(asked)), 1.0, 1e6, part, 100)

    monkeypatch.setattr(training, "_timed", seconds)
    monkeypatch.setattr(flops, "peak_rate", lambda devices: 1e9 * len(devices))
    return asked


def test_a_row_for_each_mode(timed, tmp_path):
    lines = []
    result = bench_training(SETTING, gpus=(1, 2), out=tmp_path, say=lines.append)
    assert json.loads((tmp_path / "training_cpu.json").read_text()) == result
    assert timed == [(mode, gpus) for gpus in (1, 2) for mode in MODES]
    rows = {(row["mode"], row["gpus"]): row for row in result["rows"]}
    for (_, gpus), row in rows.items():
        tokens, seconds = 32 * gpus, row["ms_per_step"] / 1e3
        assert row["tokens_per_s"] == tokens / seconds
        assert row["mfu"] == pytest.approx(tokens * 1e6 / seconds / (1e9 * gpus))
    assert rows["qat_int4", 1]["over_bf16"] == 2  # three seconds, of one
    assert rows["qad_nvfp4", 1]["over_student"] == 1 and rows["bf16", 1]["over_student"] is None
    assert rows["bf16", 2]["scaling"] == pytest.approx(2 / 6)
    assert "fake quantization costs 100.0%" in lines[1]
    assert lines[3].endswith("the teacher costs 100.0%, its operations 33.3%")
    assert lines[5].endswith("0.33 x one device")


def test_a_file_is_gone_on_with(timed, tmp_path):
    file = tmp_path / "rows.json"
    bench_training(SETTING, ["bf16"], out=file)
    bench_training(replace(SETTING, batch=2), ["bf16"], out=file)
    rows = bench_training(SETTING, ["qat_int4", "bf16"], out=file)["rows"]
    assert [(row["mode"], row["batch"], row["ms_per_step"]) for row in rows] == [
        ("bf16", 2, 2e3),
        ("qat_int4", 1, 3e3),
        ("bf16", 1, 4e3),
    ]
    assert rows[1]["over_bf16"] == 3 / 4 - 1
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "another"}))
    with pytest.raises(UserError, match="figures of another, not of cpu"):
        TrainingResults(file)
    file.write_text("{}")
    with pytest.raises(UserError, match="no results of this bench"):
        TrainingResults(file)


def test_what_would_not_end_in_time_is_not_begun(timed, tmp_path):
    lines = []
    result = bench_training(SETTING, limit=0.0, out=tmp_path, say=lines.append)
    assert len(result["rows"]) <= 1 and "the limit is reached before" in lines[-1]


@pytest.mark.parametrize("mode", ["bf16", "qad_nvfp4"])
def test_steps_run(mode, monkeypatch):
    """On two devices with rows of their own, of which the loss is finite and falls."""
    losses = []

    def seconds(step, state, teacher, batch, steps):
        for _ in range(3):
            state, metrics = step(state, teacher, batch)
            losses.append(float(metrics["loss"]))
            assert metrics["skipped"] == 0 and metrics["count"] == 2 * 2 * 15
        return 1.0

    monkeypatch.setattr(training, "_seconds_per_step", seconds)
    (row,) = bench_training(SETTING, [mode], (2,))["rows"]
    assert losses == sorted(losses, reverse=True) and row["tokens_per_s"] == 64
    assert row["mfu"] is None and row["bytes"] > 0
    assert row_line(row).startswith(f"tiny {mode} on 2 devices: 1000.0 ms a step, 64 tokens/s")


def test_the_decoder_s_matrices_are_rounded():
    masters = random_masters(SETTING.config, "nvfp4")
    for path, leaf in tree.leaves_with_paths(masters):
        assert isinstance(leaf, FakeTensor) == path.endswith("_proj/weight")
        assert all(array.dtype == jnp.float32 for array in jax.tree.leaves(leaf))
    leaf = masters["layers"][0]["mlp"]["up_proj"]["weight"]
    assert leaf.scales is None
    assert float(leaf.overall[0, 0]) == pytest.approx(float(jnp.max(jnp.abs(leaf.weight))))
    plain = random_masters(SETTING.config, None)
    assert jnp.array_equal(plain["layers"][0]["mlp"]["up_proj"]["weight"], leaf.weight)


def test_what_fails_is_told_and_the_others_are_measured(timed, monkeypatch, tmp_path):
    errors = {
        "qat_nvfp4": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        "qad_nvfp4": NotImplementedError("No such attention.\nAnd more."),
    }
    measured, lines = training._timed, []

    def seconds(setting, mode, gpus):
        if mode in errors:
            raise errors[mode]
        return measured(setting, mode, gpus)

    monkeypatch.setattr(training, "_timed", seconds)
    with pytest.raises(UserError, match="does not fit in memory: .*qad_nvfp4 on 1 failed"):
        bench_training(SETTING, out=tmp_path, say=lines.append)
    rows = json.loads((tmp_path / "training_cpu.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["bf16", "qat_int4", "distill"]
    assert "choose a smaller --batch" in lines[1] and len(lines) == len(MODES)
    assert lines[3] == "qad_nvfp4 on 1 failed: No such attention."


def test_mistakes():
    with pytest.raises(UserError, match="model 'llama-2b' is unknown; choose llama-8b"):
        bench_training(replace(SETTING, model="llama-2b"))
    with pytest.raises(UserError, match="mode 'fp4' is unknown; choose bf16, qat_nvfp4"):
        bench_training(SETTING, ["fp4"])
    with pytest.raises(UserError, match="99 devices were asked for and there are 8"):
        bench_training(SETTING, gpus=(1, 99))


def test_the_command(timed, monkeypatch, tmp_path, capsys):
    arguments = ["--model", "tiny", "--modes", "bf16", "--modes", "qat_int4", "--length", "16"]
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", "bench", "training", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "tokens/s" in printed[0]
    assert printed[1].endswith("fake quantization costs 100.0%")
