"""A choice of its own for each layer: blocks are scored one by one, the best mixture is exact.

    score[l, c] = KL(original || original in which block l alone is as choice c says)

    minimise  Σ_l score[l, c_l]    so that    Σ_l cost[l, c_l] <= what layers may cost

Blocks are the attention and the feed-forward network of each layer; a layer's score is the sum of
theirs, or that of leaving it out. What single blocks cost does not quite add up, least of all where
layers go, so the mixture is a candidate like others. Reference: Bercovich et al. 2024,
arXiv:2411.19146.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxopt_models import knapsack
from jaxopt_models.knapsack import Priced
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.candidates import Candidate, Grids
from jaxopt_models.prune.choose import Target, choose
from jaxopt_models.prune.damage import damage
from jaxopt_models.prune.importance import Importance
from jaxopt_models.prune.masks import Masks, drop_layers
from jaxopt_models.prune.sizes import Axis, Costs

_ATTENTION: tuple[Axis, ...] = ("groups", "heads")
_DENSE: tuple[Axis, ...] = ("neurons",)
_EXPERTS: tuple[Axis, ...] = ("experts", "expert_neurons")

type Kept = dict[Axis, int]  # how many of the axes of a block


@dataclass(frozen=True)
class Block:
    """What one layer may become.

    Attributes:
      layer: its number.
      kept: how many of each axis of its attention or its feed-forward network; None is to leave the
        layer out.
      kl: score, nats a predicted token; None until it is measured.
    """

    layer: int
    kept: Kept | None
    kl: float | None = None

    def masks(self, whole: Kept, importance: Importance) -> Masks:
        """Of the model in which it is the only change."""
        if self.kept is None:
            return drop_layers(choose(importance, Target()), [self.layer])
        layers = [self.kept if i == self.layer else {} for i in range(whole["layers"])]
        return choose(importance, _target(whole, layers))

    def as_dict(self) -> dict[str, Any]:
        return {"layer": self.layer, "keep": self.kept, "kl": self.kl}


def blocks(config: ModelConfig, grids: Grids, widths: int, uniform: bool) -> list[list[Block]]:
    """Of each layer what it may become, besides what it is.

    Args:
      config: of the original model.
      grids: numbers to choose from, see `sizes.grids`.
      widths: of each axis at most so many of these numbers, evenly spread from the least on.
      uniform: layers stay as they are or go.
    """
    some = {axis: _spread(numbers, widths) for axis, numbers in grids.items()}

    def of_layer(layer: int) -> list[Block]:
        found: list[Block] = []
        for axes in () if uniform else _axes(config, layer):
            whole = {axis: grids[axis][-1] for axis in axes}
            every = itertools.product(*(some[axis] for axis in axes))
            kept = (dict(zip(axes, numbers, strict=True)) for numbers in every)
            found += [Block(layer, one) for one in kept if one != whole]
        return found + ([Block(layer, None)] if len(grids["layers"]) > 1 else [])

    return [of_layer(layer) for layer in range(config.num_layers)]


def score(
    config: ModelConfig,
    params: Any,
    batches: Sequence[Any],
    choices: Sequence[Block],
    importance: Importance,
    whole: Kept,
    progress: Progress = silent,
) -> list[float]:
    """KL of each choice for one layer, the rest of the model as it was; see `damage.damage`."""
    masks = [choice.masks(whole, importance) for choice in choices]
    return [max(0.0, one.kl) for one in damage(config, params, batches, masks, None, progress)]


def mixtures(
    config: ModelConfig,
    costs: Costs,
    grids: Grids,
    scored: Sequence[Block],
    budget: int,
) -> list[Candidate]:
    """The best mixture within a budget, and where it leaves out layers the best that leaves out
    none; without what does not fit.

    Args:
      costs: in the unit of the budget.
      grids: as of `blocks`; no fewer layers stay than the least of them.
      scored: choices for all layers, measured.
      budget: largest cost.
    """
    most = grids["layers"][-1] - grids["layers"][0]
    options = [_options(config, costs.whole, i, scored) for i in range(config.num_layers)]
    room = budget - costs.of_outside(costs.whole)
    best = _best("per layer", costs, options, room, most)
    found = [best] if best is not None else []
    if best is not None and best.dropped:
        every = _best("per layer, all kept", costs, options, room, 0)
        found += [every] if every is not None else []
    return found


@dataclass(frozen=True)
class _Option:
    """What a layer keeps of its axes, None if it is left out, and the score of that."""

    kept: Kept | None
    kl: float


def _options(config: ModelConfig, whole: Any, layer: int, scored: Sequence[Block]) -> list[_Option]:
    """Every attention with every feed-forward network, and without the layer."""
    mine = [one for one in scored if one.layer == layer]
    parts: list[list[_Option]] = []
    for axes in _axes(config, layer):
        own = [one for one in mine if one.kept is not None and set(one.kept) == set(axes)]
        parts.append([_Option({axis: whole[axis] for axis in axes}, 0.0)])
        parts[-1] += [_Option(one.kept, _measured(one)) for one in own]
    pairs = itertools.product(*parts)
    found = [_Option((a.kept or {}) | (f.kept or {}), a.kl + f.kl) for a, f in pairs]
    return found + [_Option(None, _measured(one)) for one in mine if one.kept is None]


def _measured(block: Block) -> float:
    assert block.kl is not None  # by `score`
    return block.kl


def _best(
    name: str, costs: Costs, options: Sequence[Sequence[_Option]], room: int, most: int
) -> Candidate | None:
    def cost(layer: int, option: _Option) -> int:
        return 0 if option.kept is None else costs.of_layer(layer, {**costs.whole, **option.kept})

    groups = [
        [Priced(option.kl, cost(layer, option), option.kept is None) for option in of_layer]
        for layer, of_layer in enumerate(options)
    ]
    if room < knapsack.smallest(groups, most):
        return None
    picks = knapsack.choose(groups, room, most)
    taken = [own[i] for own, i in zip(options, picks, strict=True)]
    dropped = tuple(i for i, option in enumerate(taken) if option.kept is None)
    target = _target(dict(costs.whole), [option.kept or {} for option in taken])
    total = sum(group[i].cost for group, i in zip(groups, picks, strict=True))
    return Candidate(name, target, dropped, costs.of_outside(costs.whole) + total)


def _target(whole: Kept, layers: Sequence[Kept]) -> Target:
    """Of what each layer keeps; axes that all layers keep whole are left out."""
    each: dict[Axis, Any] = {
        axis: tuple(kept.get(axis, size) for kept in layers)
        for axis, size in whole.items()
        if axis not in ("layers", "hidden")
    }
    some: Any = {axis: own for axis, own in each.items() if set(own) != {whole[axis]}}
    return Target(**some)


def _axes(config: ModelConfig, layer: int) -> tuple[tuple[Axis, ...], ...]:
    """Of the attention and of the feed-forward network."""
    return _ATTENTION, _EXPERTS if layer in config.moe_layers else _DENSE


def _spread(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """So many besides the last, evenly spread from the first on; and the last."""
    last = len(numbers) - 1
    places = {round(last * i / count) for i in range(count)} | {last}
    return tuple(numbers[i] for i in sorted(places))
