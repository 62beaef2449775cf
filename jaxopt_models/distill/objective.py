"""Losses summed over a batch, a piece of the logits at a time (`pieces`).

That goes for the student's, for the teacher's, and for each one's gradient. Of a piece, its
gradients are made at once along with its loss, so that nothing is computed twice. Where there are
so many rows that even one position of each is too much, a piece's logits are made in chunks of the
vocabulary, see `vocabulary`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.distill.losses import TopK
from jaxopt_models.distill.pieces import chunk_count, cut, joined, piece_length
from jaxopt_models.distill.predictor import Predictor, learnt_positions
from jaxopt_models.distill.vocabulary import losses_by_chunks, why_whole
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig


def summed_losses(
    terms: Sequence[LogitLoss],
    weights: jax.Array,
    student: Predictor,
    teacher: Predictor | TopK | None,
    tokens: jax.Array,
    mask: jax.Array,
    piece: int | None = None,
    chunks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Losses of predicting each token from those before it.

        total = Σ_{b, t >= 1} mask[b, t] Σ_i weights[i] loss_i(hidden[b, t-1], tokens[b, t])

    Gradients reach the student's head and hidden states, through the total. A mean is the total
    over the sum of the mask, on all devices and all parts of an accumulated step.

    Args:
      terms: static.
      weights: float32, one for each.
      student: predicts.
      teacher: with the same tokens: its hidden states, or its most likely tokens [B, T, k] at the
        temperature of the terms; None if no term needs it.
      tokens: int32 [B, T].
      mask: [B, T], 1 where a token is to be learnt; the first of a row never is.
      piece: positions of each row whose logits exist at a time; None chooses.
      chunks: of the vocabulary, one of which exists at a time; None chooses one, unless rows are so
        many that it takes several, and these losses and heads can be cut.

    Returns:
      (total, [len(terms)] each loss's own sum, without weight and without gradient), float32.

    Raises:
      UserError: for a term that needs another teacher, a teacher with another vocabulary, or chunks
        of what cannot be cut: a top k, a head that is quantized or in training to be.
    """
    if not terms or weights.shape != (len(terms),):
        raise UserError(f"{len(terms)} losses need as many weights, not {list(weights.shape)}")
    if isinstance(teacher, Predictor) and teacher.config.vocab_size != student.config.vocab_size:
        raise UserError(
            f"the teacher has {teacher.config.vocab_size} tokens in its vocabulary, the student "
            f"{student.config.vocab_size}; choose models that share a tokenizer"
        )
    batch, length = tokens.shape
    vocab_size = student.config.vocab_size
    chunks = _chunks(chunks, batch, vocab_size, why_whole(terms, student, teacher))
    piece = piece or piece_length(batch, length, vocab_size, chunks)
    known = _Known(weights, teacher, jnp.roll(tokens, -1, axis=1), learnt_positions(mask))
    plan = _Plan(tuple(terms), student.config, min(piece, length), chunks)
    return _summed(plan, student.head, student.hidden, known)


def _chunks(asked: int | None, batch: int, vocab_size: int, reason: str | None) -> int:
    """Of the vocabulary, of what may have a reason to stay whole."""
    if asked is None:
        return 1 if reason else chunk_count(batch, vocab_size)
    if asked < 1:
        raise UserError(f"the vocabulary cannot be cut into {asked} chunks; choose 1 or more")
    if asked > 1 and reason:
        raise UserError(f"the vocabulary cannot be cut into chunks, since {reason}; choose 1")
    return min(asked, vocab_size)


class _Known(NamedTuple):
    """What no gradient reaches."""

    weights: jax.Array
    teacher: Predictor | TopK | None
    targets: jax.Array
    learnt: jax.Array


