"""From scores to masks: the largest stay."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.errors import UserError
from jaxopt_models.prune.importance import Importance
from jaxopt_models.prune.masks import Masks, check_multiple

# One number for all layers, or one for each.
Count = int | Sequence[int]


@dataclass(frozen=True)
class Target:
    """How much to keep; None keeps all.

    Attributes:
      hidden: channels.
      layers: how many.
      groups: key-value groups of each layer.
      heads: query heads of each kept group.
      neurons: of each feed-forward network without experts.
      experts: of each layer that has some.
      expert_neurons: of each expert.
      multiple: which hidden, neurons and expert_neurons are rounded up to, as far as there are so
        many; 64, 128 or 256 suit kernels and engines.
    """

    hidden: int | None = None
    layers: int | None = None
    groups: Count | None = None
    heads: Count | None = None
    neurons: Count | None = None
    experts: Count | None = None
    expert_neurons: Count | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        check_multiple(self.multiple)


def choose(importance: Importance, target: Target) -> Masks:
    """Masks that keep the most important of each part.

    Each layer and each group ranks its own. The score of a key-value group is the L2 norm of those
    of its heads; a layer that is removed keeps its other masks.

    Raises:
      UserError: for a number to keep that is not in 1..n, or lists of another length than there are
        layers.
    """
    numbers = range(len(importance.heads))
    groups, heads = (_each(target, name, numbers) for name in ("groups", "heads"))
    dense, wide = (_each(target, name, numbers) for name in ("neurons", "expert_neurons"))
    experts = _each(target, "experts", numbers)
    multiple = target.multiple

    def neurons(i: int) -> jax.Array:
        has_experts = importance.experts[i] is not None
        name, counts = ("expert_neurons", wide) if has_experts else ("neurons", dense)
        return largest(name, importance.neurons[i], counts[i], multiple)

    return Masks(
        hidden=largest("hidden", importance.hidden, target.hidden, multiple),
        layers=largest("layers", importance.layers, target.layers),
        heads=tuple(_heads(importance.heads[i], groups[i], heads[i]) for i in numbers),
        neurons=tuple(neurons(i) for i in numbers),
        experts=tuple(
            None if scores is None else largest("experts", scores, experts[i])
            for i, scores in enumerate(importance.experts)
        ),
    )


def largest(name: str, scores: jax.Array, count: int | None, multiple: int = 1) -> jax.Array:
    """float32 mask of the `count` largest of each row [.., n]; of equal ones the first.

    Raises:
      UserError: for a count that is not in 1..n; it names the part.
    """
    size = scores.shape[-1]
    if count is None:
        return jnp.ones(scores.shape, jnp.float32)
    if not 1 <= count <= size:
        raise UserError(f"{name}: cannot keep {count} of {size}; choose a number from 1 to {size}")
    count = min(-(-count // multiple) * multiple, size)
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return (jnp.argsort(order, axis=-1) < count).astype(jnp.float32)


def _heads(scores: jax.Array, groups: int | None, heads: int | None) -> jax.Array:
    kept = largest("groups", jnp.linalg.norm(scores, axis=-1), groups)
    return largest("heads", scores, heads) * kept[:, None]


def _each(target: Target, name: str, layers: Iterable[int]) -> list[Any]:
    """The number of each layer."""
    count, total = getattr(target, name), len(list(layers))
    if count is None or isinstance(count, int):
        return [count] * total
    if len(count) != total:
        raise UserError(f"{name}: {len(count)} numbers for {total} layers; give one for each")
    return list(count)
