"""Where arrays live on several devices: meshes, and rules from leaf paths to shardings.

A rule maps a glob on leaf paths (`tree`) to the `PartitionSpec` of the weight found there, and the
last rule that matches a leaf decides; a leaf that none matches is replicated. A spec speaks of the
weight [..., N, K] that a leaf stands for, and each array of the leaf gets what follows from it:

    QTensor      [..., N, K]     P(..., n, k)
    codes        [..., N, bytes] P(..., n, k)
    scale        [..., N/t, K/t] P(..., n, k)     likewise zero_point
    pre_scale    [K]             P(k)
    low_rank     down [..., R, K], up [..., N, R]   P(..., None, k), P(..., n, None)
    global_scale, input          replicated

    FakeTensor   [..., N, K]     P(..., n, k)     scales and learnt amax like a QTensor's
    DenseTensor  [..., N, K]     P(..., n, k)     low_rank and the other input steps likewise

    PackedTensor [N, K]          P(n, k)
    codes, scales [N, …]         P(n, k)          or [N/16, …], [N/128, …]
    scales, factor [N]           P(n)             or [N/16]; input steps as above

An array's axis is left whole where splitting it would cut unevenly or through a tile of values
that share a scale or a byte, so any rule gives correct results on any mesh. A boundary may cut a
block that is rotated (`QTensor.rotate`): devices then exchange inputs, which costs less than a
weight on each of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.packed import PackedTensor
from jaxopt_models.qtensor import DenseTensor, LowRank, QTensor
from jaxopt_models.sharding_rules import DEFAULT_RULES, TRAINING_RULES, Rules
from jaxopt_models.tree import is_leaf, leaves_with_paths, map_with_path, matches
from kernels_pallas import EightBit
from kernels_pallas.four_bit import ROWS


def make_mesh(
    shape: Mapping[str, int] | Sequence[int],
    names: Sequence[str] = ("data", "model"),
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh whose axes XLA partitions by itself (`AxisType.Auto`).

    Args:
      shape: size of each axis by name, as in {"data": 2, "model": 4}, or sizes alone.
      names: of the axes, where `shape` has none.
      devices: to build it of, all by default; the first ones are taken if there are more.

    Raises:
      UserError: for more devices than there are, or sizes that do not go with the names.
    """
    if not isinstance(shape, Mapping):
        if len(shape) != len(names):
            raise UserError(f"mesh {tuple(shape)} needs {len(shape)} names, not {tuple(names)}")
        shape = dict(zip(names, shape, strict=True))
    sizes, found = tuple(shape.values()), len(jax.devices() if devices is None else devices)
    if min(sizes, default=0) < 1 or math.prod(sizes) > found:
        raise UserError(
            f"mesh {dict(shape)} needs {math.prod(sizes)} devices and there are {found}; "
            "give sizes whose product is at most that"
        )
    auto = (AxisType.Auto,) * len(sizes)
    chosen = (jax.devices() if devices is None else devices)[: math.prod(sizes)]
    return jax.make_mesh(sizes, tuple(shape), axis_types=auto, devices=chosen)


def shardings(params: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A tree like `params` with a `NamedSharding` in place of each array.

    Args:
      params: parameter tree; arrays may be abstract (`jax.ShapeDtypeStruct`).
      mesh: from `make_mesh`.
      rules: extend the default as in `DEFAULT_RULES | {"*/mlp/up_proj/weight": P()}`.

    Raises:
      UserError: for a rule of yours that matches no leaf, and for a spec with more axes than its
        leaf or with an axis that the mesh lacks.
    """
    paths = [path for path, _ in leaves_with_paths(params)]
    for pattern, wanted in rules.items():
        ours = wanted in (DEFAULT_RULES.get(pattern), TRAINING_RULES.get(pattern))
        if not ours and not any(matches(path, pattern) for path in paths):
            raise UserError(
                f"sharding rule {pattern!r} matches no tensor; paths look like "
                f"{paths[len(paths) // 2]!r}"
            )

    def leaf_shardings(path: str, leaf: Any) -> Any:
        specs = _leaf_specs(leaf, _choose(path, leaf, mesh, rules), mesh)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    return map_with_path(leaf_shardings, params)


def shard(params: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Copies parameters onto the devices of a mesh; see `shardings` and `place`."""
    return place(params, shardings(params, mesh, rules))


def place(arrays: Any, targets: Any) -> Any:
    """Copies arrays to where a tree of shardings says.

    Arrays that lie on devices of one process only are taken to be the same on all of them, and each
    copies its own shards.
    """

    def one(array: Any, target: Sharding) -> jax.Array:
        everywhere = isinstance(array, jax.Array) and not array.is_fully_addressable
        if target.is_fully_addressable or everywhere:
            return jax.device_put(array, target)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, target, lambda index: host[index])

    return jax.tree.map(one, arrays, targets)


