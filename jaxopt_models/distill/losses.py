"""How far a student's predictions are from a teacher's, or from the text, at each position.

Logits are [..., V] in any float dtype; a loss is float32 [...], in nats. With a temperature T

    p = softmax(teacher / T),    q = softmax(student / T),

and divergences are multiplied by T², since their gradients shrink like 1 / T² (Hinton et al. 2015,
arXiv:1503.02531); the total variation, a probability, is not. A token that one of them gives no
probability (a logit of -inf) costs nothing where its factor is 0.

All but those of a top k are sums over tokens. Of some tokens only, a loss is their part of the sum
if it is given the `log_total` of all, float32 [...]: log Σ e^(logits / T), see `log_total`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError

_LEAST = -1e30  # a logarithm that stands for that of 0

type Totals = tuple[jax.Array, jax.Array]  # of the first and of the second argument's logits


def log_total(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """`log Σ e^(logits / T)`, float32 [...]; that of all tokens is `logaddexp` of its parts'."""
    return jax.nn.logsumexp(_over(logits, temperature), axis=-1)


def cross_entropy(
    student: jax.Array, targets: jax.Array, total: jax.Array | None = None
) -> jax.Array:
    """`-log softmax(student)[target]`, of targets int32 [...]; 0 where V lacks the target."""
    return -_at(_log_softmax(student, 1.0, total), targets)


def forward_kl(
    student: jax.Array,
    teacher: jax.Array,
    temperature: float = 1.0,
    totals: Totals | None = None,
) -> jax.Array:
    """`T² KL(p || q) = T² Σ p (log p - log q)`: the student has to cover what the teacher says."""
    log_q, log_p = _log_softmaxes(student, teacher, temperature, totals)
    return temperature**2 * _expected(log_p, log_p, log_q)


def reverse_kl(
    student: jax.Array,
    teacher: jax.Array,
    temperature: float = 1.0,
    totals: Totals | None = None,
) -> jax.Array:
    """`T² KL(q || p)`: the student may leave out, but not add.

    Reference: Gu et al. 2023, arXiv:2306.08543.
    """
    swapped = None if totals is None else (totals[1], totals[0])
    return forward_kl(teacher, student, temperature, swapped)


def jensen_shannon(
    student: jax.Array,
    teacher: jax.Array,
    beta: float = 0.5,
    temperature: float = 1.0,
    totals: Totals | None = None,
) -> jax.Array:
    """`T² (β KL(p || m) + (1 - β) KL(q || m))` with `m = β p + (1 - β) q`, 0 < β < 1.

    Divided by β it becomes the forward divergence as β goes to 0, and by 1 - β the reverse one as
    it goes to 1. Reference: Agarwal et al. 2023, arXiv:2306.13649.
    """
    if not 0.0 < beta < 1.0:
        raise UserError(
            f"beta is {beta}, and a mixture needs one between 0 and 1; for the limits take "
            "forward_kl or reverse_kl"
        )
    log_q, log_p = _log_softmaxes(student, teacher, temperature, totals)
    # Finite, or a token that both exclude would give gradients of infinity less infinity.
    some_p, some_q = (jnp.maximum(x, _LEAST) for x in (log_p, log_q))
    log_m = jnp.logaddexp(some_p + jnp.log(beta), some_q + jnp.log1p(-beta))
    mixed = beta * _expected(log_p, log_p, log_m) + (1.0 - beta) * _expected(log_q, log_q, log_m)
    return temperature**2 * mixed


def total_variation(
    student: jax.Array,
    teacher: jax.Array,
    temperature: float = 1.0,
    totals: Totals | None = None,
) -> jax.Array:
    """`½ Σ |p - q|`, which is `1 - Σ min(p, q)`: how often a guess of the student is refused by a
    teacher that takes as many as it can and loses nothing.

    Reference: Leviathan et al. 2022, arXiv:2211.17192.
    """
    log_q, log_p = _log_softmaxes(student, teacher, temperature, totals)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


@struct.dataclass
class TopK:
    """The k most likely tokens of a teacher, at a temperature, and what is left for all others.

    Attributes:
      indices: int32 [..., k], the most likely first.
      log_probs: float32 [..., k], log p.
      tail: float32 [...], log of the others' probability together; -inf if there are none.
    """

    indices: jax.Array
    log_probs: jax.Array
    tail: jax.Array


def top_k(teacher: jax.Array, k: int, temperature: float = 1.0) -> TopK:
    """The k most likely tokens of logits [..., V]."""
    if not 0 < k <= teacher.shape[-1]:
        raise UserError(
            f"top_k is {k}; choose 1 to {teacher.shape[-1]}, the size of the vocabulary"
        )
    log_p = _log_softmax(teacher, temperature)
    log_probs, indices = jax.lax.top_k(log_p, k)
    return TopK(indices, log_probs, _others(log_p, indices))


