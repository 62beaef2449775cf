"""What every kernel has to compute, in jnp: the oracle of their tests, and the path elsewhere."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.four_bit import FourBit


def w4a16(x: jax.Array, weight: FourBit) -> jax.Array:
    """`x @ weight.T`, the weight rounded to the dtype of `x`, sums in float32: [M, N]."""
    dense = weight.dequantize().astype(x.dtype)
    return jnp.matmul(x, dense.T, preferred_element_type=jnp.float32).astype(x.dtype)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    starts: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention, `softmax(scale · q kᵀ + mask) v`, scores in float32.

    A query at position p sees keys at positions in (p - window, p].

    Args:
      query: [B, T, H, d].
      key, value: [B, G, S, d], H a multiple of G.
      query_positions: int32 [B, T], or [1, T] for all rows.
      key_positions: int32 [B, S], or [1, S]; a key that must not be seen has one past every query.
      scale: factor on q·k.
      window: number of keys a query sees, itself included; None is unlimited.
      softcap: c of `c · tanh(scores / c)`; None is off.
      starts: int32 [B, T], the first position that a query sees; None is all.
      mask: bool [B, T, S], keys that a query sees if their position lets it; None is all.

    Returns:
      [B, T, H, d] in the dtype of `query`.
    """
    batch, length, heads, dim = query.shape
    groups = key.shape[1]
    sharing = heads // groups
    # The heads that read one key are rows of one product with it, head by head, R = sharing · T:
    # so scores come out as softmax reads them, and no copy of them is transposed.
    by_key = jnp.moveaxis(query.reshape(batch, length, groups, sharing, dim), 1, 3)
    rows = by_key.reshape(batch, groups, sharing * length, dim)
    scores = jnp.einsum("bgrd,bgsd->bgrs", rows, key, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    q, k = jnp.tile(query_positions, (1, sharing))[:, :, None], key_positions[:, None, :]
    visible = k <= q if window is None else (k <= q) & (k > q - window)
    if starts is not None:
        visible &= k >= jnp.tile(starts, (1, sharing))[:, :, None]
    if mask is not None:
        visible &= jnp.tile(mask, (1, sharing, 1))
    scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bgrs,bgsd->bgrd", weights, value, preferred_element_type=jnp.float32)
    by_position = jnp.moveaxis(mixed.reshape(by_key.shape), 3, 1)
    return by_position.astype(query.dtype).reshape(batch, length, heads, dim)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, unit_offset: bool = False) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) · w` over the last axis, or `· (1 + w)`; float32 inside.

    Reference: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    x32, w32 = x.astype(jnp.float32), weight.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    w32 = (1.0 + w32 if unit_offset else w32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * scale * w32).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Pairs (i, i + d/2) of heads [B, T, H, d] by angles [B, T, d/2], in float32; see `rotary`."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def write_slots[T](cache: T, rows: T, slots: jax.Array) -> T:
    """Arrays [B, G, S, …] with rows [B, N, G, …] at slots int32 [B, N]; one >= S is dropped.

    Scatter, because `dynamic_update_slice` would clamp a write near the end onto earlier slots.
    """
    batch = jnp.arange(slots.shape[0])[:, None]

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[batch, :, slots].set(new.astype(old.dtype), mode="drop")

    written = jax.tree.map(write, cache, rows)
    # XLA makes a scatter of one update a select on the old contents and fuses that into every
    # reader, each with a copy of the cache. Behind a barrier it stays one write in place.
    return lax.optimization_barrier(written) if slots.size == 1 else written
