"""How a kernel's work is shared among devices: each runs it on what it has.

XLA cannot look into a kernel, and would gather its operands. `partitioned` tells it which
dimensions may stay split, in whole pieces; what is split otherwise is gathered.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Sharing:
    """Which dimensions of operands and results belong together.

    Attributes:
      operands: a letter for each dimension, operands apart by commas, e.g. "m k, n k".
      results: likewise.
      pieces: of a letter, into how many equal pieces its dimensions may be split; none keeps them
        whole.
      added: letters over which results are partial sums, to be added in float32.
    """

    operands: str
    results: str
    pieces: Mapping[str, int]
    added: str = ""

    def divisible(self, letter: str, mesh: Mesh) -> bool:
        """Whether any axis of the mesh may split a letter."""
        pieces = self.pieces.get(letter, 0)
        return pieces > 1 and all(pieces % size == 0 for size in mesh.shape.values())


def whole_pieces(letter: str, size: int, piece: int) -> dict[str, int]:
    """`pieces` of a dimension that is cut into pieces of a size; none if that leaves a rest."""
    return {} if size % piece else {letter: size // piece}


def partitioned(function: Callable[..., Any], sharing: Sharing, *operands: jax.Array) -> Any:
    """`function(*operands)`, where operands may be sharded.

    Args:
      function: computes what one device has to from its parts of the operands; an array, or a tuple
        of several.
      sharing: of all operands and results.
    """
    results = jax.eval_shape(function, *operands)
    shapes = [array.shape for array in (*operands, *jax.tree.leaves(results))]
    call = custom_partitioning(function)

    def rule(mesh: Mesh, *types: Any) -> tuple[str, dict[str, Any]]:
        del types
        return _rule(sharing, shapes, mesh)

    def partition(mesh: Mesh, arguments: Any, result: Any) -> Any:
        axes = _axes(sharing, [argument.sharding for argument in arguments], mesh)
        summed = [name for letter in sharing.added for name in _names(axes.get(letter))]

        def lower(*own: jax.Array) -> Any:
            out = function(*own)
            return jax.tree.map(lambda part: _sum(part, summed), out) if summed else out

        def places(dimensions: str) -> list[NamedSharding]:
            specs = [P(*map(axes.get, letters)) for letters in _letters(dimensions)]
            return [NamedSharding(mesh, spec) for spec in specs]

        structure = jax.tree.structure(result)
        outputs = jax.tree.unflatten(structure, places(sharing.results))
        return mesh, lower, outputs, tuple(places(sharing.operands))

    call.def_partition(partition, sharding_rule=rule)
    return call(*operands)


def _rule(
    sharing: Sharing, shapes: list[tuple[int, ...]], mesh: Mesh
) -> tuple[str, dict[str, Any]]:
    """The same as Shardy writes it: a dimension of pieces is a product of two factors."""
    order: list[str] = []  # of factors as they appear, as Shardy wants them
    sizes: dict[str, int] = {}
    kept: list[str] = []
    whole: set[str] = set()
    sides: list[str] = []
    remaining = iter(shapes)
    for side in (sharing.operands, sharing.results):
        arrays = []
        for letters in _letters(side):
            factors = []
            for letter, size in zip(letters, next(remaining), strict=True):
                pieces, inner = sharing.pieces.get(letter, 0), f"{letter}{len(order)}"
                if pieces == size:
                    factors.append(letter)
                    order.append(letter)
                    whole.add(letter)
                elif sharing.divisible(letter, mesh):
                    factors.append(f"({letter} {inner})")
                    order += [letter, inner]
                    sizes |= {letter: pieces, inner: size // pieces}
                else:  # a factor of its own, to be whole
                    factors.append(inner)
                    order.append(inner)
                    kept.append(inner)
            arrays.append(" ".join(factors))
        sides.append(", ".join(arrays))
    for letter in whole:  # Shardy knows their sizes
        sizes.pop(letter, None)
    added = tuple(letter for letter in sharing.added if letter in order)
    options = {"reduction_factors": added, "need_replication_factors": tuple(kept), **sizes}
    return " -> ".join(sides), options


def _axes(sharing: Sharing, shardings: list[NamedSharding], mesh: Mesh) -> dict[str, Any]:
    """Mesh axes that split a letter's dimensions, of those that may be."""
    found: dict[str, Any] = {}
    for letters, sharding in zip(_letters(sharing.operands), shardings, strict=True):
        for letter, axes in zip(letters, sharding.spec, strict=False):
            shares = math.prod(mesh.shape[name] for name in _names(axes))
            if shares > 1 and letter in sharing.pieces and sharing.pieces[letter] % shares == 0:
                found.setdefault(letter, axes)
    return found


def _letters(side: str) -> Iterator[list[str]]:
    return (array.split() for array in side.split(","))


def _names(axes: Any) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _sum(part: jax.Array, axes: list[str]) -> jax.Array:
    return lax.psum(part.astype(jnp.float32), tuple(axes)).astype(part.dtype)
