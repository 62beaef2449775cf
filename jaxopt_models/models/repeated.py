"""Layers that are alike, as one: a program then holds their code once, and runs it in a loop.

    before: layers    period: p layers, of arrays [n, ...]    after: layers

Layer `start + i p + j` is the i-th of `period[j]`. A period has more than one layer where kinds
take turns, as Gemma's sliding and full attention do. Compilation takes as long as p layers, and
those before and after, in place of all of them.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_models.models.config import AttentionKind

_Run = Callable[[AttentionKind, Any, jax.Array], jax.Array]


@struct.dataclass
class Repeated:
    """What stands in `params["layers"]`, see above."""

    before: tuple[Any, ...]
    period: tuple[Any, ...]
    after: tuple[Any, ...]

    @property
    def start(self) -> int:
        return len(self.before)

    @property
    def count(self) -> int:
        """How often the period is run."""
        return jax.tree.leaves(self.period)[0].shape[0] if self.period else 0

    @property
    def end(self) -> int:
        return self.start + len(self.period) * self.count


def repeated(
    params: Any,
    kinds: Sequence[AttentionKind],
    prepare: Callable[[Any], Any] = lambda params: params,
) -> Any:
    """`prepare(params)`, its layers as a `Repeated`; without layers that are alike, as they are.

    Alike are layers of one kind of attention and one structure, with arrays of the same shapes and
    dtypes. Their arrays are copied.

    Args:
      params: parameter tree; its layers are a tuple.
      kinds: of attention, of each layer.
      prepare: makes of a parameter tree another, leaf by leaf. It is called on one layer for all
        that are alike, under `vmap`.
    """
    layers = params["layers"]
    place = _longest([_signature(*pair) for pair in zip(kinds, layers, strict=True)])
    if place is None:
        return prepare(params)

    def of_layer(layer: Any) -> Any:
        return prepare({"layers": (layer,)})["layers"][0]

    start, period, end = place
    alone = prepare(params | {"layers": (*layers[:start], *layers[end:])})
    alike = (layers[start + j : end : period] for j in range(period))
    stacked = tuple(
        jax.vmap(of_layer)(jax.tree.map(lambda *arrays: _stack(arrays), *each)) for each in alike
    )
    rest = alone["layers"]
    return alone | {"layers": Repeated(rest[:start], stacked, rest[start:])}


def run_layers(
    run: _Run,
    kinds: Sequence[AttentionKind],
    layers: Sequence[Any] | Repeated,
    x: jax.Array,
    wanted: Collection[int],
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """(x behind all layers, and behind each that is wanted, by its number).

    Args:
      run: a layer of a kind on the residual stream.
      kinds: of attention, of each layer.
      layers: one after the other, or those that are alike in a loop.
      x: residual stream.
      wanted: numbers of layers.
    """
    layers = layers if isinstance(layers, Repeated) else Repeated(tuple(layers), (), ())
    x, before = _several(run, kinds[: layers.start], layers.before, x)
    x, alike = _repeatedly(run, kinds, layers, x, wanted)
    x, after = _several(run, kinds[layers.end :], layers.after, x, layers.end)
    behind = before | alike | after
    return x, {i: behind[i] for i in wanted}


def _several(
    run: _Run, kinds: Sequence[AttentionKind], layers: Sequence[Any], x: jax.Array, first: int = 0
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """(x behind the layers, and behind each by its number)."""
    behind = {}
    for i, (kind, layer) in enumerate(zip(kinds, layers, strict=True), first):
        behind[i] = x = run(kind, layer, x)
    return x, behind


def _repeatedly(
    run: _Run,
    kinds: Sequence[AttentionKind],
    layers: Repeated,
    x: jax.Array,
    wanted: Collection[int],
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """(x behind the layers that are alike, and behind those of them that are wanted)."""
    if not layers.period:
        return x, {}
    start, period = layers.start, len(layers.period)
    turns = {i: divmod(i - start, period) for i in wanted if start <= i < layers.end}
    kept = {j for _, j in turns.values()}

    def turn(x: jax.Array, each: tuple[Any, ...]) -> tuple[jax.Array, dict[int, jax.Array]]:
        x, behind = _several(run, kinds[start : start + period], each, x)
        return x, {j: behind[j] for j in kept}

    x, streams = jax.lax.scan(turn, x, layers.period)
    return x, {i: streams[j][number] for i, (number, j) in turns.items()}


class _Place(NamedTuple):
    start: int
    period: int
    end: int


def _signature(kind: AttentionKind, layer: Any) -> Hashable:
    arrays, structure = jax.tree.flatten(layer)
    return kind, structure, tuple((array.shape, array.dtype) for array in arrays)


def _longest(signatures: Sequence[Hashable]) -> _Place | None:
    """Where layers repeat so that the fewest are left to be compiled, if any do."""
    total, found = len(signatures), []
    for period in range(1, total // 2 + 1):
        start = 0
        for i in range(period, total + 1):
            if i < total and signatures[i] == signatures[i - period]:
                continue
            count = (i - start) // period  # signatures[start:i] has this period
            if count > 1:
                found.append(_Place(start, period, start + count * period))
            start = i - period + 1
    return min(
        found, key=lambda at: (total - at.end + at.start + at.period, at.period), default=None
    )


def _stack(arrays: Sequence[jax.Array]) -> jax.Array:
    """[n, ...], split over devices as each of the arrays is."""
    own = None if isinstance(arrays[0], Tracer) else getattr(arrays[0], "sharding", None)
    if not isinstance(own, NamedSharding):
        return jnp.stack(arrays)
    return _split_stack(arrays, NamedSharding(own.mesh, PartitionSpec(None, *own.spec)))


@partial(jax.jit, static_argnames="split")
def _split_stack(arrays: Sequence[jax.Array], split: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.stack(arrays), split)
