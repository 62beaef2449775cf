"""SVDQuant: a low-rank part in high precision beside the quantized residual.

    x Wᵀ = x (W - up · down)ᵀ + (x downᵀ) upᵀ

The first product runs on a quantized residual, whose outliers the second one has absorbed.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxopt_models.errors import UserError
from jaxopt_models.qtensor import LowRank


@partial(jax.jit, static_argnames="rank")
def low_rank(weight: jax.Array, rank: int, second_moment: jax.Array | None = None) -> LowRank:
    """Best approximation of a matrix by one of a lower rank.

        minimise  tr((W - up · down) H (W - up · down)ᵀ)

    with H the identity (Eckart & Young 1936) or the second moment of the input, for the least error
    of the output. The optimum projects W on the first eigenvectors U of W H Wᵀ: up = U,
    down = Uᵀ W. It needs no inverse of H, which may be singular, hence no damping.

    For a residual that is to be quantized, leave H out: its rounding error follows the size of its
    entries, which the plain SVD lowers most. Of a *rounding error* W - Ŵ, with H, it is the
    correction of least output error.

    Args:
      weight: float32 [N, K].
      rank: R, at least 1; static.
      second_moment: float32 [K, K]; None is the identity.

    Returns:
      `LowRank` with down [R, K] and up [N, R], the columns of up orthonormal.

    Raises:
      UserError: for a rank that the matrix cannot have.

    References: Li et al. 2024, arXiv:2411.05007; Zhang et al. 2024, arXiv:2410.06040.
    """
    rows, width = weight.shape
    if not 1 <= rank <= min(rows, width):
        raise UserError(f"rank {rank} does not fit a matrix {rows}x{width}; choose a smaller one")
    product = partial(jnp.matmul, precision="highest")
    # A tall matrix first goes to a square one by a rotation: the eigenvectors then cost K³, not N³.
    basis, square = jnp.linalg.qr(weight) if rows > width else (None, weight)
    weighted = square if second_moment is None else product(square, second_moment)
    _, vectors = jnp.linalg.eigh(product(weighted, square.T))
    up = vectors[:, ::-1][:, :rank]
    up = up if basis is None else product(basis, up)
    return LowRank(down=product(up.T, weight), up=up)


def residual(weight: jax.Array, correction: LowRank) -> jax.Array:
    """W - up · down, float32 [N, K]: what is left to quantize."""
    return weight - correction.product()
