"""Which implementation a product takes: a kernel where there is one for it, else XLA's.

There are kernels for Hopper (compute capability 9.0) and bfloat16: `w4a16_decode` to 16 rows,
`w4a16_wide` for more.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import reference, tuning
from kernels_pallas.batching import rows_together
from kernels_pallas.decode_tiling import MOST_ROWS, Tiling, default_tiling, sizes_of
from kernels_pallas.four_bit import BLOCK_ROWS, ROWS, STEP, FourBit
from kernels_pallas.hopper import hopper_processors
from kernels_pallas.partition import Sharing, partitioned, whole_pieces
from kernels_pallas.w4a16_decode import w4a16_decode
from kernels_pallas.w4a16_wide import w4a16_wide
from kernels_pallas.wide_tiling import WideTiling, default_wide_tiling


def w4a16(x: jax.Array, weight: FourBit) -> jax.Array:
    """`x @ weight.T` with a 4-bit weight. Gradients reach `x`, through the weight's values.

    Works under `vmap`, which adds to the rows, and on sharded arrays: a weight split along N gives
    a product split along N, in blocks of 64 rows; one split along K, in steps of 512 columns, gives
    partial sums, which are added. A weight with other sizes is gathered along that axis.

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
    return _batched(x, weight)


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


@rows_together
def _batched(x: jax.Array, weight: FourBit) -> jax.Array:
    n, k = weight.shape

    def local(x: jax.Array, codes: jax.Array, scales: jax.Array, factor: jax.Array) -> jax.Array:
        own = min(n, ROWS * len(codes)), x.shape[1]
        return _local(x, FourBit(codes, scales, factor, weight.kind, own))

    pieces = {"m": len(x)} | whole_pieces("n", n, BLOCK_ROWS) | whole_pieces("k", k, STEP)
    sharing = Sharing("m k, n k, n k, n", "m n", pieces, added="k")
    return partitioned(local, sharing, x, weight.codes, weight.scales, weight.factor)


def _local(x: jax.Array, weight: FourBit) -> jax.Array:
    """The product on one device."""
    kernel = _kernel_for(x, weight)
    if kernel is None:
        return reference.w4a16(x, weight)
    return lax.platform_dependent(x, weight, cuda=kernel, default=reference.w4a16)


def _kernel_for(x: jax.Array, weight: FourBit) -> Callable[[jax.Array, FourBit], jax.Array] | None:
    processors = hopper_processors()
    if processors is None or x.dtype != jnp.bfloat16 or len(x) == 0:
        return None
    tiles, columns = weight.tiles, weight.columns
    product = weight.kind, len(x), *weight.shape, jax.devices()[0].device_kind
    if len(x) <= MOST_ROWS:
        sizes = sizes_of(len(x), weight)
        tiling = tuning.find(Tiling, "w4a16_decode", *product, lambda t: t.fits(sizes))
        tiling = tiling or default_tiling(sizes, processors)
        if tiling is not None:
            return partial(w4a16_decode, tiling=tiling, processors=processors)
    tiling = tuning.find(WideTiling, "w4a16_wide", *product, lambda t: t.fits(tiles, columns))
    tiling = tiling or default_wide_tiling(len(x), tiles, columns, processors)
    return tiling and partial(w4a16_wide, tiling=tiling, processors=processors)
