"""Scores of what each part of a model may become, and the best recipe that fits a budget.

Scores are measured once (`search.score`) and kept in a file; every budget is then a matter of
milliseconds and needs no model:

    scores.solve(bits=4.8)
    scores.solve(bytes=90_000_000, context=8192)
    scores.solve(latency=0.004)
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jaxopt_models.errors import UserError
from jaxopt_models.knapsack import Priced, choose, smallest
from jaxopt_models.quantize.options import UNITS, CacheOption, Choice, Fixed, Group, Point, Unit
from jaxopt_models.quantize.recipe import Recipe, Rule
from jaxopt_models.settings import Strict


class Scores(Strict):
    """What `search.score` found.

    Attributes:
      method: "gradient" or "kl".
      candidates: by name, with rules that name every matrix they quantize; None is the original.
      groups: the parts that are decided on.
      kv_cache: the formats to choose from for cached keys and values; at least one.
      fixed: the rest.
      rows: inputs of each product for which latency was measured; None if it was not.
      device: on which.
      signature: of model, candidates, texts and method; see `search.signature`.
    """

    method: str
    candidates: dict[str, Recipe | None]
    groups: tuple[Group, ...]
    kv_cache: tuple[CacheOption, ...]
    fixed: Fixed
    rows: int | None = None
    device: str = ""
    signature: str = ""

    @classmethod
    def load(cls, path: str | Path, signature: str | None = None) -> "Scores":
        """Reads what was written of `as_dict`.

        Args:
          signature: what the scores must have been made of; None takes any.

        Raises:
          UserError: if the file cannot be read, holds something else, or has another signature.
        """
        try:
            scores = cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the scores {path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"{path} does not hold scores of this version "
                f"({'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}); score anew"
            ) from error
        if signature not in (None, scores.signature):
            raise UserError(
                f"the scores in {path} were made of another model, other candidates, texts or "
                "another method; name another file, or remove this one"
            )
        return scores

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as JSON values."""
        return self.model_dump(mode="json")

    def solve(
        self,
        *,
        bits: float | None = None,
        bytes: float | None = None,
        latency: float | None = None,
        context: int = 0,
    ) -> Recipe:
        """The recipe of the best choice within a budget: a rule for each method, which names the
        matrices it is for.

        Quantize the original model with it once more, so that algorithms that look at neighbouring
        layers (GPTQ behind quantized layers) see the mixture.

        Args:
          bits: largest number of stored bits for each weight of the decoder's matrices.
          bytes: largest stored size of the whole model, with a cache of `context` tokens.
          latency: longest time in seconds of all the decoder's products.
          context: tokens in the cache; counts in bytes only.

        Raises:
          UserError: unless exactly one budget is given, and what `choose` raises.
        """
        unit, budget = budget_of(bits=bits, bytes=bytes, latency=latency)
        return self.recipe(self.choose(budget, unit, context))

    def choose(self, budget: float, unit: Unit = "bits", context: int = 0) -> Choice:
        """The choice of least summed score within a budget, which is never exceeded.

        Raises:
          UserError: if no choice fits the budget, for latency without measurements, and for a
            choice of caches without bytes and context.
        """
        priced, fixed = self._priced(unit, context), self._fixed(unit)
        least = self._value(unit, smallest(priced) + fixed)
        if not least <= budget < math.inf:
            raise UserError(
                f"no mixture of {', '.join(self.candidates)} is within {budget:g} {UNITS[unit]}; "
                f"the smallest takes {least!r}: raise the budget or add a smaller candidate"
            )
        return self._choice(choose(priced, self._capacity(unit, budget) - fixed), context)

    def recipe(self, choice: Choice) -> Recipe:
        """The recipe that carries out a choice, algorithms included."""
        planned = {name: _rules(recipe) for name, recipe in self.candidates.items()}
        merged: dict[Rule, list[str]] = {}
        for group, pick in zip(self.groups, choice.picks, strict=True):
            for path in group.paths:
                merged.setdefault(planned[pick].get(path, _UNTOUCHED), []).append(path)
        rules = [rule.model_copy(update={"match": tuple(p)}) for rule, p in merged.items()]
        given = [recipe for recipe in self.candidates.values() if recipe is not None]
        names, size = ", ".join(self.candidates), f"{choice.bits:.4g} bits a weight"
        return given[0].model_copy(
            update={
                "name": "auto",
                "description": f"{names} mixed to {size} by {self.method} scores",
                # What one candidate quantizes can be in the skip lists of others only.
                "skip": tuple(p for p in given[0].skip if all(p in r.skip for r in given)),
                "rules": tuple(rules),
                "kv_cache": choice.kv_cache,
            }
        )

    def uniform(self, unit: Unit = "bits", context: int = 0) -> dict[str, Point]:
        """Each candidate everywhere, the first cache with it; a point's budget is its cost."""
        found = {}
        for place, name in enumerate(self.candidates):
            choice = self._choice([place] * len(self.groups), context)
            cost = _measured(choice, unit)
            found[name] = Point(cost, cost, choice.score)
        return found

    def pareto(self, points: int = 20, unit: Unit = "bits", context: int = 0) -> list[Point]:
        """Best choices under evenly spaced budgets, from the smallest to that of least score."""
        priced, fixed = self._priced(unit, context), self._fixed(unit)
        low = smallest(priced)
        best = [min(options, key=lambda option: (option.score, option.cost)) for options in priced]
        spread = sum(option.cost for option in best) - low
        found = []
        for i in range(points):
            capacity = low + spread * i // max(points - 1, 1)
            choice = self._choice(choose(priced, capacity), context)
            budget = self._value(unit, capacity + fixed)
            found.append(Point(budget, _measured(choice, unit), choice.score))
        return found

    def _choice(self, places: Sequence[int], context: int) -> Choice:
        """`places` of the groups' options, and behind them that of the cache; the first if none."""
        groups, (cache, *_) = places[: len(self.groups)], [*places[len(self.groups) :], 0]
        picked = [group.options[i] for group, i in zip(self.groups, groups, strict=True)]
        stored = self.kv_cache[cache]
        bits = sum(option.bits for option in picked)
        nanoseconds = sum(option.nanoseconds or 0 for option in picked) + self.fixed.nanoseconds
        size = bits + stored.bits + context * stored.bits_a_token + self._fixed("bytes")
        return Choice(
            picks=tuple(option.candidate for option in picked),
            score=math.fsum([stored.score, *(option.score for option in picked)]),
            bits=self._value("bits", bits + self._fixed("bits")),
            bytes=int(self._value("bytes", size)),
            latency=None if self.rows is None else self._value("latency", nanoseconds),
            kv_cache=stored.choice,
        )

    def _priced(self, unit: Unit, context: int) -> list[list[Priced]]:
        """Options of each group, and in bytes of the cache behind them."""
        if len(self.kv_cache) > 1 and (unit != "bytes" or context < 1):
            raise UserError(
                "these scores leave the format of the cache open, which only a budget in bytes "
                "with a context of some tokens can weigh; give both, or score without kv_cache"
            )
        if unit == "latency":
            if self.rows is None:
                raise UserError("latency was not measured with these scores; score anew with rows")
            nanoseconds = [[(o.score, o.nanoseconds or 0) for o in g.options] for g in self.groups]
            return _as_priced(nanoseconds)
        priced = [[(option.score, option.bits) for option in g.options] for g in self.groups]
        if unit == "bytes":
            caches = [(c.score, c.bits + context * c.bits_a_token) for c in self.kv_cache]
            priced.append(caches)
        return _as_priced(priced)

    def _fixed(self, unit: Unit) -> int:
        if unit == "latency":
            return self.fixed.nanoseconds
        return self.fixed.bits + (self.fixed.other_bits if unit == "bytes" else 0)

    def _value(self, unit: Unit, cost: int) -> float:
        """A cost, in bits or nanoseconds, in the unit of the budget."""
        return cost // 8 if unit == "bytes" else cost / self._scale(unit)

    def _capacity(self, unit: Unit, budget: float) -> int:
        """The largest cost within a budget: of rounding in the division none is left."""
        cost = math.floor(budget * self._scale(unit))
        while self._value(unit, cost) > budget:
            cost -= 1
        while self._value(unit, cost + 1) <= budget:
            cost += 1
        return cost

    def _scale(self, unit: Unit) -> int:
        decided = sum(group.weights for group in self.groups)
        return {"bits": decided + self.fixed.weights, "bytes": 8, "latency": 10**9}[unit]


