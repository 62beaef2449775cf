"""Parameter trees by path: walking, selecting and replacing weight leaves, and their true sizes.

A leaf is an array or a leaf dataclass (`QTensor`, ...); its path is its keys joined by "/",
as in "layers/3/self_attn/q_proj/weight". A pattern is a shell glob on the whole path, in which "*"
also matches "/".
"""

import math
import zlib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from jaxopt_models.errors import UserError


class WeightLeaf:
    """Base of the dataclasses that stand for one weight array inside a parameter tree."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the leaf stands for."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def weight_bits(self) -> int:
        """Bits stored for the weight itself: codes, scales, zero points, corrections."""
        return size_in_bits(self)


def is_leaf(node: Any) -> bool:
    """True for nodes that count as one weight although they hold several arrays."""
    return isinstance(node, WeightLeaf)


def leaves_with_paths(params: Any) -> list[tuple[str, Any]]:
    """All weight leaves in tree order with their paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    return [(_join(path), leaf) for path, leaf in flat]


def arrays_with_paths(node: Any) -> list[tuple[str, Any]]:
    """All arrays in tree order with their paths, which name the fields of leaf dataclasses, too."""
    flat, _ = jax.tree_util.tree_flatten_with_path(node)
    return [(_join(path), array) for path, array in flat]


def map_with_path(function: Callable[..., Any], params: Any, *rest: Any) -> Any:
    """Applies `function(path, leaf, *others)` to every weight leaf."""

    def apply(path, *leaves):
        return function(_join(path), *leaves)

    return jax.tree_util.tree_map_with_path(apply, params, *rest, is_leaf=is_leaf)


def matches(path: str, patterns: str | Iterable[str]) -> bool:
    """True if any of the globs matches the whole path."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def select(params: Any, patterns: str | Iterable[str]) -> dict[str, Any]:
    """The leaves that match, by path.

    Raises:
      UserError: for a pattern that matches nothing.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    leaves = leaves_with_paths(params)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path, _ in leaves):
            raise UserError(
                f"pattern {pattern!r} matches no tensor; paths look like {_example(leaves)!r}"
            )
    return {path: leaf for path, leaf in leaves if matches(path, patterns)}


def replace(params: Any, new: dict[str, Any]) -> Any:
    """A tree with the leaves at the given paths replaced; all others are shared.

    Raises:
      UserError: for a path that is not in the tree.
    """
    missing = new.keys() - {path for path, _ in leaves_with_paths(params)}
    if missing:
        raise UserError(f"the parameters have no tensor {sorted(missing)[0]!r} to replace")
    return map_with_path(lambda path, leaf: new.get(path, leaf), params)


def size_in_bits(node: Any) -> int:
    """Bits that the arrays below a node take when stored, packed codes and scales included."""
    arrays = jax.tree.leaves(node)
    return sum(array.size * jax.dtypes.itemsize_bits(array.dtype) for array in arrays)


def checksum(arrays: Iterable[Any]) -> int:
    """CRC-32 of the bytes of all arrays, one after the other."""
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), total)
    return total


def fingerprints(arrays: Iterable[Any]) -> list[list[Any]]:
    """[shape, CRC-32] of each array, JSON values."""
    return [[list(array.shape), checksum([array])] for array in arrays]


def bits_per_weight(params: Any) -> float:
    """Stored bits over represented weights of the matrices inside decoder layers.

    Codes, scales and zero points count; embeddings, the output head, norms and biases do not, since
    recipes leave them alone and they would hide what a format costs.
    """
    matrices = [leaf for path, leaf in leaves_with_paths(params) if is_decoder_matrix(path, leaf)]
    return sum(weight_bits(leaf) for leaf in matrices) / sum(leaf.size for leaf in matrices)


def weight_bits(leaf: Any) -> int:
    """Bits stored for one weight leaf, array or dataclass."""
    return leaf.weight_bits if isinstance(leaf, WeightLeaf) else size_in_bits(leaf)


def is_decoder_matrix(path: str, leaf: Any) -> bool:
    """True for the matrices of decoder layers, routers excepted."""
    inside = path.startswith("layers/") and path.endswith("_proj/weight")
    return inside and leaf.ndim >= 2


def key_at(key: jax.Array, path: str) -> jax.Array:
    """A random key of a path's own: what is drawn there does not depend on which others exist."""
    return jax.random.fold_in(key, sum(ord(c) * 31**i for i, c in enumerate(path)) % 2**31)


def _example(leaves: list[tuple[str, Any]]) -> str:
    return leaves[len(leaves) // 2][0]


def _join(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
