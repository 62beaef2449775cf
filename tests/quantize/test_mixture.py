"""Scores written by hand: from budgets to recipes, with no model in sight."""

import itertools
import json
from typing import Any

import pytest

from jaxopt_models.errors import UserError
from jaxopt_models.quantize.kv import KVChoice
from jaxopt_models.quantize.mixture import Scores, to_yaml
from jaxopt_models.quantize.options import UNITS, CacheOption, Choice, Fixed, Group, Option
from jaxopt_models.quantize.recipe import Recipe

LAYERS = 3
# Name, matrices, weights, share of the sensitivity.
PARTS = [
    ("self_attn", ("q_proj", "k_proj", "v_proj"), 1536, 1.0),
    ("self_attn", ("o_proj",), 1024, 3.0),
    ("mlp", ("gate_proj", "up_proj"), 4096, 2.0),
    ("mlp", ("down_proj",), 2048, 7.0),
]
BITS = {"four": 4, "eight": 8, "original": 16}
SCORES = {"four": 0.01, "eight": 0.0007, "original": 0.0}
SPEED = {"four": 5, "eight": 4, "original": 9}
FOUR = {
    "weight": {"format": "int4", "block_size": 32},
    "rounding": {"method": "gptq", "damping": 0.02},
}
EIGHT = {"weight": "fp8", "activation": "fp8", "smooth": "smoothquant"}


def explicit(name: str, methods: dict[str, dict[str, Any]], skip: list[str]) -> Recipe:
    """A recipe whose rules name paths: a method for each of the names of matrices."""
    rules = [
        {"match": [f"layers/{i}/{part}/{n}/weight" for i in range(LAYERS)]} | methods[n]
        for part, names, _, _ in PARTS
        for n in names
        if n in methods
    ]
    return Recipe.model_validate({"name": name, "rules": rules, "skip": skip})


def scores(*, rows: int | None = 4, caches: tuple[CacheOption, ...] | None = None) -> Scores:
    every = [n for _, names, _, _ in PARTS for n in names]
    # In "eight", queries are another format than keys and values.
    eight = dict.fromkeys(every, EIGHT) | {"q_proj": {"weight": "int8"}}
    groups = []
    for i, (part, names, weights, share) in itertools.product(range(LAYERS), PARTS):
        options = [
            Option(
                candidate=name,
                score=SCORES[name] * share * (i + 1) ** 2,
                bits=BITS[name] * weights + 32 * len(names),
                nanoseconds=None if rows is None else SPEED[name] * weights,
            )
            for name in BITS
        ]
        paths = tuple(f"layers/{i}/{part}/{name}/weight" for name in names)
        groups.append(Group(name=paths[0], paths=paths, weights=weights, options=tuple(options)))
    return Scores(
        method="kl",
        candidates={
            "four": explicit("four", dict.fromkeys(every, FOUR), ["lm_head/*", "*/router/*"]),
            "eight": explicit("eight", eight, ["*/router/*", "lm_head/*", "layers/9/*"]),
            "original": None,
        },
        groups=tuple(groups),
        kv_cache=caches or (CacheOption(choice=None, score=0.0, bits=0, bits_a_token=4096),),
        fixed=Fixed(weights=512, bits=512 * 16, nanoseconds=100, other_bits=80000),
        rows=rows,
        device="abacus",
        signature="abc",
    )


CACHES = tuple(
    CacheOption(choice=KVChoice.model_validate(name) if name else None, **figures)
    for name, figures in {
        "": {"score": 0.0, "bits": 0, "bits_a_token": 4096},
        "fp8": {"score": 0.002, "bits": 64, "bits_a_token": 2048},
        "nvfp4": {"score": 0.05, "bits": 64, "bits_a_token": 1152},
    }.items()
)
RANGE = {
    "bits": (4.7, 5.9, 8.03, 16.1),
    "bytes": (28_000, 40_000, 70_000),
    "latency": (1.5e-4, 2e-4),
}
CASES = [(unit, budget) for unit, budgets in RANGE.items() for budget in budgets]


