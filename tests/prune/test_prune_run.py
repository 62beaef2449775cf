"""Pruning by settings: what is asked for, what comes out, and what is said about it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, params_of, tokens

import jaxopt_models
from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward
from jaxopt_models.prune.importance import importance
from jaxopt_models.prune.run import prune
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.sizes import cost_of

RUNS = Path(jaxopt_models.__file__).parent / "configs" / "runs"


def _settings(**fields: Any) -> PruneSettings:
    return PruneSettings.model_validate({"multiple": 4, "batch": 2} | fields)


@pytest.fixture(scope="module")
def texts():
    return [tokens(2, seed=i) for i in range(2)], [tokens(2, seed=9)]


@pytest.fixture(scope="module")
def model():
    """Its layer 1 adds nothing."""
    params = tree.map_with_path(
        lambda path, x: x * 0 if path.startswith("layers/1/") and x.ndim == 2 else x,
        params_of("tied"),
    )
    return Model(CONFIGS["tied"], params)


def test_a_search_finds_neurons_that_do_nothing(texts):
    params = tree.map_with_path(
        lambda path, x: x.at[::2].set(0.0) if path.endswith("gate_proj/weight") else x,
        params_of("tied"),
    )
    model = Model(CONFIGS["tied"], params)
    search = {"candidates": 4, "first": 2, "least": 0.5}
    settings = _settings(budget={"parameters": 0.8}, search=search, axes=("hidden", "neurons"))
    config, params, report = prune(model, settings, *texts)
    assert report.chosen is not None and report.chosen.name == "neurons only"
    assert 24 <= config.intermediate_size < 48
    assert report.chosen.target.neurons == config.intermediate_size
    assert len(params["layers"]) == 3 and config.hidden_size == 32
    whole = cost_of(model.params, "parameters")
    assert report.parameters == (whole, cost_of(params, "parameters"))
    assert report.budget is not None and report.budget == int(0.8 * whole)
    assert report.chosen.cost == report.parameters[1] <= report.budget
    assert all(one.candidate.cost <= report.budget for one in report.candidates)
    # What is reported is what the result does, on the other text.
    text = texts[1]
    measured = evaluate(config, params, text, reference(model.config, model.params, text))
    assert report.pruned == measured and measured.kl == pytest.approx(0, abs=1e-5)
    assert report.pruned.perplexity == pytest.approx(report.original.perplexity, rel=1e-4)
    uniform = next(one for one in report.candidates if one.candidate.name == "uniform")
    assert report.candidates[0].damage.kl < uniform.damage.kl
    assert report.uniform is not None and report.uniform.kl > 1e-3
    said = json.loads(json.dumps(report.as_dict()))
    assert said["chosen"]["name"] == "neurons only" and len(said["candidates"]) == len(
        report.candidates
    )
    assert said["evaluation"]["uniform"]["kl"] == report.uniform.kl


def test_bytes_are_a_budget_and_norms_are_rescaled(model, texts):
    limit = int(0.7 * cost_of(model.params, "bytes"))
    fields = {"budget": {"bytes": limit}, "axes": ("hidden",), "rescale_norms": True}
    _, params, report = prune(model, _settings(**fields), *texts)
    assert report.chosen is not None and report.budget == limit
    assert report.bytes[1] == report.chosen.cost <= limit
    scores = importance(model.config, model.params, texts[0])
    kept = np.flatnonzero(report.chosen.masks(scores).hidden)
    factors = (
        np.asarray(params["norm"]["weight"]) / np.asarray(model.params["norm"]["weight"])[kept]
    )
    assert np.ptp(factors) < 1e-5 and abs(factors[0] - 1) > 1e-3


def test_what_is_to_be_kept_is_kept_and_zeros_come_on_top(model, texts):
    keep = {"layers": 2, "hidden": 20, "neurons": (24, 32, 24)}
    zeros = {"pattern": "2:4", "method": "wanda", "update": "exact"}
    settings = _settings(keep=keep, sparsity=zeros, uniform=False)
    config, params, report = prune(model, settings, *texts)
    assert config.num_layers == 2 and config.hidden_size == 20 and report.candidates == ()
    assert (
        report.chosen is not None
        and report.chosen.dropped == (1,)
        and report.uniform is None
        and report.budget is None
    )
    widths = [layer["mlp"]["up_proj"]["weight"].shape for layer in params["layers"]]
    assert widths == [(24, 20), (24, 20)]
    assert len(report.sparsity) == 14 and all(row.sparsity >= 0.5 for row in report.sparsity)
    assert report.parameters[1] == report.chosen.cost == cost_of(params, "parameters")
    assert bool(jnp.all(jnp.isfinite(forward(config, params, texts[1][0]))))


def test_zeros_alone_cut_nothing(model, texts):
    params_before = jax.tree.map(lambda x: x + 1e-3, model.params)
    dense = Model(model.config, params_before)
    config, params, report = prune(dense, _settings(sparsity={"pattern": 0.5}), *texts)
    assert config == model.config and report.chosen is None
    assert report.parameters[0] == report.parameters[1]
    q_proj = params["layers"][0]["self_attn"]["q_proj"]["weight"]
    assert float(jnp.mean(q_proj == 0)) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("windows: 3", "nothing is to be removed; give a 'budget', 'keep' or 'sparsity'"),
        ("budget: {parameters: 0.8}\nkeep: {layers: 2}", "leave out one of them"),
        ("budget: {}", "budget: give 'parameters', 'bytes' or 'latency', one of them"),
        ("budget: {bytes: 0.8, latency: 0.8}", "'bytes' or 'latency', one of them"),
        ("budget: {bytes: 0.8, context: 512}", "'context' goes with 'latency'; leave it out"),
        ("budget: {parameters: -1}", "budget.parameters: Input should be greater than 0"),
        ("budget: {parameters: .inf}", "budget.parameters: Input should be a finite number"),
        ("budget: {flops: 0.1}", "unknown key 'budget.flops'; remove it or correct"),
        ("budget: {parameters: 0.8}\naxes: [depth]", "axes.0: Input should be 'layers', 'hidden'"),
        ("budget: {parameters: 0.8}\naxes: [layers, layers]", "names one twice"),
        ("keep: {}", "'keep' is empty"),
        ("keep: {layers: 2}\naxes: [layers]", "'axes' is for a search; give a 'budget'"),
        ("sparsity: {pattern: '4:2'}", "sparsity '4:2' is unknown; give n:m"),
        ("sparsity: {pattern: '2:4', method: wanda, update: obs}", "belongs to method 'sparsegpt'"),
        ("- budget", "expected keys such as 'budget'"),
        ("a: [", "cannot be read"),
    ],
)
def test_mistakes_in_settings(tmp_path, fields, says):
    file = tmp_path / "prune.yaml"
    file.write_text(fields)
    with pytest.raises(UserError) as error:
        PruneSettings.load(file)
    assert says in str(error.value) and str(error.value).startswith(f"pruning {file}: ")


def test_settings_are_overridden(tmp_path):
    file = tmp_path / "prune.yaml"
    file.write_text("budget: {parameters: 0.8}")
    settings = PruneSettings.load(file, ["search.first=2", "budget.parameters=1000", "windows=3"])
    assert settings.search.first == 2 and settings.windows == 3 and settings.budget is not None
    assert settings.budget.of(5000) == 1000 and settings.budget.unit == "parameters"
    zeros = PruneSettings.model_validate({"sparsity": {"pattern": "2:4", "method": "wanda"}})
    for saved in (settings, zeros):
        assert PruneSettings.model_validate(saved.model_dump(mode="json")) == saved
    assert zeros.sparsity is not None and zeros.sparsity.sparsity().update == "none"


@pytest.mark.parametrize("file", sorted(RUNS.glob("prune*.yaml")), ids=lambda file: file.stem)
def test_presets_of_pruning_go_with_the_command_above_them(file):
    words = file.read_text().splitlines()[0].split()
    assert words[1:3] == ["jaxopt-models", "prune"] and f"configs/runs/{file.name}" in words
    assert PruneSettings.load(file).budget is not None
