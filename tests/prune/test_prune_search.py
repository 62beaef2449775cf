"""Candidates cost what they are said to and cannot be larger; halving finds who loses least."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import pytest
from pruned_models import CONFIGS, params_of, random_importance, tokens

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.prune.candidates import BASELINE, Candidate, candidates, explicit
from jaxopt_models.prune.choose import Target
from jaxopt_models.prune.damage import Damage, damage
from jaxopt_models.prune.search import Scored, frontier, halve, rounds
from jaxopt_models.prune.sizes import Prices, cost_of, grids, sizes_of
from jaxopt_models.prune.slicing import slice_model


def _half(params):
    """Layers in two bytes, so that bytes are no multiple of parameters."""
    return tree.map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if path.startswith("layers") else x, params
    )


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3", "gemma3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("unit", ["parameters", "bytes"])
def test_costs_are_those_of_the_sliced_model(name, unit):
    config, params = CONFIGS[name], _half(params_of(name))
    prices, whole = Prices.of(config, params, unit), sizes_of(config, params)
    sizes: Any
    assert prices.of_sizes(whole, ()) == cost_of(params, unit)
    kept = {"hidden": 20, "neurons": 12, "heads": 1, "groups": 1}
    kept |= {"experts": 3, "expert_neurons": 10}
    sizes = {axis: kept.get(axis, size) for axis, size in whole.items()}
    target = Target(**{a: n for a, n in sizes.items() if a != "layers"})
    for dropped in [(), (0,), (1, 2)]:
        masks = Candidate("x", target, dropped, 0).masks(random_importance(name))
        _, cut = slice_model(config, params, masks, uniform=True)
        assert prices.of_sizes(sizes, dropped) == cost_of(cut, unit)


@pytest.mark.parametrize("name", ["tied", "qwen3_moe"])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_candidates_fit_and_could_not_keep_a_step_more(name, share):
    config, params = CONFIGS[name], params_of(name)
    prices, whole = Prices.of(config, params, "parameters"), sizes_of(config, params)
    axes: list[Any] = [axis for axis in whole if axis != "groups"]
    numbers = grids(config, whole, axes, least=0.3, multiple=2)
    budget = int(share * cost_of(params, "parameters"))
    found = candidates(prices, numbers, random_importance(name), budget, count=12, seed=3)
    assert found[0].name == BASELINE and len({one.name for one in found}) == len(found)
    assert len({(one.target, one.dropped) for one in found}) == len(found) >= 5
    assert found == candidates(prices, numbers, random_importance(name), budget, 12, seed=3)
    other = candidates(prices, numbers, random_importance(name), budget, 12, seed=4)
    assert share > 0.8 or found != other  # with little to remove, both find all there are
    for one in found:
        given: Any = {a: getattr(one.target, a) or size for a, size in whole.items()}
        sizes: Any = given | {"layers": whole["layers"] - len(one.dropped)}
        assert one.cost == prices.of_sizes(sizes, one.dropped) <= budget
        only: Any = one.name.removesuffix(" only")
        for axis in [only] if only in axes else axes:
            assert sizes[axis] in numbers[axis]
            if axis != "layers" and sizes[axis] < whole[axis]:
                place = numbers[axis].index(sizes[axis])
                more: Any = sizes | {axis: numbers[axis][place + 1]}
                assert prices.of_sizes(more, one.dropped) > budget


def test_depth_alone_tries_every_run_of_layers():
    config, params = CONFIGS["tied"], params_of("tied")
    prices, whole = Prices.of(config, params, "parameters"), sizes_of(config, params)
    scores = dataclasses.replace(random_importance("tied"), layers=jnp.asarray([0.2, 0.9, 0.1]))
    numbers = grids(config, whole, ["layers"], least=0.3, multiple=1)
    one_layer = (
        cost_of(params, "parameters") - prices.of_sizes({**whole, "layers": 2}, (0,))
    ) * 1.5
    budget = int(cost_of(params, "parameters") - one_layer)
    found = candidates(prices, numbers, scores, budget, count=5)
    assert [one.dropped for one in found] == [(0, 2), (0, 1), (1, 2)]  # by influence, then runs
    assert explicit(Target(layers=1, neurons=8), scores).dropped == (0, 2)


def test_experts_stay_as_many_as_a_token_needs():
    config, params = CONFIGS["mixtral"], params_of("mixtral")
    numbers = grids(config, sizes_of(config, params), ["experts", "hidden"], 0.1, 12)
    assert numbers["experts"] == (2, 3, 4) and numbers["hidden"] == (12, 24, 32)
    assert numbers["layers"] == (3,) and "neurons" not in numbers


def test_rounds_halve_candidates_and_double_text():
    assert rounds(32, 16, 1, 4) == [(32, 1), (16, 2), (8, 4), (4, 8), (4, 16)]
    assert rounds(3, 16, 2, 4) == [(3, 2), (3, 16)]
    assert rounds(9, 1, 4, 2) == [(9, 1)]
    assert rounds(5, 4, 1, 1) == [(5, 1), (3, 2), (2, 4)]


def test_halving_finds_the_best_and_keeps_the_baseline():
    config, params = CONFIGS["tied"], params_of("tied")
    scores, text = random_importance("tied"), [tokens(2, seed=i) for i in range(4)]
    # Layer 1 adds nothing, so to be without it costs nothing; neurons of layer 1 alike.
    idle = tree.map_with_path(
        lambda path, x: x * 0 if path.startswith("layers/1/") and x.ndim == 2 else x, params
    )
    named = {BASELINE: Target(hidden=8), "hidden": Target(hidden=20), "neurons": Target(neurons=24)}
    given = [Candidate(name, target, (), 0) for name, target in named.items()]
    given += [Candidate(f"layer {i}", Target(), (i,), 0) for i in range(3)]
    found = halve(
        config, idle, text, given, lambda one: one.masks(scores), finalists=2, always=[BASELINE]
    )
    assert found[0].candidate.name == "layer 1" and found[0].damage.kl == pytest.approx(0, abs=1e-6)
    by_name = {one.candidate.name: one for one in found}
    assert len(found) == len(given) and [one.windows for one in found] == [8, 8, 8, 2, 2, 2]
    kls = [one.damage.kl for one in found]
    assert kls[:3] == sorted(kls[:3]) and kls[3:] == sorted(kls[3:])
    # The mean over rounds is the mean over all text.
    (whole,) = damage(config, idle, text, [given[0].masks(scores)])
    assert by_name[BASELINE].damage.kl == pytest.approx(whole.kl, rel=1e-5)
    assert by_name[BASELINE].damage.nll == pytest.approx(whole.nll, rel=1e-5)


def test_parameters_that_go_with_a_width_are_used_for_it():
    config, params, text = CONFIGS["tied"], params_of("tied"), [tokens(2)]
    scores, asked = random_importance("tied"), []
    given = [Candidate("a", Target(hidden=20), (), 0), Candidate("b", Target(neurons=24), (), 0)]
    louder = tree.replace(params, {"norm/weight": params["norm"]["weight"] * 1.5})

    def changed(masks):
        asked.append(int(masks.hidden.sum()))
        return louder

    found = halve(config, params, text, given, lambda one: one.masks(scores), changed=changed)
    by_name = {one.candidate.name: one.damage.kl for one in found}
    masks = [one.masks(scores) for one in given]
    (narrow,) = damage(config, louder, text, masks[:1], params)
    (wide,) = damage(config, params, text, masks[1:])
    assert asked == [20] and by_name == {"a": narrow.kl, "b": wide.kl}


def test_the_frontier_is_what_nothing_beats():
    points = [(10, 3.0, 8), (12, 1.0, 8), (11, 2.0, 8), (12, 1.5, 8), (9, 0.1, 4), (13, 1.0, 8)]
    scored = [
        Scored(Candidate(str(i), Target(), (), cost), Damage(0.0, kl, 0.0), windows)
        for i, (cost, kl, windows) in enumerate(points)
    ]
    kept = frontier(scored)
    assert [one.candidate.cost for one in kept] == [10, 11, 12]
    most = [one for one in scored if one.windows == 8]
    for one, other in itertools.product(most, kept):
        better = one.candidate.cost <= other.candidate.cost and one.damage.kl < other.damage.kl
        assert not better


def test_budgets_without_candidates_are_refused():
    config, params = CONFIGS["tied"], params_of("tied")
    prices, whole = Prices.of(config, params, "parameters"), sizes_of(config, params)
    numbers, scores = grids(config, whole, ["layers"], 0.5, 1), random_importance("tied")
    total = cost_of(params, "parameters")
    with pytest.raises(UserError, match=f"has {total} parameters already"):
        candidates(prices, numbers, scores, total, 1)
    with pytest.raises(UserError, match="the smallest candidate has .* and the budget is 10 p"):
        candidates(prices, numbers, scores, 10, 1)
    with pytest.raises(UserError, match="no experts to remove; choose among layers, hidden"):
        grids(config, whole, ["experts"], 0.5, 1)
    with pytest.raises(UserError, match="keep.layers: cannot keep 4 of 3"):
        explicit(Target(layers=4), scores)
    thin = params | {"layers": (*params["layers"][:2], _narrow(params["layers"][2]))}
    with pytest.raises(UserError, match="layers have 24 to 48 neurons.*keep"):
        sizes_of(config, thin)


def _narrow(layer):
    mlp = layer["mlp"]
    cut = {name: {"weight": mlp[name]["weight"][:24]} for name in ("gate_proj", "up_proj")}
    return layer | {"mlp": cut | {"down_proj": {"weight": mlp["down_proj"]["weight"][:, :24]}}}
