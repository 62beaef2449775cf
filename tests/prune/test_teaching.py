"""Finalists learn for a few steps, and the choice is by what they lose behind that."""

from typing import Any

import jax
import numpy as np
import pytest
from pruned_models import CONFIGS, params_of, tokens

from jaxopt_models import tree
from jaxopt_models.data import token_batches
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.models.model import Model
from jaxopt_models.progress import silent
from jaxopt_models.prune.damage import Damage
from jaxopt_models.prune.masks import drop_layers, keep_all
from jaxopt_models.prune.run import prune
from jaxopt_models.prune.settings import Distill, PruneSettings
from jaxopt_models.prune.slicing import slice_model
from jaxopt_models.prune.teaching import School, rows_between
from jaxopt_models.report_pruning import candidates_table

ROWS = np.asarray(tokens(8, seed=3))


@pytest.fixture(scope="module")
def model() -> Model:
    """As sure of its predictions as trained models are."""
    params = tree.map_with_path(
        lambda path, x: 4 * x if path.startswith("embed") else x, params_of("tied")
    )
    return Model(CONFIGS["tied"], params, source="tiny")


def _school(model: Model, steps: int = 30) -> School:
    how = Distill(steps=steps, batch=4, learning_rate=3e-3)
    return School.of(model, how, 0, ROWS, [tokens(2)], silent)


def _without(model: Model, layer: int) -> tuple[Any, Any]:
    masks = drop_layers(keep_all(model.config, model.params), [layer])
    return slice_model(model.config, model.params, masks)


def test_a_lesson_brings_the_candidate_closer_and_is_the_same_each_time(model):
    school, again = _school(model), _school(model)
    config, params = _without(model, 1)
    before, taught = school.examine(config, params), school.teach(config, params)
    assert school.examine(config, taught).kl < 0.9 * before.kl
    same = again.teach(config, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), taught, same))
    # Another layer less is the same shape: one step serves both.
    school.teach(*_without(model, 0))
    assert len(school.steps) == 1
    assert school.steps[config]._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


class _Numbers:
    """A tokenizer whose text is a count: "90" has the ids 0 to 89."""

    def __init__(self, bos: int | None = None):
        self.bos_token_id = bos

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = False) -> list[int]:
        if add_special_tokens:
            return [5 if self.bos_token_id is None else self.bos_token_id]
        return list(range(int(text)))


@pytest.mark.parametrize("bos", [None, 63])
def test_lessons_are_of_text_that_nothing_is_scored_on(model, bos):
    numbers = Model(model.config, model.params, _Numbers(bos), "tiny")
    rows = rows_between(numbers, "90", count=4, length=6)
    scored = np.concatenate(token_batches(numbers, "90", 4, 6, 2))
    used = [row[-5:] if bos else row for row in (*scored, *rows)]
    flat = np.concatenate(used)
    assert len(set(flat.tolist())) == len(flat) and rows.shape == (len(rows), 6)
    # Less than a row is left of each gap.
    assert 90 - len(flat) < 4 * len(used[0]) and rows.dtype == np.int32
    assert bos is None or (rows[:, 0] == 63).all()
    with pytest.raises(UserError, match="search.distill: the text has 24 tokens.*longer text"):
        rows_between(Model(model.config, None, _Numbers()), "24", count=4, length=6)


SETTINGS = PruneSettings.model_validate(
    {"budget": {"parameters": 0.85}, "axes": ["layers", "neurons"], "multiple": 8, "batch": 2}
    | {"search": {"candidates": 0, "finalists": 2, "distill": {"steps": 2, "batch": 4}}}
)


def test_the_choice_is_behind_the_lesson_and_the_result_is_what_was_taught(model, monkeypatch):
    learnt: list[float] = []

    def teach(self, config, params):
        return jax.tree.map(lambda x: x * 0.75, params)

    def examine(self, config, params):
        learnt.append(1.0 / (1 + len(learnt)))  # the later the better
        return Damage(2.0, learnt[-1], 0.5)

    monkeypatch.setattr(School, "teach", teach)
    monkeypatch.setattr(School, "examine", examine)
    text, other = [tokens(2, seed=i) for i in range(2)], [tokens(2, seed=9)]
    config, params, report = prune(model, SETTINGS, text, other, training=ROWS)
    finalists = [one for one in report.candidates if one.taught is not None]
    assert len(finalists) == len(learnt) >= 2
    assert [one.taught.kl for one in finalists if one.taught] == sorted(learnt)
    assert report.candidates[: len(finalists)] == tuple(finalists)
    assert finalists[0].damage.kl == max(one.damage.kl for one in finalists)
    assert report.chosen is not None and report.chosen == finalists[0].candidate
    norm = np.asarray(model.params["norm"]["weight"])
    assert np.allclose(params["norm"]["weight"], 0.75 * norm)
    original = reference(model.config, model.params, other)
    assert report.pruned == evaluate(config, params, other, original)
    if report.chosen.name != "uniform":
        assert report.uniform is not None
    rows = report.as_dict()["candidates"]
    assert rows[0]["taught_kl"] == min(learnt)
    assert str(candidates_table(report).columns[-1].header) == "KL, taught"
    with pytest.raises(UserError, match="search.distill needs rows to learn from"):
        prune(model, SETTINGS, text, other)
