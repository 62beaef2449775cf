"""GPTQ: columns rounded one after another, each making up for the errors of those before it.

For a matrix W under scales that are given, with the second moment H = E[x xᵀ] of its input,

    minimise  tr((W - Ŵ) H (W - Ŵ)ᵀ),    ŵ_k = nearest(w_k + Σ_{i<k} (w_i - ŵ_i) U_ik)

where H = (I + U) D (I + U)ᵀ, with U strictly upper triangular and D diagonal, is the Cholesky
factorization of H from its last column to its first. That is the update of the GPTQ paper with the
inverse of H and its factor eliminated (Chee et al. 2023 prove that the two are equal): errors are
those of the weights as they were, so nothing of a column but its error is needed again.

References: Frantar et al. 2022, arXiv:2210.17323; Chee et al. 2023, arXiv:2307.13304.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_models import numerics
from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import Scales

_MOST_DAMPING = 1e4
_LEAST_RAISE = 1e-6  # what a damping of zero is raised to

_product = partial(jnp.matmul, precision="highest")  # GPUs would round to TF32


@partial(jax.jit, static_argnames=("spec", "block", "act_order"))
def gptq(
    weight: jax.Array,
    hessian: jax.Array,
    scales: Scales,
    spec: QuantSpec,
    *,
    damping: float | jax.Array = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Grid values that keep the output of a linear, rather than its weight, near the original.

    A column that is never read, H_kk = 0, is rounded to nearest and affects no other; nor does it
    count in the mean of the diagonal. The factorization may fail, since H is a float32 estimate
    that may have less than full rank: then the damping is raised tenfold, until it succeeds.

    Args:
      weight: [N, K]; arithmetic is float32. Map a stack of experts with `jax.vmap`.
      hessian: float32 [K, K], E[x xᵀ]. Its scale does not matter.
      scales: of `weight`, found by any method; they stay as they are.
      spec: number format; static.
      damping: added to the diagonal of H, in units of its mean.
      block: columns between two updates of all that follow; changes the time taken and the order
        of float32 sums, nothing else; static.
      act_order: visits columns by decreasing H_kk, so that the most used are rounded first, when
        there is most left to make up for them. A column keeps the scale of its place; static.

    Returns:
      (grid values float32 [N, K] for `qtensor.from_grid_values`, the damping used, float32 scalar).
      The damping is NaN, and the grid values mean nothing, where even 10^4 times the mean did not
      make H positive definite: H holds NaN or an infinity, or its diagonal is not positive. The
      caller has to raise, since this function may run inside jit.
    """
    columns = weight.astype(jnp.float32).T
    by_column = jax.tree.map(jnp.transpose, numerics.expand(scales, spec, weight.shape))
    if not act_order:
        feedback, _, used = feedback_of(hessian, damping)
        return _round_columns(columns, by_column, feedback, spec, block).T, used
    order = jnp.argsort(-jnp.diagonal(hessian), stable=True)
    feedback, _, used = feedback_of(hessian[order][:, order], damping)
    ordered = jax.tree.map(lambda rows: rows[order], by_column)
    grid = _round_columns(columns[order], ordered, feedback, spec, block)
    return grid[jnp.argsort(order)].T, used


def feedback_of(
    hessian: jax.Array, damping: float | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Uᵀ of the module's formula, [K, K] strictly lower triangular; the diagonal of D, [K]; and the
    damping used, NaN where nothing helped."""
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    read = jnp.where(dead, 0.0, 1.0)
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(read), 1.0)
    # The lower factor of the matrix with both axes reversed is, reversed, an upper factor.
    reverse = jnp.where(dead[:, None] | dead[None, :], 0.0, hessian)[::-1, ::-1]

    def factor(damping: jax.Array) -> jax.Array:
        added = jnp.where(dead, 1.0, damping * mean)[::-1]
        return lax.linalg.cholesky(reverse + jnp.diag(added))  # NaN where it fails

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.all(jnp.isfinite(state[1])) & (state[0] < _MOST_DAMPING)

    def retry(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        more = jnp.maximum(10 * state[0], _LEAST_RAISE)
        return more, factor(more)

    start = jnp.asarray(damping, jnp.float32)
    used, lower = lax.while_loop(failed, retry, (start, factor(start)))
    upper_transposed = lower[::-1, ::-1].T
    pivots = jnp.diagonal(upper_transposed)
    feedback = jnp.tril(upper_transposed / pivots[:, None], -1)
    return feedback, pivots**2, jnp.where(jnp.all(jnp.isfinite(lower)), used, jnp.nan)


def _round_columns(
    columns: jax.Array, scales: Scales, feedback: jax.Array, spec: QuantSpec, block: int
) -> jax.Array:
    """Grid values [K, N] of Wᵀ: a column of W lies in memory as one piece.

    Args:
      columns: [K, N] in the order of visits.
      scales: expanded, [K, N].
      feedback: [K, K], row k the weights of earlier errors in what is added to column k.
    """
    size, rows = columns.shape
    block = min(block, size)
    pad = -size % block

    def split(array: jax.Array, mode: str = "constant") -> jax.Array:
        padded = jnp.pad(array, ((0, pad), (0, 0)), mode=mode) if pad else array
        return padded.reshape(-1, block, array.shape[-1])

    def step(errors: jax.Array, part: tuple) -> tuple[jax.Array, jax.Array]:
        start, exact, scales, feedback = part
        wanted = exact + _product(feedback, errors)
        inside = lax.dynamic_slice(feedback, (0, start), (block, block))
        grid, mine = _round_block(exact, wanted, scales, inside, spec)
        return lax.dynamic_update_slice(errors, mine, (start, 0)), grid

    parts = (
        jnp.arange(0, size + pad, block),
        split(columns),
        jax.tree.map(partial(split, mode="edge"), scales),
        split(jnp.pad(feedback, ((0, 0), (0, pad)))),
    )
    _, grid = lax.scan(step, jnp.zeros((size + pad, rows), jnp.float32), parts)
    return grid.reshape(size + pad, rows)[:size]


def _round_block(
    exact: jax.Array, wanted: jax.Array, scales: Scales, feedback: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
    """Rounds the columns of one block: (grid values, errors W - Ŵ), both [block, N].

    Args:
      exact: [block, N], columns of W.
      wanted: [block, N], the same with the feedback of the blocks before.
      scales: expanded, [block, N].
      feedback: [block, block], of the block's own errors.
    """

    def step(errors: jax.Array, column: tuple) -> tuple[jax.Array, jax.Array]:
        k, exact, wanted, scale, weights = column  # weights are zero from entry k on
        grid = numerics.to_grid(wanted + _product(weights, errors), scale, spec)
        error = exact - numerics.from_grid(grid, scale, spec)
        return lax.dynamic_update_slice(errors, error, (k, 0)), grid

    columns = (jnp.arange(len(exact)), exact, wanted, scales, feedback)
    rows = jax.tree.map(lambda array: array[:, None], columns[1:])
    errors, grid = lax.scan(step, jnp.zeros_like(exact), (columns[0], *rows))
    return grid[:, 0], errors
