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
from jaxopt_models.models.transformer import hidden_states_with_layers
from jaxopt_models.speculative.draft import Target
from jaxopt_models.speculative.eagle3 import Eagle3, head_rows
from jaxopt_models.speculative.unrolled import unrolled
from jaxopt_models.train.objectives import QAD, Term, logit_losses
from jaxopt_models.train.step import Loss, Sums
from kernels_pallas import rms_norm

_REFUSED = LogitLoss("total_variation")


def eagle3_loss(
    config: ModelConfig,
    head: Eagle3,
    terms: Sequence[Term] = QAD,
    *,
    steps: int = 5,
    decay: float = 0.8,
    remat: bool = False,
) -> Loss:
    """The loss of an EAGLE-3 head, for `make_train_step`.

        Σ_s decay^s Σ_t Σ_i weight_i loss_i(q_{t,s}, p_{t+1+s})  /  Σ_s decay^s

    q_{t,s} is what the head says at index t of step s, see `unrolled`; p_u what the model says
    behind token u, of the tokens in the head's vocabulary.

    Args:
      config: of the model; its dtype is the one that its pass is computed in.
      head: as it is trained; its parameters are not read here.
      terms: losses of next tokens, and what each counts; cross-entropy has nothing to say of tokens
        that are not in the head's vocabulary.
      steps: that are trained; static, as the next.
      decay: what each counts for, of the one before.
      remat: whether a step is computed again for gradients.

    Returns:
      (head.params, the model's parameters, batch, step) -> `Sums`. The batch is that of
      `objectives.next_token_loss`. Among the others are each loss's sum over the steps, and by
      "refused_1", … the probability that a guess at a step is not accepted, if it is sampled, or
      rather its sum.
    """
    losses = logit_losses(terms)
    if len(losses) != len(terms) or not terms:
        raise UserError("a draft head is trained for next tokens; give losses of these alone")
    measured = (*losses, _REFUSED)
    total_decay = sum(decay**s for s in range(steps))

    def loss(params: Any, context: Any, batch: Any, step: jax.Array) -> Sums:
        own, target = replace(head, params=params), Target(config, context)
        tokens, starts = batch["tokens"], batch.get("starts")
        mask = batch.get("mask", jnp.ones(tokens.shape, jnp.float32)).astype(jnp.float32)
        hidden, features = _of_the_model(target, tokens, head.layers, starts)
        rows = head_rows(target, params["vocabulary"], config.dtype)
        teacher = replace(config, vocab_size=len(rows), tie_word_embeddings=False)
        weights = jnp.stack([*(term.weight_at(step) for term in terms), jnp.float32(0.0)])
        total, others, count = jnp.float32(0.0), {}, jnp.float32(0.0)
        for s, x in enumerate(unrolled(own, target, tokens, features, steps, starts, remat)):
            learnt = _shifted_mask(mask, starts, 1 + s)
            its = jnp.roll(hidden, -(1 + s), axis=1)
            part, sums = summed_losses(
                measured,
                weights,
                _student(own, x),
                Predictor({"lm_head": {"weight": rows}}, its, teacher),
                # Which tokens they are matters to cross-entropy alone.
                _in_own_vocabulary(params["vocabulary"], jnp.roll(tokens, -(1 + s), axis=1)),
                learnt,
            )
            total += decay**s / total_decay * part
            count = count if s else jnp.sum(learnt[:, 1:])
            names = [loss.kind for loss in losses]
            for name, value in zip([*names, f"refused_{s + 1}"], sums, strict=True):
                others[name] = others.get(name, jnp.float32(0.0)) + value
        return Sums(total, count, others)

    return loss


def _of_the_model(
    target: Target, tokens: jax.Array, layers: Sequence[int], starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(what its output head reads, features), both without gradient."""
    found = hidden_states_with_layers(target.config, target.params, tokens, layers, starts)
    hidden, behind = jax.lax.stop_gradient(found)
    return hidden, jnp.concatenate([behind[i] for i in layers], axis=-1)


def _student(head: Eagle3, x: jax.Array) -> Predictor:
    normed = rms_norm(x, head.params["norm"]["weight"], head.config.rms_norm_eps)
    return Predictor({"lm_head": head.params["lm_head"]}, normed, head.config)


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