def _choose(path: str, leaf: Any, mesh: Mesh, rules: Rules) -> tuple[Any, ...]:
    """Mesh axes for each axis of the weight at a path, by the last rule that matches."""
    found = [pattern for pattern in rules if matches(path, pattern)]
    if not found:
        return (None,) * leaf.ndim
    pattern = found[-1]
    options = rules[pattern]
    specs = [
        _completed(pattern, spec, path, leaf, mesh)
        for spec in (options if isinstance(options, tuple) else (options,))
    ]
    even = (spec for spec in specs if _kept(spec, leaf.shape, mesh, _units(leaf)) == spec)
    return next(even, specs[-1])


def _units(leaf: Any) -> tuple[int, ...]:
    """The least of each axis of a weight that may be split off."""
    units = (1,) * leaf.ndim
    if not isinstance(leaf, QTensor | FakeTensor):
        return units
    codes_a_group = 8 // math.gcd(8, leaf.spec.element.bits)  # the fewest that fill whole bytes
    width = leaf.spec.tile(leaf.shape)[-1]
    # Under one scale for the whole axis a boundary may fall anywhere.
    return (*units[:-1], math.lcm(codes_a_group, width if width < leaf.shape[-1] else 1))


def _completed(pattern: str, spec: P, path: str, leaf: Any, mesh: Mesh) -> tuple[Any, ...]:
    """A spec's entries, one an axis of the leaf, checked against leaf and mesh."""
    unknown = [name for entry in spec for name in _names(entry) if name not in mesh.shape]
    if unknown:
        raise UserError(
            f"sharding rule {pattern!r} splits over {unknown[0]!r}, but the mesh has the axes "
            f"{', '.join(mesh.shape)}; give the mesh that axis (of size 1 to split nothing)"
        )
    if len(spec) > leaf.ndim:
        raise UserError(
            f"sharding rule {pattern!r} has {len(spec)} axes, but {path!r} has the shape "
            f"{list(leaf.shape)}; shorten the rule, or narrow its pattern"
        )
    return (*spec, *(None,) * (leaf.ndim - len(spec)))


def _leaf_specs(leaf: Any, spec: tuple[Any, ...], mesh: Mesh) -> Any:
    """The leaf with a `PartitionSpec` in place of each of its arrays."""
    if isinstance(leaf, QTensor):
        return _quantized_specs(leaf, spec, mesh)
    if isinstance(leaf, FakeTensor):
        return _fake_specs(leaf, spec, mesh)
    if isinstance(leaf, PackedTensor):
        return _packed_specs(leaf, spec, mesh)
    if isinstance(leaf, DenseTensor):
        return _dense_specs(leaf, spec, mesh)
    if not is_leaf(leaf):
        return P(*_kept(spec, leaf.shape, mesh))
    # Any other leaf kind: what has the weight's own extents is split like it (masks, masters).
    return jax.tree.map(lambda part: _like(leaf.shape, part, spec, mesh), leaf)


def _like(shape: tuple[int, ...], part: Any, spec: tuple[Any, ...], mesh: Mesh) -> P:
    """Spec of an array whose axes either equal the weight's or are shared by all of it."""
    if part.ndim != len(shape):
        return P()
    entries = zip(spec, part.shape, shape, strict=True)
    same = tuple(entry if extent == whole else None for entry, extent, whole in entries)
    return P(*_kept(same, part.shape, mesh))


def _quantized_specs(q: QTensor, spec: tuple[Any, ...], mesh: Mesh) -> QTensor:
    spec, tiled, specs = _by_tiles(q, spec, mesh)
    return replace(
        specs,
        codes=P(*spec),
        scale=tiled(q.scale),
        zero_point=_each(tiled, q.zero_point),
        global_scale=_each(tiled, q.global_scale),
    )


