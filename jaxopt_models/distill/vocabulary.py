"""Losses where one position's logits are too many: a chunk of the vocabulary exists at a time.

    log Z = log Σ_c Σ_{v in c} e^(logit_v / T)                            a pass over all chunks c
    g     = Σ_c Σ_{v in c} ∂f_v / ∂ log Z                                 a second one
    loss  = Σ_c Σ_{v in c} (f_v + g e^(logit_v / T - log Z))  -  g        a third, log Z and g fixed

The terms with g add up to 0, and bring the gradient through log Z to each logit next to that of
f_v. What remains of the two is small where a student is close, and would drown if each went back
through a product of bfloat16 alone. A head's products are made about twice as often as where all
logits of a position are kept: it is for when they cannot be.

Chunk c of n has the tokens c, c + n, c + 2n, ...: devices among which a head's rows are split have
a share of each chunk. Reference for log Z in one pass: Milakov and Gimelshein 2018,
arXiv:1805.02867.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_models import tree
from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.distill.losses import TopK
from jaxopt_models.distill.predictor import Predictor
from jaxopt_models.models.transformer import logits

type _Part = tuple[jax.Array, jax.Array | None, jax.Array]  # logits of both, targets in the chunk


def why_whole(
    terms: Sequence[LogitLoss], student: Predictor, teacher: Predictor | TopK | None
) -> str | None:
    """What stands against chunks, if anything does."""
    if isinstance(teacher, TopK) or not all(term.sums_over_tokens for term in terms):
        return "a top k is told apart from all other tokens together"
    known = [student] if teacher is None else [student, teacher]
    if any(tree.is_leaf(_weight(one.head)) for one in known):
        return "an output head is no plain array"
    return None


def losses_by_chunks(
    terms: Sequence[LogitLoss],
    student: Predictor,
    teacher: Predictor | None,
    targets: jax.Array,
    count: int,
) -> jax.Array:
    """The losses at each position, float32 [len(terms), ...].

    Args:
      terms: none with a top k.
      student: predicts, hidden states [..., D]; its head is a plain array, as the teacher's.
      teacher: of the same positions, without gradient; None if no term needs it.
      targets: int32 [...].
      count: of chunks, at most the tokens of the vocabulary.
    """
    # The chunks' gradients of hidden states add up in float32.
    wide = student.hidden.astype(jnp.float32)

    def part(hidden: jax.Array, chunk: Any) -> _Part:
        number, own, its = chunk
        narrow = replace(student, hidden=hidden.astype(student.hidden.dtype))
        theirs = None if teacher is None else _logits(teacher, its, number, count)
        places = jnp.where(targets % count == number, targets // count, -1)
        return _logits(narrow, own, number, count), theirs, places

    its = None if teacher is None else _cut(teacher.head, count)
    chunks = jnp.arange(count), _cut(student.head, count), its
    fixed, still = partial(part, lax.stop_gradient(wide)), lax.stop_gradient(chunks)
    totals = _totals(terms, fixed, still, targets.shape)
    slopes = _slopes(terms, fixed, still, totals)

    @partial(jax.checkpoint, prevent_cse=False)  # a scan's body is alone
    def add(carry: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        own, theirs, places = part(wide, chunk)
        found = []
        for term, total, slope in zip(terms, totals, slopes, strict=True):
            share = jnp.exp(term.log_totals(own, theirs)[0] - total[0])
            found.append(term.at(own, theirs, places, total) + slope * share)
        return carry + jnp.stack(found), None

    return lax.scan(add, -slopes, chunks)[0]


def _totals(
    terms: Sequence[LogitLoss], part: Callable[[Any], _Part], chunks: Any, shape: tuple[int, ...]
) -> Any:
    """`log_totals` of all tokens, of each term."""

    def add(carry: Any, chunk: Any) -> tuple[Any, None]:
        own, theirs, _ = part(chunk)
        found = [term.log_totals(own, theirs) for term in terms]
        return jax.tree.map(jnp.logaddexp, carry, found), None

    none = jnp.full(shape, -jnp.inf)
    start: Any = [(none, none if term.needs_teacher else None) for term in terms]
    return lax.scan(add, start, chunks)[0]


def _slopes(
    terms: Sequence[LogitLoss], part: Callable[[Any], _Part], chunks: Any, totals: Any
) -> jax.Array:
    """How each loss grows with the student's log total, float32 [len(terms), ...]."""

    def slope(term: LogitLoss, found: _Part, total: Any) -> jax.Array:
        own, its = total
        return jax.jvp(lambda x: term.at(*found, (x, its)), (own,), (jnp.ones_like(own),))[1]

    def add(carry: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        found = part(chunk)
        each = [slope(term, found, total) for term, total in zip(terms, totals, strict=True)]
        return carry + jnp.stack(each), None

    return lax.scan(add, jnp.zeros((len(terms), *totals[0][0].shape)), chunks)[0]


def _weight(head: Any) -> Any:
    (module,) = head.values()
    return module["weight"]


def _cut(head: Any, count: int) -> Any:
    """A head whose weight is [count, V / count, D], zeros behind the last tokens."""
    weight = _weight(head)
    rows, width = weight.shape
    size = -(-rows // count)
    cut = jnp.pad(weight, ((0, size * count - rows), (0, 0))).reshape(size, count, width)
    return {name: {"weight": jnp.swapaxes(cut, 0, 1)} for name in head}


def _logits(predictor: Predictor, head: Any, number: jax.Array, count: int) -> jax.Array:
    """Of chunk `number`, whose head that is; -inf behind the last token."""
    found = logits(predictor.config, head, predictor.hidden)
    tokens = number + count * lax.broadcasted_iota(jnp.int32, found.shape, found.ndim - 1)
    return jnp.where(tokens < _weight(predictor.head).shape[0], found, -jnp.inf)
