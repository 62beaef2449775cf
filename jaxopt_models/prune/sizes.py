"""What a model has so many of, and what a smaller model costs before it is made.

Every leaf's size is a product in which each axis that is cut is a factor, so what stays of it is

    size · Π_a kept_a / whole_a,    a over the axes of that leaf

in integers. Layers are taken out whole.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.prune.masks import head_shape

Axis = Literal["layers", "hidden", "neurons", "heads", "groups", "experts", "expert_neurons"]
AXES: tuple[Axis, ...] = get_args(Axis)
Stored = Literal["parameters", "bytes"]
Unit = Literal[Stored, "nanoseconds"]
# What people are shown: a cost times the first number is in the second.
SHOWN: dict[Unit, tuple[float, str]] = {
    "parameters": (1, "parameters"),
    "bytes": (1, "bytes"),
    "nanoseconds": (1e-6, "ms a step"),
}
Sizes = Mapping[Axis, int]  # how many of each axis that the model has; of layers, in all
ROUNDED: tuple[Axis, ...] = ("hidden", "neurons", "expert_neurons")

# The axes of a leaf by the module that it is in; biases have those of the rows alone.
_ROWS: dict[str, tuple[Axis, ...]] = {
    "q_proj": ("heads", "groups"),
    "k_proj": ("groups",),
    "v_proj": ("groups",),
    "o_proj": ("hidden",),
    "gate_proj": ("neurons",),
    "up_proj": ("neurons",),
    "down_proj": ("hidden",),
    "router": ("experts",),
}
_COLUMNS: dict[str, tuple[Axis, ...]] = {"o_proj": ("heads", "groups"), "down_proj": ("neurons",)}
_WHOLE = ("q_norm", "k_norm")  # of heads, whose size stays


def sizes_of(config: ModelConfig, params: Any) -> dict[Axis, int]:
    """The axes of a model whose layers have equal widths; those that it does not have are left out.

    Raises:
      UserError: for layers of different widths.
    """
    found: dict[Axis, set[int]] = {axis: set() for axis in AXES}
    found["layers"].add(len(params["layers"]))
    found["hidden"].add(params["embed_tokens"]["weight"].shape[1])
    for layer in params["layers"]:
        groups, heads = head_shape(config, layer["self_attn"])
        found["groups"].add(groups)
        found["heads"].add(heads)
        mlp = layer["mlp"]
        down = mlp.get("experts", mlp)["down_proj"]["weight"].shape
        found["expert_neurons" if "experts" in mlp else "neurons"].add(down[-1])
        if "experts" in mlp:
            found["experts"].add(down[0])
    for axis, values in found.items():
        if len(values) > 1:
            raise UserError(
                f"layers have {min(values)} to {max(values)} {axis}, and a search needs equal "
                "ones; say what each layer is to keep with `keep` instead of `budget`"
            )
    return {axis: values.pop() for axis, values in found.items() if values}


def grids(
    config: ModelConfig, whole: Sizes, axes: Collection[Axis], least: float, multiple: int
) -> dict[Axis, tuple[int, ...]]:
    """Ascending numbers of each axis to choose from; only the whole of those that stay.

    Args:
      config: the architecture.
      whole: of the model.
      axes: that may be cut.
      least: share of each axis that stays at least.
      multiple: of widths, unless they are whole; heads, groups, experts and layers have none.

    Raises:
      UserError: for an axis that the model does not have.
    """
    for axis in axes:
        if axis not in whole:
            raise UserError(
                f"axes: the model has no {axis} to remove; choose among {', '.join(whole)}"
            )
    found: dict[Axis, tuple[int, ...]] = {}
    for axis, size in whole.items():
        first = max(1, math.ceil(least * size - 1e-9))
        if axis == "experts":
            first = max(first, config.experts_per_token)
        step = multiple if axis in ROUNDED else 1
        numbers = range(-(-first // step) * step, size, step) if axis in axes else ()
        found[axis] = (*numbers, size)
    return found


class Costs(ABC):
    """What a model costs by what it keeps, as integers of one unit, so that "within the budget" has
    no rounding in it: the sum over what is outside of layers and each layer that stays.

    Attributes:
      whole: sizes of the model.
    """

    whole: Sizes

    @abstractmethod
    def of_outside(self, kept: Sizes) -> int:
        """Of embeddings, the final norm and the head, of which so many of each axis are kept."""

    @abstractmethod
    def of_layer(self, index: int, kept: Sizes) -> int:
        """Of one layer that keeps so many of each axis."""

    @abstractmethod
    def text(self, cost: int) -> str:
        """A cost and its unit, for people."""

    def of_sizes(self, kept: Sizes, dropped: Collection[int]) -> int:
        """Of a model that keeps so many of each axis, without some layers."""
        stay = (i for i in range(self.whole["layers"]) if i not in dropped)
        return self.of_outside(kept) + sum(self.of_layer(i, kept) for i in stay)

    @property
    def of_whole(self) -> int:
        return self.of_sizes(self.whole, ())


@dataclass(frozen=True)
class Prices(Costs):
    """Of what is stored, exact.

    Attributes:
      whole: sizes of the model.
      outside: of leaves outside of layers, their cost by the axes that they have.
      layers: of each layer, likewise.
      unit: of costs.
    """

    whole: Sizes
    outside: Mapping[tuple[Axis, ...], int]
    layers: tuple[Mapping[tuple[Axis, ...], int], ...]
    unit: Stored

    @classmethod
    def of(cls, config: ModelConfig, params: Any, unit: Stored) -> "Prices":
        """Of a model in plain arrays, which may be abstract."""
        outside: Counter[tuple[Axis, ...]] = Counter()
        layers = tuple(Counter[tuple[Axis, ...]]() for _ in params["layers"])
        for path, leaf in tree.leaves_with_paths(params):
            width = jax.dtypes.itemsize_bits(leaf.dtype) // 8 if unit == "bytes" else 1
            _, _, rest = path.partition("/")
            place = layers[int(rest.split("/")[0])] if path.startswith("layers/") else outside
            place[_axes(path)] += leaf.size * width
        return cls(sizes_of(config, params), outside, layers, unit)

    def of_outside(self, kept: Sizes) -> int:
        return self._sum(self.outside, kept)

    def of_layer(self, index: int, kept: Sizes) -> int:
        return self._sum(self.layers[index], kept)

    def text(self, cost: int) -> str:
        return f"{cost} {self.unit}"

    def _sum(self, costs: Mapping[tuple[Axis, ...], int], kept: Sizes) -> int:
        return sum(
            cost // _product(self.whole, axes) * _product(kept, axes)
            for axes, cost in costs.items()
        )


def cost_of(params: Any, unit: Stored) -> int:
    """Of a whole model."""
    if unit == "bytes":
        return tree.size_in_bits(params) // 8
    return sum(leaf.size for _, leaf in tree.leaves_with_paths(params))


def _product(sizes: Sizes, axes: tuple[Axis, ...]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _axes(path: str) -> tuple[Axis, ...]:
    *modules, leaf = path.split("/")
    name = modules[-1]
    if name in _WHOLE:
        return ()
    if name not in _ROWS:  # embeddings, the head, norms
        return ("hidden",)
    axes = _ROWS[name] + (_COLUMNS.get(name, ("hidden",)) if leaf == "weight" else ())
    if "experts" not in modules:
        return axes
    inside: tuple[Axis, ...] = tuple("expert_neurons" if a == "neurons" else a for a in axes)
    return ("experts", *inside)
