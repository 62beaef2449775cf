"""Importance by gradients: what the loss would change, to first order, if a part were removed.

With a mask m = 1 on each part and L the mean next-token cross-entropy of a sequence,

    score = sqrt( mean over sequences of (∂L/∂m)² ),    ∂L/∂m = Σ w ∂L/∂w

where the sum is over all weights that go with the part: one backward pass scores every axis. A
mask's derivative leaves out what removal does to the number that norms divide by, and which other
experts tokens would be sent to.

Reference: Molchanov et al. 2019, arXiv:1906.10771; for coupled groups of weights Ma et al. 2023,
arXiv:2305.11627.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.data import token_arrays
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import hidden_states, logits, output_head
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.masks import Masks, apply_masks, keep_all


def taylor_importance(
    config: ModelConfig,
    params: Any,
    batches: Iterable[Any],
    valid: Sequence[Any] | None = None,
    progress: Progress = silent,
) -> Masks:
    """Scores in the fields and shapes of masks, one gradient a sequence.

    The whole model is on the device, with the inputs of its layers for one sequence.

    Args:
      config: the architecture.
      params: the model, in plain arrays.
      batches: int32 [B, T] token arrays, T at least 2.
      valid: [B, T] of each batch, nonzero at tokens that are to be predicted; None is all.
      progress: wraps the loop over batches, as `tqdm` would.

    Raises:
      UserError: without text, for `valid` of other shapes, for what `apply_masks` refuses, and for
        gradients that are not finite.
    """
    ones = keep_all(config, params)
    text = token_arrays(config, batches, shortest=2)
    if not text:
        raise UserError("gradients need text: no batches were given")
    counted = [jnp.ones(batch.shape) for batch in text]
    if valid is not None:
        counted = [(jnp.asarray(mask) != 0).astype(jnp.float32) for mask in valid]
        if [mask.shape for mask in counted] != [batch.shape for batch in text]:
            raise UserError("`valid` has to be one array for each batch, of its shape")
    total = jax.tree.map(jnp.zeros_like, ones)
    for batch, mask in progress(list(zip(text, counted, strict=True)), "gradients"):
        squares = _squared_gradients(config, params, ones, batch, mask)
        total = jax.tree.map(jnp.add, total, squares)
    count = sum(batch.shape[0] for batch in text)
    scores = jax.tree.map(lambda square: jnp.sqrt(square / count), total)
    for path, score in tree.arrays_with_paths(scores):
        if not bool(jnp.all(jnp.isfinite(score))):
            raise UserError(f"gradients by {path!r} are not finite; look for NaN in the weights")
    return scores


@partial(jax.jit, static_argnums=0)
def _squared_gradients(
    config: ModelConfig, params: Any, masks: Masks, tokens: jax.Array, valid: jax.Array
) -> Masks:
    """Σ over sequences of the squared derivatives by each mask."""

    def loss(masks: Masks, row: jax.Array, counts: jax.Array) -> jax.Array:
        masked = apply_masks(config, params, masks)
        hidden = hidden_states(config, masked, row[None], remat="layers")
        log_q = jax.nn.log_softmax(logits(config, output_head(masked), hidden[0, :-1]))
        nll = -jnp.take_along_axis(log_q, row[1:, None], axis=1)[:, 0]
        return jnp.sum(nll * counts[1:]) / jnp.maximum(jnp.sum(counts[1:]), 1.0)

    def one(of_row: tuple[jax.Array, jax.Array]) -> Masks:
        return jax.tree.map(jnp.square, jax.grad(loss)(masks, *of_row))

    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(one, (tokens, valid)))
