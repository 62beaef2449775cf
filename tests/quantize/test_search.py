"""Mixed precision on tiny models: what is scored, priced, decided, and what that gains."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate
from jaxopt_models.models.cache import cache_bytes, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init
from jaxopt_models.quantize import latency, search
from jaxopt_models.quantize.kv import KVChoice
from jaxopt_models.quantize.mixture import Scores
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.quantize.search import score, signature
from jaxopt_models.quantize.sensitivity import sensitivities

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
DENSE = ModelConfig.from_hf({"model_type": "llama"} | _SIZES)
EXPERTS = ModelConfig.from_hf(
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    | _SIZES
    | {"num_hidden_layers": 1}
)


def batch(rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, (rows, length), dtype=np.int32)


CALIBRATION = [batch(8, 16, seed=1)]
SCORING = [batch(8, 16, seed=2)]
HELD_OUT = [batch(16, 16, seed=3)]


def weight_only(name: str, **more: Any) -> Recipe:
    return Recipe.model_validate({"name": name, "rules": [{"match": "*", "weight": name} | more]})


def with_field(recipe: Recipe, **fields: Any) -> Recipe:
    return recipe.model_copy(update=fields)


INT4, MXFP6, INT8 = weight_only("int4"), weight_only("mxfp6"), weight_only("int8")
GPTQ = weight_only("int4", rounding="gptq")


@functools.cache
def model(config: ModelConfig = DENSE) -> Model:
    """A model that is not even: the middle layer's feed-forward has outliers, and counts more."""
    params = init(config, jax.random.key(0))
    changed = {"embed_tokens/weight": 20 * params["embed_tokens"]["weight"]}
    if config is DENSE:
        mlp = params["layers"][1]["mlp"]
        changed["layers/1/mlp/down_proj/weight"] = 3 * mlp["down_proj"]["weight"]
        up = mlp["up_proj"]["weight"]
        changed["layers/1/mlp/up_proj/weight"] = up.at[:, 5].multiply(30.0)
    return Model(config, tree.replace(params, changed))


@functools.cache
def found(method: Any = "gradient") -> Scores:
    return score(model(), [INT4, MXFP6, INT8, None], None, SCORING, method=method)


def divergence(params: Any, on: list[np.ndarray]) -> float:
    kl = evaluate(model().config, params, on, reference=model().params).kl
    assert kl is not None
    return kl


# What is scored


def test_groups_are_the_linears_that_engines_fuse():
    paths = [group.paths for group in found().groups]
    assert len(paths) == 4 * 3
    assert tuple(f"layers/2/self_attn/{n}_proj/weight" for n in "qkv") in paths
    assert tuple(f"layers/0/mlp/{n}_proj/weight" for n in ("gate", "up")) in paths
    assert ("layers/1/mlp/down_proj/weight",) in paths and ("layers/1/self_attn/o_proj/weight",)
    names = {group.name for group in found().groups}
    assert "layers/2/self_attn/q_proj+k_proj+v_proj" in names and len(names) == len(paths)
    for group in found().groups:
        assert [option.candidate for option in group.options] == list(found().candidates)


def test_experts_are_decided_together():
    scores = score(model(EXPERTS), ["fp8", INT4, None], CALIBRATION, SCORING, rows=3)
    paths = [group.paths for group in scores.groups]
    experts = [f"layers/0/mlp/experts/{n}_proj/weight" for n in ("gate", "up", "down")]
    assert (experts[0], experts[1]) in paths and (experts[2],) in paths and len(paths) == 4
    recipe = scores.solve(bits=7.0)
    params, report = quantize(model(EXPERTS), recipe, CALIBRATION)
    assert report.bits_per_weight == scores.choose(7.0).bits <= 7.0
    router = params["layers"][0]["mlp"]["router"]["weight"]
    assert isinstance(router, jax.Array)


@pytest.mark.parametrize("method", ["gradient", "kl"])
def test_scores_are_sensitivities_of_the_candidates_leaves(method):
    params, _ = quantize(model(), INT4)
    leaves = dict(tree.leaves_with_paths(params))
    trials = [{path: leaves[path] for path in group.paths} for group in found().groups]
    expected = sensitivities(DENSE, model().params, trials, SCORING, method)
    ours = [group.options[0].score for group in found(method).groups]
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_the_original_scores_nothing_and_four_bits_the_most():
    for group in found().groups:
        four, six, eight, original = (option.score for option in group.options)
        assert four > max(six, eight) > min(six, eight) > original == 0


def test_a_candidate_decides_only_what_it_quantizes():
    attention = weight_only("int4", match="*/self_attn/*")
    partly = Recipe.model_validate(
        {"name": "partly", "rules": [{"match": "layers/0/mlp/up_proj/weight", "weight": "int8"}]}
    )
    scores = score(model(), [attention, partly], None, SCORING)
    assert len(scores.groups) == 2 * 3 + 1
    (up,) = [group for group in scores.groups if "mlp" in group.name]
    assert up.name == "layers/0/mlp/up_proj"
    untouched, changed = up.options
    assert untouched.score == 0 < changed.score and untouched.bits == 64 * 32 * 32
    assert 4.9 < scores.uniform()["int4"].cost < 32
    recipe = scores.solve(bits=40)
    params, report = quantize(model(), recipe)
    assert report.bits_per_weight == scores.choose(40).bits
    gate, original = (p["layers"][0]["mlp"]["gate_proj"] for p in (params, model().params))
    np.testing.assert_array_equal(gate["weight"], original["weight"])