def narrowed(known: TopK, k: int) -> TopK:
    """The k most likely of the known tokens; the rest joins the others. As if found with that k."""
    count = known.indices.shape[-1]
    if not 0 < k <= count:
        raise UserError(f"top_k is {k}, and {count} tokens of the teacher are known; choose fewer")
    rest = [known.log_probs[..., k:], known.tail[..., None]]
    tail = jax.nn.logsumexp(jnp.concatenate(rest, axis=-1), axis=-1)
    return TopK(known.indices[..., :k], known.log_probs[..., :k], tail)


def widened(known: TopK) -> TopK:
    """Known tokens that were stored in narrower dtypes, in those of `TopK`.

    Rounded probabilities do not sum to one, and a divergence from what does not is not zero where
    the student agrees, and may be below. So all are divided by their sum.
    """
    log_probs, tail = (x.astype(jnp.float32) for x in (known.log_probs, known.tail))
    total = jax.nn.logsumexp(jnp.concatenate([log_probs, tail[..., None]], axis=-1), axis=-1)
    return TopK(known.indices.astype(jnp.int32), log_probs - total[..., None], tail - total)


def top_k_kl(student: jax.Array, teacher: TopK, temperature: float = 1.0) -> jax.Array:
    """`T² KL(p || q)` where all tokens but the teacher's k most likely ones count as one:

        T² (Σ p_i (log p_i - log q_i)  +  p_tail (log p_tail - log q_tail))

    It is at most `forward_kl`, and grows to it with k. With k tokens renormalized instead, the
    others' logits would have no gradient, and could rise unseen.

    Args:
      student: logits [..., V].
      teacher: at the same temperature.
    """
    log_q = _log_softmax(student, temperature)
    kept = jnp.take_along_axis(log_q, teacher.indices, axis=-1)
    log_q = jnp.concatenate([kept, _others(log_q, teacher.indices)[..., None]], axis=-1)
    log_p = jnp.concatenate([teacher.log_probs, teacher.tail[..., None]], axis=-1)
    return temperature**2 * _expected(log_p, log_p, log_q)


def cosine_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """`1 - cos` of hidden states [..., D], float32 [...]; 1 where one of them is zero."""
    a, b = student.astype(jnp.float32), teacher.astype(jnp.float32)
    squares = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    known = squares > 0.0
    inverse = jax.lax.rsqrt(jnp.where(known, squares, 1.0))
    return 1.0 - jnp.where(known, jnp.sum(a * b, axis=-1) * inverse, 0.0)


def mean_square(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """`|s - t|² / |t|²` of hidden states [..., D], float32 [...].

    Relative, since a few channels of a residual stream are a thousand times the others and grow
    from layer to layer.
    """
    a, b = student.astype(jnp.float32), teacher.astype(jnp.float32)
    scale = jnp.sum(b * b, axis=-1)
    return jnp.sum((a - b) ** 2, axis=-1) / jnp.where(scale > 0.0, scale, 1.0)


def _log_softmaxes(
    student: jax.Array, teacher: jax.Array, temperature: float, totals: Totals | None
) -> tuple[jax.Array, jax.Array]:
    own, its = (None, None) if totals is None else totals
    return _log_softmax(student, temperature, own), _log_softmax(teacher, temperature, its)


def _log_softmax(
    logits: jax.Array, temperature: float, total: jax.Array | None = None
) -> jax.Array:
    scaled = _over(logits, temperature)
    return jax.nn.log_softmax(scaled, axis=-1) if total is None else scaled - total[..., None]


def _over(logits: jax.Array, temperature: float) -> jax.Array:
    if not temperature > 0.0:
        raise UserError(f"the temperature is {temperature}; choose one above 0")
    return logits.astype(jnp.float32) / temperature


def _expected(log_weights: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """`Σ e^log_weights (left - right)` over the last axis, without what has no weight."""
    known = log_weights != -jnp.inf  # NaN is, and spreads
    # Twice, or gradients of what is left out would be 0 times infinity.
    left, right, weights = (jnp.where(known, x, 0.0) for x in (left, right, log_weights))
    return jnp.sum(jnp.where(known, jnp.exp(weights) * (left - right), 0.0), axis=-1)


def _at(values: jax.Array, targets: jax.Array) -> jax.Array:
    """`values[..., target]`, as a sum, which stays where a vocabulary is split among devices."""
    tokens = jax.lax.broadcasted_iota(targets.dtype, values.shape, values.ndim - 1)
    return jnp.sum(jnp.where(tokens == targets[..., None], values, 0.0), axis=-1)


def _others(log_probs: jax.Array, indices: jax.Array) -> jax.Array:
    """Log of the probability of all tokens but those: [...]."""
    hidden = jnp.put_along_axis(log_probs, indices, -jnp.inf, axis=-1, inplace=False)
    most = jax.lax.stop_gradient(jnp.max(hidden, axis=-1, keepdims=True))
    most = jnp.where(most != -jnp.inf, most, 0.0)
    total = jnp.sum(jnp.exp(hidden - most), axis=-1)
    some = total != 0.0
    return jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + most[..., 0], -jnp.inf)
