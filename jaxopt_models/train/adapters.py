"""LoRA and QLoRA: low-rank pairs that learn beside frozen weights.

    x Wᵀ + (x downᵀ) upᵀ,    down ~ alpha / rank · N(0, 1/K),    up = 0 at the start

The weight W is a float array (LoRA) or codes (QLoRA). The product is that of
`W + alpha / rank · B A` with `up` = B and `down` = alpha / rank · A: the factor is part of `down`
from the start, so that a pair of arrays is all there is of an adapter. It is saved, sharded,
exported and merged like any `LowRank`, and no setting has to come along with it.

Products, and the gradient of `up`, are those of the paper for the same A and B. An optimizer whose
steps do not depend on the size of gradients (Adam, Lion) moves `down` by its learning rate, where
the paper moves alpha / rank · A by alpha / rank times as much: it is the paper's rule with a rate
of A that is divided by alpha / rank. Hayou et al. 2024 (arXiv:2402.12354) show that A should have
the smaller rate.

References: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.ops import effective_weight
from jaxopt_models.qtensor import DenseTensor, LowRank, QTensor

# All linears of attention, feed-forward layers and experts.
LINEARS = ("layers/*_proj/weight",)


def with_adapters(
    params: Any, key: jax.Array, rank: int, alpha: float, match: Sequence[str] = LINEARS
) -> Any:
    """Parameters with a new adapter beside each weight that matches: the same logits, bit for bit.

    To train adapters alone, choose `adapter_arrays(match)`.

    Args:
      params: parameter tree.
      key: of the random numbers.
      rank: R of each adapter.
      alpha: what adapters add is multiplied by alpha / rank.
      match: globs on paths of weights: the matrices of layers, routers excepted, and `lm_head`.
        Stacked experts [E, N, K] get one each.

    Returns:
      The tree with `low_rank` parts, float32 down [..., R, K] and up [..., N, R]: arrays become
      `DenseTensor`; in other leaves an adapter is put behind a low-rank part that is there, as of
      SVDQuant, R more rows and columns, which are then trained together (and summed in one product,
      whose logits agree to float32's rounding).

    Raises:
      UserError: for a pattern that matches no such weight, a rank that a weight cannot have, and a
        leaf that is laid out for running.
    """
    if rank < 1 or alpha <= 0:
        raise UserError(f"adapters of rank {rank} and alpha {alpha} do nothing; give positive ones")
    able = {path: leaf for path, leaf in tree.leaves_with_paths(params) if _is_linear(path, leaf)}
    for pattern in match:
        if not any(tree.matches(path, pattern) for path in able):
            raise UserError(
                f"pattern {pattern!r} matches no weight that can have an adapter, which are the "
                "matrices of layers, routers excepted, and lm_head; paths look like "
                f"{next(iter(able), '(none)')!r}"
            )
    new = {
        path: _adapted(path, leaf, tree.key_at(key, path), rank, alpha)
        for path, leaf in able.items()
        if tree.matches(path, match)
    }
    return tree.replace(params, new)


def adapter_arrays(match: Sequence[str] = LINEARS) -> tuple[str, ...]:
    """Globs on the arrays of adapters, for `trainable.partition`."""
    return tuple(f"{pattern}/low_rank/*" for pattern in match)


def merged(params: Any) -> Any:
    """Parameters without low-rank parts, which are folded into the weights beside them.

        W + up · down,    in float32, rounded once to the dtype of W

    An array or `DenseTensor` computes the same afterwards, up to that rounding. A `QTensor` becomes
    a float array, scale and rotation of its input folded in as well: quantizing it anew rounds
    what the adapter has learnt. To keep codes and adapter, do not merge: beside each other they are
    exact. A `FakeTensor` stays one and rounds the sum from then on, which is another function.

    Raises:
      UserError: for a `QTensor` or `DenseTensor` that quantizes its input, but not the adapter's.
    """
    return tree.map_with_path(_merged, params)


def _is_linear(path: str, leaf: Any) -> bool:
    return tree.is_decoder_matrix(path, leaf) or path == "lm_head/weight"


def _adapted(path: str, leaf: Any, key: jax.Array, rank: int, alpha: float) -> Any:
    leaf = leaf if tree.is_leaf(leaf) else DenseTensor(leaf)
    if not isinstance(leaf, QTensor | FakeTensor | DenseTensor):
        raise UserError(
            f"{path!r} is a {type(leaf).__name__}, which cannot have an adapter; give the "
            "parameters that it was made of"
        )
    *stack, rows, width = leaf.shape
    if rank > min(rows, width):
        raise UserError(f"{path!r} is {rows}x{width} and has no rank {rank}; choose a smaller one")
    down = jax.random.normal(key, (*stack, rank, width)) * (alpha / rank * width**-0.5)
    adapter = LowRank(down, jnp.zeros((*stack, rows, rank)))
    before = leaf.low_rank
    return replace(leaf, low_rank=adapter if before is None else _side_by_side(before, adapter))


def _side_by_side(first: LowRank, second: LowRank) -> LowRank:
    """One part that adds what both add."""
    return LowRank(
        jnp.concatenate([first.down.astype(jnp.float32), second.down], axis=-2),
        jnp.concatenate([first.up.astype(jnp.float32), second.up], axis=-1),
    )


def _merged(path: str, leaf: Any) -> Any:
    if not isinstance(leaf, QTensor | FakeTensor | DenseTensor) or leaf.low_rank is None:
        return leaf
    if isinstance(leaf, FakeTensor):
        return replace(leaf, weight=leaf.weight + leaf.low_rank.product(), low_rank=None)
    if leaf.input is not None:
        raise UserError(
            f"{path!r} quantizes its input, but not that of its low-rank part, which no single "
            "weight does; keep the adapter beside the codes, or quantize weights only"
        )
    return _as_array(leaf)


@jax.jit
def _as_array(leaf: QTensor | DenseTensor) -> jax.Array:
    dtype = leaf.dtype if isinstance(leaf, QTensor) else leaf.weight.dtype
    return effective_weight(leaf).astype(dtype)
