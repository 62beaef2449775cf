"""Round to nearest: the baseline every other algorithm starts from."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxopt_models.formats import QuantSpec
from jaxopt_models.qtensor import QTensor, quantize_array


def weight_amax(weight: jax.Array) -> jax.Array:
    """Largest magnitude of a matrix [N, K], float32 scalar; of each expert [E] for [E, N, K]."""
    axes = tuple(range(weight.ndim - 2, weight.ndim))
    return jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=axes)


@partial(jax.jit, static_argnames="spec")
def round_to_nearest(
    weight: jax.Array, spec: QuantSpec, amax: jax.Array | None = None
) -> tuple[QTensor, jax.Array]:
    """Quantizes a matrix, or each of a stack of experts on its own.

    Args:
      weight: [N, K] or [E, N, K].
      spec: number format.
      amax: magnitude for a scale of the whole matrix (`weight_amax` of a group of matrices that
        shares it); None takes the matrix's own.

    Returns:
      (leaf, float32 relative error `||W - Ŵ|| / ||W||`, 0 for a matrix of zeros).
    """
    quantize = partial(quantize_array, format=spec)
    if weight.ndim == 3:
        leaf = jax.vmap(lambda w, a: quantize(w, amax=a))(weight, amax)
    else:
        leaf = quantize(weight, amax=amax)
    # Restored as the forward pass does it, so that the error is that of what will be computed.
    exact, restored = weight.astype(jnp.float32), leaf.dequantize(jnp.float32)
    norm = jnp.linalg.norm(exact.reshape(-1))
    error = jnp.linalg.norm((exact - restored).reshape(-1)) / jnp.where(norm == 0, 1.0, norm)
    return leaf, error
