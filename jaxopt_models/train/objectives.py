"""What is trained for: next tokens of the text, and what a teacher says of them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxopt_models.distill.hidden import HiddenLoss, summed_hidden_losses
from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.distill.losses import TopK
from jaxopt_models.distill.objective import summed_losses
from jaxopt_models.distill.predictor import Predictor
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import (
    Remat,
    hidden_states_with_layers,
    output_head,
    positions_of,
)
from jaxopt_models.train.leaves import cast
from jaxopt_models.train.step import Loss, Sums

Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class Term:
    """A loss and its weight, a number or a function of the step, as optax makes schedules."""

    loss: LogitLoss | HiddenLoss
    weight: float | Schedule = 1.0

    def weight_at(self, step: jax.Array) -> jax.Array:
        value = self.weight(step) if callable(self.weight) else self.weight
        return jnp.asarray(value, jnp.float32)


QAT = (Term(LogitLoss("cross_entropy")),)
QAD = (Term(LogitLoss("forward_kl")),)


def logit_losses(terms: Sequence[Term]) -> list[LogitLoss]:
    """Those of next tokens."""
    return [term.loss for term in terms if isinstance(term.loss, LogitLoss)]


def next_token_loss(
    config: ModelConfig,
    terms: Sequence[Term] = QAD,
    teacher: ModelConfig | None = None,
    remat: Remat = "none",
    sharding: Sharding | None = None,
) -> Loss:
    """The loss of a model that predicts each token, for `make_train_step`.

    Args:
      config: of the model that is trained; its dtype is the one that is computed in.
      terms: what is summed; `QAT` is cross-entropy alone, `QAD` the divergence from the teacher.
      teacher: the teacher's architecture; None is the same.
      remat: what of each layer is computed again for gradients.
      sharding: of the residual streams, see `transformer.hidden_states`.

    Returns:
      (params, context, batch, step) -> `Sums`. With the parameters is a projection, if losses of
      hidden states need one, see `hidden.with_projection`. The context is the teacher's parameters,
      or None. The batch has "tokens" int32 [B, T]; "mask" [B, T], 1 for tokens to learn, if not all
      of them; "starts" int32 [B, T], where in its row the document of each token begins, if there
      are several, whose first tokens are not learnt; and "teacher", a `TopK` of [B, T, k] in any
      dtypes, in place of what the context would say of next tokens. The sum of each kind of loss is
      among the others, by its name.

    Raises:
      UserError: for no terms, two of one name, or layers that a model does not have.
    """
    names = [_name(term.loss) for term in terms]
    if not terms or len(set(names)) != len(names):
        raise UserError(f"losses {', '.join(names) or '(none)'}: give one or more, each only once")
    taught = teacher or config
    logit = [term for term in terms if isinstance(term.loss, LogitLoss)]
    hidden, pairs = _with_layers(terms, config, taught)
    own_layers, its_layers = ({pair[side] for pair in pairs} for side in (0, 1))

    def loss(params: Any, context: Any, batch: Any, step: jax.Array) -> Sums:
        tokens, starts = batch["tokens"], batch.get("starts")
        mask = batch.get("mask", jnp.ones(tokens.shape, jnp.float32)).astype(jnp.float32)
        if starts is not None:
            mask *= (positions_of(tokens) > starts).astype(jnp.float32)
        student, streams = _run(config, params, tokens, own_layers, starts, remat, sharding)
        known: Predictor | TopK | None = batch.get("teacher")
        its_streams: dict[int, jax.Array] = {}
        missing = known is None and any(term.loss.needs_teacher for term in logit)
        if context is not None and (missing or hidden):
            run = _run(taught, context, tokens, its_layers, starts, sharding=sharding)
            predictor, its_streams = jax.lax.stop_gradient(run)
            known = predictor if missing else known
        total, sums = _logit_sums(logit, step, student, known, tokens, mask)
        more, others = _hidden_sums(hidden, step, params, streams, its_streams, mask)
        return Sums(total + more, jnp.sum(mask[:, 1:]), sums | others)

    return loss


def _with_layers(
    terms: Sequence[Term], student: ModelConfig, teacher: ModelConfig
) -> tuple[list[Term], list[tuple[int, int]]]:
    """Those of hidden states, their layers named; and all their pairs of layers."""
    found = [
        (term, term.loss.between(student, teacher))
        for term in terms
        if isinstance(term.loss, HiddenLoss)
    ]
    pairs = [pair for _, loss in found for pair in loss.layers or ()]
    return [replace(term, loss=loss) for term, loss in found], pairs


def _logit_sums(
    terms: Sequence[Term],
    step: jax.Array,
    student: Predictor,
    teacher: Predictor | TopK | None,
    tokens: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(total, each loss's sum by name)."""
    if not terms:
        return jnp.float32(0.0), {}
    losses: Any = tuple(term.loss for term in terms)
    weights = _weights(terms, step)
    total, sums = summed_losses(losses, weights, student, teacher, tokens, mask)
    return total, dict(zip(map(_name, losses), sums, strict=True))


def _hidden_sums(
    terms: Sequence[Term],
    step: jax.Array,
    params: Any,
    student: dict[int, jax.Array],
    teacher: dict[int, jax.Array],
    mask: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    if not terms:
        return jnp.float32(0.0), {}
    losses: Any = tuple(term.loss for term in terms)
    if not teacher:
        raise UserError(f"{_name(losses[0])} needs the teacher's parameters")
    sums = summed_hidden_losses(losses, params, student, teacher, mask)
    total = jnp.sum(_weights(terms, step) * sums)
    return total, dict(zip(map(_name, losses), sums, strict=True))


def _weights(terms: Sequence[Term], step: jax.Array) -> jax.Array:
    return jnp.stack([term.weight_at(step) for term in terms])


def _run(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    layers: Collection[int],
    starts: jax.Array | None,
    remat: Remat = "none",
    sharding: Sharding | None = None,
) -> tuple[Predictor, dict[int, jax.Array]]:
    """(what predicts next tokens, the residual stream behind each of the layers)."""
    hidden, behind = hidden_states_with_layers(
        config, params, tokens, layers, starts, remat, sharding
    )
    # Once, since each piece of the logits reads it.
    return Predictor(cast(output_head(params), config.dtype), hidden, config), behind


def _name(loss: LogitLoss | HiddenLoss) -> str:
    if isinstance(loss, HiddenLoss):
        return loss.kind
    parts = [loss.kind]
    parts += [f"t{loss.temperature:g}"] if loss.temperature != 1.0 else []
    parts += [f"top{loss.top_k}"] if loss.top_k is not None else []
    return "_".join(parts)