def _fake_specs(fake: FakeTensor, spec: tuple[Any, ...], mesh: Mesh) -> FakeTensor:
    """Split as the folded leaf will be."""
    spec, tiled, specs = _by_tiles(fake, spec, mesh)
    return replace(
        specs,
        weight=P(*spec),
        scales=jax.tree.map(tiled, fake.scales),
        overall=_each(tiled, fake.overall),
    )


def _dense_specs(dense: DenseTensor, spec: tuple[Any, ...], mesh: Mesh) -> DenseTensor:
    *lead, rows, columns = spec = _kept(spec, dense.shape, mesh)
    return replace(_input_specs(dense, lead, rows, columns), weight=P(*spec))


def _by_tiles[Leaf: QTensor | FakeTensor](
    leaf: Leaf, spec: tuple[Any, ...], mesh: Mesh
) -> tuple[tuple[Any, ...], Callable[[Any], P], Leaf]:
    """(the spec where it cuts no tile and no byte, the specs that follow for an array with an entry
    a tile, the leaf with those of its input steps)."""
    tile = leaf.spec.tile(leaf.shape)
    spec = _kept(spec, leaf.shape, mesh, _units(leaf))
    *lead, rows, columns = (None,) * (2 - leaf.ndim) + spec

    def tiled(part: Any) -> P:
        return _tiled(leaf.shape, tile, part, spec, mesh)

    return spec, tiled, _input_specs(leaf, lead, rows, columns)


def _packed_specs(packed: PackedTensor, spec: tuple[Any, ...], mesh: Mesh) -> PackedTensor:
    weight = packed.weight
    if isinstance(weight, EightBit):
        rows, columns = _kept(spec, packed.shape, mesh, weight.piece)
        of_scales = P(rows, columns)[: weight.scales.ndim]
        specs = replace(weight, codes=P(rows, columns), scales=P(*of_scales))
    else:
        padded = weight.tiles * ROWS, weight.columns
        rows, columns = _kept(_kept(spec, padded, mesh, weight.piece), packed.shape, mesh)
        specs = replace(weight, codes=P(rows, columns), scales=P(rows, columns), factor=P(rows))
    return replace(_input_specs(packed, [], rows, columns), weight=specs)


def _input_specs[Leaf: QTensor | FakeTensor | PackedTensor | DenseTensor](
    leaf: Leaf, lead: Sequence[Any], rows: Any, columns: Any
) -> Leaf:
    """The leaf with specs of its input steps, of a weight that is split by rows and columns."""

    def low_rank(part: LowRank) -> LowRank:
        return replace(part, down=P(*lead, None, columns), up=P(*lead, rows, None))

    return replace(
        leaf,
        pre_scale=_each(lambda _: P(columns), leaf.pre_scale),
        low_rank=_each(low_rank, leaf.low_rank),
        input=jax.tree.map(lambda _: P(), leaf.input),
    )


def _each(specs: Callable[..., Any], part: Any) -> Any:
    return None if part is None else specs(part)


def _tiled(
    shape: tuple[int, ...], tile: tuple[int, ...], part: Any, spec: tuple[Any, ...], mesh: Mesh
) -> P:
    """Spec of an array with an entry for each tile of a weight that is split by `spec`."""
    # One entry a row (a stack of tensors, each with its own scale) is a tile of 1.
    sizes = (1 if n == whole else t for n, whole, t in zip(part.shape, shape, tile, strict=True))
    aligned = _kept(spec, shape, mesh, tuple(sizes))
    return P(*(None if n == 1 else entry for entry, n in zip(aligned, part.shape, strict=True)))


def _kept(
    spec: tuple[Any, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    units: tuple[int, ...] | None = None,
) -> tuple[Any, ...]:
    """The spec without the axes that would not split into equal parts of whole units."""
    units = units or (1,) * len(shape)

    def even(entry: Any, extent: int, unit: int) -> bool:
        parts = math.prod(mesh.shape[name] for name in _names(entry))
        return extent % (parts * unit) == 0

    entries = zip(spec, shape, units, strict=True)
    return tuple(entry if even(entry, extent, unit) else None for entry, extent, unit in entries)


def _names(entry: Any) -> tuple[str, ...]:
    """Mesh axes that one entry of a spec names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
