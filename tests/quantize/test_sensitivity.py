"""Both scores by their definitions: brute force without probes, and `evaluate`."""

import functools
import inspect
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import LLAMA, MIXTRAL, SIZES

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate
from jaxopt_models.models import transformer
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward, forward_with_taps, init
from jaxopt_models.ops import expert_linear, linear
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.quantize.sensitivity import sensitivities

DENSE, EXPERTS = LLAMA, MIXTRAL
# Sandwich norms, a tied head, caps, sliding windows.
GEMMA = ModelConfig.from_hf(
    {
        "model_type": "gemma3_text",
        "sliding_window": 4,
        "final_logit_softcapping": 2.0,
        "head_dim": 16,
    }
    | SIZES
)
MODELS = {"dense": DENSE, "experts": EXPERTS, "gemma": GEMMA}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def batch(rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, (rows, length), dtype=np.int32)


# The second has fewer positions than fit into a chunk of the head, the first more.
BATCHES = [batch(20, 15, seed=1), batch(3, 9, seed=2)]


@functools.cache
def params(config: ModelConfig) -> Any:
    model = init(config, jax.random.key(0))
    return tree.replace(model, {"embed_tokens/weight": 20 * model["embed_tokens"]["weight"]})


@functools.cache
def quantized(config: ModelConfig, name: str) -> dict[str, Any]:
    """Leaves of a recipe by path."""
    recipe = Recipe.model_validate(
        {"rules": [{"match": "*", "weight": name, "activation": "mxfp8"}], "name": name}
    )
    found = dict(tree.leaves_with_paths(quantize(Model(config, params(config)), recipe)[0]))
    return {path: leaf for path, leaf in found.items() if path in recipe.plan(params(config))}


def positions(batches: list[np.ndarray]) -> int:
    return sum(b.shape[0] * (b.shape[1] - 1) for b in batches)


def brute_force(config, path: str, leaf: Any, rows: np.ndarray, monkeypatch) -> float:
    """½ Σ (dL/dδ · (Ŷ - Y))², δ added to the product of one linear, by a patched forward pass."""
    weight = dict(tree.leaves_with_paths(params(config)))[path]
    routed = weight.ndim == 3
    names = ["moe"] if routed else ["block", "projections"]
    modules = [import_module(f"jaxopt_models.models.{name}") for name in names]
    layers = import_module("jaxopt_models.models.block")
    original = expert_linear if routed else linear
    tap = path.removesuffix("weight") + "input"
    taps = [tap] + (["layers/*/group_sizes"] if routed else [])
    _, saved = forward_with_taps(config, params(config), jnp.asarray(rows), taps)
    sizes = [saved[path.rsplit("/", 2)[0] + "/group_sizes"]] if routed else []
    run = jax.jit(original)
    error = run(saved[tap], leaf, *sizes) - run(saved[tap], weight, *sizes)

    def loss(delta: jax.Array) -> jax.Array:
        def patched(x, w, *rest):
            out = original(x, w, *rest)
            return out + delta if w is weight else out

        with monkeypatch.context() as patch:
            for module in modules:
                patch.setattr(module, original.__name__, patched)
            # Without their own jit, weights keep their identity within the one around it all.
            patch.setattr(transformer, "block", inspect.unwrap(transformer.block))
            deferred = inspect.unwrap(layers.deferred_block)
            patch.setattr(layers, "deferred_block", deferred)
            log_p = jax.nn.log_softmax(forward(config, params(config), jnp.asarray(rows)))
        targets = jnp.asarray(rows)[:, 1:, None]
        return -jnp.sum(jnp.take_along_axis(log_p[:, :-1], targets, axis=2))

    gradient = jax.jit(jax.grad(loss))(jnp.zeros_like(error))
    assert np.asarray(gradient).any()
    return 0.5 * float(np.sum(np.square(np.float64(gradient) * np.float64(error))))


@every_model
def test_gradient_scores_are_those_of_brute_force(config, monkeypatch):
    found = quantized(config, "int4")
    inside = "mlp/experts" if config is EXPERTS else "mlp"
    paths = [f"layers/0/{inside}/up_proj/weight", f"layers/1/{inside}/down_proj/weight"]
    paths += ["layers/0/self_attn/k_proj/weight", "layers/1/self_attn/o_proj/weight"]
    texts = [batch(2, 5, seed=3), batch(1, 8, seed=4)]
    scores = sensitivities(config, params(config), [{p: found[p]} for p in paths], texts)
    for path, score in zip(paths, scores, strict=True):
        sums = [brute_force(config, path, found[path], rows, monkeypatch) for rows in texts]
        assert score == pytest.approx(sum(sums) / positions(texts), rel=2e-4), path


