"""Rotary embeddings and grouped-query attention."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_models.models.config import Rope
from jaxopt_models.models.flash_attention import flash_attention, has_flash_attention
from kernels_pallas import cached_attention, reference

_QUERY_CHUNK = 1024  # most queries of which scores are held at once
_LEAST_CHUNK = 128  # fewer make products too small to be worth the keys they spare


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequency of each rotated pair, float32 [head_dim / 2], in radians a position.

    `theta^(-2i / d)` rescaled as `Rope` says.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return (frequencies / rope.factor).astype(np.float32)
    if rope.kind == "llama3":
        return _llama3_frequencies(frequencies, rope).astype(np.float32)
    return frequencies


def _llama3_frequencies(frequencies: np.ndarray, rope: Rope) -> np.ndarray:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend in between."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def angles(positions: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `position * frequency_i`, float32 [B, T, d/2], of positions [B, T]."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim)).reshape(1, 1, -1)
    turned = positions.astype(jnp.float32)[:, :, None] * frequencies
    return jnp.cos(turned), jnp.sin(turned)


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Rotates pairs (i, i + d/2) of each head by `position * frequency_i` (Su et al. 2021).

    Args:
      x: queries or keys, [B, T, H, d].
      positions: int32 [B, T].
      rope: which frequencies.

    Returns:
      Array like `x`. Reference: arXiv:2104.09864.
    """
    return reference.rotate(x, *angles(positions, rope, x.shape[-1]))


def cached_attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Causal grouped-query attention to a cache, whose slot s is position s.

    Few queries take a kernel (`kernels_pallas.cached_attention`). Long ones are processed in
    chunks, so that scores take [B, H, 1024, S] rather than [B, H, T, S].

    Args:
      query: [B, T, H, d].
      key, value: [B, G, S, d], H a multiple of G.
      positions: int32 [B, T], of queries.
      scale: factor on q·k.
      window: number of keys a query sees, itself included; None is unlimited.
      softcap: c of `c · tanh(scores / c)`; None is off.

    Returns:
      [B, T, H, d] in the dtype of `query`.
    """

    def chunk(part: slice) -> jax.Array:
        options = {"scale": scale, "window": window, "softcap": softcap}
        return cached_attention(query[:, part], key, value, positions[:, part], **options)

    return _in_chunks(query.shape[1], _QUERY_CHUNK, chunk)


def self_attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    starts: jax.Array | None = None,
) -> jax.Array:
    """Attention in whole sequences: key i is that of query i.

    On GPUs that have it in a library, in two bytes, scores are never in memory
    (`flash_attention`); elsewhere a chunk of queries has them at a time.

    Args:
      query: [B, T, H, d].
      key, value: [B, G, T, d], H a multiple of G.
      scale, window, softcap: as in `cached_attend`.
      starts: int32 [B, T], where the document of each token begins in its row; no other is seen.
        None is one document a row.

    Returns:
      [B, T, H, d] in the dtype of `query`.
    """
    in_chunks = partial(_attend_in_chunks, scale=scale, window=window, softcap=softcap)
    if not has_flash_attention(query, key, value, softcap=softcap, starts=starts):
        return in_chunks(query, key, value, starts)
    flash = partial(flash_attention, scale=scale, window=window)
    return lax.platform_dependent(query, key, value, starts, cuda=flash, default=in_chunks)


def _attend_in_chunks(
    query: jax.Array, key: jax.Array, value: jax.Array, starts: jax.Array | None, **options: Any
) -> jax.Array:
    """A chunk of queries is multiplied only with keys that one of its queries sees: with four
    chunks that is 5/8 of all scores, and less under a window."""
    length, window = query.shape[1], options["window"]
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    def chunk(part: slice) -> jax.Array:
        seen = slice(0 if window is None else max(0, part.start - window + 1), part.stop)
        rows, keys, values = query[:, part], key[:, :, seen], value[:, :, seen]
        at, keys_at = positions[:, part], positions[:, seen]
        own = None if starts is None else starts[:, part]
        return reference.attention(rows, keys, values, at, keys_at, starts=own, **options)

    return _in_chunks(length, min(_QUERY_CHUNK, max(_LEAST_CHUNK, -(-length // 4))), chunk)


def _in_chunks(length: int, size: int, chunk: Callable[[slice], jax.Array]) -> jax.Array:
    starts = range(0, length, size)
    parts = [chunk(slice(start, min(start + size, length))) for start in starts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
