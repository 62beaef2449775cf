"""Automatic mixed precision: which of several recipes is the best for each part of a model?

    scores = score(model, ["nvfp4_awq", "fp8", None], calibration, scoring)
    recipe = scores.solve(bits=5.0)
    params, report = quantize(model, recipe, calibration)

Every candidate quantizes the whole model once. What it does to each group of fused linears, the
rest left original, is scored (`sensitivity`) and priced (true stored bits; measured latency); the
best mixture within a budget is then exact (`knapsack`), under the assumption that scores add up.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.cache import empty_cache
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.quantize.candidates import (
    Cache,
    Candidate,
    cache_choices,
    named,
    with_paths,
)
from jaxopt_models.quantize.groups import group_of
from jaxopt_models.quantize.kv import KVChoice
from jaxopt_models.quantize.latency import product_key, product_seconds
from jaxopt_models.quantize.mixture import Scores
from jaxopt_models.quantize.options import CacheOption, Fixed, Group, Option
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.quantize.sensitivity import Method, Trial, sensitivities
from jaxopt_models.settings import Strict

Seconds = Callable[[Any, int], float]


def score(
    model: Model,
    candidates: Sequence[Candidate],
    calibration: Iterable[Any] | None,
    scoring: Iterable[Any],
    *,
    method: Method = "gradient",
    kv_cache: Sequence[Cache] = (),
    rows: int | None = None,
    seconds: Seconds | None = None,
    progress: Progress = silent,
) -> Scores:
    """Scores and prices every candidate in every group of fused linears.

    Args:
      model: the original model.
      candidates: recipes, names of presets, or paths of YAML files; None or "original" leaves a
        group as it is.
      calibration: int32 [B, T] tokens for the candidates; may be None if none needs text.
      scoring: int32 [B, T] tokens that scores are measured on.
      method: "gradient" or "kl"; see `sensitivity`.
      kv_cache: formats to choose from for the keys and values of all layers, None among them for
        the compute dtype; scored by "kl" whatever the method. None given: what the candidates have.
      rows: measure the latency of products with so many inputs; None does not.
      seconds: the latency of a weight leaf's product with so many inputs; None times it here.
      progress: wraps loops that take long, as `tqdm` would.

    Returns:
      `Scores`, from which recipes for any budget follow.

    Raises:
      UserError: for candidates that cannot be mixed, and what `quantize` and `sensitivities` raise.
    """
    recipes = named(candidates)
    caches = cache_choices(recipes, kv_cache)
    calibration = None if calibration is None else list(calibration)
    scoring = list(scoring)
    weights = dict(tree.leaves_with_paths(model.params))
    variants = {
        name: _quantized(model, recipe, calibration, progress) if recipe else {}
        for name, recipe in recipes.items()
    }
    run = partial(sensitivities, model.config, model.params, batches=scoring, progress=progress)
    timed = None if rows is None else _timer(model, rows, seconds)
    groups = _groups(weights, variants, partial(run, method=method), timed)
    decided = {path for group in groups for path in group.paths}
    return Scores(
        method=method,
        candidates={
            name: recipe and with_paths(recipe, model.params) for name, recipe in recipes.items()
        },
        groups=groups,
        kv_cache=_caches(model, caches, calibration, partial(run, method="kl")),
        fixed=_fixed(weights, decided, timed),
        rows=rows,
        device="" if rows is None else jax.devices()[0].device_kind,
        signature=signature(model, candidates, calibration, scoring, method, kv_cache),
    )


def signature(
    model: Model,
    candidates: Sequence[Candidate],
    calibration: Iterable[Any] | None,
    scoring: Iterable[Any],
    method: Method = "gradient",
    kv_cache: Sequence[Cache] = (),
) -> str:
    """Hexadecimal digest of all that scores depend on: equal for equal scores.

    It reads the weights and the texts, not their names; latency is not part of it.
    """
    recipes = named(candidates)
    choices: list[Strict | None] = [*recipes.values(), *cache_choices(recipes, kv_cache)]
    words = {"description", "aliases"}
    dumped = [choice and choice.model_dump(mode="json", exclude=words) for choice in choices]
    digest = hashlib.sha256(
        json.dumps([model.config.to_json(), method, list(recipes), dumped]).encode()
    )
    for text in (calibration or (), scoring):
        for batch in text:
            _update(digest, np.asarray(batch, np.int32))
        digest.update(b"end of text")
    for path, leaf in tree.leaves_with_paths(model.params):
        digest.update(path.encode())
        for array in jax.tree.leaves(leaf):
            _update(digest, np.asarray(array))
    return digest.hexdigest()


def _update(digest: Any, array: np.ndarray) -> None:
    digest.update(f"{array.dtype.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _quantized(
    model: Model, recipe: Recipe, calibration: Sequence[Any] | None, progress: Progress
) -> dict[str, Any]:
    """The candidate's leaves by path."""
    # A part is scored among original ones: nothing may be folded into them, and it must not make up
    # for errors that they do not make. So of all else that a recipe may ask for, nothing is done.
    kept = ("name", "skip", "rules", "experts")
    isolated = {name: getattr(recipe, name) for name in kept}
    alone = Recipe.model_validate(isolated | {"fold": False, "propagate": "original"})
    params, _ = quantize(model, alone, calibration, progress)
    planned = recipe.plan(model.params)
    originals = dict(tree.leaves_with_paths(model.params))
    for path, leaf in tree.leaves_with_paths(params):
        if path not in planned and not _same(leaf, originals.get(path)):
            raise UserError(
                f"candidate {recipe.name} changes {path}, so its parts cannot be used one by one"
            )
    leaves = dict(tree.leaves_with_paths(params))
    for path in planned:
        if not tree.is_decoder_matrix(path, originals[path]):
            raise UserError(
                f"candidate {recipe.name} quantizes {path}; only matrices of decoder layers can be "
                "searched over: put it into 'skip'"
            )
    return {path: leaves[path] for path in planned}


