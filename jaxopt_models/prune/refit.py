"""The best weights for given places of zeros: least squares, row by row, exactly.

    minimise  (w - ŵ) H (w - ŵ)ᵀ  over ŵ with support S:    H_SS ŵ_S = (H w)_S

No sequential update that stops at the columns behind it, as SparseGPT's, comes nearer.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_product = partial(jnp.matmul, precision="highest")
_ROWS = 16  # solved at a time


def refit(
    weight: jax.Array, hessian: jax.Array, mask: jax.Array, damping: float = 0.01
) -> jax.Array:
    """Weights on the mask that keep the output of a linear nearest to what it was.

    Takes N Cholesky factorisations of [n, n], n the most weights that a row keeps.

    Args:
      weight: [N, K].
      hessian: float32 [K, K], E[x xᵀ] of its input; its scale does not matter.
      mask: bool [N, K], not traced, True where a weight may stay.
      damping: added to the diagonal of H, in units of its mean, on both sides of the equation, so
        weights without evidence stay as they were.

    Returns:
      float32 [N, K], zero outside the mask. It holds NaN where H_SS is not positive definite.
    """
    most = int(np.count_nonzero(np.asarray(mask), axis=-1).max())
    return _refit(weight, hessian, mask, jnp.float32(damping), max(most, 1))


@partial(jax.jit, static_argnames="most")
def _refit(
    weight: jax.Array, hessian: jax.Array, mask: jax.Array, damping: jax.Array, most: int
) -> jax.Array:
    size = weight.shape[1]
    damped = hessian + jnp.eye(size) * (damping * jnp.mean(jnp.diagonal(hessian)))
    targets = _product(weight.astype(jnp.float32), damped)

    def one(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        target, keep = row
        at = jnp.argsort(~keep, stable=True)[:most]
        real = keep[at]
        inside = damped[at[:, None], at[None, :]]
        matrix = jnp.where(real[:, None] & real[None, :], inside, jnp.eye(most))
        factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
        found = jax.scipy.linalg.cho_solve(factor, jnp.where(real, target[at], 0.0))
        return jnp.zeros(size).at[at].set(jnp.where(real, found, 0.0))

    return jax.lax.map(one, (targets, mask), batch_size=_ROWS)
