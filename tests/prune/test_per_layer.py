"""A choice for each layer: scores are of single changes, the mixture is the best of all."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, params_of, random_importance, tokens

from jaxopt_models import tree
from jaxopt_models.models.model import Model
from jaxopt_models.prune.candidates import Candidate
from jaxopt_models.prune.choose import Target
from jaxopt_models.prune.per_layer import Block, blocks, mixtures, score
from jaxopt_models.prune.run import prune
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.sizes import Prices, cost_of, grids, sizes_of
from jaxopt_models.prune.slicing import slice_model
from jaxopt_models.report_pruning import kept_text


def _offered(name: str, axes: list[Any], widths: int = 2, uniform: bool = False):
    config, params = CONFIGS[name], params_of(name)
    whole = sizes_of(config, params)
    numbers = grids(config, whole, axes, least=0.25, multiple=4)
    return whole, numbers, blocks(config, numbers, widths, uniform)


def test_each_layer_is_offered_what_it_has():
    whole, _, offered = _offered("qwen3_moe", ["layers", "heads", "neurons", "experts"], 1)
    attention = {"groups": 2, "heads": 1}
    routed = {"experts": 2, "expert_neurons": whole["expert_neurons"]}
    assert [one.kept for one in offered[0]] == [attention, routed, None]
    assert [one.kept for one in offered[1]] == [attention, {"neurons": 12}, None]
    assert [one.layer for own in offered for one in own] == [0] * 3 + [1] * 3 + [2] * 3
    _, _, gone = _offered("tied", ["layers", "heads"], uniform=True)
    assert [[one.kept for one in own] for own in gone] == [[None]] * 3
    _, _, wide = _offered("tied", ["neurons"], widths=3)
    assert [one.kept for one in wide[2]] == [{"neurons": n} for n in (12, 24, 36)]


@pytest.mark.parametrize("name", ["tied", "qwen3_moe"])
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_no_mixture_within_the_budget_has_a_lower_score(name, share):
    axes = ["layers", "heads", "neurons"] + (["experts"] if name == "qwen3_moe" else [])
    config, params, rng = CONFIGS[name], params_of(name), np.random.default_rng(7)
    whole, numbers, offered = _offered(name, axes, 1)
    numbers["layers"] = (2, 3)
    scored = [dataclasses.replace(one, kl=float(rng.random())) for own in offered for one in own]
    costs = Prices.of(config, params, "parameters")
    budget = int(share * costs.of_whole)
    scores = random_importance(name)

    def of_layer(layer: int) -> list[Any]:
        own: list[Any] = [one for one in scored if one.layer == layer]
        heads, fed = (
            [({}, 0.0)] + [(one.kept, one.kl) for one in own if one.kept and set(one.kept) & axes]
            for axes in ({"heads"}, {"neurons", "experts"})
        )
        both = [({**a, **f}, p + q) for (a, p), (f, q) in itertools.product(heads, fed)]
        return both + [(None, one.kl) for one in own if one.kept is None]

    def cost(layers) -> int:
        kept = [(i, own) for i, (own, _) in enumerate(layers) if own is not None]
        return costs.of_outside(whole) + sum(costs.of_layer(i, whole | own) for i, own in kept)

    fitting = [
        (sum(kl for _, kl in layers), layers)
        for layers in itertools.product(*map(of_layer, range(3)))
        if cost(layers) <= budget and sum(own is None for own, _ in layers) <= 1
    ]
    found = mixtures(config, costs, numbers, scored, budget)
    everything = [one for one in fitting if all(own is not None for own, _ in one[1])]
    for candidate, possible in zip(found, [fitting, everything], strict=False):
        _, best = min(possible, key=lambda one: one[0])
        assert candidate.dropped == tuple(i for i, (own, _) in enumerate(best) if own is None)
        assert candidate.cost == cost(best) <= budget
        _, cut = slice_model(config, params, candidate.masks(scores))
        assert cost_of(cut, "parameters") == candidate.cost
    assert len(found) == 1 + bool(found[0].dropped and everything)


def test_what_does_not_fit_is_no_mixture():
    config, params = CONFIGS["tied"], params_of("tied")
    _, numbers, offered = _offered("tied", ["neurons"])
    scored = [dataclasses.replace(one, kl=1.0) for own in offered for one in own]
    costs = Prices.of(config, params, "parameters")
    assert mixtures(config, costs, numbers, scored, costs.of_outside(costs.whole) + 10) == []


def test_scores_are_of_one_change_alone():
    idle = tree.map_with_path(
        lambda path, x: x * 0 if path.startswith("layers/1/mlp/down") else x, params_of("tied")
    )
    whole, _, offered = _offered("tied", ["layers", "neurons"], 1)
    scores, text = random_importance("tied"), [tokens(2)]
    every = [one for own in offered for one in own]
    kls = score(CONFIGS["tied"], idle, text, every, scores, dict(whole))
    found = {(one.layer, one.kept is None): kl for one, kl in zip(every, kls, strict=True)}
    assert found[1, False] == pytest.approx(0, abs=1e-6)
    assert min(found[0, False], found[2, False], found[1, True]) > 1e-4


def _half_idle() -> Model:
    """In layer 0, three of four neurons are never on."""

    def leaf(path: str, x: jax.Array) -> jax.Array:
        if path != "layers/0/mlp/gate_proj/weight":
            return x
        return jnp.where(jnp.arange(x.shape[0])[:, None] % 4 == 0, x, 0.0)

    return Model(CONFIGS["tied"], tree.map_with_path(leaf, params_of("tied")))


def test_layers_of_their_own_widths_win_where_they_lose_less():
    model, text = _half_idle(), [tokens(2, seed=i) for i in range(2)]
    whole = cost_of(model.params, "parameters")
    fields: dict[str, Any] = {
        "budget": {"parameters": whole - 36 * 3 * 32},
        "axes": ["neurons"],
        "multiple": 4,
        "batch": 2,
        "search": {"candidates": 0, "first": 2, "least": 0.25, "per_layer": {"widths": 3}},
    }
    settings = PruneSettings.model_validate(fields | {"uniform": False})
    config, params, report = prune(model, settings, text, [tokens(2, seed=9)])
    assert report.chosen is not None and report.chosen.name == "per layer"
    widths = [layer["mlp"]["up_proj"]["weight"].shape[0] for layer in params["layers"]]
    assert widths == [12, 48, 48] and config.intermediate_size == 48
    assert report.chosen.cost == report.parameters[1] == report.budget
    assert report.pruned.kl == pytest.approx(0, abs=1e-5)
    assert report.uniform is not None and report.uniform.kl > 1e-4
    assert kept_text(report.chosen) == "neurons 12-48"
    said = report.as_dict()
    assert len(said["blocks"]) == 9 and said["blocks"][0]["keep"] == {"neurons": 12}
    assert said["chosen"]["keep"] == {"neurons": (12, 48, 48)}
    with pytest.raises(ValueError, match="'axes' does not name them; add 'layers', or let widths"):
        PruneSettings.model_validate(fields)


def test_a_block_is_named_by_what_it_keeps():
    assert Block(3, {"heads": 2}, 0.5).as_dict() == {"layer": 3, "keep": {"heads": 2}, "kl": 0.5}
    left = Candidate("x", Target(neurons=(8, 8, 16)), (2,), 0)
    assert kept_text(left) == "neurons 8, without layers 2"
