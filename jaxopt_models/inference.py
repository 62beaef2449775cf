"""Parameters laid out for running: weights in the kernels' order, products of one input joined.

    params = prepare(params)  # once, after loading or quantizing
    generate(config, params, prompts)

Prepared parameters go wherever the forward pass goes. What changes or stores a model takes those
that they were made of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.projections import JOINED
from jaxopt_models.packed import PackedTensor, pack_leaf
from jaxopt_models.tree import is_leaf, leaves_with_paths, map_with_path
from kernels_pallas import concatenate
from kernels_pallas.hopper import hopper_processors


def prepare(params: Any, *, join: bool = True) -> Any:
    """Parameters that compute the same in fewer and faster steps.

    Matrices that have a kernel are packed for it (`packed`), embeddings and stacked experts
    excepted. Then q/k/v and gate/up become one weight each, wherever that is exact: all of them are
    plain arrays of one dtype, or packed in one format behind equal input steps without a `low_rank`
    correction, in whole pieces of the kernels' order. Input steps are compared by value, so this is
    no function to be jitted.

    Args:
      params: any parameter tree of a model. It stays as it is, so both are in memory until the
        caller lets go of it.
      join: False keeps linears apart. Parameters that are to be split over a mesh need that: no
        boundary of a joined weight's shards keeps heads together, so no sharding rule names one.

    Raises:
      UserError: for traced or abstract arrays, which have no values to compare.
    """
    for path, leaf in leaves_with_paths(params):
        parts = jax.tree.leaves(leaf)
        if any(isinstance(part, Tracer | jax.ShapeDtypeStruct) for part in parts):
            raise UserError(f"tensor {path!r} has no values; call prepare outside jit, on arrays")
    packed = map_with_path(_packed, params)
    if not join:
        return packed
    return packed | {"layers": tuple(_joined_layer(layer) for layer in packed["layers"])}


def for_device(config: ModelConfig, params: Any) -> Any:
    """`prepare(params)` where the default device has kernels for the compute dtype.

    They are for bfloat16 on a Hopper GPU. Elsewhere these are the parameters themselves, since
    reading packed codes without a kernel takes longer than reading canonical ones.
    """
    if config.dtype != "bfloat16" or hopper_processors() is None:
        return params
    return prepare(params)


def refuse_prepared(params: Any, purpose: str) -> None:
    """Raises UserError if `prepare` made the parameters; `purpose` is what they are no use for."""
    for path, leaf in leaves_with_paths(params):
        if isinstance(leaf, PackedTensor) or any(f"/{name}/" in path for name in JOINED):
            raise UserError(
                f"tensor {path!r} is laid out for running, not to be {purpose}; "
                "give the parameters that inference.prepare made it of"
            )


_pack = jax.jit(pack_leaf)


def _packed(path: str, leaf: Any) -> Any:
    # Rows are looked up in the table, and arrays are not to pass through jit for nothing.
    return _pack(leaf) if is_leaf(leaf) and not path.startswith("embed_tokens/") else leaf


def _joined_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    attention = _joined(layer["self_attn"], "qkv_proj")
    return {**layer, "self_attn": attention, "mlp": _joined(layer["mlp"], "gate_up_proj")}


def _joined(module: Mapping[str, Any], joined: str) -> dict[str, Any]:
    """The module with one linear instead of several, if there are several that can be joined."""
    names = JOINED[joined]
    parts = [module[name] for name in names if name in module]
    if len(parts) < len(names) or not _joinable(parts):
        return dict(module)
    rest = {name: part for name, part in module.items() if name not in names}
    linear = {"weight": _stacked([part["weight"] for part in parts])}
    if "bias" in parts[0]:
        linear["bias"] = jnp.concatenate([part["bias"] for part in parts])
    return {joined: linear} | rest


def _joinable(parts: Sequence[Mapping[str, Any]]) -> bool:
    weights = [part["weight"] for part in parts]
    if len({("bias" in part, part["weight"].shape[1:]) for part in parts}) > 1:
        return False
    if not any(is_leaf(weight) for weight in weights):
        biases = [part["bias"].dtype for part in parts if "bias" in part]
        return len({weight.dtype for weight in weights}) == 1 and len(set(biases)) <= 1
    if not all(isinstance(weight, PackedTensor) for weight in weights):
        return False
    if any(weight.low_rank is not None for weight in weights):
        return False
    whole_pieces = all(weight.shape[0] % weight.weight.piece[0] == 0 for weight in weights[:-1])
    return whole_pieces and all(_same_steps(weights[0], weight) for weight in weights[1:])


def _same_steps(first: PackedTensor, second: PackedTensor) -> bool:
    """Whether both are of one format and do the same to their input, by value."""
    if first.weight.kind != second.weight.kind:
        return False
    ours, theirs = (replace(leaf, weight=None) for leaf in (first, second))
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        return False
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _stacked(weights: Sequence[Any]) -> Any:
    """Weights [N, K] one below the other."""
    if not isinstance(weights[0], PackedTensor):
        return jnp.concatenate(weights)
    return replace(weights[0], weight=concatenate([weight.weight for weight in weights]))
