"""How a product with a 4-bit weight is shared among devices.

Rows of activations may be split, the weight along N (then so is the product) and along K (then
devices have partial sums, which are added in float32). N is split between blocks of 64 rows and
K between steps of 512 columns; a weight with other sizes is gathered along that axis.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.four_bit import BLOCK_ROWS, ROWS, SCALE_WORDS, STEP, FourBit, Kind

type Product = Callable[[jax.Array, FourBit], jax.Array]


def partitioned(local: Product, x: jax.Array, weight: FourBit) -> jax.Array:
    """`local(x, weight)`, [M, K] and [N, K] to [M, N], where arrays may be sharded.

    Args:
      local: computes the product of what one device has.
    """
    product = _partitioned(local, weight.kind, weight.shape)
    return product(x, weight.codes, weight.scales, weight.factor)


@lru_cache
def _partitioned(local: Product, kind: Kind, shape: tuple[int, int]) -> Callable[..., jax.Array]:
    n, k = shape

    @custom_partitioning
    def product(x: jax.Array, codes: jax.Array, scales: jax.Array, factor: jax.Array) -> jax.Array:
        return local(x, FourBit(codes, scales, factor, kind, shape))

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        del result
        rows = _axes(arguments[0], 0)
        along_n = _axes(arguments[1], 0, n / BLOCK_ROWS)
        along_k = _axes(arguments[1], 1, k / STEP)

        def lower(x: jax.Array, codes: jax.Array, scales: jax.Array, factor: jax.Array):
            own = (ROWS * len(codes) if along_n else n, x.shape[1])
            out = local(x, FourBit(codes, scales, factor, kind, own))
            if along_k is None:
                return out
            return lax.psum(out.astype(jnp.float32), along_k).astype(out.dtype)

        weight = P(along_n, along_k)
        specs = (P(rows, along_k), weight, weight, P(along_n))
        places = tuple(NamedSharding(mesh, spec) for spec in specs)
        return mesh, lower, NamedSharding(mesh, P(rows, along_n)), places

    def rule(mesh: Any, *types: Any) -> tuple[str, dict[str, Any]]:
        del types
        return _rule(kind, n, k, mesh.shape.values())

    product.def_partition(partition, sharding_rule=rule)
    return product


def _rule(kind: Kind, n: int, k: int, axes: Iterable[int]) -> tuple[str, dict[str, Any]]:
    """Which dimensions belong together, as Shardy writes it: `t` blocks of N, `g` steps of K.

    Where a mesh axis does not divide the blocks, or the steps, that dimension is not to be split.
    """
    sizes: dict[str, int] = {}
    fixed: list[str] = []
    if _divisible(k / STEP, axes):
        columns = ("(g a)", "(g b)", "(g c)")
        words = STEP // 128 * SCALE_WORDS[kind]
        sizes |= {"g": k // STEP, "a": STEP, "b": 2 * STEP, "c": words}
    else:
        columns = ("a", "b", "c")
        fixed += columns
    if _divisible(n / BLOCK_ROWS, axes):
        tiles, out = "(t u)", "(t r)"
        sizes |= {"t": n // BLOCK_ROWS, "u": BLOCK_ROWS // ROWS, "r": BLOCK_ROWS}
    else:
        tiles, out = "t", "n"
        fixed += ["t", "n"]
    operands = ", ".join([f"m {columns[0]}", *(f"{tiles} {each}" for each in columns[1:]), tiles])
    options = {
        "reduction_factors": ("g",) if "g" in sizes else (),
        # In the order in which they appear.
        "need_replication_factors": tuple(sorted(fixed, key="atbcn".index)),
        **sizes,
    }
    return f"{operands} -> m {out}", options


def _divisible(pieces: float, axes: Iterable[int]) -> bool:
    return pieces > 1 and all(pieces % size == 0 for size in axes)


def _axes(argument: Any, dimension: int, pieces: float = 0) -> Any:
    """Mesh axes that split a dimension of an argument; None if it has to be gathered.

    Args:
      pieces: number of those that must stay whole, if any.
    """
    sharding = argument.sharding
    axes = sharding.spec[dimension] if dimension < len(sharding.spec) else None
    names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    shares = math.prod(sharding.mesh.shape[name] for name in names)
    return axes if pieces % shares == 0 else None
