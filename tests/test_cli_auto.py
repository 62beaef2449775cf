"""`jaxopt-models auto`: a recipe for a budget, scores that are kept, one line for each mistake."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxopt_models import Model, Recipe, cli, init
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.quantize import search
from jaxopt_models.quantize.ptq import quantize

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
)


class Letters:
    """A tokenizer whose ids are ASCII codes."""

    bos_token_id = 1

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) % 128 for letter in text]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, init(CONFIG, jax.random.key(0)), Letters(), "tiny")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, model):
    """Runs `auto` in this process on the model above: (exit code, output, errors)."""
    text = tmp_path / "text.txt"
    text.write_text(
        "Not all those who wander are lost; the old that is strong does not wither. " * 9
    )
    monkeypatch.setattr(cli, "_load", lambda name: model)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, out: str = "auto.yaml") -> tuple[int, str, str]:
        sizes = ["--windows", 6, "--scoring-windows", 4, "--length", 16, "--calib", text]
        command = ["auto", "tiny", *arguments, *sizes, "--out", out]
        monkeypatch.setattr(sys, "argv", ["jaxopt-models", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


PAIR = ("--candidate", "int4", "--candidate", "int8_weight_only")


def test_a_recipe_for_a_budget(run, model, monkeypatch):
    kept = ("--scores", "scores.json")
    code, printed, _ = run(*PAIR, *kept, "--bits", 6.5, "--plot", "curve.png")
    assert code == 0 and "bits a weight" in printed and "int8_weight_only" in printed
    assert Path("curve.png").read_bytes()[1:4] == b"PNG"
    recipe = Recipe.load("auto.yaml")
    assert {rule.weight.format for rule in recipe.rules if rule.weight} == {"int4", "int8"}
    _, report = quantize(model, recipe)
    assert report.bits_per_weight <= 6.5
    assert f"{report.bits_per_weight:.4f}" in printed

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the scores were there already")

    monkeypatch.setattr(search, "score", never)
    code, _, _ = run(*PAIR, *kept, "--bits", 5.5, out="smaller.yaml")
    assert code == 0 and Recipe.load("smaller.yaml") != recipe
    assert len(json.loads(Path("scores.json").read_text())["groups"]) == 8

    code, _, error = run(*PAIR, *kept, "--bits", 5.5, "--method", "kl")
    assert code == 2 and "scores.json were made of another model, other candidates" in error
    code, _, error = run(*PAIR, *kept, "--latency", 1.0)
    assert code == 2 and "scores.json has no latencies for 1 rows" in error


def test_bytes_with_a_cache_and_latency(run):
    cache = ("--kv-cache", "int8", "--kv-cache", "original", "--context", 64)
    code, printed, _ = run(*PAIR, *cache, "--bytes", 75_000)
    assert code == 0 and "cache int8" in printed
    assert Recipe.load("auto.yaml").kv_cache is not None
    code, printed, _ = run("--candidate", "int4", "--candidate", "original", "--latency", 10)
    assert code == 0 and " ms" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*PAIR,), "give one budget, of bits, bytes or latency; 0 were given"),
        ((*PAIR, "--bits", 5, "--bytes", 5), "2 were given"),
        ((*PAIR, "--bits", 2), "the smallest takes"),
        (("--candidate", "nosuch", "--bits", 5), "neither a .yaml file nor one of"),
        ((*PAIR, "--bits", 5, "--method", "magic"), "Invalid value for '--method'"),
        ((*PAIR, "--bits", 5, "--out", "recipe.json"), "ends in .yaml"),
    ],
)
def test_mistakes(run, arguments, message):
    out = "recipe.json" if "recipe.json" in arguments else "auto.yaml"
    code, printed, error = run(*arguments, out=out)
    assert code == 2 and message in error and "Traceback" not in error
    assert not Path(out).exists()
