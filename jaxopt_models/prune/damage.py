"""What does a model lose when something is removed? Candidates of masks, measured.

    nll    next-token cross-entropy of the masked model
    kl     KL(original || masked)

both in nats a predicted token. One compiled program measures all candidates: masks are its
arguments. Leaving out each layer, or each run of neighbouring layers, is `layer_runs`: whole runs,
since what single layers cost does not add up. Reference: Gromov et al. 2024, arXiv:2403.17887.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.data import token_arrays
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import position_sums
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import hidden_states, output_head
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.masks import Masks, apply_masks, check_plain, check_shapes, drop_layers


@dataclass(frozen=True)
class Damage:
    """What a candidate was measured at.

    Attributes:
      nll: mean next-token cross-entropy, nats.
      kl: mean KL(original || candidate), nats.
      top1_agreement: share of positions where both have the same most likely token.
    """

    nll: float
    kl: float
    top1_agreement: float


def damage(
    config: ModelConfig,
    params: Any,
    batches: Iterable[Any],
    candidates: Sequence[Masks],
    original: Any = None,
    progress: Progress = silent,
) -> list[Damage]:
    """Measures every candidate on the same text.

    The text's final hidden states in the original model stay on the device, 4 D bytes a token.

    Args:
      config: the architecture.
      params: the model that is masked, in plain arrays.
      batches: int32 [B, T] token arrays, T at least 2.
      candidates: masks of the model.
      original: parameters that they are compared with, where `params` have been changed already, as
        by `norm_gains.rescale_norms`; None is `params`.
      progress: wraps the loop over candidates, as `tqdm` would.

    Returns:
      One for each candidate, in their order.

    Raises:
      UserError: without text or candidates, for masks of another model or with fewer experts than a
        token is sent to, and for a candidate whose logits are not finite, by its number.
    """
    check_plain(params)
    text = token_arrays(config, batches, shortest=2)
    if not text or not candidates:
        raise UserError("there is nothing to measure: give batches of text and candidates of masks")
    for number, masks in enumerate(candidates):
        check_shapes(config, params, masks)
        _check_experts(config, masks, number)
    original = params if original is None else original
    hidden = [_hidden(config, original, batch) for batch in text]
    head = output_head(original)
    sums = [
        sum(
            masked_sums(config, params, masks, batch, (head, states))
            for batch, states in zip(text, hidden, strict=True)
        )
        for masks in progress(candidates, "measuring candidates")
    ]
    positions = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in text)
    found = np.asarray(jnp.stack(sums), np.float64) / positions
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        raise UserError(
            f"the logits of candidate {bad[0]} are not finite; look for NaN in the model's weights"
        )
    return [Damage(*row) for row in found.tolist()]


@partial(jax.jit, static_argnums=0)
def masked_sums(
    config: ModelConfig,
    params: Any,
    masks: Masks,
    tokens: jax.Array,
    original: tuple[Any, jax.Array],
) -> jax.Array:
    """Sums over predicted positions of (nll, KL, agreement) of the masked model, float32 [3].

    Args:
      masks: traced, so `jax.lax.map` or `jax.vmap` take many at once.
      tokens: int32 [B, T].
      original: output head and final hidden states [B, T, D] of the model to compare with.
    """
    masked = apply_masks(config, params, masks)
    student = output_head(masked), hidden_states(config, masked, tokens)
    return position_sums(config, config, student, original, tokens)


def layer_runs(layers: int, longest: int | None = None) -> list[range]:
    """Every run of neighbouring layers: single ones first, at most `longest` long, never all."""
    longest = layers - 1 if longest is None else min(longest, layers - 1)
    return [
        range(start, start + length)
        for length in range(1, longest + 1)
        for start in range(layers - length + 1)
    ]


def without_layers(masks: Masks, runs: Iterable[Iterable[int]]) -> list[Masks]:
    """The masks, with each of the runs of layers removed as well: candidates for `damage`."""
    return [drop_layers(masks, run) for run in runs]


_hidden = jax.jit(hidden_states, static_argnums=0)


def _check_experts(config: ModelConfig, masks: Masks, number: int) -> None:
    for i, mask in enumerate(masks.experts):
        if mask is not None and np.count_nonzero(np.asarray(mask)) < config.experts_per_token:
            raise UserError(
                f"candidate {number} keeps {np.count_nonzero(np.asarray(mask))} experts of layer "
                f"{i}, and each token is sent to {config.experts_per_token}; keep at least as many"
            )
