"""Rotations fused into the weights: the function is the same, outliers are spread over channels.

    fuse_norms     norm(x) · g, then W         ->  norm(x), then W diag(g)
    rotate_hidden  residual stream x -> x Q    ->  E Q;  W Q where it is read;  Qᵀ W, Qᵀ b where it
    (R1)                                           is written
    rotate_heads   each head's values v -> v R ->  Rᵀ W_v, Rᵀ b_v a head;  W_o R a head
    (R2)

RMSNorm without gains commutes with Q, since it preserves lengths; hence gains are fused first, and
nothing is centred: these models' norms subtract no mean. A rotated model has an output head of its
own, `lm_head`, whatever it was before, since only the embedding is used without the last gain.

Arrays that change become float32: they are to be quantized, and rounding to bfloat16 before would
be an error of its own. Everything is linear algebra on whole leaves, so sharded leaves are fine.
Layers may be treated one at a time by the `..._layer` functions, with `..._ends` for the rest.

The other two rotations are online: R3 of queries and keys belongs to the cache, R4 of the input of
down_proj to its leaf (`QTensor.rotate`).

Reference: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456; Liu et al. 2024 (SpinQuant),
arXiv:2405.16406.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import orthogonal
from jaxopt_models.models.config import ModelConfig

# What reads the residual stream through a norm, and what adds to it; "*" leads into "experts/".
_READERS = (
    "self_attn/[qkv]_proj/weight",
    "mlp/router/weight",
    "mlp/*gate_proj/weight",
    "mlp/*up_proj/weight",
)
_WRITERS = ("self_attn/o_proj/*", "mlp/*down_proj/*")


def fuse_norms(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """Moves the gains of norms before linears into those linears, and the last one into the head.

    The norms' weights become the identity: ones, or zeros where the gain is 1 + w. Gemma's norms
    behind attention and feed-forward, and those of queries and keys, keep their gains.

    Args:
      params: of float arrays; see `transformer`.

    Returns:
      (config with an untied head, parameters).

    Raises:
      UserError: if a leaf is quantized already.
    """
    _check_floats(params)
    config_untied, params = fuse_ends(config, params)
    layers = tuple(fuse_layer(config, layer) for layer in params["layers"])
    return config_untied, params | {"layers": layers}


def fuse_layer(config: ModelConfig, layer: Mapping[str, Any]) -> Any:
    """One layer of `fuse_norms`."""
    _check_floats(layer)
    second = "pre_feedforward_layernorm" if config.sandwich_norm else "post_attention_layernorm"
    norms = {"self_attn": layer["input_layernorm"], "mlp": layer[second]}
    gains = {reader: _gain(config, norm["weight"]) for reader, norm in norms.items()}

    def fused(path: str, leaf: jax.Array) -> jax.Array:
        if path in ("input_layernorm/weight", f"{second}/weight"):
            return _identity(config, leaf)
        return _scaled(leaf, gains[path.split("/")[0]]) if tree.matches(path, _READERS) else leaf

    return tree.map_with_path(fused, layer)


def fuse_ends(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """What of `fuse_norms` lies outside the layers: `lm_head` takes the last norm's gain."""
    head = "lm_head" if "lm_head" in params else "embed_tokens"
    _check_floats({name: params[name] for name in (head, "norm")})
    norm = params["norm"]["weight"]
    fused = {
        "norm": {"weight": _identity(config, norm)},
        "lm_head": {"weight": _scaled(params[head]["weight"], _gain(config, norm))},
    }
    return dataclasses.replace(config, tie_word_embeddings=False), params | fused


def rotate_hidden(
    config: ModelConfig, params: Any, seed: int | None = None
) -> tuple[ModelConfig, Any]:
    """R1: the residual stream in another orthonormal basis, the same in all layers.

    Args:
      params: of float arrays; norms need not be fused.
      seed: of the basis' random signs; None takes the plain one. See `hadamard.orthogonal`.

    Returns:
      (config with an untied head, parameters).

    Raises:
      UserError: for a model that normalizes what it adds to the residual stream, and if a leaf is
        quantized already.
    """
    _check_rotatable(config)
    _check_floats(params)
    basis = jnp.asarray(orthogonal(params["embed_tokens"]["weight"].shape[-1], seed), jnp.float32)
    config_untied, params = rotate_ends(config, params, basis)
    layers = tuple(rotate_layer(config, layer, basis) for layer in params["layers"])
    return config_untied, params | {"layers": layers}


