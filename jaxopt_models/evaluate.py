"""Does the cheaper model still say the same things? Perplexity, divergence, agreement, size.

Protocol: every window [L] is one sequence; positions 0..L-2 predict tokens 1..L-1; each figure is
the mean over all predicted positions of all windows. Logits and logarithms are float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import tree
from jaxopt_models.data import token_arrays
from jaxopt_models.distributed import on_host
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import hidden_states, logits, output_head
from jaxopt_models.progress import Progress, silent

# Positions whose logits exist at one time: 256 x 262144 float32 are 256 MiB.
_POSITIONS = 256


@dataclass(frozen=True)
class Metrics:
    """What an evaluation measured.

    Attributes:
      perplexity: exp of the mean negative log-likelihood, in nats a token.
      nll: that mean.
      kl: mean of KL(reference || model) over the full vocabulary, nats a token; None without a
        reference.
      top1_agreement: share of positions where both have the same most likely token; None likewise.
      bits_per_weight: see `tree.bits_per_weight`.
      bytes: stored size of all parameters, from bits.
      positions: number of predicted positions.
    """

    perplexity: float
    nll: float
    kl: float | None
    top1_agreement: float | None
    bits_per_weight: float
    bytes: int
    positions: int

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """A reference model with its final hidden states on given batches, so that comparing many
    models to it runs it once. Takes 4·D bytes a token on the host.
    """

    config: ModelConfig
    params: Any
    batches: tuple[np.ndarray, ...]
    hidden: tuple[np.ndarray, ...]


def reference(
    config: ModelConfig, params: Any, batches: Iterable[Any], progress: Progress = silent
) -> Reference:
    """Runs the reference model once; the result goes into `evaluate(..., reference=...)`."""
    tokens = _checked(config, batches)
    hidden = tuple(
        on_host(hidden_states(config, params, batch))
        for batch in progress(tokens, "running the reference")
    )
    return Reference(config, params, tuple(on_host(batch) for batch in tokens), hidden)


def evaluate(
    config: ModelConfig,
    params: Any,
    batches: Iterable[Any],
    reference: Any = None,
    progress: Progress = silent,
) -> Metrics:
    """Measures a model on token batches, against a reference model if one is given.

    Args:
      config: architecture of the model.
      params: the model; leaves may be of any kind.
      batches: int32 [B, L] arrays, L at least 2; see `data.windows` for the protocol.
      reference: parameters of the original model, of the same architecture, or what `reference()`
        made of them on the same batches.
      progress: wraps the loop over batches, as `tqdm` would.

    Returns:
      `Metrics`.

    Raises:
      UserError: without batches, for token ids outside the vocabulary, for a `Reference` that was
        made of other batches, or when logits are not finite.
    """
    tokens = _checked(config, batches)
    teacher, known = _teacher(config, reference, tokens)
    totals = np.zeros(3, np.float64)
    for i, batch in progress(list(enumerate(tokens)), "evaluating"):
        student = (output_head(params), hidden_states(config, params, batch))
        if teacher is None:
            sums = position_sums(config, None, student, None, batch)
        else:
            its_config, its_params = teacher
            hidden = known[i] if known else hidden_states(its_config, its_params, batch)
            sums = position_sums(
                config, its_config, student, (output_head(its_params), hidden), batch
            )
        totals += on_host(sums).astype(np.float64)
    positions = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in tokens)
    nll, kl, same = (float(total) / positions for total in totals)
    if not np.isfinite([nll, kl]).all():
        whose = "reference" if np.isfinite(nll) else "model"
        raise UserError(
            f"the {whose}'s logits are not finite on this text; look for NaN in its weights"
        )
    return Metrics(
        perplexity=float(np.exp(nll)),
        nll=nll,
        kl=None if teacher is None else kl,
        top1_agreement=None if teacher is None else same,
        bits_per_weight=tree.bits_per_weight(params),
        bytes=sum(tree.weight_bits(leaf) for _, leaf in tree.leaves_with_paths(params)) // 8,
        positions=positions,
    )


@partial(jax.jit, static_argnums=(0, 1))
def position_sums(
    config: ModelConfig,
    teacher_config: ModelConfig | None,
    student: tuple[Any, Any],
    teacher: tuple[Any, Any] | None,
    tokens: jax.Array,
) -> jax.Array:
    """Sums of (nll, KL, agreement) over predicted positions, float32 [3].

    `student` and `teacher` are (output head, hidden states [B, L, D]). The heads run on
    `_POSITIONS` positions at a time, so that [B, L, V] never exists.
    """
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    size = min(_POSITIONS, count)
    padded = -(-count // size) * size

    def chunks(x: jax.Array) -> jax.Array:
        flat = x.reshape(count, *x.shape[2:])
        flat = jnp.pad(flat, [(0, padded - count)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(-1, size, *flat.shape[1:])

    def one(chunk: tuple[Any, ...]) -> jax.Array:
        real, target, states, *expected = chunk
        ours = logits(config, student[0], states)
        log_q = jax.nn.log_softmax(ours)
        nll = -jnp.take_along_axis(log_q, target[:, None], axis=1)[:, 0]
        kl = same = jnp.zeros_like(nll)
        if teacher is not None and teacher_config is not None:
            theirs = logits(teacher_config, teacher[0], expected[0])
            log_p = jax.nn.log_softmax(theirs)
            kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
            # Of logits, as the sampler chooses: the softmax's subtraction can round two to a tie.
            same = (jnp.argmax(theirs, axis=-1) == jnp.argmax(ours, axis=-1)).astype(jnp.float32)
        return jnp.sum(jnp.where(real[None], jnp.stack([nll, kl, same]), 0.0), axis=1)

    real = (jnp.arange(padded) < count).reshape(-1, size)
    inputs = [tokens[:, 1:], student[1][:, :-1]] + ([teacher[1][:, :-1]] if teacher else [])
    return jnp.sum(jax.lax.map(one, (real, *map(chunks, inputs))), axis=0)


def _teacher(
    config: ModelConfig, reference: Any, tokens: Sequence[jax.Array]
) -> tuple[tuple[ModelConfig, Any] | None, tuple[np.ndarray, ...]]:
    """((config, params) of the reference or None, its hidden states where they are known)."""
    if not isinstance(reference, Reference):
        return (None if reference is None else (config, reference)), ()
    same = len(reference.batches) == len(tokens) and all(
        np.array_equal(a, on_host(b)) for a, b in zip(reference.batches, tokens, strict=True)
    )
    if not same:
        raise UserError("the reference was run on other batches; run reference() on these")
    if reference.config.vocab_size != config.vocab_size:
        raise UserError(
            f"the reference has {reference.config.vocab_size} tokens in its vocabulary, the model "
            f"{config.vocab_size}; compare models that share a tokenizer"
        )
    return (reference.config, reference.params), reference.hidden


def _checked(config: ModelConfig, batches: Iterable[Any]) -> list[jax.Array]:
    tokens = token_arrays(config, batches, shortest=2)
    if not tokens:
        raise UserError("there is nothing to evaluate on: no batches were given")
    return tokens
