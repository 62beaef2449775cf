"""Key-value cache: one array a layer, written in place at given slots.

Slot s holds the key and value of position s of its row. Nothing is erased: entries past a row's
committed length are hidden by position and overwritten before any query may see them, so rolling
back is forgetting the length. Every array is [B, G, S, ·], with what belongs to slot s at s.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.kv_quantizer import KVQuantizer
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.projections import widths
from jaxopt_models.tree import size_in_bits
from kernels_pallas import reference, rotate_append


@struct.dataclass
class LayerCache:
    """Keys (after rotary embedding) and values of one layer.

    Heads before slots, since batched products want it so: otherwise each step would transpose a
    copy.

    Attributes:
      keys, values: [B, G, S, d]; or codes [B, G, S, bytes] under a `KVQuantizer`, whose own static
        scales and biases are not repeated here.
      key_scale, value_scale: [B, G, S, blocks], scales of each slot; None where there are none.
    """

    keys: jax.Array
    values: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    def append(
        self,
        keys: jax.Array,
        values: jax.Array,
        slots: jax.Array,
        quantizer: KVQuantizer | None = None,
    ) -> "LayerCache":
        """Writes [B, N, G, d] at slots int32 [B, N]; a slot >= S is dropped."""
        _check(self, quantizer)
        return reference.write_slots(self, _entries(keys, values, quantizer), slots)

    def append_rotated(
        self,
        query: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        slots: jax.Array,
        angles: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, "LayerCache"]:
        """(query, keys, cache): both rotated, and `append(keys, values, slots)`, in one kernel."""
        _check(self, None)
        arrays = query, keys, values, *angles, slots
        query, keys, *cached = rotate_append(*arrays, self.keys, self.values)
        return query, keys, LayerCache(*cached)

    def read(self, dtype: Any, quantizer: KVQuantizer | None = None) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all slots, each [B, G, S, d] in `dtype`."""
        if quantizer is None:
            return self.keys.astype(dtype), self.values.astype(dtype)
        keys = quantizer.key.restore(self.keys, self.key_scale, dtype)
        return keys, quantizer.value.restore(self.values, self.value_scale, dtype)


KVCache = tuple[LayerCache, ...]


def moved(cache: KVCache, sources: jax.Array, slots: jax.Array) -> KVCache:
    """What is at some slots, also at others: of each row, slot sources[n] to slots[n].

    Args:
      sources, slots: int32 [B, N]; a slot >= S is dropped. All is read before it is written.
    """

    def rows(array: jax.Array) -> jax.Array:
        found = jnp.take_along_axis(array, sources[:, None, :, None], axis=2)
        return jnp.swapaxes(found, 1, 2)

    return tuple(reference.write_slots(one, jax.tree.map(rows, one), slots) for one in cache)


def empty_cache(
    config: ModelConfig, params: Any, batch: int, capacity: int, dtype: Any = None
) -> KVCache:
    """Zeros for `capacity` positions of each row; widths are those of each layer's keys.

    A layer with a `kv_cache` holds codes, others hold `dtype`, by default the compute dtype.
    Separate arrays a layer, since a stacked cache is copied by the loop that carries it.
    """
    dtype = dtype or config.dtype

    def layer(weights: Any) -> LayerCache:
        attention = weights["self_attn"]
        _, keys, _ = widths(attention, "qkv_proj")
        groups = keys // config.head_dim
        shape = (batch, groups, capacity, config.head_dim)
        quantizer = attention.get("kv_cache")
        if quantizer is None:
            # Two calls: donated buffers must not alias.
            return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        (keys, key_scale), (values, value_scale) = (
            part.blank(shape) for part in (quantizer.key, quantizer.value)
        )
        return LayerCache(keys, values, key_scale, value_scale)

    return tuple(layer(weights) for weights in params["layers"])


def cache_bytes(cache: KVCache) -> int:
    """Bytes that the cache occupies."""
    return size_in_bits(cache) // 8


def _entries(keys: jax.Array, values: jax.Array, quantizer: KVQuantizer | None) -> LayerCache:
    """What is to be written for [B, N, G, d]: arrays [B, N, G, ·]."""
    if quantizer is None:
        return LayerCache(keys, values)
    (keys, key_scale), (values, value_scale) = (
        part.store(jnp.swapaxes(rows, 1, 2))
        for part, rows in ((quantizer.key, keys), (quantizer.value, values))
    )
    stored = LayerCache(keys, values, key_scale, value_scale)
    return jax.tree.map(lambda array: jnp.swapaxes(array, 1, 2), stored)


def _check(cache: LayerCache, quantizer: KVQuantizer | None) -> None:
    dense = jnp.issubdtype(cache.keys.dtype, jnp.floating)
    if dense != (quantizer is None):
        raise UserError(
            f"the cache holds {cache.keys.dtype.name}, and the layer's 'kv_cache' is "
            f"{'absent' if quantizer is None else 'present'}; make the cache with "
            "empty_cache(config, params, …) of the same parameters"
        )
