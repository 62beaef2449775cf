"""Choosing the next token: greedy, temperature, top-k, top-p, with noise that belongs to a place.

The noise of a token depends on (request, absolute position) alone, by the Gumbel-max identity
`argmax(logits / T + g) ~ softmax(logits / T)`. A request therefore gets the same tokens alone or in
any batch, in one step or after a rejected draft. References: Gumbel 1954; arXiv:2408.07978.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError


@struct.dataclass
class Sampler:
    """How tokens are chosen, an entry for each row.

    Attributes:
      temperature: float32 [B]; 0 is greedy.
      top_k: int32 [B]; keep the k most likely, 0 keeps all.
      top_p: float32 [B]; keep the most likely tokens up to this probability, 1 keeps all.
      request: int32 [B], identity of each request, which its noise is keyed by.
      key: the random key that all rows share.
      stochastic, filtered: whether any row samples, or filters; static, they leave out dead work.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    request: jax.Array
    key: jax.Array
    stochastic: bool = struct.field(pytree_node=False)
    filtered: bool = struct.field(pytree_node=False)

    def __call__(self, logits: jax.Array, positions: jax.Array) -> jax.Array:
        """Tokens int32 [B, N] for float32 logits [B, N, V]; `positions` [B, N] are the tokens'
        own."""
        return jnp.argmax(self.scores(logits, positions), axis=-1).astype(jnp.int32)

    def scores(self, logits: jax.Array, positions: jax.Array) -> jax.Array:
        """What is largest of the token that is chosen, float32 [B, N, V]: the logits of a greedy
        row, else `logits / T + noise`, -inf where a token is filtered out."""
        if not self.stochastic:
            return logits
        noise = position_noise(self.key, self.request, positions, logits.shape[-1])
        greedy = self.temperature[:, None, None] == 0
        return jnp.where(greedy, logits, self._processed(logits) + noise)

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """What tokens are drawn from, float32 [B, N, V]; all on the largest logit in a greedy
        row."""
        best = jnp.argmax(logits, axis=-1)
        chosen = jax.nn.one_hot(best, logits.shape[-1], dtype=logits.dtype)
        if not self.stochastic:
            return chosen
        greedy = self.temperature[:, None, None] == 0
        return jnp.where(greedy, chosen, jax.nn.softmax(self._processed(logits), axis=-1))

    def _processed(self, logits: jax.Array) -> jax.Array:
        """Divided by the temperature, -inf where a token is filtered out."""
        temperature = self.temperature[:, None, None]
        scaled = logits / jnp.where(temperature == 0, 1.0, temperature)
        if not self.filtered:
            return scaled
        return keep_most_likely(scaled, self.top_k[:, None], self.top_p[:, None])


@dataclass(frozen=True)
class _Range:
    name: str
    low: float
    high: float
    meaning: str
    whole: bool = False

    def allows(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.whole and value % 1)


_RANGES = (
    _Range("temperature", 0.0, float("inf"), "0 (greedy) or positive"),
    _Range("top_k", 0, 2**31 - 1, "0 (off) or a positive integer", whole=True),
    _Range("top_p", 1e-9, 1.0, "in (0, 1], 1 is off"),
)


def make_sampler(
    batch: int,
    *,
    temperature: float | list[float] = 0.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    key: jax.Array | None = None,
    request_ids: list[int] | None = None,
) -> Sampler:
    """A sampler of one setting for all rows, or one for each.

    Args:
      batch: number of rows.
      temperature, top_k, top_p: a number, or a list of `batch` numbers.
      key: random key; None is `jax.random.key(0)`.
      request_ids: identity of each row, 0, 1, … by default.

    Raises:
      UserError: for a value outside its range or a list of another length.
    """
    rows = {}
    for rule, value in zip(_RANGES, (temperature, top_k, top_p), strict=True):
        values = value if isinstance(value, list) else [value] * batch
        if len(values) != batch or not all(rule.allows(v) for v in values):
            raise UserError(
                f"{rule.name} must be {rule.meaning}, one number or one for each of the {batch} "
                f"prompts; it is {value}"
            )
        rows[rule.name] = values
    requests = list(range(batch)) if request_ids is None else request_ids
    if len(requests) != batch:
        raise UserError(f"request_ids must have an entry for each of the {batch} prompts")
    return Sampler(
        temperature=jnp.asarray(rows["temperature"], jnp.float32),
        top_k=jnp.asarray(rows["top_k"], jnp.int32),
        top_p=jnp.asarray(rows["top_p"], jnp.float32),
        request=jnp.asarray(requests, jnp.int32),
        key=jax.random.key(0) if key is None else key,
        stochastic=any(t > 0 for t in rows["temperature"]),
        filtered=any(k > 0 for k in rows["top_k"]) or any(p < 1 for p in rows["top_p"]),
    )


def position_noise(
    key: jax.Array, request: jax.Array, positions: jax.Array, vocabulary: int
) -> jax.Array:
    """Standard Gumbel noise of each token of each place.

    Args:
      request: int32 [B].
      positions: int32 [B, N].

    Returns:
      float32 [B, N, vocabulary]; entry [b, n] depends on request[b] and positions[b, n] only.
    """
    return _at_each(
        lambda own: jax.random.gumbel(own, (vocabulary,), jnp.float32), key, request, positions
    )


def position_uniform(key: jax.Array, request: jax.Array, positions: jax.Array) -> jax.Array:
    """A number in [0, 1) for each place, float32 [B, N]; see `position_noise`."""
    return _at_each(lambda own: jax.random.uniform(own, (), jnp.float32), key, request, positions)


def _at_each(
    draw: Callable[[jax.Array], jax.Array], key: jax.Array, request: jax.Array, positions: jax.Array
) -> jax.Array:
    """What is drawn with the key of each request and place: [B, N, …]."""

    def row(request_id: jax.Array, places: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, request_id)
        return jax.vmap(lambda place: draw(jax.random.fold_in(own, place)))(places)

    return jax.vmap(row)(request, positions)


def keep_most_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Masks unlikely tokens with -inf: first all but the `top_k` largest, then the tail past
    `top_p`.

    Of the tokens in falling order, top-p keeps those before which less than p has accumulated, so
    at least one. Tokens equal to the last one kept are kept too.

    Args:
      logits: float32 [B, N, V].
      top_k: int32 [B, 1], 0 is off.
      top_p: float32 [B, 1], 1 is off.
    """
    falling = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1]).reshape(1, 1, -1)
    limit = jnp.where(top_k == 0, logits.shape[-1], top_k)[..., None]
    falling = jnp.where(rank < limit, falling, -jnp.inf)
    probability = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (rank < limit) & ((before < top_p[..., None]) | (top_p[..., None] >= 1.0))
    least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
