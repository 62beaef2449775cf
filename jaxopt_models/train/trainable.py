"""Which arrays of a parameter tree are trained.

    array                 itself
    FakeTensor            weight, learnt scales, low-rank correction
    QTensor, DenseTensor  low-rank correction (adapters beside a frozen weight)

Codes, fixed scales, input steps and what quantizes cached keys and values never are. Paths of
arrays name their fields, too: "layers/3/mlp/up_proj/weight/scales/amax"; patterns are globs on
them, as in `tree`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.kv_quantizer import in_kv_cache
from jaxopt_models.qtensor import DenseTensor, QTensor

# Fields with something to train, of each kind of leaf, below the leaf's own path.
_FIELDS: dict[type, tuple[str, ...]] = {
    FakeTensor: ("/weight", "/scales/amax", "/scales/rounding", "/low_rank/*"),
    QTensor: ("/low_rank/*",),
    DenseTensor: ("/low_rank/*",),
}


def partition(
    params: Any, train: Sequence[str] = ("*",), freeze: Sequence[str] = ()
) -> tuple[Any, Any]:
    """(what is trained, what is not): two trees like `params`, None where the other has an array.

    Args:
      params: parameter tree.
      train: globs on paths of arrays; what matches none is frozen.
      freeze: globs on those that are frozen all the same.

    Raises:
      UserError: for a pattern that matches nothing that could be trained, or if nothing is left.
    """
    named, structure = tree.arrays_with_paths(params), jax.tree.structure(params)
    fields = {
        path + field
        for path, leaf in tree.leaves_with_paths(params)
        for field in ([""] if not tree.is_leaf(leaf) else _FIELDS.get(type(leaf), ()))
    }
    able = [
        path
        for path, array in named
        if tree.matches(path, fields)
        and jnp.issubdtype(array.dtype, jnp.floating)
        and not in_kv_cache(path)
    ]
    for pattern in (*train, *freeze):
        if not any(tree.matches(path, pattern) for path in able):
            raise UserError(
                f"pattern {pattern!r} matches nothing that can be trained; "
                + (f"paths look like {able[len(able) // 2]!r}" if able else "there is nothing")
            )
    chosen = {p for p in able if tree.matches(p, train) and not tree.matches(p, freeze)}
    if not chosen:
        raise UserError(f"nothing is trained: {', '.join(freeze)} freezes all of it")
    trained = [array if path in chosen else None for path, array in named]
    frozen = [None if path in chosen else array for path, array in named]
    return jax.tree.unflatten(structure, trained), jax.tree.unflatten(structure, frozen)


def combine(trained: Any, frozen: Any) -> Any:
    """The whole tree again."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda node: node is None
    )
