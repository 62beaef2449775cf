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
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import hidden_states, logits

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

    params: Any
    batches: tuple[np.ndarray, ...]
    hidden: tuple[np.ndarray, ...]


def reference(config: ModelConfig, params: Any, batches: Iterable[jax.Array]) -> Reference:
    """Runs the reference model once; the result goes into `evaluate(..., reference=...)`."""
    tokens = _checked(config, batches)
    hidden = tuple(np.asarray(hidden_states(config, params, batch)) for batch in tokens)
    return Reference(params, tuple(np.asarray(batch) for batch in tokens), hidden)


def evaluate(
    config: ModelConfig,
    params: Any,
    batches: Iterable[jax.Array],
    reference: Any = None,
) -> Metrics:
    """Measures a model on token batches, against a reference model if one is given.

    Args:
      config: architecture of both models.
      params: the model; leaves may be of any kind.
      batches: int32 [B, L] arrays, L at least 2; see `data.windows` for the protocol.
      reference: parameters of the original model, or `reference(config, params, batches)` of them.

    Returns:
      `Metrics`.

    Raises:
      UserError: without batches, for token ids outside the vocabulary, for a `Reference` that was
        made of other batches, or when logits are not finite.
    """
    tokens = _checked(config, batches)
    known = _known_hidden(reference, tokens)
    teacher = reference.params if isinstance(reference, Reference) else reference
    totals = np.zeros(3, np.float64)
    for i, batch in enumerate(tokens):
        hidden = hidden_states(config, params, batch)
        if teacher is None:
            sums = _sums(config, params, hidden, None, None, batch)
        else:
            expected = known[i] if known else hidden_states(config, teacher, batch)
            sums = _sums(config, params, hidden, teacher, expected, batch)
        totals += np.asarray(sums, np.float64)
    positions = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in tokens)
    nll, kl, same = (float(total) / positions for total in totals)
    if not np.isfinite(nll):
        raise UserError(
            "the model's logits are not finite on this text; look for NaN in its weights"
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


def _sums(
    config: ModelConfig, params: Any, hidden: Any, teacher: Any, expected: Any, tokens: Any
) -> jax.Array:
    head = _head(params)
    other = None if teacher is None else _head(teacher)
    return _head_sums(config, head, hidden, other, expected, tokens)


@partial(jax.jit, static_argnums=0)
def _head_sums(
    config: ModelConfig, head: Any, hidden: Any, teacher: Any, expected: Any, tokens: Any
) -> jax.Array:
    """Sums of (nll, KL, agreement) over predicted positions: float32 [3].

    The head runs on `_POSITIONS` positions at a time, so that [B, L, V] never exists.
    """
    width = hidden.shape[-1]
    inputs = [hidden[:, :-1].reshape(-1, width), tokens[:, 1:].reshape(-1)]
    if teacher is not None:
        inputs.append(expected[:, :-1].reshape(-1, width))
    count = inputs[1].shape[0]
    size = min(_POSITIONS, count)
    padded = -(-count // size) * size

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padded - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    def one(chunk: tuple[Any, ...]) -> jax.Array:
        real, states, target, *rest = chunk
        log_q = jax.nn.log_softmax(logits(config, head, states))
        nll = -jnp.take_along_axis(log_q, target[:, None], axis=1)[:, 0]
        if teacher is None:
            return jnp.stack([jnp.sum(jnp.where(real, nll, 0.0)), jnp.float32(0), jnp.float32(0)])
        log_p = jax.nn.log_softmax(logits(config, teacher, rest[0]))
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        same = (jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)).astype(jnp.float32)
        return jnp.sum(jnp.where(real, jnp.stack([nll, kl, same]), 0.0), axis=1)

    real = (jnp.arange(padded) < count).reshape(-1, size)
    return jnp.sum(jax.lax.map(one, (real, *(chunks(x) for x in inputs))), axis=0)


def _head(params: Any) -> dict[str, Any]:
    """The parameters that `logits` reads."""
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {name: params[name]}


def _known_hidden(reference: Any, tokens: Sequence[jax.Array]) -> tuple[np.ndarray, ...] | None:
    if not isinstance(reference, Reference):
        return None
    same = len(reference.batches) == len(tokens) and all(
        np.array_equal(a, np.asarray(b)) for a, b in zip(reference.batches, tokens, strict=True)
    )
    if not same:
        raise UserError("the reference was run on other batches; run reference() on these")
    return reference.hidden


def _checked(config: ModelConfig, batches: Iterable[jax.Array]) -> list[jax.Array]:
    tokens = [jnp.asarray(batch, jnp.int32) for batch in batches]
    if not tokens:
        raise UserError("there is nothing to evaluate on: no batches were given")
    for batch in tokens:
        if batch.ndim != 2 or batch.shape[1] < 2:
            raise UserError(f"a batch must be [B, L] with L >= 2; one has shape {batch.shape}")
        if int(jnp.min(batch)) < 0 or int(jnp.max(batch)) >= config.vocab_size:
            raise UserError(
                f"a batch holds token ids outside the vocabulary of {config.vocab_size}; "
                "tokenize with the model's own tokenizer"
            )
    return tokens
