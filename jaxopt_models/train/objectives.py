"""What is trained for: next tokens of the text, and what a teacher says of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxopt_models import tree
from jaxopt_models.distill.losses import TopK
from jaxopt_models.distill.objective import LogitLoss, Predictor, summed_losses
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import Remat, hidden_states, output_head, positions_of
from jaxopt_models.train.step import Loss, Sums

Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class Term:
    """A loss and its weight, a number or a function of the step, as optax makes schedules."""

    loss: LogitLoss
    weight: float | Schedule = 1.0

    def weight_at(self, step: jax.Array) -> jax.Array:
        value = self.weight(step) if callable(self.weight) else self.weight
        return jnp.asarray(value, jnp.float32)


QAT = (Term(LogitLoss("cross_entropy")),)
QAD = (Term(LogitLoss("forward_kl")),)


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
      (params, context, batch, step) -> `Sums`. The context is the teacher's parameters, or None.
      The batch has "tokens" int32 [B, T]; "mask" [B, T], 1 for tokens to learn, if not all of them;
      "starts" int32 [B, T], where in its row the document of each token begins, if there are
      several, whose first tokens are not learnt; and "teacher", a `TopK` of [B, T, k] in any
      dtypes, in place of the context. The sum of each kind of loss is among the others, by its
      name.

    Raises:
      UserError: for no terms, or two of one name.
    """
    names = [_name(term.loss) for term in terms]
    if not terms or len(set(names)) != len(names):
        raise UserError(f"losses {', '.join(names) or '(none)'}: give one or more, each only once")
    losses = tuple(term.loss for term in terms)

    def loss(params: Any, context: Any, batch: Any, step: jax.Array) -> Sums:
        tokens, starts = batch["tokens"], batch.get("starts")
        mask = batch.get("mask", jnp.ones(tokens.shape, jnp.float32)).astype(jnp.float32)
        if starts is not None:
            mask *= (positions_of(tokens) > starts).astype(jnp.float32)
        student = _predictor(config, params, tokens, starts, remat, sharding)
        known: Predictor | TopK | None = batch.get("teacher")
        if known is None and context is not None and any(one.needs_teacher for one in losses):
            theirs = _predictor(teacher or config, context, tokens, starts, sharding=sharding)
            known = jax.lax.stop_gradient(theirs)
        weights = jnp.stack([term.weight_at(step) for term in terms])
        total, sums = summed_losses(losses, weights, student, known, tokens, mask)
        count = jnp.sum(mask[:, 1:])
        return Sums(total, count, dict(zip(names, sums, strict=True)))

    return loss


def _predictor(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    starts: jax.Array | None,
    remat: Remat = "none",
    sharding: Sharding | None = None,
) -> Predictor:
    hidden = hidden_states(config, params, tokens, starts, remat, sharding)
    # Once, since each piece of the logits reads it.
    head = tree.map_with_path(
        lambda _, leaf: leaf if tree.is_leaf(leaf) else leaf.astype(config.dtype),
        output_head(params),
    )
    return Predictor(head, hidden, config)


def _name(loss: LogitLoss) -> str:
    parts = [loss.kind]
    parts += [f"t{loss.temperature:g}"] if loss.temperature != 1.0 else []
    parts += [f"top{loss.top_k}"] if loss.top_k is not None else []
    return "_".join(parts)
