"""Greedy tokens beside those of the reference path."""

import json
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxopt_models import cli
from jaxopt_models.bench import greedy
from jaxopt_models.bench.decode import MODELS
from jaxopt_models.bench.greedy import Difference, bench_greedy, compare
from jaxopt_models.generate import Generation
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward, init
from jaxopt_models.qtensor import quantize_array
from jaxopt_models.tree import map_with_path, matches

TINY = replace(ModelConfig.from_hf(MODELS["tiny"]), dtype="bfloat16")
PROMPTS = [[1, 2, 3], [7, 6, 5]]


@pytest.fixture(scope="module")
def params():
    def leaf(path, weight):
        return quantize_array(weight, "nvfp4") if matches(path, "*_proj/weight") else weight

    return map_with_path(leaf, init(TINY, jax.random.key(0), jnp.bfloat16))


def test_the_first_difference_with_its_margin(params, monkeypatch):
    made = []

    def generate(config, params, prompts, **options):
        """The most likely token twice, but for one row of the second call."""
        tokens = [[11, 12], [13, 14]] if not made else [[11, 12], [13, 99]]
        made.append(config.dtype)
        assert options["max_new_tokens"] == 2 and options["eos_token_ids"] == ()
        return Generation(tokens=tokens)

    monkeypatch.setattr(greedy, "generate", generate)
    (found,) = compare(TINY, params, PROMPTS, 2)
    assert made == ["bfloat16"] * 2
    assert (found.row, found.position, found.expected, found.found) == (1, 1, 14, 99)
    tokens = jnp.asarray([[*PROMPTS[1], 13]], jnp.int32)
    rounded = forward(TINY, params, tokens)[0, -1]
    exact = forward(replace(TINY, dtype="float32"), params, tokens)[0, -1]
    assert found.margin == pytest.approx(float(rounded[14] - rounded[99]), abs=0.02)
    assert found.noise == pytest.approx(float(jnp.std(rounded - exact)), rel=0.1)


def test_what_counts_as_a_near_tie():
    one = Difference(row=0, position=0, expected=1, found=2, margin=0.42, noise=0.1)
    assert one.near_tie and not replace(one, noise=0.09).near_tie


def test_a_row_for_each_recipe(tmp_path, tiny_model, monkeypatch, capsys):
    def load(path, dtype):
        assert path == "tiny"
        return replace(tiny_model, config=replace(tiny_model.config, dtype=dtype))

    monkeypatch.setattr(greedy, "load", load)
    options: dict[str, Any] = {"prompts": 3, "length": 8, "new_tokens": 5, "out": tmp_path}
    result = bench_greedy("tiny", ["nvfp4_weight_only", "fp8_dynamic"], **options)
    assert json.loads((tmp_path / "greedy_cpu.json").read_text()) == result
    assert [row["recipe"] for row in result["rows"]] == ["nvfp4_weight_only", "fp8_dynamic"]
    for row in result["rows"]:
        assert row["equal"] + len(row["differences"]) == row["prompts"] == 3
        assert all(one["near_tie"] for one in row["differences"])

    sizes = ["--prompts", "2", "--length", "8", "--new-tokens", "3"]
    command = ["bench", "greedy", "--model", "tiny", *sizes, "--recipe", "mxfp4_weight_only"]
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "mxfp4_weight_only: 2 of 2 prompts equal" in capsys.readouterr().out
