"""Attention in whole sequences by cuDNN, which keeps no scores: for training on GPUs.

Memory grows with T rather than with T², forward and backward. Reference: Dao 2023,
arXiv:2307.08691.
"""

import jax
import jax.numpy as jnp

_CAPABILITY = 8.0  # Ampere, the first GPUs that it runs on
_LARGEST_HEAD = 128
_LEAST_LENGTH = 128  # its tiles are no shorter
_DTYPES = (jnp.bfloat16, jnp.float16)


def has_flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    softcap: float | None = None,
    starts: jax.Array | None = None,
) -> bool:
    """Whether the default device's library does it: an NVIDIA GPU from Ampere on, two bytes an
    entry, heads of up to 128 in eights, rows of 128 or more, no soft cap.

    Args:
      query, key, value, softcap, starts: as in `attention.self_attend`.
    """
    _, length, _, dim = query.shape
    typed = query.dtype in _DTYPES and query.dtype == key.dtype == value.dtype
    fits = dim <= _LARGEST_HEAD and dim % 8 == 0 and length >= _LEAST_LENGTH
    even = starts is None or length % 2 == 0  # gradients under a mask need it
    return typed and fits and even and softcap is None and query.size > 0 and _on_ampere()


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """Causal grouped-query attention as in `attention.self_attend`, for what `has_flash_attention`.

    Rows and heads may be sharded. Gradients are added up in no fixed order, unless XLA is told
    `--xla_gpu_deterministic_ops`. Documents cost a mask [B, 1, T, T] of two bytes an entry.
    """
    length = query.shape[1]
    window = None if window is None or window >= length else window
    mask, local = None, None if window is None else (window - 1, 0)
    if starts is not None:
        # cuDNN takes no window beside a mask, so that the mask has both.
        mask, local = _visible(starts, window), None
    by_position = (jnp.swapaxes(array, 1, 2) for array in (key, value))
    return jax.nn.dot_product_attention(
        query,
        *by_position,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=local,
        implementation="cudnn",
    )


def _visible(starts: jax.Array, window: int | None) -> jax.Array:
    """Keys that a query sees besides being causal: bool [B, 1, T, T]."""
    at = jnp.arange(starts.shape[1], dtype=starts.dtype)
    first = starts if window is None else jnp.maximum(starts, at[None] - (window - 1))
    return (at[None, None] >= first[:, :, None])[:, None]


def _on_ampere() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and float(device.compute_capability) >= _CAPABILITY