# What it costs


@pytest.mark.parametrize("bits", [4.95, 5.3, 6.5, 7.7, 12.0, 30.0])
def test_the_quantized_model_has_the_predicted_size_within_the_budget(bits):
    choice = found().choose(bits)
    params, report = quantize(model(), found().recipe(choice))
    metrics = evaluate(DENSE, params, SCORING)
    assert metrics.bits_per_weight == report.bits_per_weight == choice.bits <= bits
    assert metrics.bytes == choice.bytes
    assert found().choose(choice.bytes, "bytes").bytes <= choice.bytes


def test_uniform_points_are_the_candidates():
    for name, point in found().uniform().items():
        recipe = found().candidates[name]
        params = quantize(model(), recipe)[0] if recipe else model().params
        assert point.cost == tree.bits_per_weight(params)


def test_latencies_are_those_of_the_table():
    seen: list[tuple[tuple[int, ...], int]] = []

    def table(leaf: Any, rows: int) -> float:
        seen.append((leaf.shape, rows))
        return 1e-9 * leaf.size * (1 if tree.is_leaf(leaf) else 2)

    scores = score(model(), [INT4, None], None, SCORING, rows=7, seconds=table)
    # One for each shape and format: attention is square.
    assert len(seen) == len(set(seen)) * 2 == 3 * 2 and {rows for _, rows in seen} == {7}
    for group in scores.groups:
        assert [o.nanoseconds for o in group.options] == [group.weights, 2 * group.weights]
    weights = sum(group.weights for group in scores.groups)
    choice = scores.choose(1.5e-9 * weights, "latency")
    assert choice.latency is not None and choice.latency <= 1.5e-9 * weights
    assert set(choice.picks) == {"int4", "original"}


def test_experts_are_timed_with_their_share_of_the_rows():
    seen = {}

    def table(leaf: Any, rows: int) -> float:
        seen[leaf.ndim] = rows
        return 1e-6

    score(model(EXPERTS), [INT4], None, SCORING, rows=7, seconds=table)
    assert seen == {2: 7, 3: 14}


@pytest.mark.parametrize("shape", [(24, 32), (4, 24, 32)])
def test_a_product_is_timed(shape):
    weight = jax.random.normal(jax.random.key(0), shape)
    assert 0 < latency.product_seconds(weight, rows=10, repeats=3) < 10
    assert latency.product_key(weight) == latency.product_key(weight + 1)
    assert latency.product_key(weight) != latency.product_key(weight.astype(jnp.bfloat16))


# What it gains


@pytest.mark.parametrize("method", ["gradient", "kl"])
def test_a_mixture_beats_the_uniform_format_of_its_size(method):
    """In predicted and in measured divergence, on other text than it was scored on."""
    scores = found(method)
    uniform = scores.uniform()["mxfp6"]
    choice = scores.choose(uniform.cost)
    assert choice.bits <= uniform.cost and choice.score < 0.8 * uniform.score
    mixed, _ = quantize(model(), scores.recipe(choice))
    plain, _ = quantize(model(), MXFP6)
    assert divergence(mixed, HELD_OUT) < 0.9 * divergence(plain, HELD_OUT)


@pytest.mark.parametrize("method", ["gradient", "kl"])
def test_the_sensitive_layer_gets_the_bits(method):
    choice = found(method).choose(5.2)
    picks = dict(zip((group.name for group in found().groups), choice.picks, strict=True))
    rank = list(found().candidates).index
    others = [name for name in picks if name.startswith("layers/2/")]
    assert rank(picks["layers/1/mlp/gate_proj+up_proj"]) > max(rank(picks[n]) for n in others)


def test_solving_again_runs_no_model(monkeypatch):
    scores = found()
    for name in ("quantize", "sensitivities"):
        monkeypatch.setattr(search, name, None)
    monkeypatch.setattr(jax, "jit", None)
    assert scores.solve(bits=5.0) != scores.solve(bits=6.0)


def test_algorithms_survive_solving():
    token = {"format": "int8", "granularity": "token"}
    smooth = weight_only("int8", smooth={"method": "smoothquant", "alpha": 0.5}, activation=token)
    scores = score(model(), [GPTQ, smooth], CALIBRATION, SCORING)
    choice = scores.choose(6.5)
    assert set(choice.picks) == {"int4", "int8"}
    params, report = quantize(model(), scores.recipe(choice), CALIBRATION)
    algorithms = {row.path: row.algorithm for row in report.tensors}
    for group, pick in zip(scores.groups, choice.picks, strict=True):
        expected = {"int4": "gptq", "int8": "smoothquant"}[pick]
        assert {algorithms[path] for path in group.paths} == {expected}
    # Factors that can be folded into norms cost nothing in the end.
    assert tree.bits_per_weight(params) <= choice.bits <= 6.5