def _same(leaf: Any, original: Any) -> bool:
    return leaf is original or (
        jax.tree.structure(leaf) == jax.tree.structure(original)
        and all(map(np.array_equal, jax.tree.leaves(leaf), jax.tree.leaves(original)))
    )


def _groups(
    weights: dict[str, Any],
    variants: dict[str, dict[str, Any]],
    run: Callable[[list[Trial]], list[float]],
    timed: Callable[[Any], int] | None,
) -> tuple[Group, ...]:
    """Every group that some candidate changes, with the score and costs of all of them."""
    touched = [path for path in weights if any(path in leaves for leaves in variants.values())]
    trials = {
        (group, name): {path: leaves[path] for path in group if path in leaves}
        for group in _fused(touched)
        for name, leaves in variants.items()
    }
    # What changes nothing costs nothing.
    tried = {key: trial for key, trial in trials.items() if trial}
    scores = dict(zip(tried, run(list(tried.values())), strict=True))

    def option(group: tuple[str, ...], name: str) -> Option:
        leaves = [trials[group, name].get(path, weights[path]) for path in group]
        return Option(
            candidate=name,
            score=scores.get((group, name), 0.0),
            bits=sum(map(tree.weight_bits, leaves)),
            nanoseconds=sum(map(timed, leaves)) if timed else None,
        )

    return tuple(
        Group(
            name=_title(group),
            paths=group,
            weights=sum(weights[path].size for path in group),
            options=tuple(option(group, name) for name in variants),
        )
        for group in dict.fromkeys(group for group, _ in trials)
    )


def _fused(paths: Sequence[str]) -> list[tuple[str, ...]]:
    """Paths of fused linears together, layer by layer."""
    found: dict[tuple[str, ...], None] = {}
    for path in paths:
        *prefix, inside = path.split("/", 2)
        names = group_of(inside.removesuffix("/weight"))
        whole = ("/".join([*prefix, name, "weight"]) for name in names)
        found[tuple(path for path in whole if path in paths)] = None
    return list(found)


def _title(group: tuple[str, ...]) -> str:
    parent = group[0].rsplit("/", 2)[0]
    return f"{parent}/{'+'.join(path.split('/')[-2] for path in group)}"


def _caches(
    model: Model,
    caches: Sequence[KVChoice | None],
    calibration: Sequence[Any] | None,
    run: Callable[[list[Trial]], list[float]],
) -> tuple[CacheOption, ...]:
    """Every format of the cache with its score and size."""

    def option(choice: KVChoice | None) -> CacheOption:
        params, trial = model.params, {}
        if choice is not None:
            recipe = Recipe.model_validate({"name": "kv_cache", "kv_cache": choice})
            params, _ = quantize(model, recipe, calibration)
            trial = {
                f"layers/{i}/self_attn/kv_cache": layer["self_attn"]["kv_cache"]
                for i, layer in enumerate(params["layers"])
            }
        cache = jax.eval_shape(lambda: empty_cache(model.config, params, batch=1, capacity=1))
        return CacheOption(
            choice=choice,
            # Nothing is to be decided about a single one.
            score=run([trial])[0] if trial and len(caches) > 1 else 0.0,
            bits=tree.size_in_bits(trial),
            bits_a_token=tree.size_in_bits(cache),
        )

    return tuple(map(option, caches))


def _fixed(weights: dict[str, Any], decided: set[str], timed: Callable[[Any], int] | None) -> Fixed:
    matrices = {p: w for p, w in weights.items() if tree.is_decoder_matrix(p, w)}
    rest = [weight for path, weight in matrices.items() if path not in decided]
    other = [weight for path, weight in weights.items() if path not in matrices]
    return Fixed(
        weights=sum(weight.size for weight in rest),
        bits=sum(map(tree.weight_bits, rest)),
        nanoseconds=sum(map(timed, rest)) if timed else 0,
        other_bits=sum(map(tree.weight_bits, other)),
    )


def _timer(model: Model, rows: int, seconds: Seconds | None) -> Callable[[Any], int]:
    """Nanoseconds of a leaf's product, measured once for all leaves that compile to the same."""
    known: dict[Any, int] = {}

    def timed(weight: Any) -> int:
        key = product_key(weight)
        if key not in known:
            # Each token is an input of several experts.
            inputs = rows * (model.config.experts_per_token if weight.ndim == 3 else 1)
            measure = seconds or (lambda w, m: product_seconds(w, m, model.config.dtype))
            known[key] = round(measure(weight, inputs) * 1e9)
        return known[key]

    return timed
