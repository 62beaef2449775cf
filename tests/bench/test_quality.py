"""The quality bench on a tiny model: what a row holds, what survives, what does not compare."""

import io
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console

from jaxopt_models import cli, data
from jaxopt_models.bench import quality, quality_peer
from jaxopt_models.bench.memory import peak_memory
from jaxopt_models.bench.quality import Windows, bench_quality
from jaxopt_models.bench.quality_peer import PeerFigures, format_name
from jaxopt_models.bench.quality_results import quality_table
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe

SIZES: dict[str, Any] = {"windows": 3, "length": 16, "calibration_windows": 4}
REFERENCE = {
    "formats": {"A": "int8/int8", "B": "int8/int8", "C": "fp8/fp8"},
    "recipes": {"int8": "A", "fp8": "C"},
    "models": {
        "tiny": {
            "windows": {"evaluation": 3, "awq": 4, "gptq": 4, "other": 4},
            "length": 16,
            "teacher": {"ppl": 200.0},
            "rows": {
                "A": {"ppl": 9.0, "kl": 0.5, "top1": 0.5, "calib_seconds": 1000},
                "B": {"ppl": 8.0, "kl": 0.25, "top1": 0.6, "calib_seconds": 0},
            },
        }
    },
}


def recipe(name: str = "recipe", **rule: Any) -> Recipe:
    return Recipe.model_validate({"name": name, "rules": [{"match": "*"} | rule]})


@pytest.fixture
def tiny(tiny_model, monkeypatch, tmp_path):
    """Two texts, two recipes and a model "tiny" that the reference was measured on too."""
    (tmp_path / "calib.txt").write_text("To calibrate is human. " * 30)
    (tmp_path / "eval.txt").write_text("To evaluate, divine: let us see how it goes. " * 30)
    rules = {"int8": ("int8", "int8"), "int8_static": ("int8", {"format": "int8"})}
    for name, (weight, activation) in rules.items():
        rule = {"match": "*", "weight": weight, "activation": activation}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"rules": [rule]}))
    token = {
        "match": "*",
        "weight": "int8",
        "activation": {"format": "int8", "granularity": "token"},
    }
    (tmp_path / "int8.yaml").write_text(yaml.safe_dump({"rules": [token]}))
    monkeypatch.setattr(quality, "load", lambda name: tiny_model)
    # What a test has compiled serves the next; only one of them is about compilation.
    monkeypatch.setattr(quality, "compiling_anew", nullcontext)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setattr(quality_peer, "_published", lambda: REFERENCE)
    return tmp_path


def run(folder: Path, *recipes: str, out: str = "results.json", **options: Any) -> list[dict]:
    return bench_quality(
        ["tiny"],
        [folder / f"{name}.yaml" for name in recipes],
        calibration_text=str(folder / "calib.txt"),
        evaluation_text=str(folder / "eval.txt"),
        out=folder / out,
        **(SIZES | options),
    )


def as_reference(folder: Path, monkeypatch) -> None:
    """Makes the folder's texts those that the reference was measured on."""
    for constant, split in (("CALIBRATION", "calib.txt"), ("EVALUATION", "eval.txt")):
        digest = quality.checksum(str(folder / split), "calibration")
        source = getattr(quality.texts, constant)
        monkeypatch.setattr(quality.texts, constant, replace(source, sha256=digest))


