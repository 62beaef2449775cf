"""SparseGPT: columns lose weights one after another, each making up for those lost before it.

For a matrix W with the second moment H = E[x xᵀ] of its input and H = (I + U) D (I + U)ᵀ as in
`quantize.gptq`, column k after the columns before it is

    v_k = w_k + Σ_{i<k} (w_i - ŵ_i) U_ik,    ŵ_k = v_k or 0

and the weights that become zero are those of the smallest v² D_k. D_k is what the square error
grows by, per v², if all later columns make up for it as well as they can. In groups they are chosen
when the group begins; else in each block of columns, when it begins, over all rows. For that v is
computed as if the columns from the beginning on kept all of their weights, ŵ = v.

Reference: Frantar & Alistarh 2023, arXiv:2301.00774.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_models.prune.patterns import Pattern, mask_of
from jaxopt_models.quantize.gptq import feedback_of

_product = partial(jnp.matmul, precision="highest")


@partial(jax.jit, static_argnames=("pattern", "block"))
def sparsegpt(
    weight: jax.Array,
    hessian: jax.Array,
    pattern: Pattern,
    *,
    damping: float | jax.Array = 0.01,
    block: int = 128,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights with zeros, and the others updated so that the output of the linear stays near.

    Args:
      weight: [N, K].
      hessian: float32 [K, K], E[x xᵀ]; its scale does not matter.
      pattern: of zeros; static. Groups divide K.
      damping: added to the diagonal of H, in units of its mean; raised until H has a factor.
      block: columns whose zeros are chosen together where the pattern has no groups, and between
        two updates of all that follow; static.

    Returns:
      (float32 [N, K], bool [N, K] that is False at zeros, the damping used: NaN if H has no factor
      at any, and then the rest means nothing).
    """
    size, rows = weight.shape[1], weight.shape[0]
    group = max(pattern.group, 1)
    block = min(max(block // group, 1) * group, size)  # whole groups
    feedback, pivots, used = feedback_of(hessian, damping)
    pivots = jnp.where(jnp.diagonal(hessian) == 0, 0.0, pivots)  # columns that nothing reads
    pad = -size % block

    def split(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, pad)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(-1, block, *array.shape[1:])

    def step(errors: jax.Array, part: tuple) -> tuple[jax.Array, Any]:
        start, exact, pivots, real, feedback = part
        wanted = exact + _product(feedback, errors)
        inside = lax.dynamic_slice(feedback, (0, start), (block, block))
        found, keep = _prune_block(exact, wanted, pivots, real, inside, pattern)
        return lax.dynamic_update_slice(errors, exact - found, (start, 0)), (found, keep)

    parts = (
        jnp.arange(0, size + pad, block),
        split(weight.astype(jnp.float32).T),
        split(pivots),
        split(jnp.ones(size, bool)),
        split(jnp.pad(feedback, ((0, 0), (0, pad)))),
    )
    _, (found, keep) = lax.scan(step, jnp.zeros((size + pad, rows), jnp.float32), parts)
    back = [array.reshape(size + pad, rows)[:size].T for array in (found, keep)]
    return back[0], back[1], used


def _prune_block(
    exact: jax.Array,
    wanted: jax.Array,
    pivots: jax.Array,
    real: jax.Array,
    feedback: jax.Array,
    pattern: Pattern,
) -> tuple[jax.Array, jax.Array]:
    """(weights, kept), both [block, N], of the columns of one block.

    Args:
      exact: [block, N], columns of W; wanted: the same with the feedback of the blocks before.
      pivots, real: [block], D, and False for columns that fill up the last block.
      feedback: [block, block], of the block's own errors.
    """
    size, rows = exact.shape
    group = pattern.group or 1
    chosen = jnp.ones(exact.shape, bool)
    if not pattern.group:
        # Every column of the block as it is if none of them loses a weight.
        whole = lax.linalg.triangular_solve(
            feedback, wanted - exact, left_side=True, lower=True, unit_diagonal=True
        )
        scores = (exact + whole) ** 2 * pivots[:, None]
        chosen = _smallest_removed(scores, real, pattern.sparsity)

    def step(errors: jax.Array, part: tuple) -> tuple[jax.Array, Any]:
        start, exact, wanted, pivots, chosen, weights = part
        now = wanted + _product(weights, errors)  # of this group, errors are zero so far
        inside = lax.dynamic_slice(weights, (0, start), (group, group))
        if pattern.group:
            whole = _columns(exact, now, inside, jnp.ones(exact.shape, bool))
            chosen = mask_of((whole**2 * pivots[:, None]).T, pattern, "row").T
        found = _columns(exact, now, inside, chosen)
        return lax.dynamic_update_slice(errors, exact - found, (start, 0)), (found, chosen)

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(-1, group, *array.shape[1:])

    parts = (jnp.arange(0, size, group), *map(split, (exact, wanted, pivots, chosen, feedback)))
    _, (found, keep) = lax.scan(step, jnp.zeros_like(exact), parts)
    return found.reshape(size, rows), keep.reshape(size, rows)


def _columns(
    exact: jax.Array, wanted: jax.Array, feedback: jax.Array, chosen: jax.Array
) -> jax.Array:
    """A few columns one after another, [m, N]; zero where not chosen."""
    found: list[jax.Array] = []
    for j in range(exact.shape[0]):
        value = wanted[j]
        for i in range(j):
            value = value + feedback[j, i] * (exact[i] - found[i])
        found.append(jnp.where(chosen[j], value, 0.0))
    return jnp.stack(found)


def _smallest_removed(scores: jax.Array, real: jax.Array, sparsity: float) -> jax.Array:
    """False at that share of the real entries, the smallest of [block, N]; those are all finite."""
    flat = jnp.where(real[:, None], scores, jnp.inf).reshape(-1)
    count = jnp.sum(real).astype(jnp.float32) * scores.shape[1]
    removed = jnp.round(sparsity * count).astype(jnp.int32)
    ranks = jnp.argsort(jnp.argsort(flat, stable=True))
    return (ranks >= removed).reshape(scores.shape)
