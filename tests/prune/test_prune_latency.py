"""A budget of latency: times of parts add up to those of models. No test measures time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, params_of, tokens

from jaxopt_models import decode_time
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init
from jaxopt_models.prune.latency import Times, parts, wall_clock
from jaxopt_models.prune.prune_report import PruneReport
from jaxopt_models.prune.run import prune
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.sizes import grids, sizes_of
from jaxopt_models.report_pruning import candidates_table, totals_line


def _clock(config: ModelConfig, params: Any = None) -> float:
    """Seconds that add up over layers and are linear in each width, more of those that see all."""
    width = config.hidden_size
    total = 1e-4 + 2e-6 * width
    for i, kind in enumerate(config.attention_kinds):
        fed = config.intermediate_size
        if i in config.moe_layers:
            fed = 3 + config.num_experts * config.expert_size
        keys = (2 if kind == "full" else 1) * config.num_kv_heads
        total += 1e-5 + 1e-7 * width * (config.num_heads + fed) + 3e-6 * keys
    return total


def _times(name: str, clock: Any = _clock, original: float | None = None) -> Times:
    config = CONFIGS[name]
    whole = sizes_of(config, params_of(name))
    numbers = grids(config, whole, list(whole), least=0.25, multiple=4)
    known = {part: clock(part) for part in parts(config, whole, numbers)}
    return Times.of(config, whole, numbers, known.__getitem__, original or clock(config))


@pytest.mark.parametrize("name", ["tied", "gemma3", "qwen3_moe", "mixtral"])
def test_what_adds_up_and_is_linear_between_knots_is_predicted(name):
    times, config = _times(name), CONFIGS[name]
    assert times.scale == pytest.approx(1)
    smaller: Any = {"hidden": 20, "neurons": 28, "heads": 1, "groups": 1}
    smaller |= {"experts": 3, "expert_neurons": 12}
    kept: Any = {axis: smaller.get(axis, size) for axis, size in times.whole.items()}
    for dropped in [(), (1,), (0, 2)]:
        stay = [i for i in range(3) if i not in dropped]
        small = ModelConfig.from_json(
            config.to_json()
            | {"hidden_size": 20, "num_heads": 1, "num_kv_heads": 1, "num_layers": len(stay)}
            | {"intermediate_size": kept.get("neurons", 0), "num_experts": kept.get("experts", 0)}
            | {"expert_size": kept.get("expert_neurons", 0)}
            | {"attention_kinds": [config.attention_kinds[i] for i in stay]}
            | {"moe_layers": [at for at, i in enumerate(stay) if i in config.moe_layers]}
        )
        found = times.of_sizes(kept, dropped)
        assert found == pytest.approx(1e9 * _clock(small), abs=4)  # a rounding for each part
    assert times.text(1234567) == "1.235 ms a step"


def test_parts_are_scaled_to_the_original():
    plain, scaled = _times("tied"), _times("tied", original=1.5 * _clock(CONFIGS["tied"]))
    assert scaled.scale == pytest.approx(1.5)
    assert scaled.of_whole == pytest.approx(1.5 * plain.of_whole, abs=4)


def test_layers_that_a_clock_cannot_see_cost_nothing():
    faster = _times("tied", lambda config: 1e-3 - 1e-6 * config.num_layers, original=1e-3)
    assert all(faster.of_layer(i, faster.whole) == 0 for i in range(3))


def _pruned(latency: float, clock: Any, **search: Any) -> tuple[ModelConfig, Any, PruneReport]:
    """The model with three layers and its feed-forward networks, cut to a time by a clock."""
    settings = PruneSettings.model_validate(
        {"budget": {"latency": latency}, "axes": ["layers", "neurons"], "multiple": 8, "batch": 2}
        | {"search": {"candidates": 2, "finalists": 2, "first": 2, "least": 0.5} | search}
    )
    text = [tokens(2, seed=i) for i in range(2)]
    model = Model(CONFIGS["tied"], params_of("tied"))
    return prune(model, settings, text, text[:1], clock=clock)


@pytest.mark.parametrize("latency", [0.85, 620.0])
def test_candidates_keep_to_the_time_and_finalists_are_timed_whole(latency):
    asked = []
    factor = 1 if latency < 1 else 1e3  # a number of milliseconds is 1 or more

    def clock(config, params):
        asked.append(len(params["layers"]))
        slower = 1.5 if len(params["layers"]) == 2 else 1.0  # than parts say
        return factor * slower * _clock(config)

    config, params, report = _pruned(latency, clock)
    whole = factor * 1e9 * _clock(CONFIGS["tied"])
    limit = latency * (whole if latency < 1 else 1e6)
    assert report.unit == "nanoseconds" and report.budget == pytest.approx(limit, abs=2)
    assert report.latency is not None and report.latency.original == pytest.approx(whole, abs=4)
    assert 0 in asked and 4 in asked and report.latency.scale == pytest.approx(1)
    assert report.budget is not None
    assert all(one.candidate.cost <= report.budget for one in report.candidates)
    for one in report.candidates:
        timed = one.windows == 4
        assert (one.measured is not None) == timed
        slower = 1.5 if timed and len(one.candidate.dropped) == 1 else 1.0
        if timed:
            assert one.measured == pytest.approx(slower * one.candidate.cost, abs=10)
        assert one.over == (timed and slower > 1)
    assert {one.windows for one in report.candidates} == {2, 4}
    timed = [one.candidate for one in report.candidates if one.measured is not None]
    shapes = {(one.target, len(one.dropped)) for one in timed}
    whole_models = asked[len(asked) - len(shapes) :]  # behind parts and the original
    assert asked.count(3) == 1 + whole_models.count(3)
    assert report.chosen is not None and report.chosen == report.candidates[0].candidate
    assert config.num_layers == len(params["layers"])
    said = report.as_dict()
    assert said["latency"]["context"] == 1024 and "measured" in said["candidates"][0]
    assert "ms a step" in str(candidates_table(report).title)
    assert f"({report.chosen.cost / 1e6:,.3f} predicted)" in totals_line(report)


def test_finalists_over_the_budget_come_behind_those_within():
    """Whichever loses least by parts alone is not chosen if its time says otherwise; where all are
    over, the line for people says so."""

    def clock(config, params, slow=(2,)):
        slower = len(params["layers"]) in slow and config != CONFIGS["tied"]
        return (1.5 if slower else 1.0) * _clock(config)

    everything = {"finalists": 8, "first": 4}
    _, _, report = _pruned(0.85, clock, **everything)
    over = [one.over for one in report.candidates]
    assert over == sorted(over) and len(set(over)) == 2
    best = min(report.candidates, key=lambda one: (one.over, one.damage.kl))
    assert report.chosen == best.candidate and "over the budget" not in totals_line(report)
    _, _, report = _pruned(0.85, partial(clock, slow=(2, 3)), **everything)
    assert all(one.over for one in report.candidates)
    assert "predicted, over the budget, as all finalists are)" in totals_line(report)


def test_the_clock_decodes_whole_models_and_those_without_layers(monkeypatch):
    def seconds_per_turn(start, turns):
        for count in turns:
            states.append(start(count)())
        return 0.25

    states: list[Any] = []
    monkeypatch.setattr(decode_time, "seconds_per_turn", seconds_per_turn)
    config = CONFIGS["tied"]
    whole = sizes_of(config, params_of("tied"))
    (none,) = (
        p for p in parts(config, whole, {a: (n,) for a, n in whole.items()}) if not p.num_layers
    )
    for one in (config, none):
        params = init(one, jax.random.key(0), jnp.bfloat16)
        assert wall_clock(2, 64)(one, params) == 0.25
        assert bool(jnp.all(states[-1].done)) and states[-1].tokens.shape == (2, 64)
        assert np.asarray(states[-1].length).tolist() == [64, 64]