_UNTOUCHED = Rule.model_validate({"match": "*", "weight": None})


def budget_of(
    *, bits: float | None = None, bytes: float | None = None, latency: float | None = None
) -> tuple[Unit, float]:
    """The one budget that was given, with its unit.

    Raises:
      UserError: if none was, or several were.
    """
    budgets = {"bits": bits, "bytes": bytes, "latency": latency}
    given: list[Unit] = [unit for unit in UNITS if budgets[unit] is not None]
    if len(given) != 1:
        raise UserError(f"give one budget, of bits, bytes or latency; {len(given)} were given")
    budget = budgets[given[0]]
    assert budget is not None
    return given[0], budget


def to_yaml(recipe: Recipe) -> str:
    """Text of a file that `Recipe.load` reads to the same recipe, name aside."""
    fields = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    return yaml.safe_dump(fields, sort_keys=False, width=100)


def _rules(recipe: Recipe | None) -> dict[str, Rule]:
    """What a candidate does to each matrix, without the globs that select it."""
    rules = recipe.rules if recipe else ()
    return {
        path: rule.model_copy(update={"match": _UNTOUCHED.match})
        for rule in rules
        for path in rule.match
    }


def _as_priced(groups: list[list[tuple[float, int]]]) -> list[list[Priced]]:
    return [[Priced(score, cost) for score, cost in options] for options in groups]


def _measured(choice: Choice, unit: Unit) -> float:
    costs = {"bits": choice.bits, "bytes": choice.bytes, "latency": choice.latency}
    return costs[unit] or 0.0