def spent(choice: Choice, unit: str) -> float:
    cost = getattr(choice, unit)
    assert cost is not None
    return cost


# Budgets


@pytest.mark.parametrize("unit, budget", CASES)
def test_a_budget_is_never_exceeded(unit, budget):
    assert spent(scores().choose(budget, unit), unit) <= budget


@pytest.mark.parametrize("unit, budget", CASES)
def test_what_a_choice_costs_is_a_budget_for_the_same_choice(unit, budget):
    """Of the division by weights, bytes or seconds no bit is lost."""
    choice = scores().choose(budget, unit)
    again = scores().choose(spent(choice, unit), unit)
    assert again.score == choice.score and spent(again, unit) == spent(choice, unit)


def test_costs_are_counted_over_the_whole_model():
    choice = scores().choose(16.5)
    assert set(choice.picks) == {"original"} and choice.score == 0
    weights = LAYERS * (1536 + 1024 + 4096 + 2048)
    bits = 16 * weights + 32 * 7 * LAYERS + 512 * 16
    assert choice.bits == bits / (weights + 512)
    assert choice.bytes == (bits + 80000) // 8
    assert choice.latency == pytest.approx((9 * weights + 100) / 1e9, rel=1e-12)


def test_a_context_counts_in_bytes():
    without, found = scores().choose(40_000, "bytes"), scores().choose(40_000, "bytes", 10)
    assert found.bytes <= 40_000 and found.bytes % 8 == without.bytes % 8
    same = scores().choose(40_000 + 10 * 4096 // 8, "bytes", 10)
    assert same.picks == without.picks and same.bytes == without.bytes + 10 * 4096 // 8


def test_a_larger_budget_never_scores_more():
    found = [scores().choose(4.7 + 0.31 * i).score for i in range(40)]
    assert found == sorted(found, reverse=True) and found[-1] == 0 < found[0]


def test_a_mixture_beats_each_uniform_format_at_its_own_cost():
    for unit in UNITS:
        for name, point in scores().uniform(unit).items():
            choice = scores().choose(point.cost, unit)
            assert choice.score <= point.score
            # In time, "eight" is the cheapest there is.
            assert choice.score < point.score or name != "eight" or unit == "latency"


def test_pareto_points_are_the_choices_of_their_budgets():
    for unit in UNITS:
        points = scores().pareto(9, unit)
        assert len(points) == 9
        for point in points:
            choice = scores().choose(point.budget, unit)
            assert (spent(choice, unit), choice.score) == (point.cost, point.score)
            assert point.cost <= point.budget
        assert [p.budget for p in points] == sorted(p.budget for p in points)
        assert points[-1].score == 0


@pytest.mark.parametrize("unit", UNITS)
def test_an_impossible_budget_names_the_smallest_possible(unit):
    smallest = scores().pareto(2, unit)[0].cost
    with pytest.raises(UserError, match="the smallest takes") as error:
        scores().choose(smallest * 0.999, unit)
    named = float(str(error.value).split("takes ")[1].split(":")[0])
    assert named == smallest
    assert spent(scores().choose(named, unit), unit) == smallest


@pytest.mark.parametrize("budgets", [{}, {"bits": 5.0, "bytes": 10_000}])
def test_exactly_one_budget(budgets):
    with pytest.raises(UserError, match=f"give one budget.*; {len(budgets)} were given"):
        scores().solve(**budgets)


@pytest.mark.parametrize("bits", [float("nan"), float("inf"), -1.0])
def test_a_budget_is_a_number(bits):
    with pytest.raises(UserError, match="no mixture of four, eight, original is within"):
        scores().solve(bits=bits)


def test_latency_needs_measurements():
    with pytest.raises(UserError, match="latency was not measured"):
        scores(rows=None).solve(latency=1.0)
    assert scores(rows=None).choose(6).latency is None


# The cache


def test_the_cache_takes_its_share_of_the_bytes():
    found = scores(caches=CACHES)
    longer = [found.choose(60_000, "bytes", n) for n in (1, 60, 100, 190)]
    formats = [choice.kv_cache.format if choice.kv_cache else "" for choice in longer]
    assert formats[0] == "" and formats[-1] == "nvfp4"
    assert [choice.score for choice in longer] == sorted(choice.score for choice in longer)
    assert all(choice.bytes <= 60_000 for choice in longer)
    assert found.solve(bytes=60_000, context=190).kv_cache == KVChoice(format="nvfp4")
    assert found.solve(bytes=60_000, context=1).kv_cache is None


@pytest.mark.parametrize("budget", [{"bits": 6}, {"latency": 1.0}, {"bytes": 60_000}])
def test_an_open_cache_needs_bytes_and_a_context(budget):
    with pytest.raises(UserError, match="format of the cache open"):
        scores(caches=CACHES).solve(**budget)


def test_the_only_cache_goes_into_the_recipe():
    found = scores(caches=CACHES[1:2])
    assert found.solve(bits=6).kv_cache == KVChoice(format="fp8")


# Recipes


def rule_of(recipe: Recipe, path: str) -> dict[str, Any]:
    (rule,) = [rule for rule in recipe.rules if path in rule.match]
    return rule.model_dump(exclude={"match"})


def test_every_path_keeps_the_whole_method_of_its_candidate():
    found = scores()
    choice = found.choose(9.0)
    recipe = found.recipe(choice)
    assert set(choice.picks) == {"four", "eight", "original"}
    for group, pick in zip(found.groups, choice.picks, strict=True):
        candidate = found.candidates[pick]
        for path in group.paths:
            if candidate is None:
                assert rule_of(recipe, path)["weight"] is None
            else:
                assert rule_of(recipe, path) == rule_of(candidate, path)
    assert any(rule.rounding.method == "gptq" for rule in recipe.rules)
    assert any(rule.smooth is not None for rule in recipe.rules)


def test_equal_methods_share_a_rule():
    recipe = scores().solve(bits=9.0)
    methods = [json.dumps(r.model_dump(exclude={"match"})) for r in recipe.rules]
    assert len(methods) == len(set(methods)) == 4  # GPTQ, FP8, queries in INT8, the original
    paths = [path for rule in recipe.rules for path in rule.match]
    assert len(paths) == len(set(paths)) == 7 * LAYERS


def test_a_recipe_leaves_alone_what_no_candidate_touches():
    assert scores().solve(bits=9.0).skip == ("lm_head/*", "*/router/*")


def test_solving_is_deterministic():
    assert scores().solve(bits=6.3) == scores().solve(bits=6.3)


def test_a_recipe_goes_through_yaml(tmp_path):
    for found in (scores().solve(bits=9.0), scores(caches=CACHES).solve(bytes=50_000, context=50)):
        (tmp_path / "auto.yaml").write_text(to_yaml(found))
        assert Recipe.load(tmp_path / "auto.yaml") == found


# Files


def test_scores_go_through_json(tmp_path):
    path = tmp_path / "scores.json"
    for found in (scores(), scores(rows=None, caches=CACHES)):
        path.write_text(json.dumps(found.as_dict()))
        assert Scores.load(path) == found
        assert Scores.load(path, "abc") == found


def test_scores_of_something_else_are_refused(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores().as_dict()))
    with pytest.raises(UserError, match="made of another model"):
        Scores.load(path, "abd")
    path.write_text(json.dumps(scores().as_dict() | {"groups": 3}))
    with pytest.raises(UserError, match=r"does not hold scores of this version \(groups"):
        Scores.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="does not hold scores"):
        Scores.load(path)
    with pytest.raises(UserError, match="cannot read the scores"):
        Scores.load(tmp_path / "missing.json")
