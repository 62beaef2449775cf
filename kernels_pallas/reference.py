"""What every kernel has to compute, in jnp: the oracle of their tests, and the path elsewhere."""

import jax
import jax.numpy as jnp

from kernels_pallas.four_bit import FourBit


def w4a16(x: jax.Array, weight: FourBit) -> jax.Array:
    """`x @ weight.T`, the weight rounded to the dtype of `x`, sums in float32: [M, N]."""
    dense = weight.dequantize().astype(x.dtype)
    return jnp.matmul(x, dense.T, preferred_element_type=jnp.float32).astype(x.dtype)