def rotate_layer(
    config: ModelConfig, layer: Mapping[str, Any], basis: jax.Array | np.ndarray
) -> Any:
    """One layer of `rotate_hidden`, norms fused; `basis` is Q [D, D]."""
    _check_rotatable(config)

    def rotated(path: str, leaf: jax.Array) -> jax.Array:
        if tree.matches(path, _READERS):
            return _rotated(leaf, basis, -1)
        return _rotated(leaf, basis, _output_axis(path)) if tree.matches(path, _WRITERS) else leaf

    return tree.map_with_path(rotated, fuse_layer(config, layer))


def rotate_ends(
    config: ModelConfig, params: Any, basis: jax.Array | np.ndarray
) -> tuple[ModelConfig, Any]:
    """What of `rotate_hidden` lies outside the layers: embedding and head, the last norm fused."""
    _check_rotatable(config)
    ends = ("embed_tokens", "lm_head")
    _check_floats({name: params[name] for name in ends if name in params})
    config, params = fuse_ends(config, params)
    rotated = {name: {"weight": _rotated(params[name]["weight"], basis, -1)} for name in ends}
    return config, params | rotated


def rotate_heads(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """R2: the values of each head in a Hadamard basis, from v_proj's outputs to o_proj's inputs.

    Works for every model; the head's size need not be a power of two. See `hadamard.orthogonal`.

    Returns:
      (config as it was, parameters).

    Raises:
      UserError: if a leaf is quantized already.
    """
    _check_floats(params)
    layers = tuple(rotate_layer_heads(config, layer) for layer in params["layers"])
    return config, params | {"layers": layers}


def rotate_layer_heads(config: ModelConfig, layer: Mapping[str, Any]) -> Any:
    """One layer of `rotate_heads`."""
    _check_floats(layer)
    basis = orthogonal(config.head_dim)

    def rotated(path: str, leaf: jax.Array) -> jax.Array:
        if path.startswith("self_attn/v_proj/"):
            return _rotated(leaf, basis, _output_axis(path))
        return _rotated(leaf, basis, -1) if path == "self_attn/o_proj/weight" else leaf

    return tree.map_with_path(rotated, layer)


def _output_axis(path: str) -> int:
    """Of a linear's weight [..., N, K] or bias [N], the axis N."""
    return -1 if path.endswith("/bias") else -2


def _gain(config: ModelConfig, weight: jax.Array) -> jax.Array:
    weight = weight.astype(jnp.float32)
    return 1.0 + weight if config.unit_offset_norm else weight


def _identity(config: ModelConfig, weight: jax.Array) -> jax.Array:
    return jnp.zeros_like(weight) if config.unit_offset_norm else jnp.ones_like(weight)


@jax.jit
def _scaled(weight: jax.Array, gain: jax.Array) -> jax.Array:
    """`W diag(g)`: [..., N, K] with a factor [K] for each column, float32."""
    return weight.astype(jnp.float32) * gain.reshape((1,) * (weight.ndim - 1) + (-1,))


def _rotated(array: jax.Array, basis: jax.Array | np.ndarray, axis: int) -> jax.Array:
    """`x Q` for every `len(Q)` neighbours x on an axis, float32."""
    return _product(array, jnp.asarray(basis, jnp.float32), axis)


@partial(jax.jit, static_argnames="axis")
def _product(array: jax.Array, basis: jax.Array, axis: int) -> jax.Array:
    last = jnp.moveaxis(array, axis, -1).astype(jnp.float32)
    pieces = last.reshape(*last.shape[:-1], -1, basis.shape[0])
    rotated = jnp.matmul(pieces, basis, precision="highest")
    return jnp.moveaxis(rotated.reshape(last.shape), -1, axis)


def _check_floats(params: Any) -> None:
    for path, leaf in tree.leaves_with_paths(params):
        if tree.is_leaf(leaf):
            raise UserError(
                f"tensor {path!r} is a {type(leaf).__name__} already; rotate before quantizing"
            )


def _check_rotatable(config: ModelConfig) -> None:
    if config.sandwich_norm:
        raise UserError(
            f"the hidden states of a {config.model_type} model cannot be rotated, since it scales "
            "channels of what it adds to them (norms after attention and feed-forward); rotate "
            "heads, and inputs of linears online"
        )
