"""From masks to indices: what of each layer stays when a model is cut."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax
import numpy as np

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.prune.masks import Masks, check_multiple


@dataclass(frozen=True)
class Widths:
    """Sizes of one layer: key-value groups, query heads of each, experts (0 where there are none),
    feed-forward neurons (of each expert)."""

    groups: int
    heads: int
    experts: int
    neurons: int


@dataclass(frozen=True)
class KeptLayer:
    """Indices that stay in one layer, ascending, with a mask of those that are still read.

    Attributes:
      groups: [G].
      heads, head_mask: [G, S], within each group.
      neurons, neuron_mask: [F] or, of each kept expert, [E, F].
      experts: [E] or None.
    """

    groups: np.ndarray
    heads: np.ndarray
    head_mask: np.ndarray
    neurons: np.ndarray
    neuron_mask: np.ndarray
    experts: np.ndarray | None

    @property
    def widths(self) -> Widths:
        experts = 0 if self.experts is None else len(self.experts)
        groups, heads = self.heads.shape
        return Widths(groups, heads, experts, self.neurons.shape[-1])


@dataclass(frozen=True)
class Kept:
    """Indices of channels [D] and layers [L] that stay, and what stays of each of these layers."""

    hidden: np.ndarray
    layers: np.ndarray
    parts: tuple[KeptLayer, ...]


def kept_of(config: ModelConfig, masks: Masks, *, uniform: bool, multiple: int) -> Kept:
    """What `slicing.slice_model` keeps; see there."""
    binary = jax.tree.map(_binary, masks)
    hidden, layers = np.flatnonzero(binary.hidden), np.flatnonzero(binary.layers)
    if not len(hidden) or not len(layers):
        raise UserError("the masks remove all channels or all layers; keep at least one of each")
    check_multiple(multiple)
    if len(hidden) % multiple:
        raise UserError(
            f"the masks keep {len(hidden)} hidden channels, which is no multiple of {multiple}; "
            "keep another number, since a spare channel would not leave the norms as they are"
        )
    wanted = {i: _widths(config, binary, i, multiple) for i in layers.tolist()}
    if uniform:
        wanted = _widest(wanted)
    return Kept(hidden, layers, tuple(_part(binary, i, width) for i, width in wanted.items()))


def _binary(mask: Any) -> np.ndarray:
    array = np.asarray(mask)
    if not np.isin(array, (0, 1)).all():
        raise UserError("masks to cut by hold only 0 and 1; round them first")
    return array > 0


def _widths(config: ModelConfig, masks: Any, index: int, multiple: int) -> Widths:
    """The least that a layer can keep.

    Raises:
      UserError: if nothing is left of a part, or fewer experts than a token is sent to.
    """
    heads, neurons, experts = masks.heads[index], masks.neurons[index], masks.experts[index]
    read = neurons if experts is None else neurons[experts]
    chosen = 0 if experts is None else int(experts.sum())
    if experts is not None and chosen < config.experts_per_token:
        raise UserError(
            f"the masks keep {chosen} experts of layer {index}, and each token is sent to "
            f"{config.experts_per_token}; keep at least as many"
        )
    if not heads.any() or not read.any():
        part = "neurons" if heads.any() else "heads"
        raise UserError(f"the masks keep no {part} of layer {index}; remove the layer instead")
    wide = -(-int(read.sum(axis=-1).max()) // multiple) * multiple
    if wide > neurons.shape[-1]:
        raise UserError(
            f"layer {index} has {neurons.shape[-1]} neurons, so it cannot keep {wide}, the next "
            f"multiple of {multiple}; choose a smaller multiple"
        )
    return Widths(
        groups=int(heads.any(axis=1).sum()),
        heads=int(heads.sum(axis=1).max()),
        experts=chosen,
        neurons=wide,
    )


def _widest(wanted: Mapping[int, Widths]) -> dict[int, Widths]:
    """The same widths for all layers; neurons, for all that have experts and for all others."""
    experts = {widths.experts for widths in wanted.values() if widths.experts}
    if len(experts) > 1:
        raise UserError(
            f"the masks keep {min(experts)} experts in one layer and {max(experts)} in another, "
            "which no uniform model has; keep equally many, or let layers differ"
        )

    def largest(layers: Sequence[Widths]) -> Widths:
        return Widths(*(max(sizes) for sizes in zip(*map(astuple, layers), strict=True)))

    shared = largest(list(wanted.values()))
    return {
        i: Widths(
            shared.groups,
            shared.heads,
            own.experts,
            largest([w for w in wanted.values() if bool(w.experts) == bool(own.experts)]).neurons,
        )
        for i, own in wanted.items()
    }


def _part(masks: Any, index: int, widths: Widths) -> KeptLayer:
    heads, neurons, experts = masks.heads[index], masks.neurons[index], masks.experts[index]
    groups = _first(heads.any(axis=1), widths.groups)
    inside = _first(heads[groups], widths.heads)
    chosen = None if experts is None else np.flatnonzero(experts)
    read = neurons if chosen is None else neurons[chosen]
    columns = _first(read, widths.neurons)
    return KeptLayer(
        groups=groups,
        heads=inside,
        head_mask=np.take_along_axis(heads[groups], inside, axis=-1),
        neurons=columns,
        neuron_mask=np.take_along_axis(read, columns, axis=-1),
        experts=chosen,
    )


def _first(mask: np.ndarray, count: int) -> np.ndarray:
    """Indices [.., count], ascending: those that are kept, then the first of the others."""
    order = np.argsort(~mask, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1)
