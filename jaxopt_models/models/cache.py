"""Key-value cache: one array a layer, written in place at given slots.

Slot s holds the key and value of position s of its row. Nothing is erased: entries past a row's
committed length are hidden by position and overwritten before any query may see them, so rolling
back is forgetting the length.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.tree import size_in_bits


@struct.dataclass
class LayerCache:
    """Keys (after rotary embedding) and values of one layer, each [B, G, S, d].

    Heads before slots, since batched products want it so: otherwise each step would transpose a
    copy.
    """

    keys: jax.Array
    values: jax.Array

    def append(self, keys: jax.Array, values: jax.Array, slots: jax.Array) -> "LayerCache":
        """Writes [B, N, G, d] at slots int32 [B, N]; a slot >= S is dropped.

        Scatter, because `dynamic_update_slice` would clamp a write near the end onto earlier slots.
        """
        rows = jnp.arange(slots.shape[0])[:, None]
        cache = LayerCache(
            self.keys.at[rows, :, slots].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[rows, :, slots].set(values.astype(self.values.dtype), mode="drop"),
        )
        # XLA makes a scatter of one update a select on the old contents and fuses that into every
        # reader, each with a copy of the cache. Behind a barrier it stays one write in place.
        return jax.lax.optimization_barrier(cache) if slots.size == 1 else cache


KVCache = tuple[LayerCache, ...]


def empty_cache(
    config: ModelConfig, params: Any, batch: int, capacity: int, dtype: Any = None
) -> KVCache:
    """Zeros for `capacity` positions of each row; widths are those of each layer's k_proj.

    Separate arrays a layer, since a stacked cache is copied by the loop that carries it.
    """
    dtype = dtype or config.dtype

    def layer(weights: Any) -> LayerCache:
        groups = weights["self_attn"]["k_proj"]["weight"].shape[0] // config.head_dim
        # Two calls: donated buffers must not alias.
        shape = (batch, groups, capacity, config.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return tuple(layer(weights) for weights in params["layers"])


def cache_bytes(cache: KVCache) -> int:
    """Bytes that the cache occupies."""
    return size_in_bits(cache) // 8
