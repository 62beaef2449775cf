"""What a decode step of a smaller model takes, from the times of its parts on this device.

    t(model) ≈ r · ( o(D) + Σ_l ( a(D, G, S) + f(D, F) ) )

o is all that is outside of layers; a is a layer with the least feed-forward network; f, what a
wider one adds. Each is timed at the least, the middle and the whole of its axes and is linear in
each of them in between, since a step reads every weight once. A layer's time is what a model of a
few such layers takes longer than one of none, so that weights do not stay in caches as those of a
single one would. r makes the original's parts add up to its own time. Reference for times that add
up: Bercovich et al. 2024, arXiv:2411.19146.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from jaxopt_models.decode_time import decode_seconds
from jaxopt_models.inference import for_device
from jaxopt_models.models.config import AttentionKind, ModelConfig
from jaxopt_models.prune.sizes import Axis, Costs, Sizes

# Seconds that a decode step of (config, params) takes.
Clock = Callable[[ModelConfig, Any], float]
Numbers = Mapping[Axis, Sequence[int]]  # of each axis, ascending, the whole last

_LAYERS = 4  # that are timed together
_STEPS = (8, 40)
_NANO = 1e9

_HIDDEN: tuple[Axis, ...] = ("hidden",)
_ATTENTION: tuple[Axis, ...] = ("hidden", "groups", "heads")
_DENSE: tuple[Axis, ...] = ("hidden", "neurons")
_EXPERTS: tuple[Axis, ...] = ("hidden", "experts", "expert_neurons")


def wall_clock(batch: int, context: int) -> Clock:
    """Times models as `generate` runs them, at the end of a context of so many positions."""

    def seconds(config: ModelConfig, params: Any) -> float:
        return decode_seconds(config, for_device(config, params), batch, context, _STEPS)

    return seconds


@dataclass(frozen=True)
class Table:
    """Seconds by some axes, linear in each of them between knots.

    Attributes:
      axes: of the table.
      knots: ascending numbers of each.
      seconds: [len(knots_0), len(knots_1), ..].
    """

    axes: tuple[Axis, ...]
    knots: tuple[tuple[int, ...], ...]
    seconds: np.ndarray
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False, compare=False)

    def at(self, kept: Sizes) -> float:
        """Of sizes within the knots."""
        place = tuple(kept[axis] for axis in self.axes)
        if place not in self._known:
            between = RegularGridInterpolator(self.knots, self.seconds)
            self._known[place] = float(between(np.asarray(place, np.float64))[0])
        return self._known[place]


@dataclass(frozen=True)
class LayerTable:
    """Of one kind of layer: `attention` with the least feed-forward network, and what a wider one
    adds to it, `added`."""

    attention: Table
    added: Table

    def at(self, kept: Sizes) -> float:
        return self.attention.at(kept) + self.added.at(kept)


type _Kind = tuple[AttentionKind, bool]  # of a layer, and whether it has experts


@dataclass(frozen=True)
class Times(Costs):
    """Of a decode step, in nanoseconds.

    Attributes:
      whole: sizes of the model.
      outside: of all but the layers.
      layers: of each layer.
      scale: r, what the original takes by what its parts add up to.
    """

    whole: Sizes
    outside: Table
    layers: tuple[LayerTable, ...]
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        whole: Sizes,
        numbers: Numbers,
        seconds: Callable[[ModelConfig], float],
        original: float,
    ) -> "Times":
        """From the times of parts.

        Args:
          config: of the original model.
          whole: its sizes.
          numbers: that each axis is cut to, see `sizes.grids`.
          seconds: of a model of each of `parts`.
          original: seconds of the original.
        """
        parts = cls(whole, *_tables(config, whole, numbers, seconds))
        return replace(parts, scale=original / max(parts._seconds(whole), 1e-12))

    def of_outside(self, kept: Sizes) -> int:
        return self._nanoseconds(self.outside.at(kept))

    def of_layer(self, index: int, kept: Sizes) -> int:
        return self._nanoseconds(self.layers[index].at(kept))

    def text(self, cost: int) -> str:
        return f"{cost / 1e6:.3f} ms a step"

    def _nanoseconds(self, seconds: float) -> int:
        return round(seconds * self.scale * _NANO)

    def _seconds(self, kept: Sizes) -> float:
        return self.outside.at(kept) + sum(table.at(kept) for table in self.layers)


def parts(config: ModelConfig, whole: Sizes, numbers: Numbers) -> list[ModelConfig]:
    """The models whose times `Times.of` asks for, each once; they are small."""
    asked: dict[ModelConfig, float] = {}
    _tables(config, whole, numbers, lambda part: asked.setdefault(part, 0.0))
    return list(asked)


def _tables(
    config: ModelConfig,
    whole: Sizes,
    numbers: Numbers,
    seconds: Callable[[ModelConfig], float],
) -> tuple[Table, tuple[LayerTable, ...]]:
    """(outside of layers, of each layer)."""
    knots: dict[Axis, tuple[int, ...]] = {axis: _knots(numbers[axis]) for axis in whole}
    least: dict[Axis, int] = {axis: numbers[0] for axis, numbers in knots.items()}

    def of_layer(kind: _Kind, kept: Sizes) -> float:
        several = seconds(_model(config, kept, [kind] * _LAYERS))
        return max(0.0, several - seconds(_model(config, kept, []))) / _LAYERS  # clocks are noisy

    def layer_table(kind: _Kind) -> LayerTable:
        attention = _table(_ATTENTION, knots, lambda kept: of_layer(kind, least | kept))

        def added(kept: dict[Axis, int]) -> float:
            return of_layer(kind, least | kept) - attention.at(least | kept)

        return LayerTable(attention, _table(_EXPERTS if kind[1] else _DENSE, knots, added))

    outside = _table(_HIDDEN, knots, lambda kept: seconds(_model(config, least | kept, [])))
    kinds: list[_Kind] = [
        (kind, i in config.moe_layers) for i, kind in enumerate(config.attention_kinds)
    ]
    tables = {kind: layer_table(kind) for kind in dict.fromkeys(kinds)}
    return outside, tuple(tables[kind] for kind in kinds)


def _table(
    axes: tuple[Axis, ...],
    knots: Mapping[Axis, tuple[int, ...]],
    seconds: Callable[[dict[Axis, int]], float],
) -> Table:
    own = tuple(knots[axis] for axis in axes)
    values = np.zeros([len(numbers) for numbers in own])
    for place in np.ndindex(values.shape):
        kept: dict[Axis, int] = {a: of[i] for a, of, i in zip(axes, own, place, strict=True)}
        values[place] = seconds(kept)
    return Table(axes, own, values)


def _knots(numbers: Sequence[int]) -> tuple[int, ...]:
    """The first, the middle and the last."""
    return tuple(sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}))


def _model(config: ModelConfig, kept: Sizes, kinds: Sequence[_Kind]) -> ModelConfig:
    """Of layers of these kinds and sizes."""
    return replace(
        config,
        intermediate_size=kept.get("neurons", config.intermediate_size),
        num_experts=kept.get("experts", config.num_experts),
        expert_size=kept.get("expert_neurons", config.expert_size),
        hidden_size=kept["hidden"],
        num_heads=kept["groups"] * kept["heads"],
        num_kv_heads=kept["groups"],
        num_layers=len(kinds),
        attention_kinds=tuple(kind for kind, _ in kinds),
        moe_layers=tuple(i for i, (_, experts) in enumerate(kinds) if experts),
    )
