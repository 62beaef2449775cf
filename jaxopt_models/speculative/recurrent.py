"""Heads of one layer that run on their own output: what EAGLE-3 and MTP have in common.

At index t a head reads the token t + 1 and a state, and says token t + 2:

    x_t = layer(e_{t+1}, h_t, what the layer kept of e_1, h_0, …, e_t, h_{t-1})
    h_t = fused(what the model thought of token t), or x_{t-1} where the model has not been

Only layer, fused and the output differ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_models.errors import UserError
from jaxopt_models.models import transformer
from jaxopt_models.models.block import attention
from jaxopt_models.models.cache import KVCache, LayerCache, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import embed_tokens, positions_of
from jaxopt_models.models.tree_attention import Branches
from jaxopt_models.ops import embed
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Prompted, Seen, Target
from jaxopt_models.speculative.tree import Guess


class RecurrentHead:
    """A drafter that is such a head, but for what a subclass says.

    Attributes:
      config: of its layer, and of its output if that is its own.
      params: with layers, ({self_attn, …},). With embed_tokens: an embedding of its own.
      layers: of the model, whose streams it reads.
      count: tokens of a guess.
    """

    config: Any
    params: Any
    layers: Any
    count: Any

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count must be at least 1; it is {self.count}")

    # What a subclass says

    @property
    def vocabulary(self) -> jax.Array | None:
        """int32 [V], rising, which of the model's tokens it may say; None is all."""
        raise NotImplementedError

    def fused(self, features: jax.Array) -> jax.Array:
        """States [B, T, D] of features [B, T, F]."""
        raise NotImplementedError

    def layer(
        self, hidden: jax.Array, embedded: jax.Array, attend: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """x [B, T, D] of h and e [B, T, D], where `attend` maps what attention reads to what it
        says."""
        raise NotImplementedError

    def output(self, target: Target) -> tuple[ModelConfig, Any]:
        """Of `transformer.logits`: the configuration and parameters of the output."""
        raise NotImplementedError

    def states(self, x: jax.Array) -> jax.Array:
        """What the output reads of x [B, T, D]."""
        raise NotImplementedError

    # What all do

    @property
    def depth(self) -> int:
        return self.count

    @property
    def reach(self) -> None:
        """See `growth.Grower`."""

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> KVCache:
        """Its cache, with all of the prompts but their last tokens."""
        tokens = prompts.tokens
        (cache,) = empty_cache(self.config, self.params, len(tokens), capacity)
        behind, places = jnp.roll(tokens, -1, axis=1), positions_of(tokens)
        embedded = embeddings(self, target, behind)
        states = self.fused(prompts.features)
        return (cached_layer(self, states, embedded, places, cache)[1],)

    def propose(
        self, target: Target, state: KVCache, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, KVCache]:
        """See `Drafter`. What stood for features of tokens that are committed by now is replaced by
        the features."""
        x, cache = caught_up(self, target, state, seen)
        place = (seen.length - 1)[:, None]  # of the next index
        said = self.logits(target, x)
        first = choose(self, target, sampler, said, place + 1)

        def step(carry: tuple[jax.Array, jax.Array, LayerCache], ahead: jax.Array) -> Any:
            x, token, cache = carry
            at = place + ahead
            x, cache = cached_layer(self, x, embeddings(self, target, token), at, cache)
            said = self.logits(target, x)
            chosen = choose(self, target, sampler, said, at + 2)
            return (x, chosen, cache), (chosen[:, 0], said[:, 0])

        ahead = jnp.arange(self.count - 1, dtype=jnp.int32)
        (_, _, cache), (more, behind) = lax.scan(step, (x, first, cache), ahead)
        said = jnp.concatenate([said, jnp.swapaxes(behind, 0, 1)], axis=1)
        tokens = jnp.concatenate([first, more.T], axis=1)
        return Guess(tokens, logits=model_logits(self, target, said)), (cache,)

    def grower(
        self, target: Target, state: KVCache, seen: Seen, sampler: Sampler
    ) -> tuple[Any, KVCache]:
        """See `growth.Grower`. What a tree writes to the cache lies behind the text, where the next
        pass writes before it reads."""
        x, cache = caught_up(self, target, state, seen)
        branch = _Branch(x, cache, jnp.zeros((len(seen.length), 1, 0), bool))

        def continued(level: int, token: jax.Array | None, above: jax.Array | None) -> jax.Array:
            nonlocal branch
            if token is not None and above is not None:
                embedded = embeddings(self, target, model_tokens(self, token))
                branch = branch.continued(self, level, embedded, above, seen.length - 1)
            places = jnp.broadcast_to((seen.length + level)[:, None], branch.x.shape[:2])
            own = scores(self, target, sampler, self.logits(target, branch.x), places)
            return jax.nn.log_softmax(own, axis=-1)

        return continued, (cache,)

    def logits(self, target: Target, x: jax.Array) -> jax.Array:
        """float32 [B, T, V] in the head's own vocabulary."""
        config, params = self.output(target)
        return transformer.logits(config, params, self.states(x))


class _Branch(NamedTuple):
    """Nodes of a level: x [B, n, D], the cache with all levels until now, and which of their nodes
    each sees, bool [B, n, M]."""

    x: jax.Array
    cache: LayerCache
    seen: jax.Array

    def continued(
        self,
        head: RecurrentHead,
        level: int,
        embedded: jax.Array,
        above: jax.Array,
        first: jax.Array,
    ) -> "_Branch":
        """The next level: embeddings [B, n, D], and int32 [B, n], of which node each is a child.
        The tree begins at slot `first`, int32 [B]."""
        batch, count = above.shape
        own = jnp.broadcast_to(jnp.eye(count, dtype=bool), (batch, count, count))
        before = jnp.take_along_axis(self.seen, above[:, :, None], axis=1)
        seen = jnp.concatenate([before, own], axis=2)
        depth = jnp.repeat(jnp.arange(level, dtype=jnp.int32), count)
        branches = Branches(first, jnp.broadcast_to(depth, (batch, level * count)), seen)
        hidden = jnp.take_along_axis(self.x, above[:, :, None], axis=1)
        places = branches.positions
        return _Branch(*cached_layer(head, hidden, embedded, places, self.cache, branches), seen)


def embeddings(head: RecurrentHead, target: Target, tokens: jax.Array) -> jax.Array:
    """Of tokens int32 [B, T], the head's own or the model's: [B, T, D]."""
    if "embed_tokens" in head.params:
        return embed(tokens, head.params["embed_tokens"]["weight"], head.config.dtype)
    return embed_tokens(target.config, target.params, tokens).astype(head.config.dtype)


def cached_layer(
    head: RecurrentHead,
    hidden: jax.Array,
    embedded: jax.Array,
    positions: jax.Array,
    cache: LayerCache,
    branches: Branches | None = None,
) -> tuple[jax.Array, LayerCache]:
    """(x, cache) at positions int32 [B, T] behind what a cache holds."""
    (layer,), after = head.params["layers"], cache

    def attend(z: jax.Array) -> jax.Array:
        nonlocal after
        kind, weights = head.config.attention_kinds[0], layer["self_attn"]
        mixed, found = attention(head.config, weights, z, positions, cache, kind, branches=branches)
        assert found is not None
        after = found
        return mixed

    return head.layer(hidden, embedded, attend), after


def caught_up(
    head: RecurrentHead, target: Target, state: KVCache, seen: Seen
) -> tuple[jax.Array, LayerCache]:
    """(x [B, 1, D] of the last token but one, from which the next is guessed; cache)."""
    (cache,), width = state, seen.features.shape[1]
    first = seen.length - seen.count - 1
    places = first[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    behind = jnp.take_along_axis(seen.tokens, places + 1, axis=1, mode="clip")
    embedded = embeddings(head, target, behind)
    x, cache = cached_layer(head, head.fused(seen.features), embedded, places, cache)
    return jnp.take_along_axis(x, (seen.count - 1)[:, None, None], axis=1), cache


# Vocabularies


def model_tokens(head: RecurrentHead, tokens: jax.Array) -> jax.Array:
    """Of tokens of the head's vocabulary, those of the model's."""
    return tokens if head.vocabulary is None else head.vocabulary[tokens]


def model_logits(head: RecurrentHead, target: Target, said: jax.Array) -> jax.Array:
    """Logits [B, T, V] of the head's vocabulary, among those of the model's; -inf of the rest."""
    if head.vocabulary is None:
        return said
    wide = jnp.full((*said.shape[:2], target.config.vocab_size), -jnp.inf)
    return wide.at[:, :, head.vocabulary].set(said)


def scores(
    head: RecurrentHead, target: Target, sampler: Sampler, said: jax.Array, positions: jax.Array
) -> jax.Array:
    """What is largest of the token that the head would choose, float32 [B, T, V] for logits of as
    many, of its own vocabulary: with the noise of the model's tokens, that both may take the
    same."""
    if not sampler.stochastic:
        return said
    wide = sampler.scores(model_logits(head, target, said), positions)
    return wide if head.vocabulary is None else wide[:, :, head.vocabulary]


def choose(
    head: RecurrentHead, target: Target, sampler: Sampler, said: jax.Array, positions: jax.Array
) -> jax.Array:
    """The model's tokens int32 [B, T] that the head takes at these positions, by its logits."""
    best = jnp.argmax(scores(head, target, sampler, said, positions), axis=-1)
    return model_tokens(head, best.astype(jnp.int32))
