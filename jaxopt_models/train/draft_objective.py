"""What draft heads are trained for: to say what the model will say, several tokens ahead."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.distill.objective import summed_losses
from jaxopt_models.distill.predictor import Predictor
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import hidden_states_with_layers, output_head
from jaxopt_models.speculative.draft import Target
from jaxopt_models.speculative.eagle3 import Eagle3
from jaxopt_models.speculative.eagle3_params import head_rows
from jaxopt_models.speculative.medusa import Medusa
from jaxopt_models.speculative.mtp import Mtp
from jaxopt_models.speculative.unrolled import unrolled
from jaxopt_models.train.objectives import QAD, Term, logit_losses
from jaxopt_models.train.step import Loss, Sums

# The probability that a sampled guess is not accepted.
REFUSED = LogitLoss("total_variation")


def draft_loss(
    config: ModelConfig,
    head: Eagle3 | Mtp | Medusa,
    terms: Sequence[Term] = QAD,
    *,
    steps: int = 5,
    decay: float = 0.8,
    remat: bool = False,
) -> Loss:
    """The loss of a draft head, for `make_train_step`.

        Σ_s decay^s Σ_t Σ_i weight_i loss_i(q_{t,s}, p_{t+1+s})  /  Σ_s decay^s

    q_{t,s} is what the head says at index t of step s, of token t + 2 + s: an EAGLE-3 or MTP head
    as in `unrolled`, or Medusa head s; p_u what the model says behind token u, of the tokens in the
    head's vocabulary.

    Args:
      config: of the model; its dtype is the one that its pass is computed in.
      head: as it is trained; its parameters are not read here.
      terms: losses of next tokens, and what each counts; cross-entropy has nothing to say of tokens
        that are not in the head's vocabulary.
      steps: that are trained, or Medusa heads; static, as the next.
      decay: what each counts for, of the one before.
      remat: whether a step is computed again for gradients.

    Returns:
      (head.params, the model's parameters, batch, step) -> `Sums`. The batch is that of
      `objectives.next_token_loss`. Among the others are each loss's sum over the steps, and by
      "refused_1", … the probability that a guess at a step is not accepted, if it is sampled, or
      rather its sum.
    """
    losses = next_token_losses(terms)
    measured = (*losses, REFUSED)
    total_decay = sum(decay**s for s in range(steps))

    def loss(params: Any, context: Any, batch: Any, step: jax.Array) -> Sums:
        own, target = replace(head, params=params), Target(config, context)
        tokens, starts = batch["tokens"], batch.get("starts")
        mask = batch.get("mask", jnp.ones(tokens.shape, jnp.float32)).astype(jnp.float32)
        hidden, features = of_the_model(target, tokens, head.layers, starts)
        said = _predictors(own, target, tokens, features, steps, starts, remat)
        teacher, targets = _teacher(own, target, hidden), tokens
        if own.vocabulary is not None:
            # Which tokens they are matters to cross-entropy alone.
            targets = _in_own_vocabulary(own.vocabulary, tokens)
        weights = jnp.stack([*(term.weight_at(step) for term in terms), jnp.float32(0.0)])
        total, others, count = jnp.float32(0.0), {}, jnp.float32(0.0)
        for s, student in enumerate(said):
            learnt = _shifted_mask(mask, starts, 1 + s)
            its = replace(teacher, hidden=jnp.roll(hidden, -(1 + s), axis=1))
            ahead = jnp.roll(targets, -(1 + s), axis=1)
            part, sums = summed_losses(measured, weights, student, its, ahead, learnt)
            total += decay**s / total_decay * part
            count = count if s else jnp.sum(learnt[:, 1:])
            names = [loss.kind for loss in losses]
            for name, value in zip([*names, f"refused_{s + 1}"], sums, strict=True):
                others[name] = others.get(name, jnp.float32(0.0)) + value
        return Sums(total, count, others)

    return loss


def next_token_losses(terms: Sequence[Term]) -> tuple[LogitLoss, ...]:
    """The losses of a draft head.

    Raises:
      UserError: for none, and for others than of next tokens.
    """
    losses = logit_losses(terms)
    if len(losses) != len(terms) or not terms:
        raise UserError("a draft head is trained for next tokens; give losses of these alone")
    return tuple(losses)


def of_the_model(
    target: Target, tokens: jax.Array, layers: Sequence[int], starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(what its output head reads, features), both without gradient."""
    own = target.config.num_layers
    inner = [i for i in layers if i != own]
    found = hidden_states_with_layers(target.config, target.params, tokens, inner, starts)
    hidden, behind = jax.lax.stop_gradient(found)
    return hidden, jnp.concatenate([(behind | {own: hidden})[i] for i in layers], axis=-1)


def _predictors(
    head: Eagle3 | Mtp | Medusa,
    target: Target,
    tokens: jax.Array,
    features: jax.Array,
    steps: int,
    starts: jax.Array | None,
    remat: bool,
) -> list[Predictor]:
    """What a head says at each step, in its own vocabulary."""
    if isinstance(head, Medusa):
        heads = enumerate(head.params["heads"][:steps])
        return [
            Predictor({"lm_head": one["lm_head"]}, head.states(features, number), head.config)
            for number, one in heads
        ]
    config, output = head.output(target)
    found = unrolled(head, target, tokens, features, steps, starts, remat)
    return [Predictor(output, head.states(x), config) for x in found]


def _teacher(head: Eagle3 | Mtp | Medusa, target: Target, hidden: jax.Array) -> Predictor:
    """The model, of the tokens that a head may say."""
    config, vocabulary = target.config, head.vocabulary
    if vocabulary is None:
        return Predictor(output_head(target.params), hidden, config)
    rows = head_rows(target, vocabulary, config.dtype)
    config = replace(config, vocab_size=len(rows), tie_word_embeddings=False)
    return Predictor({"lm_head": {"weight": rows}}, hidden, config)


def _shifted_mask(mask: jax.Array, starts: jax.Array | None, by: int) -> jax.Array:
    """Which tokens are learnt from so many places farther back than from the one before: entry t is
    of token t + by, guessed at index t - 1."""
    length = mask.shape[1]
    known = (jnp.arange(length) < length - by)[None]
    if starts is not None:
        known = known & (jnp.roll(starts, -by, axis=1) == jnp.roll(starts, 1, axis=1))
    return jnp.where(known, jnp.roll(mask, -by, axis=1), 0.0)


def _in_own_vocabulary(vocabulary: jax.Array, tokens: jax.Array) -> jax.Array:
    """Number of each token in the rising vocabulary of a head; -1 of those that it lacks."""
    number = jnp.minimum(jnp.searchsorted(vocabulary, tokens), len(vocabulary) - 1)
    return jnp.where(vocabulary[number] == tokens, number, -1).astype(jnp.int32)
