"""Benches that run a peer: what it is given, and what becomes of what it says."""

import json
import sys

import jax
import pytest

from jaxopt_models.bench import calibration, evaluation
from jaxopt_models.bench.calibration import bench_calibration
from jaxopt_models.bench.evaluation import bench_evaluation
from jaxopt_models.errors import UserError

# An interpreter that, whatever script it is to run, reports what it was given.
PEER = """#!{python}
import json, os, sys
from pathlib import Path
import numpy as np
script, directory, windows, *rest = sys.argv[1:]
assert "PYTHONPATH" not in os.environ and Path(script).is_file()
assert (Path(directory) / "model.safetensors").is_file()
print("chatter")
versions = {{"torch": "9", "given": [list(np.load(windows).shape), *rest]}}
print(json.dumps({{"seconds": {seconds}, "perplexity": 7.0, "versions": versions}}))
"""


@pytest.fixture
def peer(tmp_path):
    def make(seconds: float = 0.5) -> str:
        file = tmp_path / "python"
        file.write_text(PEER.format(python=sys.executable, seconds=seconds))
        file.chmod(0o755)
        return str(file)

    return make


@pytest.fixture
def text(tmp_path, tiny_model, monkeypatch):
    for bench in (calibration, evaluation):
        monkeypatch.setattr(bench, "load", lambda name: tiny_model)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    file = tmp_path / "text.txt"
    file.write_text("All animals are equal. " * 60)
    return str(file)


def test_evaluation_beside_a_peer(text, peer):
    figures = bench_evaluation("tiny", text, 4, 16, 2, peer(1e-9), rounds=1)
    assert figures["peer_perplexity"] == 7.0 and 1 < figures["perplexity"] < 1000
    assert figures["ratio_to_peer"] == figures["seconds"] / 1e-9
    assert figures["versions"]["given"] == [[4, 16], "2"]
    assert figures["versions"]["jax"] == jax.__version__


def test_calibration_beside_a_peer(text, peer, tmp_path):
    sizes = {"length": 16, "batch": 2, "rounds": 2, "out": tmp_path / "out.json"}
    result = bench_calibration("tiny", text, peer(), windows=4, **sizes)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert [row["recipe"] for row in result["rows"]] == ["int4_awq", "int4_gptq"]
    for row in result["rows"]:
        assert row["peer_seconds"] == 0.5 and row["windows"] == 4
        assert row["seconds"] == min(row["all_seconds"]["ours"])
        assert len(row["all_seconds"]["ours"]) == len(row["all_seconds"]["peer"]) == 2
        assert row["ratio_to_peer"] == row["seconds"] / 0.5
    assert result["versions"]["given"] == [[4, 16], "2", "gptq"]


def test_recipe_without_a_counterpart(text, peer):
    with pytest.raises(UserError, match="nvfp4 has no counterpart to time; choose int4_awq or"):
        bench_calibration("tiny", text, peer(), recipes=["nvfp4"])


def test_peer_that_cannot_run(text, tmp_path):
    with pytest.raises(UserError, match=r"cannot run the peer's Python .*nowhere: No such file"):
        bench_evaluation("tiny", text, 4, 16, 2, str(tmp_path / "nowhere"))


def test_peer_that_fails(text, tmp_path):
    file = tmp_path / "python"
    file.write_text("#!/bin/sh\necho first >&2; echo 'No module named modelopt' >&2; exit 1\n")
    file.chmod(0o755)
    with pytest.raises(UserError, match="No module named modelopt; install nvidia-modelopt"):
        bench_calibration("tiny", text, str(file), windows=2, length=16)
