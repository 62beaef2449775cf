"""Hadamard rotations, which spread an outlier over its neighbours so that a shared scale fits all.

    H_1 = [1],   H_2n = [[H_n, H_n], [H_n, -H_n]],   rotation = H_n / sqrt(n)

This is Sylvester's matrix: symmetric and orthonormal, so the rotation is its own inverse.

Reference: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.errors import UserError

# The largest matrix that is multiplied by whole; H_ab is H_a ⊗ H_b, so larger ones are factored.
# A butterfly of additions needs fewer flops, but compiles into passes over memory: on an H100,
# [4096, 8192] in float32 takes it 0.6 ms for blocks of 64 and 1.1 ms for 4096, and products 0.15
# and 0.26 ms, where a copy takes 0.1; on two cores of a CPU products are 1 to 8 times as fast. A
# larger matrix than this costs more in flops than the transposes between two smaller ones.
_LARGEST_FACTOR = 128


def hadamard(x: jax.Array, block: int) -> jax.Array:
    """Rotates every `block` neighbours on the last axis: `x_b H / sqrt(block)`; its own inverse.

    Sums are float32, and 1 and -1 are exact in every float dtype, so the only rounding to the dtype
    of `x` is that of the result.

    Args:
      x: float array [..., K], K a multiple of `block`.
      block: a power of two.

    Returns:
      Array of the shape and dtype of `x`.

    Raises:
      UserError: for another block.
    """
    size = x.shape[-1]
    if block < 1 or size % block or block & (block - 1):
        raise UserError(
            f"a Hadamard rotation of {size} channels has no block of {block}; choose a power of "
            f"two that divides them, {largest_block(size)} at most"
        )
    factors = _factors(block)
    y = x.reshape(*x.shape[:-1], size // block, *factors)
    for factor in reversed(factors):
        y = _last_axis_product(y, factor)
        if len(factors) > 1:
            # Each product takes the last factor to the front: after all of them the order is back.
            y = jnp.moveaxis(y, -1, x.ndim)
    return (y.reshape(x.shape) * jnp.float32(block**-0.5)).astype(x.dtype)


def largest_block(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size


def orthogonal(size: int, seed: int | None = None) -> np.ndarray:
    """An orthogonal matrix that spreads outliers, for any size: float64 [size, size].

    `diag(±1) · (H_p / sqrt(p) ⊗ C)` with p the largest power of two that divides `size` and C the
    orthonormal cosine transform (DCT-II) of what is left, which is [1] for powers of two.

    Args:
      size: of the rotated axis, at least 1.
      seed: of the random signs ("randomised Hadamard"); None leaves them out.
    """
    power = largest_block(size)
    rotation = np.kron(_sylvester(power) / math.sqrt(power), _cosines(size // power))
    if seed is None:
        return rotation
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size)
    return signs[:, None] * rotation


def _factors(block: int) -> tuple[int, ...]:
    """Powers of two, as equal as can be and none above the largest, whose product is `block`."""
    bits = block.bit_length() - 1
    count = max(1, -(-bits // (_LARGEST_FACTOR.bit_length() - 1)))
    return tuple(1 << (bits + i) // count for i in range(count))


def _last_axis_product(y: jax.Array, size: int) -> jax.Array:
    matrix = jnp.asarray(_sylvester(size), y.dtype)
    return jax.lax.dot_general(
        y,
        matrix,
        (((y.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,  # a GPU would round float32 to TF32
        preferred_element_type=jnp.float32,
    )


def _sylvester(size: int) -> np.ndarray:
    """±1 float32 [size, size]: the sign of entry (i, j) is the parity of the bits of i & j."""
    index = np.arange(size, dtype=np.uint32)
    odd = np.bitwise_count(index[:, None] & index[None, :]) % 2
    return np.where(odd, np.float32(-1), np.float32(1))


def _cosines(size: int) -> np.ndarray:
    """Orthonormal DCT-II, float64: row k is `sqrt(2/n) cos(pi k (2i + 1) / 2n)`, row 0 flat."""
    i = np.arange(size)
    rows = np.cos(np.pi / (2 * size) * np.outer(i, 2 * i + 1)) * math.sqrt(2 / size)
    rows[0] = math.sqrt(1 / size)
    return rows
