"""What the bench says of guesses: shares and lengths as generation counts them, and the choice."""

import copy
import json
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxopt_models import cli
from jaxopt_models.bench import speculative
from jaxopt_models.bench.decode import MODELS
from jaxopt_models.bench.speculative import Setting, bench_speculative, prompt_ids
from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import init
from jaxopt_models.speculative import DraftModel, NGram

TINY = replace(ModelConfig.from_hf(MODELS["tiny"]), dtype="float32")
PROMPTS = [[1, 2, 3, 1, 2], [7, 6, 5], [9], [4, 4, 4]]


@pytest.fixture(scope="module")
def params():
    return init(TINY, jax.random.key(0))


def test_what_a_row_says(params, tmp_path):
    draft = DraftModel(TINY, params, 3)
    said: list[str] = []
    settings = [Setting(2, 0.0, 21), Setting(2, 0.8, 21)]
    result = bench_speculative(
        TINY, params, PROMPTS, {"self": draft}, settings, out=tmp_path / "a.json", say=said.append
    )
    assert json.loads((tmp_path / "a.json").read_text()) == result
    assert [row["temperature"] for row in result["rows"]] == [0.0, 0.8]
    for row in result["rows"]:
        assert (row["K"], row["batch"], row["prompts"], row["mismatches"]) == (3, 2, 4, 0)
        assert row["acceptance_length"] == 4.0 and row["accepted"] == [1.0] * 3
        assert row["straggling"] == 0.0 and row["near_ties"] is None
        assert row["ratio"] == row["tokens_per_s"] / row["plain_tokens_per_s"]
    assert said[0].startswith("batch 2, temperature 0, self: 4.00 tokens a pass, ")


def test_lengths_are_those_of_generation(params):
    setting, draft = Setting(4, 0.0, 30), NGram(2)
    (row,) = bench_speculative(TINY, params, PROMPTS, {"ngram": draft}, [setting])["rows"]
    found = generate(TINY, params, PROMPTS, max_new_tokens=30, draft=draft)
    assert found.acceptance_length is not None
    passes = [29 / length for length in found.acceptance_length]
    assert row["acceptance_length"] == pytest.approx(4 * 29 / sum(passes))
    assert row["straggling"] == pytest.approx(1 - sum(passes) / (4 * max(passes)))


def test_the_fastest_is_chosen(params, monkeypatch):
    """By a clock that gives each call the seconds that it is to take."""
    seconds = {None: 4.0, 2: 2.0, 5: 8.0}

    def batch(config: Any, params: Any, prompts: Any, first: int, room: int, draft: Any, _: Any):
        ones, taken = np.ones(len(prompts), int), seconds[draft and draft.count]
        counts = np.zeros((len(prompts), draft.count if draft else 0), int)
        return speculative.Run([[1, 2]] * len(prompts), ones, counts, ones, taken, taken)

    monkeypatch.setattr(speculative, "_batch", batch)
    drafters = {"short": NGram(2), "long": NGram(5)}
    result = bench_speculative(TINY, params, PROMPTS, drafters)
    assert [row["ratio"] for row in result["rows"]] == [2.0, 0.5]
    assert [row["pass_cost"] for row in result["rows"]] == [0.5, 2.0]
    (choice,) = result["choices"]
    assert choice == {"batch": 1, "temperature": 0.0, "choice": "short", "plain_differs": 0}
    seconds[2] = 5.0
    assert bench_speculative(TINY, params, PROMPTS, drafters)["choices"][0]["choice"] == "off"


def test_other_tokens_are_counted(params, monkeypatch):
    run = speculative.run_all

    def spoiled(config: Any, params: Any, prompts: Any, draft: Any, setting: Any) -> Any:
        found = run(config, params, prompts, draft, setting)
        if draft is not None:
            last = (found.tokens[1][-1] + 1) % TINY.vocab_size
            found.tokens[1][-1] = last
        return found

    monkeypatch.setattr(speculative, "run_all", spoiled)
    config = replace(TINY, dtype="bfloat16")
    setting = [Setting(4, 0.0, 4)]
    (row,) = bench_speculative(config, params, PROMPTS, {"ngram": NGram(2)}, setting)["rows"]
    assert row["mismatches"] >= 1 and row["near_ties"] < row["mismatches"]


def test_what_batches_change_in_plain_generation_is_counted(params, monkeypatch):
    """Beside the first batch size of the same temperature; here the bigger one changes a prompt."""
    run = speculative.run_all

    def rounded(config: Any, params: Any, prompts: Any, draft: Any, setting: Any) -> Any:
        found = run(config, params, prompts, draft, setting)
        found.tokens[0][-1] += setting.batch == 3
        return found

    monkeypatch.setattr(speculative, "run_all", rounded)
    settings = [Setting(1, 0.0, 4), Setting(1, 0.7, 4), Setting(3, 0.0, 4)]
    found = bench_speculative(TINY, params, PROMPTS, {"ngram": NGram(2)}, settings)["choices"]
    assert [choice["plain_differs"] for choice in found] == [0, 0, 1]


def test_too_few_prompts_for_a_batch(params):
    with pytest.raises(UserError, match="a batch of 8 needs as many prompts, and there are 4"):
        bench_speculative(TINY, params, PROMPTS, {"ngram": NGram()}, [Setting(8)])


def test_prompts_come_in_the_chat_template(tiny_model, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"turns": ["what is it", "and then"]}\n{"prompt": "why"}\n')
    plain = tiny_model.tokenizer
    expected = [plain.encode("what is it"), plain.encode("why")]
    assert prompt_ids(tiny_model, str(file)) == expected
    chat = copy.deepcopy(plain)
    chat.chat_template = "{% for one in messages %}so {{ one['content'] }} is{% endfor %}"
    found = prompt_ids(replace(tiny_model, tokenizer=chat), str(file))
    texts = ["so what is it is", "so why is"]
    assert found == [plain.encode(text, add_special_tokens=False) for text in texts]
    none = tmp_path / "none.json"
    none.write_text("[]")
    with pytest.raises(UserError, match="holds no prompts"):
        prompt_ids(tiny_model, str(none))


def test_the_command(tiny_model, tmp_path, monkeypatch, capsys):
    for load in ("jaxopt_models.load", "jaxopt_models.speculative.named.load"):
        monkeypatch.setattr(load, lambda name, dtype=None: tiny_model)
    monkeypatch.setattr("jaxopt_models.speculative.named.resolve", lambda name: tmp_path / name)
    (tmp_path / "p.txt").write_text("one is one\ntwo is two\nthree is three\n")
    command = ["bench", "speculative", "tiny", "--prompts", str(tmp_path / "p.txt")]
    options = ["--draft", "ngram", "--draft", "small", "--draft-tokens", "2", "--new-tokens", "8"]
    more = ["--batch", "2", "--count", "2", "--out", str(tmp_path / "s.json")]
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", *command, *options, *more])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr().out
    assert not stop.value.code and "batch 2, temperature 0: choose " in printed
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["drafter"] for row in rows] == ["ngram, K = 2", "small, K = 2"]
    assert [row["mismatches"] for row in rows] == [0, 0]
