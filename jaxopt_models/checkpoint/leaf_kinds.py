"""Parameter trees without their values, as JSON: which kind of leaf stands where.

    dict            {"key": node, …}
    tuple           [node, …]
    absent part     null
    array           {"kind": "array", "dtype": "bfloat16", "shape": [64, 32]}
    leaf dataclass  {"kind": "QTensor", "static": {"pad": 0, …}, "parts": {"codes": node, …}}

A description names dtypes, formats and optional parts, so that a tree made from it has the very
structure, static fields included, of the tree that was described.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor, LearnedAmax
from jaxopt_models.formats import FORMATS, QuantSpec
from jaxopt_models.kv_quantizer import KVQuantizer, RowQuantizer
from jaxopt_models.numerics import Scales
from jaxopt_models.qtensor import DenseTensor, InputQuantizer, LowRank, QTensor

# The dataclasses that checkpoints may hold, by the names they have there.
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        QTensor,
        LowRank,
        InputQuantizer,
        KVQuantizer,
        RowQuantizer,
        FakeTensor,
        LearnedAmax,
        Scales,
        DenseTensor,
    )
}
_PLAIN = (str, int, float, bool, type(None))


def describe(node: Any, path: str = "") -> Any:
    """JSON description of a tree; see above.

    Raises:
      UserError: for a leaf that is no array and of no kind in `KINDS`, and for 64-bit arrays.
    """
    if node is None:
        return None
    if isinstance(node, dict) and all(isinstance(key, str) for key in node):
        return {key: describe(child, _join(path, key)) for key, child in node.items()}
    if type(node) is tuple:
        return [describe(child, _join(path, str(i))) for i, child in enumerate(node)]
    if _is_array(node):
        if jax.dtypes.canonicalize_dtype(node.dtype, allow_extended_dtype=True) != node.dtype:
            raise UserError(
                f"the parameters hold {node.dtype.name} at {path!r}, which JAX would narrow; "
                "cast it to a dtype of at most 32 bits"
            )
        return {"kind": "array", "dtype": node.dtype.name, "shape": list(node.shape)}
    name = type(node).__name__
    if KINDS.get(name) is not type(node):
        raise UserError(
            f"the parameters hold a {name} at {path!r}, which a checkpoint cannot hold; "
            f"make it a dict with text keys, a tuple, an array or one of {', '.join(KINDS)}"
        )
    static, parts = _fields(node)
    return {
        "kind": name,
        "static": {key: _static(value) for key, value in static.items()},
        "parts": {key: describe(part, _join(path, key)) for key, part in parts.items()},
    }


def build(description: Any, path: str = "") -> Any:
    """The tree that was described, with `jax.ShapeDtypeStruct` for its arrays.

    Raises:
      UserError: for a leaf kind, a number format or an option that this version does not know.
    """
    if description is None:
        return None
    if isinstance(description, list):
        return tuple(build(child, _join(path, str(i))) for i, child in enumerate(description))
    kind = description.get("kind")
    if not isinstance(kind, str):
        return {key: build(child, _join(path, key)) for key, child in description.items()}
    if kind == "array":
        return jax.ShapeDtypeStruct(tuple(description["shape"]), jnp.dtype(description["dtype"]))
    if kind not in KINDS:
        raise _unknown(path, f"leaf kind {kind!r}")
    static = {key: _from_static(value, path) for key, value in description["static"].items()}
    parts = {key: build(part, _join(path, key)) for key, part in description["parts"].items()}
    try:
        return KINDS[kind](**static, **parts)
    except TypeError as error:
        raise _unknown(path, f"a {kind} with the fields {', '.join([*static, *parts])}") from error


def digest(description: Any) -> str:
    """SHA-256 of a description: equal for equal trees of paths, kinds, dtypes and shapes."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _is_array(node: Any) -> TypeGuard[jax.Array | np.ndarray | jax.ShapeDtypeStruct]:
    """True for arrays of JAX, abstract ones, and NumPy's of numbers."""
    if isinstance(node, np.ndarray):
        return node.dtype.kind not in "OSUMm"
    return isinstance(node, (jax.Array, jax.ShapeDtypeStruct))


def _fields(node: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Static fields and pytree fields of a leaf dataclass."""
    values = {field: getattr(node, field.name) for field in dataclasses.fields(node)}
    static = {f.name: v for f, v in values.items() if not f.metadata.get("pytree_node", True)}
    return static, {f.name: v for f, v in values.items() if f.name not in static}


def _static(value: Any) -> Any:
    if isinstance(value, QuantSpec):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_static(item) for item in value]
    if not isinstance(value, _PLAIN):
        raise TypeError(f"a static field holds a {type(value).__name__}, which has no JSON form")
    return value


def _from_static(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return tuple(_from_static(item, path) for item in value)
    if not isinstance(value, Mapping):
        return value
    if value.get("format") not in FORMATS:
        raise _unknown(path, f"number format {value.get('format')!r}")
    try:
        return QuantSpec(**value)
    except TypeError as error:
        raise _unknown(path, f"a number format with the fields {', '.join(value)}") from error


def _unknown(path: str, what: str) -> UserError:
    return UserError(
        f"tensor {path!r} has {what}, which this version does not know; "
        "install the version that wrote the checkpoint"
    )


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key
