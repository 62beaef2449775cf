"""One option for each group, at the least total score under a budget: an exact solver.

    minimise  Σ_g score[g, x_g]    so that    Σ_g cost[g, x_g] <= capacity

and, if there are options that few groups may take, so that no more than so many do. This is the
multiple-choice knapsack problem, solved as a mixed-integer linear program. Costs are integers
(bits, bytes, nanoseconds), so that "within the budget" has no rounding in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

# The solver stops at an absolute gap of 1e-6: the objective is scaled until that is nothing.
_OBJECTIVE = 1e6


@dataclass(frozen=True)
class Priced:
    """An option's score, float, and cost, integer; less is better in both.

    A `rare` one is of those that few groups may take.
    """

    score: float
    cost: int
    rare: bool = False


def smallest(groups: Sequence[Sequence[Priced]], rare: int | None = None) -> int:
    """The least capacity for which there is a choice with no more than so many rare options, of
    which no group may have others alone; None does not count them."""
    least = [min(option.cost for option in options) for options in groups]
    if rare is None:
        return sum(least)
    common = [min(o.cost for o in options if not o.rare) for options in groups]
    saved = sorted((own - low for own, low in zip(common, least, strict=True)), reverse=True)
    return sum(common) - sum(saved[:rare])


def choose(groups: Sequence[Sequence[Priced]], capacity: int, rare: int | None = None) -> list[int]:
    """The place of the chosen option in each group.

    Of options with equal scores the cheaper is taken, of equal ones the first. Equal inputs give
    equal choices.

    Args:
      groups: the options of each group, at least one.
      capacity: upper bound of the total cost, inclusive; at least `smallest(groups, rare)`.
      rare: how many groups may take a rare option; each has others then. None is all.

    Reference: Sinha & Zoltners 1979, doi:10.1287/opre.27.3.503.
    """
    if capacity < smallest(groups, rare):
        raise ValueError(
            f"capacity {capacity} is below the smallest possible {smallest(groups, rare)}"
        )
    spare = capacity - smallest(groups)
    items = [item for g, options in enumerate(groups) for item in _items(g, options, spare)]
    picks = [0] * len(groups)
    for i in _solve(items, len(groups), spare, len(groups) if rare is None else rare):
        picks[items[i].group] = items[i].place
    return picks


class _Item(NamedTuple):
    """An option worth considering: what it adds to the cheapest and to the best of its group."""

    group: int
    place: int
    cost: int
    score: float
    rare: bool


def _items(group: int, options: Sequence[Priced], spare: int) -> list[_Item]:
    """The affordable options that no other is at least as good as in every respect, by cost."""
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].score, i))
    least = options[order[0]].cost
    kept: list[int] = []
    for place in order:
        own = options[place]
        beaten = any(
            o.score <= own.score and o.rare <= own.rare for o in map(options.__getitem__, kept)
        )
        if not beaten and own.cost - least <= spare:
            kept.append(place)
    best = min(options[i].score for i in kept)
    return [
        _Item(group, i, options[i].cost - least, options[i].score - best, options[i].rare)
        for i in kept
    ]


def _solve(items: Sequence[_Item], groups: int, spare: int, rare: int) -> list[int]:
    """Places of the chosen items, one of each group."""
    count, places = len(items), np.arange(len(items))
    if count == groups:
        return places.tolist()  # no group has two options left
    total = sum(item.score for item in items) or 1.0
    # Their common divisor makes most costs small numbers, which scales the constraint well.
    unit = math.gcd(*(item.cost for item in items)) or 1
    costs, room = [item.cost // unit for item in items], spare // unit
    one_each = csr_array((np.ones(count), ([item.group for item in items], places)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(np.asarray(costs, np.float64)[None], -np.inf, float(room)),
        LinearConstraint(np.asarray([[float(item.rare) for item in items]]), -np.inf, float(rare)),
    ]
    while True:
        result = milp(
            np.asarray([item.score for item in items]) * (_OBJECTIVE / total),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise RuntimeError(f"the solver found no choice: {result.message}")
        chosen = result.x > 0.5
        taken = np.flatnonzero(chosen).tolist()
        if sum(costs[i] for i in taken) <= room:
            return taken
        # The solver holds constraints to a tolerance: what oversteps by less is ruled out by name.
        again = LinearConstraint(chosen.astype(np.float64)[None], -np.inf, len(taken) - 1)
        constraints.append(again)
