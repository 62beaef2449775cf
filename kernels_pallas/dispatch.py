"""Which implementation a product takes: a kernel where there is one for it, else XLA's.

There is one on Hopper (compute capability 9.0), for 1 to 16 rows of bfloat16.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import reference
from kernels_pallas.four_bit import FourBit
from kernels_pallas.w4a16_decode import MOST_ROWS, default_tiling, padded_rows, w4a16_decode


def w4a16(x: jax.Array, weight: FourBit) -> jax.Array:
    """`x @ weight.T` with a 4-bit weight. Gradients reach `x`, through the weight's values.

    Args:
      x: [..., K], any number of rows.
      weight: standing for [N, K].

    Returns:
      [..., N] in the dtype of `x`.

    Raises:
      ValueError: if K is not the weight's.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {weight.shape[1]}")
    rows = x.reshape(-1, x.shape[-1])
    return _product(rows, weight).reshape(*x.shape[:-1], weight.shape[0])


@jax.custom_vjp
def _product(x: jax.Array, weight: FourBit) -> jax.Array:
    processors = hopper_processors()
    if processors is None or not _has_kernel(x, weight, processors):
        return reference.w4a16(x, weight)
    kernel = partial(w4a16_decode, processors=processors)
    return lax.platform_dependent(x, weight, cuda=kernel, default=reference.w4a16)


def _forward(x: jax.Array, weight: FourBit) -> tuple[jax.Array, FourBit]:
    return _product(x, weight), weight


def _backward(weight: FourBit, gradient: jax.Array) -> tuple[jax.Array, FourBit]:
    dense = weight.dequantize().astype(gradient.dtype)
    of_x = jnp.matmul(gradient, dense, preferred_element_type=jnp.float32)

    def nothing(array: jax.Array):
        integral = jnp.issubdtype(array.dtype, jnp.integer)
        return np.zeros(array.shape, jax.dtypes.float0) if integral else jnp.zeros_like(array)

    return of_x.astype(gradient.dtype), jax.tree.map(nothing, weight)


_product.defvjp(_forward, _backward)


def _has_kernel(x: jax.Array, weight: FourBit, processors: int) -> bool:
    if x.dtype != jnp.bfloat16 or not 0 < len(x) <= MOST_ROWS:
        return False
    tiles, words = weight.codes.shape
    return default_tiling(padded_rows(len(x)), tiles, words // 2, processors) is not None


def hopper_processors() -> int | None:
    """Streaming multiprocessors of the default device; None if it is no Hopper GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or float(device.compute_capability) != 9.0:
        return None
    return device.core_count