@dataclass(frozen=True)
class _Plan:
    terms: tuple[LogitLoss, ...]
    config: ModelConfig
    piece: int
    chunks: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    plan: _Plan, head: Any, hidden: jax.Array, known: _Known
) -> tuple[jax.Array, jax.Array]:
    def one(carry: Any, own: Any) -> tuple[Any, None]:
        found = _piece_sums(plan, known, head, *own)
        return jax.tree.map(jnp.add, carry, found), None

    start = jnp.float32(0.0), jnp.zeros(len(plan.terms))
    return lax.scan(one, start, _pieces(plan, hidden, known))[0]


def _forward(plan: _Plan, head: Any, hidden: Any, known: Any) -> tuple[Any, Any]:
    """Sums, and gradients of the total."""
    leaves, structure = jax.tree.flatten(head)
    # A head that is not trained costs no gradient.
    trained = [i for i, leaf in enumerate(leaves) if leaf.perturbed]
    leaves, hidden, known = jax.tree.map(lambda leaf: leaf.value, (leaves, hidden, known))

    def with_trained(arrays: Sequence[Any], others: Sequence[Any]) -> Any:
        found = dict(zip(trained, arrays, strict=True))
        return jax.tree.unflatten(structure, [found.get(i, o) for i, o in enumerate(others)])

    def one(carry: Any, own: Any) -> tuple[Any, jax.Array]:
        def of_piece(arrays: Any, states: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _piece_sums(plan, known, with_trained(arrays, leaves), states, *own[1:])

        arrays = [leaves[i] for i in trained]
        total, pull, sums = jax.vjp(of_piece, arrays, own[0], has_aux=True)
        of_head, of_states = pull(jnp.ones_like(total))
        found = total, sums, [part.astype(jnp.float32) for part in of_head]
        return jax.tree.map(jnp.add, carry, found), of_states

    zeros = [jnp.zeros(leaves[i].shape, jnp.float32) for i in trained]
    start = jnp.float32(0.0), jnp.zeros(len(plan.terms)), zeros
    (total, sums, of_head), of_hidden = lax.scan(one, start, _pieces(plan, hidden, known))
    of_hidden = joined(of_hidden, hidden.shape[1])
    of_head = [part.astype(leaves[i].dtype) for i, part in zip(trained, of_head, strict=True)]
    return (total, sums), (with_trained(of_head, [None] * len(leaves)), of_hidden)


def _backward(plan: _Plan, gradients: Any, cotangents: Any) -> Any:
    of_total, _ = cotangents
    if isinstance(of_total, SymbolicZero):
        return None, None, None
    of_head, of_hidden = jax.tree.map(
        lambda g: (g.astype(jnp.float32) * of_total).astype(g.dtype), gradients
    )
    return of_head, of_hidden, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _piece_sums(
    plan: _Plan,
    known: _Known,
    head: Any,
    states: jax.Array,
    targets: jax.Array,
    learnt: jax.Array,
    teacher: Any,
) -> tuple[jax.Array, jax.Array]:
    """(total, each loss's sum) of a piece [B, piece]."""
    student = Predictor(head, states, plan.config)
    if isinstance(known.teacher, Predictor):
        teacher = lax.stop_gradient(replace(known.teacher, hidden=teacher))
    if plan.chunks > 1:
        each = losses_by_chunks(plan.terms, student, teacher, targets, plan.chunks)
    else:
        theirs = teacher.logits() if isinstance(teacher, Predictor) else teacher
        ours = student.logits()
        each = jnp.stack([term.at(ours, theirs, targets) for term in plan.terms])
    sums = jnp.sum(learnt[None] * each, axis=(1, 2))
    return jnp.sum(known.weights * sums), sums


def _pieces(plan: _Plan, hidden: jax.Array, known: _Known) -> tuple[Any, ...]:
    """(states, targets, learnt, of the teacher), each array [pieces, B, piece, ...]."""
    teacher = known.teacher.hidden if isinstance(known.teacher, Predictor) else known.teacher
    arrays = hidden, known.targets, known.learnt, teacher
    return jax.tree.map(lambda array: cut(array, plan.piece), arrays)