def test_a_row_is_what_quantize_and_evaluate_give(tiny, tiny_model):
    (row,) = run(tiny, "int8_static")
    texts = {name: data.read_text(tiny / name) for name in ("calib.txt", "eval.txt")}
    calibration = data.token_batches(tiny_model, texts["calib.txt"], 4, 16, 4)
    evaluation = data.token_batches(tiny_model, texts["eval.txt"], 3, 16, 4)
    params, report = quantize(tiny_model, Recipe.load(tiny / "int8_static.yaml"), calibration)
    expected = evaluate(tiny_model.config, params, evaluation, tiny_model.params)
    assert row["ppl"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert row["kl"] == pytest.approx(expected.kl, rel=1e-3, abs=1e-7) and row["kl"] > 0
    assert row["top1"] == expected.top1_agreement
    assert row["bits_per_weight"] == report.bits_per_weight
    assert row["calib_seconds"] > 0 and row["calibration_windows"] == 4
    assert (row["model"], row["recipe"], row["format"]) == ("tiny", "int8_static", "int8/int8")


def test_a_recipe_that_needs_no_text_is_given_none(tiny, monkeypatch):
    def watched(model, plan, batches, **options):
        assert (batches is None) == (plan.name == "int8")
        return quantize(model, plan, batches, **options)

    monkeypatch.setattr(quality, "quantize", watched)
    assert [row["calibration_windows"] for row in run(tiny, "int8", "int8_static")] == [0, 4]


def test_the_file_says_what_was_measured_how(tiny, monkeypatch):
    as_reference(tiny, monkeypatch)
    rows = run(tiny, "int8")
    document = json.loads((tiny / "results.json").read_text())
    assert document["rows"] == rows and document["device"] == rows[0]["device"]
    assert document["protocol"]["windows"] == REFERENCE["models"]["tiny"]["windows"]
    assert document["protocol"]["length"] == 16
    assert document["protocol"]["differs_from_reference"] == []
    assert len(document["protocol"]["evaluation_text"]) == 64
    assert {"jax", "jaxopt-models", "python"} <= document["versions"].keys()
    assert 100 < document["teachers"]["tiny"]["ppl"] < 300
    assert document["teachers"]["tiny"]["reference_ppl"] == 200


def test_rows_are_saved_one_by_one_and_replaced(tiny, monkeypatch):
    def kill(model, plan, batches, **options):
        if plan.name == "int8_static":
            raise KeyboardInterrupt
        return quantize(model, plan, batches, **options)

    monkeypatch.setattr(quality, "quantize", kill)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, "int8", "int8_static")
    monkeypatch.undo()
    saved = json.loads((tiny / "results.json").read_text())["rows"]
    assert [row["recipe"] for row in saved] == ["int8"]


def test_a_second_run_merges(tiny):
    run(tiny, "int8", "int8_static")
    file = tiny / "results.json"
    document = json.loads(file.read_text())
    document["rows"][0]["ppl"] = 0.0
    document["rows"].append(document["rows"][0] | {"device": "an abacus"})
    file.write_text(json.dumps(document))
    run(tiny, "int8")
    rows = json.loads(file.read_text())["rows"]
    found = {(row["recipe"], row["device"] == "an abacus"): row["ppl"] for row in rows}
    assert found.keys() == {("int8", False), ("int8", True), ("int8_static", False)}
    assert found["int8", True] == 0 and found["int8", False] > 1