@every_model
def test_kl_scores_are_those_of_evaluate(config):
    found = quantized(config, "int4")
    trials = [
        {path: leaf for path, leaf in found.items() if path.startswith(part)}
        for part in ("layers/0/self_attn/o", "layers/1/mlp", "layers/0/self_attn/q", "layers/")
    ]
    scores = sensitivities(config, params(config), trials, BATCHES, "kl")
    for trial, score in zip(trials, scores, strict=True):
        changed = tree.replace(params(config), trial)
        expected = evaluate(config, changed, BATCHES, reference=params(config)).kl
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert scores[3] > max(scores[:3]) > 0


def test_a_cache_is_scored_as_evaluate_does():
    recipe = Recipe.model_validate({"kv_cache": "nvfp4"})
    changed, _ = quantize(Model(DENSE, params(DENSE)), recipe, BATCHES)
    path = "layers/{}/self_attn/kv_cache"
    leaves = [layer["self_attn"]["kv_cache"] for layer in changed["layers"]]
    trial = {path.format(i): leaf for i, leaf in enumerate(leaves)}
    (score,) = sensitivities(DENSE, params(DENSE), [trial], BATCHES, "kl")
    expected = evaluate(DENSE, changed, BATCHES, reference=params(DENSE)).kl
    assert score == pytest.approx(expected, rel=1e-4) and score > 0


@pytest.mark.parametrize("config", [DENSE, GEMMA], ids=["dense", "gemma"])
def test_both_methods_agree_on_small_errors(config):
    """The gradient's score is a second-order estimate of what KL measures. (Of experts it is too
    low: what sends tokens to other experts is a jump.)"""
    found = quantized(config, "int8")
    trials = [{path: leaf} for path, leaf in found.items()]
    by_gradient = sensitivities(config, params(config), trials, BATCHES)
    by_kl = sensitivities(config, params(config), trials, BATCHES, "kl")
    ratio = np.asarray(by_gradient) / np.asarray(by_kl)
    assert 0.2 < ratio.min() and ratio.max() < 5
    assert 0.5 < np.median(ratio) < 2


@pytest.mark.parametrize("method", ["gradient", "kl"])
def test_the_cut_into_batches_and_the_company_do_not_matter(method):
    found = quantized(DENSE, "int4")
    trials = [{path: leaf} for path, leaf in found.items()]
    rows = batch(6, 10, seed=5)
    whole = sensitivities(DENSE, params(DENSE), trials, [rows], method)
    cut = sensitivities(DENSE, params(DENSE), trials, iter([rows[:4], rows[4:]]), method)
    alone = sensitivities(DENSE, params(DENSE), trials[5:6], [rows], method)
    np.testing.assert_allclose(whole, cut, rtol=1e-4, atol=1e-8)
    assert alone[0] == pytest.approx(whole[5], rel=1e-4)


def test_gradient_scores_of_a_trial_add_up():
    found = quantized(DENSE, "int4")
    paths = [f"layers/{i}/self_attn/{n}_proj/weight" for i in (0, 1) for n in "qkv"]
    each = sensitivities(DENSE, params(DENSE), [{p: found[p]} for p in paths], BATCHES)
    (together,) = sensitivities(DENSE, params(DENSE), [{p: found[p] for p in paths}], BATCHES)
    assert together == pytest.approx(sum(each), rel=1e-5)


@pytest.mark.parametrize("method", ["gradient", "kl"])
def test_the_original_costs_nothing(method):
    weights = dict(tree.leaves_with_paths(params(DENSE)))
    path = "layers/1/mlp/gate_proj/weight"
    assert sensitivities(DENSE, params(DENSE), [{path: weights[path]}], BATCHES, method) == [0.0]
    assert sensitivities(DENSE, params(DENSE), [], BATCHES, method) == []


def test_mistakes():
    model = params(DENSE)
    with pytest.raises(UserError, match="sensitivity 'hessian' is unknown"):
        sensitivities(DENSE, model, [], BATCHES, "hessian")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no batches were given"):
        sensitivities(DENSE, model, [], [])
    path = "layers/0/mlp/up_proj/weight"
    broken = jnp.full_like(model["layers"][0]["mlp"]["up_proj"]["weight"], jnp.nan)
    for method in ("gradient", "kl"):
        with pytest.raises(UserError, match=f"score of {path} is not finite"):
            sensitivities(DENSE, model, [{path: broken}], BATCHES, method)
