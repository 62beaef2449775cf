"""What DFlash heads are trained for: to say what the model will say, at all places of a block."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_models.distill.objective import summed_losses
from jaxopt_models.distill.predictor import Predictor
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import output_head
from jaxopt_models.speculative.blocks import blocks
from jaxopt_models.speculative.dflash import DFlash
from jaxopt_models.speculative.draft import Target
from jaxopt_models.train.draft_objective import REFUSED, next_token_losses, of_the_model
from jaxopt_models.train.objectives import QAD, Term
from jaxopt_models.train.step import Loss, Sums


def block_loss(
    config: ModelConfig,
    head: DFlash,
    terms: Sequence[Term] = QAD,
    *,
    anchors: int = 64,
    decay: float = 0.8,
    seed: int = 0,
) -> Loss:
    """The loss of a DFlash head, for `make_train_step`.

        Σ_k decay^(k-1) Σ_t Σ_i weight_i loss_i(q_{t,k}, p_{t+k-1})  /  Σ_k decay^(k-1)

    t are the anchors of a row, q_{t,k} what place k of the block from t says, see `blocks`, of
    token t + k, k = 1..n-1; p_u what the model says behind token u. Blocks are always computed
    again for gradients.

    Args:
      config: of the model; its dtype is the one that its pass is computed in.
      head: as it is trained; its parameters are not read here.
      terms: losses of next tokens, and what each counts.
      anchors: places of a row that blocks begin at, at most; static, as the next. Another choice
        each step, the same for all rows but where rows do not have what to learn there.
      decay: what each place of a block counts for, of the one before.
      seed: of the choice, which is a function of it and of the step.

    Returns:
      (head.params, the model's parameters, batch, step) -> `Sums`. The batch is that of
      `objectives.next_token_loss`; a row is longer than a block. The others are those of
      `draft_objective.draft_loss`, "refused_1" of the place behind the anchor.

    Raises:
      UserError: for losses of something else, no anchors, and, by the loss, rows that are too
        short.
    """
    losses = next_token_losses(terms)
    if anchors < 1:
        raise UserError(f"a row has {anchors} anchors, where blocks begin; choose 1 or more")
    measured, ahead = (*losses, REFUSED), range(1, head.block)
    counts = jnp.asarray([decay ** (k - 1) for k in ahead], jnp.float32)
    counts = counts / jnp.sum(counts)

    def loss(params: Any, context: Any, batch: Any, step: jax.Array) -> Sums:
        own, target = replace(head, params=params), Target(config, context)
        tokens, starts = batch["tokens"], batch.get("starts")
        mask = batch.get("mask", jnp.ones(tokens.shape, jnp.float32)).astype(jnp.float32)
        hidden, features = of_the_model(target, tokens, head.layers, starts)
        learnt = _learnt(mask, starts, head.block)
        places = _chosen(learnt[0] > 0, anchors, seed, step)
        said = blocks(own, target, tokens, features, places, starts)
        weights = jnp.stack([*(term.weight_at(step) for term in terms), jnp.float32(0.0)])
        output = output_head(context)

        def one(total: jax.Array, place: Any) -> tuple[jax.Array, Any]:
            """At place k of all blocks."""
            k, count, states, learnt = place
            student = Predictor(output, states, own.config)
            teacher = Predictor(output, _at(hidden, places + k - 1), config)
            parts = student, teacher, _at(tokens, places + k), _at(learnt, places)
            part, sums = summed_losses(measured, weights, *_as_next_tokens(*parts))
            return total + count * part, sums

        each = jnp.asarray(ahead, jnp.int32), counts, jnp.moveaxis(said[:, :, 1:], 2, 0), learnt
        total, sums = lax.scan(one, jnp.float32(0.0), each)
        others = {loss.kind: jnp.sum(sums[:, i]) for i, loss in enumerate(losses)}
        others |= {f"refused_{k}": sums[k - 1, -1] for k in ahead}
        return Sums(total, jnp.sum(_at(learnt[0], places)), others)

    return loss


def _learnt(mask: jax.Array, starts: jax.Array | None, block: int) -> jax.Array:
    """What counts at each place of blocks from each anchor that has room: [n - 1, B, T - n + 1].

    That is the mask of the token that is said there. An anchor has text before it, and blocks end
    with their document.
    """
    length = mask.shape[1]
    if length <= block:
        raise UserError(
            f"rows have {length} tokens, and a block of {block} places needs a text before it; "
            "make rows longer, or the block shorter"
        )
    count = length - block + 1
    first = jnp.zeros_like(mask, jnp.int32) if starts is None else starts
    own = first[:, :count]
    inside = jnp.arange(count, dtype=jnp.int32)[None] > own
    return jnp.stack(
        [
            jnp.where(inside & (first[:, k : k + count] == own), mask[:, k : k + count], 0.0)
            for k in range(1, block)
        ]
    )


def _chosen(possible: jax.Array, count: int, seed: int, step: jax.Array) -> jax.Array:
    """Anchors of each row int32 [B, A], drawn without repetition from bool [B, P], and only then
    from the others. The draw is one for all rows, so it is the same however rows are split."""
    size = possible.shape[1]
    drawn = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step), (1, size))
    _, places = lax.top_k(drawn + possible.astype(jnp.float32), min(count, size))
    return places.astype(jnp.int32)


def _at(array: jax.Array, places: jax.Array) -> jax.Array:
    """[B, A, ...] of [B, T, ...] at places int32 [B, A]."""
    wide = places.reshape(*places.shape, *[1] * (array.ndim - 2))
    return jnp.take_along_axis(array, wide, axis=1)


def _as_next_tokens(
    student: Predictor, teacher: Predictor, tokens: jax.Array, learnt: jax.Array
) -> tuple[Predictor, Predictor, jax.Array, jax.Array]:
    """What says each token, [B, A], as `summed_losses` has it: one place before it."""

    def behind(one: Predictor) -> Predictor:
        return replace(one, hidden=jnp.pad(one.hidden, ((0, 0), (0, 1), (0, 0))))

    tokens, learnt = (jnp.pad(array, ((0, 0), (1, 0))) for array in (tokens, learnt))
    return behind(student), behind(teacher), tokens, learnt