def test_rows_of_another_protocol_are_not_mixed(tiny):
    run(tiny, "int8")
    before = (tiny / "results.json").read_text()
    with pytest.raises(UserError, match="another length.*choose another --out"):
        run(tiny, "int8", length=12)
    (tiny / "eval.txt").write_text("Something else entirely, for once. " * 30)
    with pytest.raises(UserError, match="another evaluation_text"):
        run(tiny, "int8")
    assert (tiny / "results.json").read_text() == before
    (tiny / "other.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="no results of this bench"):
        run(tiny, "int8", out="other.json")


def test_a_refused_recipe_does_not_stop_the_others(tiny):
    rule = {"match": "*conv*", "weight": "int8"}
    (tiny / "odd.yaml").write_text(yaml.safe_dump({"rules": [rule]}))
    with pytest.raises(UserError, match=r"1 rows are measured, but not odd on tiny \(.*conv"):
        run(tiny, "odd", "int8")
    saved = json.loads((tiny / "results.json").read_text())["rows"]
    assert [row["recipe"] for row in saved] == ["int8"]


def test_results_go_where_the_model_says(tiny):
    run(tiny, "int8", out="folder")
    assert (tiny / "folder" / "quality_tiny.json").exists()
    with pytest.raises(UserError, match="2 models; name a directory"):
        bench_quality(
            ["tiny", "tiny"], [], calibration_text="", evaluation_text="", out=tiny / "a.json"
        )


def test_a_short_text_is_refused_before_the_work(tiny, monkeypatch):
    monkeypatch.setattr(quality, "reference", None)
    with pytest.raises(UserError, match="1000 windows of 16 need"):
        run(tiny, "int8_static", calibration_windows=1000)


# The reference's figures


def test_ratios_where_the_protocol_is_the_same(tiny, monkeypatch):
    as_reference(tiny, monkeypatch)
    named, other = run(tiny, "int8", "int8_static")
    assert named["reference"]["config"] == "A" and not named["reference"]["best_of_format"]
    assert named["ratio_kl"] == named["kl"] / 0.5
    assert named["ratio_seconds"] == named["calib_seconds"] / 1000
    assert other["reference"]["config"] == "B" and other["reference"]["best_of_format"]
    assert other["ratio_kl"] == other["kl"] / 0.25
    assert other["ratio_seconds"] is None  # of zero seconds


def test_no_ratios_where_it_is_not(tiny, monkeypatch):
    as_reference(tiny, monkeypatch)
    (row,) = run(tiny, "int8", windows=2)
    assert row["reference"]["kl"] == 0.5
    assert row["ratio_kl"] is None and row["ratio_seconds"] is None
    protocol = json.loads((tiny / "results.json").read_text())["protocol"]
    assert protocol["differs_from_reference"] == ["windows"]


def test_seconds_compare_on_a_cpu_only(tiny, monkeypatch):
    as_reference(tiny, monkeypatch)
    theirs = REFERENCE["models"]["tiny"]
    peer = PeerFigures(theirs["windows"], 16, 200.0, theirs["rows"])
    monkeypatch.setattr(quality.jax, "default_backend", lambda: "gpu")
    plan = recipe("int8", weight="int8", activation="int8")
    ours = {"kl": 0.1, "calib_seconds": 3.0}
    row = quality._compare(ours, plan, peer, {"differs_from_reference": []})
    assert row["ratio_kl"] == 0.2 and row["ratio_seconds"] is None


def test_a_name_alone_makes_no_counterpart(tiny):
    peer = PeerFigures.of("tiny")
    assert peer is not None and PeerFigures.of("another") is None
    assert peer.counterpart(recipe("int8", weight="nf4")) is None
    assert peer.counterpart(recipe("fp8", weight="fp8", activation="fp8")) is None  # no row C


def test_published_figures_are_whole():
    published = quality_peer._published()
    assert set(published["recipes"].values()) == set(published["formats"])
    assert list(published["models"]) == list(quality.MODELS)
    for name, model in published["models"].items():
        assert model["rows"].keys() <= published["formats"].keys()
        for row in model["rows"].values():
            assert row["ppl"] > model["teacher"]["ppl"] and 0 < row["kl"] and 0 < row["top1"] < 1
        kind = {"smollm2-135m": "llama", "gemma3-270m": "gemma3_text"}[name]
        assert quality.asdict(quality._WINDOWS.get(kind, Windows())) == model["windows"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"weight": "int4"}, "int4-g128"),
        ({"weight": {"format": "int4", "block_size": 64}, "activation": "fp8"}, "int4-g64/fp8"),
        ({"weight": {"format": "int4", "granularity": "channel"}}, "int4"),
        ({"weight": "mxfp8", "activation": "mxfp8"}, "mxfp8_e4m3/mxfp8_e4m3"),
        ({"weight": "nvfp4"}, "nvfp4"),
    ],
)
def test_format_names(rule, expected):
    assert format_name(recipe(**rule)) == expected


def test_format_names_of_several_rules_and_of_the_cache():
    rules = [{"match": "*", "weight": "int4"}, {"match": "*q_proj*", "weight": "fp8"}]
    assert format_name(Recipe.model_validate({"rules": rules})) == "int4-g128+fp8"
    assert format_name(Recipe.model_validate({"kv_cache": "nvfp4"})) == "kv nvfp4"
    both = {"rules": [{"match": "*", "weight": "nvfp4", "activation": "nvfp4"}], "kv_cache": "fp8"}
    assert format_name(Recipe.model_validate(both)) == "nvfp4/nvfp4 kv fp8"


