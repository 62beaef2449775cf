"""Recipes that compete for the parts of one model: can they be mixed, and what do they touch?"""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from jaxopt_models.errors import UserError
from jaxopt_models.quantize.kv import KVChoice
from jaxopt_models.quantize.options import ORIGINAL
from jaxopt_models.quantize.recipe import Recipe, Rotation, Rule

Candidate = str | Recipe | None
Cache = str | KVChoice | None

# What each candidate keeps for itself.
_OWN = {"name", "aliases", "description", "rules", "skip"}


def named(candidates: Sequence[Candidate]) -> dict[str, Recipe | None]:
    """Candidates by name, in their order, with equal values of what a recipe has once.

    Raises:
      UserError: without a recipe, for two of one name, and for recipes that cannot be mixed.
    """
    found: dict[str, Recipe | None] = {}
    for candidate in candidates:
        recipe = None if candidate in (None, ORIGINAL) else candidate
        recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
        name = recipe.name if recipe else ORIGINAL
        if name in found:
            raise UserError(f"two candidates are called {name!r}; give each its own name")
        found[name] = recipe
    recipes = [recipe for recipe in found.values() if recipe]
    if not recipes:
        raise UserError("there is nothing to choose from: give at least one recipe as a candidate")
    shared = _shared(recipes)
    return {name: recipe and recipe.model_copy(update=shared) for name, recipe in found.items()}


def _shared(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """What a recipe has once: of each field the value that is not its default, where one has it."""
    shared: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for recipe in recipes:
        if recipe.rotation != Rotation():
            raise UserError(
                f"candidate {recipe.name} rotates the whole model, which no part of it can do by "
                "itself; rotate the model first (quantize.rotate) and remove 'rotation'"
            )
        for field in recipe.model_fields_set - _OWN:
            value = getattr(recipe, field)
            if value == Recipe.model_fields[field].get_default():
                continue
            if shared.setdefault(field, value) != value:
                raise UserError(
                    f"candidates {owners[field]} and {recipe.name} differ in {field!r}, which a "
                    "recipe has once; make them equal"
                )
            owners.setdefault(field, recipe.name)
    return shared


def cache_choices(
    recipes: dict[str, Recipe | None], given: Sequence[Cache]
) -> tuple[KVChoice | None, ...]:
    """The formats of cached keys and values to choose from, at least one: those of the candidates
    if none are given.

    Raises:
      UserError: for an unknown format, or if the candidates have one as well.
    """
    first = next(recipe for recipe in recipes.values() if recipe)
    if not given:
        return (first.kv_cache,)
    if first.kv_cache is not None:
        raise UserError(
            f"candidate {first.name} decides the format of the cache itself; remove its 'kv_cache' "
            "or give none to choose from"
        )
    try:
        return tuple(
            None if choice in (None, ORIGINAL) else KVChoice.model_validate(choice)
            for choice in given
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"kv_cache {problem['input']!r}: {problem['msg']}") from error


def with_paths(recipe: Recipe, params: Any) -> Recipe:
    """The recipe with a rule for each method, which names all the matrices it is for."""
    merged: dict[Rule, list[str]] = {}
    for path, rule in recipe.plan(params).items():
        merged.setdefault(rule, []).append(path)
    rules = tuple(r.model_copy(update={"match": tuple(paths)}) for r, paths in merged.items())
    return recipe.model_copy(update={"rules": rules, "aliases": (), "kv_cache": None})
