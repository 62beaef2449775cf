"""EAGLE-3: a head of one layer, which reads what the model thought of the text so far.

Of each token t the model's residual stream is taken behind three of its layers, early, middle and
late. With the embedding e of the token behind it

    g_t = W_fc [f_low; f_mid; f_high]
    z_t = [norm(e_{t+1}); norm(a_t)]                       a_t = g_t, or the head's own x_{t-1}
    x_t = a_t + attention(z_0..z_t);   x_t <- x_t + mlp(norm(x_t))

the head's output norm(x_t) says token t + 2, in a vocabulary of its own, the most frequent tokens.
Where the model has not been, x_t stands for the features of the next place. Reference: Li et al.
2025, arXiv:2503.01840.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxopt_models.errors import UserError
from jaxopt_models.models.block import attention, feed_forward
from jaxopt_models.models.cache import KVCache, LayerCache, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import embed_tokens, logits, positions_of
from jaxopt_models.models.tree_attention import Branches
from jaxopt_models.ops import embed, linear
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Seen, Target
from jaxopt_models.speculative.tree import Guess
from kernels_pallas import rms_norm


@struct.dataclass
class Eagle3:
    """A drafter that is such a head.

    Attributes:
      config: of the head; its vocabulary is the head's own.
      params: {fc: {weight [D, 3 D]}, layers: ({input_layernorm, hidden_norm, self_attn,
        post_attention_layernorm, mlp},), norm, lm_head, vocabulary int32 [V]}: which of the model's
        tokens each of the head's is; attention reads 2 D. With embed_tokens: an embedding of its
        own. Leaves may be of any kind.
      layers: of the model, whose streams are read.
      count: tokens of a guess.
      norm_before_residual: whether the attention is added to norm(a) in place of a.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False, default=5)
    norm_before_residual: bool = struct.field(pytree_node=False, default=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count must be at least 1; it is {self.count}")

    @property
    def depth(self) -> int:
        return self.count

    def check(self, config: ModelConfig) -> None:
        """Raises UserError unless the model has the layers and the width that the head reads."""
        if not all(0 <= i < config.num_layers for i in self.layers):
            raise UserError(
                f"the draft head reads layers {list(self.layers)}, and the model has "
                f"{config.num_layers}; it was made for another model"
            )
        reads = self.params["fc"]["weight"].shape[-1]
        if reads != len(self.layers) * config.hidden_size:
            raise UserError(
                f"the draft head reads {reads} features, and {len(self.layers)} layers of the "
                f"model have {len(self.layers) * config.hidden_size}; it was made for another model"
            )

    def begin(
        self,
        target: Target,
        prompts: jax.Array,
        lengths: jax.Array,
        features: jax.Array,
        capacity: int,
    ) -> KVCache:
        """Its cache, with all of the prompts but their last tokens."""
        (cache,) = empty_cache(self.config, self.params, prompts.shape[0], capacity)
        behind, places = jnp.roll(prompts, -1, axis=1), positions_of(prompts)
        embedded = embeddings(self, target, behind)
        return (cached_layer(self, fused(self, features), embedded, places, cache)[1],)

    def propose(
        self, target: Target, state: KVCache, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, KVCache]:
        """See `Drafter`. What stood for features of tokens that are committed by now is replaced by
        the features."""
        x, cache = caught_up(self, target, state, seen)
        place = (seen.length - 1)[:, None]  # of the next index
        said = head_logits(self, x)
        first = choose(self, target, sampler, said, place + 1)

        def step(carry: tuple[jax.Array, jax.Array, LayerCache], ahead: jax.Array) -> Any:
            x, token, cache = carry
            at = place + ahead
            x, cache = cached_layer(self, x, embeddings(self, target, token), at, cache)
            said = head_logits(self, x)
            chosen = choose(self, target, sampler, said, at + 2)
            return (x, chosen, cache), (chosen[:, 0], said[:, 0])

        ahead = jnp.arange(self.count - 1, dtype=jnp.int32)
        (_, _, cache), (more, behind) = lax.scan(step, (x, first, cache), ahead)
        said = jnp.concatenate([said, jnp.swapaxes(behind, 0, 1)], axis=1)
        tokens = jnp.concatenate([first, more.T], axis=1)
        return Guess(tokens, logits=in_the_model_s(self, target, said)), (cache,)

    @property
    def vocabulary(self) -> jax.Array:
        """See `growth.Grower`."""
        return self.params["vocabulary"]

    @property
    def reach(self) -> None:
        """See `growth.Grower`."""

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
                embedded = embeddings(self, target, self.vocabulary[token])
                branch = branch.continued(self, level, embedded, above, seen.length - 1)
            places = jnp.broadcast_to((seen.length + level)[:, None], branch.x.shape[:2])
            own = scores(self, target, sampler, head_logits(self, branch.x), places)
            return jax.nn.log_softmax(own, axis=-1)

        return continued, (cache,)


class _Branch(NamedTuple):
    """Nodes of a level: x [B, n, D], the cache with all levels until now, and which of their nodes
    each sees, bool [B, n, M]."""

    x: jax.Array
    cache: LayerCache
    seen: jax.Array

    def continued(
        self, head: Eagle3, level: int, embedded: jax.Array, above: jax.Array, first: jax.Array
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


# What the head computes


def fused(head: Eagle3, features: jax.Array) -> jax.Array:
    """Features [B, T, F] -> [B, T, D]."""
    return linear(features.astype(head.config.dtype), head.params["fc"]["weight"])


def embeddings(head: Eagle3, target: Target, tokens: jax.Array) -> jax.Array:
    """Of tokens int32 [B, T], the head's own or the model's: [B, T, D]."""
    if "embed_tokens" in head.params:
        return embed(tokens, head.params["embed_tokens"]["weight"], head.config.dtype)
    return embed_tokens(target.config, target.params, tokens).astype(head.config.dtype)


def head_layer(head: Eagle3, hidden: jax.Array, embedded: jax.Array, attend: Any) -> jax.Array:
    """x of a and e [B, T, D], where `attend` maps z [B, T, 2 D] to what is added."""
    (layer,), config = head.params["layers"], head.config
    normed = _norm(config, layer["hidden_norm"], hidden)
    z = jnp.concatenate([_norm(config, layer["input_layernorm"], embedded), normed], axis=-1)
    x = (normed if head.norm_before_residual else hidden) + attend(z)
    after = _norm(config, layer["post_attention_layernorm"], x)
    return x + feed_forward(config, layer["mlp"], after)


def cached_layer(
    head: Eagle3,
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

    return head_layer(head, hidden, embedded, attend), after


def head_logits(head: Eagle3, x: jax.Array) -> jax.Array:
    """float32 [B, T, V] in the head's own vocabulary."""
    return logits(head.config, head.params, _norm(head.config, head.params["norm"], x))


def caught_up(
    head: Eagle3, target: Target, state: KVCache, seen: Seen
) -> tuple[jax.Array, LayerCache]:
    """(x [B, 1, D] of the last token but one, from which the next is guessed; cache)."""
    (cache,), width = state, seen.features.shape[1]
    first = seen.length - seen.count - 1
    places = first[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    behind = jnp.take_along_axis(seen.tokens, places + 1, axis=1, mode="clip")
    embedded = embeddings(head, target, behind)
    x, cache = cached_layer(head, fused(head, seen.features), embedded, places, cache)
    return jnp.take_along_axis(x, (seen.count - 1)[:, None, None], axis=1), cache


def in_the_model_s(head: Eagle3, target: Target, said: jax.Array) -> jax.Array:
    """Logits [B, T, V] of the head's vocabulary, among those of the model's; -inf of the rest."""
    wide = jnp.full((*said.shape[:2], target.config.vocab_size), -jnp.inf)
    return wide.at[:, :, head.vocabulary].set(said)


def scores(
    head: Eagle3, target: Target, sampler: Sampler, said: jax.Array, positions: jax.Array
) -> jax.Array:
    """What is largest of the token that the head would choose, float32 [B, T, V] for logits of as
    many, of its own vocabulary: with the noise of the model's tokens, that both may take the
    same."""
    if not sampler.stochastic:
        return said
    return sampler.scores(in_the_model_s(head, target, said), positions)[:, :, head.vocabulary]


def choose(
    head: Eagle3, target: Target, sampler: Sampler, said: jax.Array, positions: jax.Array
) -> jax.Array:
    """The model's tokens int32 [B, T] that the head takes at these positions, by its logits."""
    best = jnp.argmax(scores(head, target, sampler, said, positions), axis=-1)
    return head.vocabulary[best]


def _norm(config: ModelConfig, module: Any, x: jax.Array) -> jax.Array:
    return rms_norm(x, module["weight"], config.rms_norm_eps)