def test_windows_by_what_a_recipe_does():
    counts = Windows()
    assert counts.calibration(recipe(weight="int4")) == 128
    assert counts.calibration(recipe(weight="int4", smooth="awq")) == 16
    assert counts.calibration(recipe(weight="int4", rounding="gptq")) == 32
    assert counts.calibration(recipe(weight="int4", smooth="awq", rounding="gptq")) == 128
    assert counts.calibration(recipe(weight="int8", smooth="smoothquant")) == 128


# How it measures


def test_programs_are_not_kept_on_disk(tmp_path):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def kept() -> int:
        return len(list(tmp_path.rglob("*-cache")))

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        with quality.compiling_anew():
            jax.jit(lambda x: 3 * x + 1)(jnp.ones(3))
            assert kept() == 0
        jax.jit(lambda x: 5 * x + 1)(jnp.ones(3))
        assert kept() > 0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        quality.compilation_cache.reset_cache()


def test_every_recipe_compiles_for_itself(tiny, monkeypatch):
    events = []
    monkeypatch.setattr(jax, "clear_caches", lambda: events.append("clear"))

    def watched(model, plan, batches, **options):
        events.append(plan.name)
        return quantize(model, plan, batches, **options)

    monkeypatch.setattr(quality, "quantize", watched)
    run(tiny, "int8", "int8_static")
    assert events == ["clear", "int8", "clear", "int8_static"]


def test_products_are_float32(tiny, monkeypatch):
    seen = []

    def watched(*arguments, **options):
        seen.append(jax.config.jax_default_matmul_precision)
        return quantize(*arguments, **options)

    monkeypatch.setattr(quality, "quantize", watched)
    run(tiny, "int8")
    assert seen == ["highest"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux only")
def test_peak_memory_counts_what_is_gone_again():
    with peak_memory() as peak:
        np.ones(2**24)  # 128 MiB
    assert peak.bytes is not None and 120 * 2**20 < peak.bytes < 160 * 2**20
    with peak_memory() as peak:
        np.ones(2**20)
    assert peak.bytes is not None and peak.bytes < 32 * 2**20


def test_peak_memory_of_an_accelerator(monkeypatch):
    class Device:
        held, peak = 100, 900

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": self.held, "peak_bytes_in_use": self.peak}

    device = Device()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with peak_memory() as peak:
        device.peak = 1500  # above what it ever was: exact
    assert peak.bytes == 1400
    with peak_memory() as peak:
        device.held = 400
        time.sleep(0.1)
        device.held = 100
    assert peak.bytes == 300  # as sampled


def test_the_table_is_readable_on_eighty_columns(tiny, monkeypatch):
    as_reference(tiny, monkeypatch)
    rows = run(tiny, "int8", "int8_static")
    rows[0] = rows[0] | {"recipe": "nvfp4_awq_lite", "ppl": 98.765, "calib_seconds": 1234.5}
    rows[1] = rows[1] | {"peak_bytes": None, "reference": None, "ratio_kl": None}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(quality_table(rows))
    printed = console.export_text()
    assert "…" not in printed and "98.77" in printed and "1234" in printed and "tiny" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_command(tiny, monkeypatch, capsys):
    options = {"--recipe": "int8.yaml", "--calib": "calib.txt", "--text": "eval.txt", "--out": "."}
    files = [word for key, name in options.items() for word in (key, str(tiny / name))]
    sizes = ["--windows", "3", "--length", "16", "--calibration-windows", "4"]
    command = ["jaxopt-models", "bench", "quality", "--model", "tiny", *files, *sizes]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert not stop.value.code, captured.err
    assert "theirs" in captured.out and "int8" in captured.out
    (row,) = json.loads((tiny / "quality_tiny.json").read_text())["rows"]
    assert row["recipe"] == "int8"
