"""Structured pruning as masks: a parameter tree of the same shapes that computes the smaller model.

    masks = drop_layers(keep_all(params), [3, 4])
    forward(config, apply_masks(config, params, masks), tokens)

Masks are arrays, so one compiled program runs every candidate. They are folded into the weights,
and the forward pass knows nothing of them:

    hidden channels   rows of all that writes to the residual stream: embeddings, o_proj, down_proj
    attention heads   columns of o_proj
    neurons           columns of down_proj
    experts           router logits, + log m, before softmax and top-k
    layers            rows of o_proj and down_proj, or the gain of the norms behind them (Gemma)

That leaves RMSNorm, which has to divide by the number d of channels that are kept and not by D. If
the residual stream is stretched, x' = s x with s = sqrt(D / d), then

    mean over D of x'² = Σ x² / D · D / d = Σ x² / d

so the norm of x' is s times what it should be, epsilon included, and its gain is divided by s. All
writers have the stretch in their rows; a norm between a writer and the stream passes it on. Hence

    forward(apply_masks(params, masks)) == forward(slice_model(params, masks))

up to the rounding of sums. Reference for masks in place of cuts: Xia et al. 2024, arXiv:2310.06694.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.inference import refuse_prepared
from jaxopt_models.models.config import ModelConfig


@struct.dataclass
class Masks:
    """What is kept, float32: 1 keeps, 0 removes. Layers may have different widths.

    The derivative of a loss by a mask, at 1, is Σ w ∂L/∂w over all weights that go with that part.

    Attributes:
      hidden: [D], channels of the residual stream.
      layers: [L].
      heads: [G, S] of each layer, the S query heads of each of G key-value groups. A group without
        heads is removed.
      neurons: [F] of each layer, or [E, F] where there are experts.
      experts: [E] of each layer; None where there are none.
    """

    hidden: jax.Array
    layers: jax.Array
    heads: tuple[jax.Array, ...]
    neurons: tuple[jax.Array, ...]
    experts: tuple[jax.Array | None, ...]


def keep_all(config: ModelConfig, params: Any) -> Masks:
    """Masks that remove nothing of a model, whose leaves may be abstract.

    Raises:
      UserError: for a model that cannot be pruned as it is, see `apply_masks`.
    """
    check_plain(params)

    def ones(*shape: int) -> jax.Array:
        return jnp.ones(shape, jnp.float32)

    layers = params["layers"]
    shapes = [_down(layer).shape for layer in layers]
    return Masks(
        hidden=ones(params["embed_tokens"]["weight"].shape[1]),
        layers=ones(len(layers)),
        heads=tuple(ones(*head_shape(config, layer["self_attn"])) for layer in layers),
        neurons=tuple(ones(*shape[:-2], shape[-1]) for shape in shapes),
        experts=tuple(ones(shape[0]) if len(shape) == 3 else None for shape in shapes),
    )


def drop_layers(masks: Masks, layers: Iterable[int]) -> Masks:
    """The masks with some layers removed as well.

    Raises:
      UserError: for a layer that the model does not have.
    """
    count = masks.layers.shape[0]
    numbers = sorted(set(layers))
    for i in numbers:
        if not 0 <= i < count:
            raise UserError(f"there is no layer {i} to remove; layers are 0 to {count - 1}")
    dropped = jnp.asarray(numbers, jnp.int32)
    return replace(masks, layers=masks.layers.at[dropped].set(0.0))


def apply_masks(config: ModelConfig, params: Any, masks: Masks) -> Any:
    """Parameters of the same shapes whose forward pass is that of the pruned model.

    A pure function of the masks, which may be traced. What is masked comes in the wider dtype of
    its own and the compute dtype, gains of norms in float32. Where embeddings are tied the result
    has a head of its own, which is the table as it was.

    Args:
      config: the architecture; static.
      params: the model, in plain arrays.
      masks: of its shapes; see `keep_all`.

    Raises:
      UserError: for quantized weights, for parameters of `inference.prepare`, and for masks of
        another model.
    """
    check_plain(params)
    check_shapes(config, params, masks)
    width = masks.hidden.shape[0]
    kept = jax.lax.stop_gradient(jnp.sum(masks.hidden))
    stretch = jnp.sqrt(width / jnp.maximum(kept, 1.0))
    rows = masks.hidden * stretch
    table = params["embed_tokens"]["weight"]
    layers = (
        _masked_layer(config, layer, rows, stretch, masks, i)
        for i, layer in enumerate(params["layers"])
    )
    return {"lm_head": {"weight": table}} | {
        **params,
        "embed_tokens": {"weight": _times(config, table, rows[None, :])},
        "layers": tuple(layers),
        "norm": scaled_norm(config, params["norm"], 1 / stretch),
    }


def scaled_norm(config: ModelConfig, module: Any, factor: jax.Array) -> dict[str, jax.Array]:
    """A norm whose output is multiplied by `factor`, [] or [D]; float32."""
    gain = module["weight"].astype(jnp.float32)
    return {"weight": (1.0 + gain) * factor - 1.0 if config.unit_offset_norm else gain * factor}


def head_shape(config: ModelConfig, attention: Any) -> tuple[int, int]:
    """(key-value groups, query heads of each)."""
    groups = attention["k_proj"]["weight"].shape[0] // config.head_dim
    return groups, attention["q_proj"]["weight"].shape[0] // config.head_dim // groups


def check_plain(params: Any) -> None:
    """Refuses what cannot be pruned.

    Raises:
      UserError: for parameters of `inference.prepare`, layers in a loop, quantized weights and
        quantizers of the cache.
    """
    refuse_prepared(params, "pruned")
    if not isinstance(params["layers"], tuple | list):
        raise UserError("layers that are run in a loop cannot be pruned; give them as a tuple")
    for path, leaf in tree.leaves_with_paths(params):
        if tree.is_leaf(leaf):
            raise UserError(
                f"tensor {path!r} is a {type(leaf).__name__}, and only plain arrays can be pruned; "
                "prune the original model and quantize the result"
            )
        if "/kv_cache/" in path:
            raise UserError(
                f"{path!r} belongs to the quantizer of a cache, which a pruned model would not "
                "fit; prune the original model and quantize the result"
            )


def check_multiple(multiple: int) -> None:
    """Raises UserError for what no width can be a multiple of."""
    if multiple < 1:
        raise UserError(f"widths cannot be multiples of {multiple}; choose 1 or more")


def check_shapes(config: ModelConfig, params: Any, masks: Masks) -> None:
    """Raises UserError for masks that are not of this model, naming the first that is not."""
    expected = dict(tree.arrays_with_paths(jax.eval_shape(lambda: keep_all(config, params))))
    found = dict(tree.arrays_with_paths(masks))
    for path in sorted(expected.keys() | found.keys()):
        shapes = [tuple(side[path].shape) if path in side else None for side in (found, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"mask {path!r} has shape {shapes[0]} where this model needs {shapes[1]}; "
                "make masks with keep_all of the same parameters"
            )


def _masked_layer(
    config: ModelConfig,
    layer: Any,
    rows: jax.Array,
    stretch: jax.Array,
    masks: Masks,
    index: int,
) -> dict[str, Any]:
    gate, heads = masks.layers[index], jnp.repeat(masks.heads[index].reshape(-1), config.head_dim)
    first, second = "post_attention_layernorm", "post_feedforward_layernorm"
    changed: dict[str, Any] = {}
    if config.sandwich_norm:
        reading = ("input_layernorm", "pre_feedforward_layernorm")
        # A norm undoes any scale of its input, so the gate is behind it.
        changed = {name: scaled_norm(config, layer[name], gate) for name in (first, second)}
    else:
        reading, rows = ("input_layernorm", first), rows * gate
    changed |= {name: scaled_norm(config, layer[name], 1 / stretch) for name in reading}
    attention, mlp = layer["self_attn"], layer["mlp"]
    changed["self_attn"] = attention | {
        "o_proj": _writer(config, attention["o_proj"], rows, heads[None, :])
    }
    experts, neurons = masks.experts[index], masks.neurons[index]
    if experts is None:
        changed["mlp"] = mlp | {"down_proj": _writer(config, mlp["down_proj"], rows, neurons[None])}
        return layer | changed
    columns = (experts[:, None] * neurons)[:, None, :]
    down = _writer(config, mlp["experts"]["down_proj"], rows, columns)
    changed["mlp"] = mlp | {
        "router": mlp["router"] | {"bias": _router_bias(mlp["router"], experts)},
        "experts": mlp["experts"] | {"down_proj": down},
    }
    return layer | changed


def _router_bias(router: Any, experts: jax.Array) -> jax.Array:
    """+ log m, without a derivative: that of an expert's mask is of its output alone."""
    experts = jax.lax.stop_gradient(experts)
    added = jnp.where(experts > 0, jnp.log(jnp.maximum(experts, 1e-30)), -jnp.inf)
    return router["bias"].astype(jnp.float32) + added if "bias" in router else added


def _writer(
    config: ModelConfig, module: Any, rows: jax.Array, columns: jax.Array
) -> dict[str, jax.Array]:
    """A linear that writes to the residual stream, [.., D, K], its rows and columns scaled."""
    weight = module["weight"]
    masked = _times(config, weight, columns * rows.reshape((1,) * (weight.ndim - 2) + (-1, 1)))
    if "bias" not in module:
        return {"weight": masked}
    return {"weight": masked, "bias": _times(config, module["bias"], rows)}


def _times(config: ModelConfig, array: jax.Array, factors: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        wider = jnp.promote_types(array.dtype, config.dtype)
    return (array.astype(jnp.float32) * factors).astype(wider)


def _down(layer: Any) -> Any:
    mlp = layer["mlp"]
    return (mlp["experts"] if "experts" in mlp else mlp)["down_proj"]["weight"]
