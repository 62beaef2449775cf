"""What guessing costs on random weights: what a row says, and what is refused."""

import json
import sys
from types import SimpleNamespace

import pytest

from jaxopt_models import cli
from jaxopt_models.bench import pass_cost
from jaxopt_models.bench.pass_cost import bench_pass_cost
from jaxopt_models.errors import UserError
from jaxopt_models.speculative import Eagle3, NGram


def test_costs_are_beside_plain_passes(monkeypatch):
    """The check is that of n-grams; what the head's pass takes longer is the head."""
    asked = []

    def run_all(config, params, prompts, drafter, setting):
        asked.append((len(prompts), drafter and drafter.count))
        seconds = {None: 0.002, NGram: 0.0025, Eagle3: 0.0035}[drafter and type(drafter)]
        return SimpleNamespace(seconds_per_pass=seconds)

    monkeypatch.setattr(pass_cost, "run_all", run_all)
    result = bench_pass_cost("tiny", ["int4"], [1, 2], [3], prompt_tokens=8, new_tokens=5)
    assert asked == [(1, None), (1, 3), (1, 3), (2, None), (2, 3), (2, 3)]
    known = {"model": "tiny", "format": "int4", "context": 13, "K": 3, "plain_ms": 2.0}
    costs = {"verify_cost": pytest.approx(1.25), "draft_cost": pytest.approx(0.5)}
    assert result["rows"] == [known | {"batch": batch} | costs for batch in (1, 2)]


def test_the_command(monkeypatch, tmp_path, capsys):
    out = tmp_path / "costs.json"
    options = ["--model", "tiny", "--prompt-tokens", "8", "--new-tokens", "5", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", "bench", "pass-cost", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["K"], row["batch"], row["format"]) == (7, 1, "bf16")
    assert row["plain_ms"] > 0 and row["verify_cost"] > 0
    assert "tiny bf16, batch 1: a plain pass takes " in capsys.readouterr().out


@pytest.mark.parametrize(("model", "format"), [("llama-9t", "bf16"), ("tiny", "int3")])
def test_what_is_unknown_is_refused(model, format):
    with pytest.raises(UserError, match="is unknown; choose"):
        bench_pass_cost(model, [format])
