"""Folding the division by smoothing factors into what computes a linear's input.

    y = (x / s) (W · s)ᵀ:  x / s costs nothing once the weights that make x are divided by s

    q, k, v      input_layernorm
    gate, up     post_attention_layernorm, or pre_feedforward_layernorm between sandwich norms
    o            rows and bias of v, whose mixing by attention weights acts on each channel alone
    down         rows and bias of up, by which the activated gate is multiplied; so in each expert

Experts' gate and up are not in the list: the router and the other experts read the same norm.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.quantize.smooth import FREE, Tied

_ATTENTION = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")
_FEED_FORWARD = ("mlp/gate_proj", "mlp/up_proj")
# The linear whose rows make each channel of another's input.
LINEARS = {
    "self_attn/o_proj": "self_attn/v_proj",
    "mlp/down_proj": "mlp/up_proj",
    "mlp/experts/down_proj": "mlp/experts/up_proj",
}


def foldable(layer: Any, config: ModelConfig, name: str) -> bool:
    """Whether the input of a linear can be divided by changing weights only.

    Args:
      layer: weights of one decoder layer.
      config: static architecture.
      name: path of the linear in the layer, such as "self_attn/o_proj".
    """
    producer = _producer(config, name)
    return producer is not None and not tree.is_leaf(_module(layer, producer)["weight"])


def ties(layer: Any, config: ModelConfig, name: str) -> Tied:
    """Input channels of a linear that must share a factor for `fold` to be exact.

    Channel d of query head h of o_proj's input comes from channel d of key-value head
    h // repeats, and so do those of the `repeats - 1` heads beside it. Elsewhere all are free.
    """
    if name != "self_attn/o_proj":
        return FREE
    width = _module(layer, name)["weight"].shape[-1]
    return Tied(width // _module(layer, "self_attn/v_proj")["weight"].shape[-2], config.head_dim)


def fold(layer: Any, config: ModelConfig, name: str, s: jax.Array) -> Any:
    """Divides the input of a linear, and of all that read the same input, by s.

    The weights of those linears are not touched: with their columns times s the layer computes what
    it did. What is divided becomes float32.

    Args:
      layer: weights of one decoder layer.
      config: static architecture.
      name: path of the linear in the layer.
      s: factors, float32 [K], or [E, K] for experts; equal where `ties` says.

    Returns:
      A new layer that shares what did not change.

    Raises:
      UserError: for a linear that is not `foldable`, and (outside jit) for factors that break ties.
    """
    producer = _producer(config, name)
    if producer is None or not foldable(layer, config, name):
        raise UserError(
            f"no unquantized norm or linear alone makes the input of {name}; "
            "scale that input as it is read instead (pre_scale)"
        )
    module = _module(layer, producer)
    if producer.endswith("layernorm"):
        return tree.replace(layer, {f"{producer}/weight": _divided_norm(config, module, s)})
    rows = _one_of_each(s, ties(layer, config, name), name)
    changed = {f"{producer}/weight": module["weight"].astype(jnp.float32) / rows[..., None]}
    if "bias" in module:
        changed[f"{producer}/bias"] = module["bias"].astype(jnp.float32) / rows
    return tree.replace(layer, changed)


def _producer(config: ModelConfig, name: str) -> str | None:
    """Path of the module whose output, channel by channel, is a factor of the input of `name`."""
    if name in _ATTENTION:
        return "input_layernorm"
    if name in _FEED_FORWARD:
        return "pre_feedforward_layernorm" if config.sandwich_norm else "post_attention_layernorm"
    return LINEARS.get(name)


def _module(layer: Any, path: str) -> Any:
    for key in path.split("/"):
        layer = layer[key]
    return layer


def _divided_norm(config: ModelConfig, module: Any, s: jax.Array) -> jax.Array:
    weight = module["weight"].astype(jnp.float32)
    return (1.0 + weight) / s - 1.0 if config.unit_offset_norm else weight / s


def _one_of_each(s: jax.Array, tied: Tied, name: str) -> jax.Array:
    """Factors without the repetitions, in the order of the producer's rows."""
    if tied.repeats == 1:
        return s
    split = s.reshape(*s.shape[:-1], -1, tied.repeats, tied.width)
    first = split[..., :1, :]
    if not isinstance(s, Tracer) and not bool(jnp.all(split == first)):
        raise UserError(
            f"the factors of {name} differ between query heads that share a key-value head; "
            "choose them with the ties of that linear"
        )
    return first.reshape(*s.shape[:-1], -1)