# The cache


def test_the_cache_may_be_searched_as_well():
    formats = ["nvfp4", {"format": "int8"}, None]
    choices = [KVChoice.model_validate(c) if c else None for c in formats]
    scores = score(model(), [INT8, INT4], CALIBRATION, SCORING, kv_cache=choices)
    nvfp4, int8, original = scores.kv_cache
    assert nvfp4.score > int8.score > original.score == 0
    assert nvfp4.bits_a_token < int8.bits_a_token < original.bits_a_token
    recipe = scores.solve(bytes=scores.uniform("bytes")["int8"].cost, context=8)
    assert recipe.kv_cache is not None
    params, _ = quantize(model(), recipe, CALIBRATION)
    size = evaluate(DENSE, params, SCORING).bytes
    cache = cache_bytes(empty_cache(DENSE, params, 1, 8))
    assert size + cache <= scores.uniform("bytes")["int8"].cost
    (option,) = [option for option in scores.kv_cache if option.choice == recipe.kv_cache]
    assert cache * 8 == 8 * option.bits_a_token


def test_candidates_with_one_cache_keep_it():
    both = [with_field(recipe, kv_cache=KVChoice(format="int8")) for recipe in (INT4, INT8)]
    scores = score(model(), both, CALIBRATION, SCORING)
    assert scores.solve(bits=6).kv_cache == KVChoice(format="int8")
    with pytest.raises(UserError, match="int4 decides the format of the cache itself"):
        score(model(), both, CALIBRATION, SCORING, kv_cache=["fp8"])
    other = with_field(INT8, kv_cache=KVChoice(format="fp8"))
    with pytest.raises(UserError, match="int4 and int8 differ in 'kv_cache'"):
        score(model(), [both[0], other], CALIBRATION, SCORING)
    with pytest.raises(UserError, match="kv_cache"):
        score(model(), [INT4], CALIBRATION, SCORING, kv_cache=["fp5"])


def test_what_one_candidate_says_of_the_whole_model_holds_for_the_mixture():
    """And the calibration of a candidate by itself, layers before it quantized, is for later."""
    one = with_field(INT4, propagate="quantized")
    other = with_field(INT8, fold=False)
    scores = score(model(), [one, other], None, SCORING)
    recipe = scores.solve(bits=6)
    assert (recipe.propagate, recipe.fold) == ("quantized", False)
    assert scores.groups == score(model(), [INT4, INT8], None, SCORING).groups


# Mistakes


def test_candidates_must_be_mixable():
    def propagating(activations: str) -> Recipe:
        return with_field(INT4, propagate=activations)

    for candidates, message in [
        ([None], "nothing to choose from"),
        ([INT4, INT4], "two candidates are called 'int4'"),
        (["nosuch"], "neither a .yaml file nor one of"),
        (
            [propagating("original"), with_field(propagating("quantized"), name="b")],
            "differ in 'pro",
        ),
        ([INT4.model_copy(update={"skip": ("embed_tokens/*",)})], "int4 quantizes lm_head/weight"),
    ]:
        with pytest.raises(UserError, match=message):
            score(model(), candidates, None, SCORING)
    turned = Recipe.model_validate(INT4.model_dump() | {"rotation": {"heads": True}})
    with pytest.raises(UserError, match="int4 rotates the whole model"):
        score(model(), [turned], None, SCORING)


def test_a_candidate_that_changes_other_tensors_is_refused(monkeypatch):
    def meddling(original: Model, recipe: Recipe, *rest: Any) -> Any:
        params, report = quantize(original, recipe, *rest)
        return tree.replace(params, {"norm/weight": params["norm"]["weight"] * 2}), report

    monkeypatch.setattr(search, "quantize", meddling)
    with pytest.raises(UserError, match="candidate int4 changes norm/weight"):
        score(model(), [INT4], None, SCORING)


def test_a_signature_is_of_all_that_scores_depend_on():
    def sign(m=None, candidates=(INT4, None), calibration=CALIBRATION, scoring=SCORING, **more):
        return signature(m or model(), candidates, calibration, scoring, **more)

    moved = {"norm/weight": model().params["norm"]["weight"].at[3].add(1e-6)}
    other_weights = Model(DENSE, tree.replace(model().params, moved))
    different = [
        sign(),
        sign(other_weights),
        sign(candidates=(INT4, INT8)),
        sign(candidates=(INT4.model_copy(update={"rules": INT8.rules}), None)),
        sign(calibration=None),
        sign(calibration=HELD_OUT),
        sign(scoring=CALIBRATION),
        sign(method="kl"),
        sign(kv_cache=["fp8", None]),
    ]
    assert len(set(different)) == len(different)
    assert sign() == different[0]
    assert sign(Model(DENSE, model().params, source="elsewhere")) == different[0]
    assert found().signature == signature(model(), [INT4, MXFP6, INT8, None], None, SCORING)
