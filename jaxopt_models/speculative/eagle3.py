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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxopt_models.errors import UserError
from jaxopt_models.models.block import attention, feed_forward
from jaxopt_models.models.cache import KVCache, LayerCache, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import (
    abstract_params,
    embed_tokens,
    init,
    logits,
    output_head,
    positions_of,
)
from jaxopt_models.models.tree_attention import Branches
from jaxopt_models.ops import effective_weight, embed, linear
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
        first = choose(self, target, sampler, x, place + 1)

        def step(carry: tuple[jax.Array, jax.Array, LayerCache], ahead: jax.Array) -> Any:
            x, token, cache = carry
            at = place + ahead
            x, cache = cached_layer(self, x, embeddings(self, target, token), at, cache)
            chosen = choose(self, target, sampler, x, at + 2)
            return (x, chosen, cache), chosen[:, 0]

        ahead = jnp.arange(self.count - 1, dtype=jnp.int32)
        (_, _, cache), more = lax.scan(step, (x, first, cache), ahead)
        return Guess(jnp.concatenate([first, more.T], axis=1)), (cache,)


def init_eagle3(
    target: Target,
    key: jax.Array,
    *,
    layers: Sequence[int] | None = None,
    vocabulary: jax.Array | None = None,
    intermediate_size: int | None = None,
    count: int = 5,
) -> Eagle3:
    """A head to be trained; its output is the model's, its other weights are random.

    Args:
      target: the model.
      key: random key.
      layers: of the model; None is one early, one in the middle, one late.
      vocabulary: int32 [V], rising, the tokens that it may say; None is all.
      intermediate_size: of its feed-forward network; None is the model's.
      count: tokens of a guess.
    """
    config = target.config
    vocabulary = jnp.arange(config.vocab_size) if vocabulary is None else jnp.asarray(vocabulary)
    own = _own_config(config, len(vocabulary), intermediate_size)
    chosen = default_layers(config.num_layers) if layers is None else tuple(layers)
    start = init(own, key, jnp.float32)
    (layer,) = start["layers"]
    width = own.hidden_size
    keys = iter(jax.random.split(key, 4))

    def drawn(rows: int, columns: int) -> dict[str, jax.Array]:
        values = jax.random.normal(next(keys), (rows, columns), jnp.float32)
        return {"weight": values * columns**-0.5}

    projections = {
        name: drawn(layer["self_attn"][name]["weight"].shape[0], 2 * width)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    layer = layer | {
        "hidden_norm": {"weight": jnp.ones(width, jnp.float32)},
        "self_attn": layer["self_attn"] | projections,
    }
    norm = target.params["norm"]["weight"].astype(jnp.float32)
    params = {
        "fc": drawn(width, len(chosen) * config.hidden_size),
        "layers": (layer,),
        "norm": {"weight": 1.0 + norm if config.unit_offset_norm else norm},
        "lm_head": {"weight": head_rows(target, vocabulary, jnp.float32)},
        "vocabulary": vocabulary.astype(jnp.int32),
    }
    return Eagle3(own, params, chosen, count)


def default_layers(count: int) -> tuple[int, ...]:
    """Layers of a model of so many that are read: 1, n / 2 - 1 and n - 4, where there are as
    many."""
    return tuple(min(max(i, 0), count - 1) for i in (1, count // 2 - 1, count - 4))


def head_rows(target: Target, vocabulary: jax.Array, dtype: Any) -> jax.Array:
    """Of the model's output head, [V, D], those of some tokens."""
    (head,) = output_head(target.params).values()
    weight = head["weight"]
    rows = weight if isinstance(weight, jax.Array) else effective_weight(weight)
    return rows[vocabulary].astype(dtype)


def _own_config(config: ModelConfig, tokens: int, intermediate_size: int | None) -> ModelConfig:
    fields = {
        "model_type": "llama",
        "vocab_size": tokens,
        "hidden_size": config.hidden_size,
        "intermediate_size": intermediate_size or config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": False,
    }
    return replace(ModelConfig.from_hf(fields), dtype=config.dtype)


def abstract_eagle3(config: ModelConfig, features: int, dtype: Any) -> Any:
    """Shapes of a head's parameters, but for what it may lack, as `jax.ShapeDtypeStruct`.

    Args:
      config: of the head.
      features: numbers of a token that it reads.
    """
    whole = abstract_params(config, dtype)
    (layer,) = whole["layers"]

    def array(*shape: int) -> dict[str, Any]:
        return {"weight": jax.ShapeDtypeStruct(shape, dtype)}

    attention = {
        name: array(module["weight"].shape[0], 2 * config.hidden_size)
        for name, module in layer["self_attn"].items()
        if name != "o_proj"
    } | {"o_proj": layer["self_attn"]["o_proj"]}
    layer = layer | {"self_attn": attention, "hidden_norm": array(config.hidden_size)}
    return {
        "fc": array(config.hidden_size, features),
        "layers": (layer,),
        "norm": whole["norm"],
        "lm_head": whole["lm_head"],
        "vocabulary": jax.ShapeDtypeStruct((config.vocab_size,), jnp.int32),
    }


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


def scores(
    head: Eagle3, target: Target, sampler: Sampler, x: jax.Array, positions: jax.Array
) -> jax.Array:
    """What is largest of the token that the head would choose, float32 [B, T, V], of its own
    vocabulary: with the noise of the model's tokens, that both may take the same."""
    own = head_logits(head, x)
    if not sampler.stochastic:
        return own
    vocabulary = head.params["vocabulary"]
    wide = jnp.full((*own.shape[:2], target.config.vocab_size), -jnp.inf)
    return sampler.scores(wide.at[:, :, vocabulary].set(own), positions)[:, :, vocabulary]


def choose(
    head: Eagle3, target: Target, sampler: Sampler, x: jax.Array, positions: jax.Array
) -> jax.Array:
    """The model's tokens int32 [B, T] that the head would say at these positions."""
    best = jnp.argmax(scores(head, target, sampler, x, positions), axis=-1)
    return head.params["vocabulary"][best]


def _norm(config: ModelConfig, module: Any, x: jax.Array) -> jax.Array:
    return rms_norm(x, module["weight"], config.rms_norm_eps)
