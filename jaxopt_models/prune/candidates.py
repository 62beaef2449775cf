"""Smaller models within a budget, to be compared: how much of each axis, and which layers.

A candidate takes shares w of the reduction, one an axis, and keeps

    n_a(t) = the allowed number nearest to whole_a · exp(-t · w_a)

at the least t that fits the budget. Then axes are raised by a step each while that fits, those
first that rounding took furthest below whole_a · exp(-t · w_a), so that no candidate could keep one
step more of anything. Shares are equal ("uniform", which others are to beat), all of one axis, or
drawn from a flat Dirichlet distribution.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jaxopt_models.errors import UserError
from jaxopt_models.prune.choose import Target, choose
from jaxopt_models.prune.importance import Importance
from jaxopt_models.prune.masks import Masks, drop_layers
from jaxopt_models.prune.sizes import Axis, Costs, Sizes

BASELINE = "uniform"
_DRAWS = 10  # for each new candidate at most

type Grids = dict[Axis, tuple[int, ...]]
type Dropped = Callable[[int], tuple[int, ...]]  # which layers go, by how many


@dataclass(frozen=True)
class Candidate:
    """A smaller model.

    Attributes:
      name: for people.
      target: widths; `layers` is not set.
      dropped: layers that are removed.
      cost: in the unit of the budget.
    """

    name: str
    target: Target
    dropped: tuple[int, ...]
    cost: int

    def masks(self, importance: Importance) -> Masks:
        """That keep the most important of the model."""
        return drop_layers(choose(importance, self.target), self.dropped)

    def as_dict(self) -> dict[str, Any]:
        """What is kept of each axis that is cut, and the rest by name, as JSON values."""
        kept = {name: value for name, value in asdict(self.target).items() if value is not None}
        del kept["multiple"]
        return {"name": self.name, "keep": kept, "dropped": list(self.dropped), "cost": self.cost}


def candidates(
    costs: Costs,
    grids: Grids,
    importance: Importance,
    budget: int,
    count: int,
    seed: int = 0,
) -> list[Candidate]:
    """Different models within a budget: the baseline first, those that cut one axis, then drawn
    ones, fewer than `count` where there are no more.

    Layers go by their influence, or as the run of neighbours of least influence in total. Where
    nothing but layers is cut, every run of them is a candidate (arXiv:2403.17887).

    Args:
      costs: in the unit of the budget.
      grids: numbers to choose from, see `sizes.grids`.
      importance: of the model's parts.
      budget: largest cost.
      count: of drawn candidates.
      seed: of draws.

    Raises:
      UserError: for a budget that the whole model is within, or that no candidate is.
    """
    influence = np.asarray(importance.layers, np.float64)
    rules = [_least(influence), _least_run(influence)]
    _check(costs, grids, rules[0], budget)
    free: list[Axis] = [axis for axis, numbers in grids.items() if len(numbers) > 1]
    rng = np.random.default_rng(seed)
    found: dict[tuple[Any, ...], Candidate] = {}

    def add(name: str, shares: dict[Axis, float], rule: Dropped) -> bool:
        sizes = fit(costs, grids, shares, rule, budget)
        return sizes is not None and _keep(found, costs, name, sizes, rule)

    add(BASELINE, dict.fromkeys(free, 1.0), rules[0])
    for axis in free:
        add(f"{axis} only", {axis: 1.0}, rules[0])
    if "layers" in free:
        sizes = fit(costs, grids, {"layers": 1.0}, rules[0], budget)
        if sizes is not None:
            _keep_runs(found, costs, sizes, budget)
    drawn = 0
    for _ in range(_DRAWS * count if len(free) > 1 else 0):
        if drawn == count:
            break
        shares = dict(zip(free, rng.dirichlet(np.ones(len(free))).tolist(), strict=True))
        drawn += add(f"draw {drawn}", shares, rules[rng.integers(len(rules))])
    return list(found.values())


def fit(
    costs: Costs,
    grids: Grids,
    shares: Mapping[Axis, float],
    rule: Dropped,
    budget: int,
) -> dict[Axis, int] | None:
    """What to keep of each axis, so that no step more of one that has a share fits the budget.

    None if even the least of these axes does not fit.
    """

    def wanted(axis: Axis, t: float) -> float:
        return grids[axis][-1] * math.exp(-t * shares.get(axis, 0.0))

    def at(t: float) -> dict[Axis, int]:
        return {axis: _nearest(numbers, wanted(axis, t)) for axis, numbers in grids.items()}

    def fits(sizes: Sizes) -> bool:
        removed = costs.whole["layers"] - sizes["layers"]
        return costs.of_sizes(sizes, rule(removed)) <= budget

    low, high = 0.0, 1e6
    if not fits(at(high)):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    sizes, t = at(high), high
    while True:
        # exp(-t) is zero for long t, where every wish is equally far away.
        below = sorted(shares, key=lambda axis: sizes[axis] / max(wanted(axis, t), 1e-300))
        steps = (sizes | _step(grids, sizes, axis) for axis in below)
        more = next((new for new in steps if new != sizes and fits(new)), None)
        if more is None:
            return sizes
        sizes = more


def _step(grids: Grids, sizes: Sizes, axis: Axis) -> dict[Axis, int]:
    """The next number of an axis, or its last."""
    numbers = grids[axis]
    return {axis: numbers[min(numbers.index(sizes[axis]) + 1, len(numbers) - 1)]}


def _nearest(numbers: Sequence[int], value: float) -> int:
    """Of two that are equally near the smaller; numbers ascend."""
    return min(numbers, key=lambda number: abs(number - value))


def _least(influence: np.ndarray) -> Dropped:
    order = np.argsort(-influence, kind="stable")  # of equal ones the first stay
    return lambda count: tuple(sorted(order[len(order) - count :].tolist()))


def _least_run(influence: np.ndarray) -> Dropped:
    total = np.concatenate([[0.0], np.cumsum(influence)])

    def rule(count: int) -> tuple[int, ...]:
        start = int(np.argmin(total[count:] - total[: len(total) - count]))
        return tuple(range(start, start + count))

    return rule


def _keep(
    found: dict[tuple[Any, ...], Candidate], costs: Costs, name: str, sizes: Sizes, rule: Dropped
) -> bool:
    """Whether the candidate is a new one; then it is added."""
    whole = costs.whole
    dropped = rule(whole["layers"] - sizes["layers"])
    kept = {a: n for a, n in sizes.items() if a != "layers" and n != whole[a]}
    key = (tuple(sorted(kept.items())), dropped)
    if key in found:
        return False
    found[key] = Candidate(name, Target(**kept), dropped, costs.of_sizes(sizes, dropped))
    return True


def _keep_runs(
    found: dict[tuple[Any, ...], Candidate], costs: Costs, sizes: Sizes, budget: int
) -> None:
    """All runs of neighbouring layers of one length; layers of a mixture are not all equally
    large, so that some runs may not fit."""
    layers = costs.whole["layers"]
    length = layers - sizes["layers"]
    for start in range(layers - length + 1):
        run = tuple(range(start, start + length))
        if costs.of_sizes(sizes, run) <= budget:
            _keep(found, costs, f"layers {run[0]}-{run[-1]}", sizes, lambda _, run=run: run)


def _check(costs: Costs, grids: Grids, rule: Dropped, budget: int) -> None:
    whole = costs.of_whole
    least: dict[Axis, int] = {axis: numbers[0] for axis, numbers in grids.items()}
    smallest = costs.of_sizes(least, rule(costs.whole["layers"] - least["layers"]))
    if budget >= whole:
        raise UserError(
            f"budget: the model has {costs.text(whole)} already, so a budget of "
            f"{costs.text(budget)} leaves it as it is; lower it"
        )
    if smallest > budget:
        raise UserError(
            f"budget: the smallest candidate has {costs.text(smallest)}, and the budget is "
            f"{costs.text(budget)}; raise it, name more axes or lower `least`"
        )


def explicit(target: Target, importance: Importance) -> Candidate:
    """The candidate that a user asks for; its cost is not known yet."""
    scores = np.asarray(importance.layers, np.float64)
    layers = len(scores) if target.layers is None else target.layers
    if not 1 <= layers <= len(scores):
        raise UserError(
            f"keep.layers: cannot keep {layers} of {len(scores)}; choose a number from 1 to "
            f"{len(scores)}"
        )
    dropped = _least(scores)(len(scores) - layers)
    return Candidate("as asked", replace(target, layers=None), dropped, 0)
