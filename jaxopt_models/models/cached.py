"""A model run beside its cache: prompts, and tokens that continue them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.models.block import deferred_block
from jaxopt_models.models.cache import KVCache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import embed_tokens, final_norm, logits, positions_of
from jaxopt_models.models.tree_attention import Branches


def prefill(
    config: ModelConfig, params: Any, tokens: jax.Array, lengths: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs prompts and fills the cache with their keys and values.

    Args:
      tokens: int32 [B, T], padded on the right; what stands behind a prompt does not matter.
      lengths: int32 [B], tokens of each prompt, at least 1.
      cache: from `cache.empty_cache`, capacity at least T.

    Returns:
      (float32 [B, V] logits after each prompt's last token, cache).
    """
    return prefill_with_features(config, params, tokens, lengths, cache, ())[:2]


def prefill_with_features(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: KVCache,
    layers: Sequence[int],
) -> tuple[jax.Array, KVCache, jax.Array]:
    """`prefill`, and the features [B, T, len(layers) · D], see `decode_step_with_features`."""
    stream, cache, behind = _cached(config, params, tokens, positions_of(tokens), cache, layers)
    last = jax.tree.map(
        lambda part: jnp.take_along_axis(part, (lengths - 1)[:, None, None], axis=1), stream
    )
    if config.num_layers in layers:
        behind[config.num_layers] = final_norm(config, params, *stream)
    features = _joined(behind, layers, tokens, config)
    return logits(config, params, final_norm(config, params, *last))[:, 0], cache, features


def decode_step(
    config: ModelConfig, params: Any, tokens: jax.Array, positions: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Continues each row by N given tokens.

    Args:
      tokens: int32 [B, N].
      positions: int32 [B, N]; rows may stand at different positions. Keys and values are written at
        these slots; one past the capacity is dropped.
      cache: holds every earlier position of each row.

    Returns:
      (float32 [B, N, V] logits after each token, cache).
    """
    return decode_step_with_features(config, params, tokens, positions, cache, ())[:2]


def decode_step_with_features(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    cache: KVCache,
    layers: Sequence[int],
    branches: Branches | None = None,
) -> tuple[jax.Array, KVCache, jax.Array]:
    """`decode_step`, and what the model thinks of each token.

    Args:
      layers: static; i < L is the residual stream behind layer i, L what the output head reads.
      branches: where tokens are written and which of each other they see, if several of them may
        continue the same one; None is one behind the other.

    Returns:
      (logits, cache, features [B, N, len(layers) · D] in the compute dtype, side by side).
    """
    stream, cache, behind = _cached(config, params, tokens, positions, cache, layers, branches)
    hidden = behind[config.num_layers] = final_norm(config, params, *stream)
    return logits(config, params, hidden), cache, _joined(behind, layers, tokens, config)


def _cached(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    cache: KVCache,
    layers: Sequence[int],
    branches: Branches | None = None,
) -> tuple[tuple[jax.Array, jax.Array | None], KVCache, dict[int, jax.Array]]:
    """((x, update), whose sum is the residual stream behind the layers; cache; the stream behind
    each that is wanted)."""
    x, update, entries = embed_tokens(config, params, tokens), None, []
    behind: dict[int, jax.Array] = {}
    each = zip(config.attention_kinds, params["layers"], cache, strict=True)
    for i, (kind, layer, entry) in enumerate(each):
        x, update, entry, _ = deferred_block(
            config, layer, x, update, positions, entry, kind=kind, branches=branches
        )
        entries.append(entry)
        if i in layers:
            behind[i] = x + update
    return (x, update), tuple(entries), behind


def _joined(
    behind: dict[int, jax.Array], layers: Sequence[int], tokens: jax.Array, config: ModelConfig
) -> jax.Array:
    none = jnp.zeros((*tokens.shape, 0), config.dtype)
    return jnp.concatenate([none, *(behind[i] for i in layers)], axis=-1)
