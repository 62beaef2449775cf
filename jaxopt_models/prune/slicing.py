"""Cuts out of a model what its masks remove: a smaller `(config, params)` that computes the same.

Which indices of each leaf stay:

    embed_tokens, lm_head [V, D]       columns of kept channels; one table where they are tied
    norms [D]                          kept channels; those of heads (q_norm, k_norm) stay whole
    q, k, v, gate, up, router          columns of kept channels
    o, down and their biases           rows of kept channels
    q rows, o columns                  kept heads of kept key-value groups, whole heads
    k, v rows                          kept groups
    gate, up rows, down columns        kept neurons, of each expert its own
    router rows, experts               kept experts
    layers                             with their entries in `attention_kinds` and `moe_layers`

The size of a head stays, so `head_dim` is no longer hidden_size / num_heads. The groups of a layer
need equally many heads, its experts equally many neurons, and kernels like round numbers: where the
masks keep too few, removed ones stay with zeros in the columns that read them. They compute
nothing, and training may take them up again.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.prune.kept import Kept, KeptLayer, kept_of
from jaxopt_models.prune.masks import Masks, check_plain, check_shapes, head_shape, scaled_norm


def slice_model(
    config: ModelConfig,
    params: Any,
    masks: Masks,
    *,
    uniform: bool = False,
    multiple: int = 1,
) -> tuple[ModelConfig, Any]:
    """The smaller model.

    Args:
      config: the architecture.
      params: the model, in plain arrays; host arrays stay on the host.
      masks: of zeros and ones.
      uniform: gives all layers the widths of the widest, as a `config.json` has them, so that
        `export_hf` can write the result; what Gemma derives from the hidden width then moves into
        the embedding table. Otherwise layers have widths of their own, and the config the largest.
      multiple: which feed-forward widths are rounded up to, and the hidden width must be.

    Returns:
      (config, params), which share what was not cut.

    Raises:
      UserError: for what `apply_masks` refuses, for masks that hold something else than 0 and 1 or
        keep nothing of a part, for fewer experts than a token is sent to, and for what `uniform` or
        `multiple` cannot do.
    """
    check_plain(params)
    check_shapes(config, params, masks)
    kept = kept_of(config, masks, uniform=uniform, multiple=multiple)
    whole = np.arange(params["embed_tokens"]["weight"].shape[0])
    small = params | {
        "embed_tokens": _linear(params["embed_tokens"], whole, kept.hidden),
        "layers": tuple(
            _layer(config, params["layers"][i], kept.hidden, part)
            for i, part in zip(kept.layers.tolist(), kept.parts, strict=True)
        ),
        "norm": _norm(params["norm"], kept.hidden),
    }
    if "lm_head" in params:
        small["lm_head"] = _linear(params["lm_head"], whole, kept.hidden)
    sliced = _config(config, kept)
    if uniform and math.isclose(config.embed_scale, config.hidden_size**0.5):
        return _with_scale_of_width(sliced, small)
    return sliced, small


def _layer(
    config: ModelConfig, layer: Mapping[str, Any], hidden: np.ndarray, part: KeptLayer
) -> dict[str, Any]:
    norms = {name: _norm(module, hidden) for name, module in layer.items() if "norm" in name}
    attention, mlp = layer["self_attn"], layer["mlp"]
    if part.experts is None:
        fed = _feed_forward(mlp, hidden, part)
    else:
        chosen = jax.tree.map(partial(_take, index=part.experts, axis=0), mlp["experts"])
        fed = {
            "router": _linear(mlp["router"], part.experts, hidden),
            "experts": _feed_forward(chosen, hidden, part),
        }
    return norms | {"self_attn": _attention(config, attention, hidden, part), "mlp": fed}


def _attention(
    config: ModelConfig, attention: Mapping[str, Any], hidden: np.ndarray, part: KeptLayer
) -> dict[str, Any]:
    groups, sharing = head_shape(config, attention)
    of_all = np.arange(groups * sharing).reshape(groups, sharing)[part.groups]
    heads = np.take_along_axis(of_all, part.heads, axis=-1).reshape(-1)
    queries, keys = _channels(heads, config.head_dim), _channels(part.groups, config.head_dim)
    read = np.repeat(part.head_mask.reshape(-1), config.head_dim)
    return {
        **attention,
        "q_proj": _linear(attention["q_proj"], queries, hidden),
        "k_proj": _linear(attention["k_proj"], keys, hidden),
        "v_proj": _linear(attention["v_proj"], keys, hidden),
        "o_proj": _linear(attention["o_proj"], hidden, queries, read),
    }


def _channels(heads: np.ndarray, dim: int) -> np.ndarray:
    """The channels of these heads, [n * dim]."""
    return (heads[:, None] * dim + np.arange(dim)).reshape(-1)


def _feed_forward(mlp: Mapping[str, Any], hidden: np.ndarray, part: KeptLayer) -> dict[str, Any]:
    """Of one network, or of the stacked experts that stay."""
    return {
        "gate_proj": _linear(mlp["gate_proj"], part.neurons, hidden),
        "up_proj": _linear(mlp["up_proj"], part.neurons, hidden),
        "down_proj": _linear(mlp["down_proj"], hidden, part.neurons, part.neuron_mask),
    }


def _norm(module: Mapping[str, Any], hidden: np.ndarray) -> dict[str, Any]:
    return {"weight": _take(module["weight"], hidden, -1)}


def _linear(
    module: Mapping[str, Any], rows: np.ndarray, columns: np.ndarray, read: np.ndarray | None = None
) -> dict[str, Any]:
    """Some rows and columns of weights [.., N, K]; columns that are not to be read become zero."""
    weight = _take(_take(module["weight"], rows, -2), columns, -1)
    if read is not None and not read.all():
        weight = weight * read[..., None, :].astype(weight.dtype)
    return {"weight": weight} | (
        {"bias": _take(module["bias"], rows, -1)} if "bias" in module else {}
    )


def _take(array: Any, index: np.ndarray, axis: int) -> Any:
    """Entries of an axis; of each matrix of a stack its own, where indices are [E, n]."""
    if index.shape[-1] == array.shape[axis]:
        return array  # indices ascend
    numpy = np if isinstance(array, np.ndarray) else jnp
    if index.ndim == 1:
        return numpy.take(array, index, axis=axis)
    own = index[:, :, None] if axis == -2 else index[:, None, :]
    return numpy.take_along_axis(array, own, axis=axis)


def _config(config: ModelConfig, kept: Kept) -> ModelConfig:
    layers = kept.layers.tolist()
    kinds = tuple(config.attention_kinds[i] for i in layers)
    widths = [part.widths for part in kept.parts]
    dense = [own.neurons for own in widths if not own.experts]
    expert = [own.neurons for own in widths if own.experts]
    sliced = replace(
        config,
        hidden_size=len(kept.hidden),
        num_layers=len(layers),
        attention_kinds=kinds,
        sliding_window=config.sliding_window if "sliding" in kinds else None,
        num_heads=max(own.groups * own.heads for own in widths),
        num_kv_heads=max(own.groups for own in widths),
        moe_layers=tuple(at for at, i in enumerate(layers) if i in config.moe_layers),
        num_experts=max(own.experts for own in widths),
        intermediate_size=max(dense, default=config.intermediate_size),
        expert_size=max(expert, default=config.expert_size),
    )
    if config.model_type == "mixtral":  # has one key for both
        return replace(sliced, intermediate_size=sliced.expert_size)
    return sliced


def _with_scale_of_width(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The model whose embeddings are multiplied by sqrt(hidden_size), as transformers does.

    The table takes the rest of the factor, which the final norm undoes for a head that is tied.
    """
    scale = config.hidden_size**0.5
    factor = config.embed_scale / scale
    table = params["embed_tokens"]["weight"]
    params = params | {"embed_tokens": {"weight": (table * factor).astype(table.dtype)}}
    if "lm_head" not in params:
        norm = scaled_norm(config, params["norm"], jnp.float32(1 / factor))
        params["norm"] = {"weight": norm["weight"].astype(params["norm"]["weight"].dtype)}
    return replace(config, embed_scale=scale), params
