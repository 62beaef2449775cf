"""DFlash: a head that fills in a whole block of tokens at once, as a diffusion model does.

Of each token u the model's residual stream is taken behind some of its layers. Of n places of a
block the first is the last token of the text, the anchor; the others hold a mask, and say what
stands there:

    c_u = norm(W_fc [f_1; …; f_L])                             of tokens before the anchor
    x   = [e_anchor, e_mask, …, e_mask]                        the model's own embedding
    x <- x + attention(q(norm x); k, v([c_0..c_{t-1}; norm x]));   x <- x + mlp(norm x)

Every place sees the text before the anchor and the whole block, behind it as well as before it. The
model's output head reads norm(x) at places 1..n-1, so n - 1 tokens take one pass of the head. None
of them knows what the others say. Reference: Chen et al. 2026, arXiv:2602.06036.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.models.attention import cached_attend, rotate
from jaxopt_models.models.block import feed_forward
from jaxopt_models.models.cache import KVCache, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import embed_tokens, logits, positions_of
from jaxopt_models.ops import linear
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Prompted, Seen, Target, check_layers
from jaxopt_models.speculative.tree import Guess
from kernels_pallas import rms_norm


@struct.dataclass
class DFlash:
    """A drafter that is such a head.

    Attributes:
      config: of the head, whose layers are Qwen3's; its vocabulary and width are the model's.
      params: {fc: {weight [D, L D]}, hidden_norm, layers: ({input_layernorm, self_attn: {q_proj,
        k_proj, v_proj, o_proj, q_norm, k_norm}, post_attention_layernorm, mlp}, …), norm}. Leaves
        may be of any kind.
      layers: of the model, whose streams are read.
      block: places of a block, the anchor among them.
      mask_token: of the model's vocabulary, which stands where a token is to be said.
      count: tokens of a guess, the first that are said; the block is run whole.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)
    mask_token: int = struct.field(pytree_node=False)
    count: int = struct.field(pytree_node=False)

    def __post_init__(self) -> None:
        if not 1 <= self.count < self.block:
            raise UserError(
                f"count is {self.count}, and a block of {self.block} places says "
                f"{self.block - 1} tokens behind its anchor; choose 1 to {self.block - 1}"
            )
        if not 0 <= self.mask_token < self.config.vocab_size:
            raise UserError(
                f"mask_token is {self.mask_token}, and the model has tokens 0 to "
                f"{self.config.vocab_size - 1}; choose one that texts do not have"
            )

    @property
    def depth(self) -> int:
        return self.count

    @property
    def vocabulary(self) -> None:
        """See `growth.Grower`."""

    @property
    def reach(self) -> int:
        """See `growth.Grower`."""
        return self.block - 1

    def check(self, config: ModelConfig) -> None:
        """Raises UserError unless the model has the layers, width and vocabulary of the head's."""
        check_layers(self.layers, config)
        own, its = ((one.vocab_size, one.hidden_size) for one in (self.config, config))
        reads = self.params["fc"]["weight"].shape[-1]
        if own != its or reads != len(self.layers) * config.hidden_size:
            raise UserError(
                f"the draft head is of a model with an embedding {list(own)} and reads {reads} "
                f"features of {len(self.layers)} layers, and this model's embedding is {list(its)};"
                " it was made for another model"
            )

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> KVCache:
        """Its cache, with keys and values of the prompts' features. What stands behind a prompt is
        overwritten before a block sees it."""
        empty = empty_cache(self.config, self.params, len(prompts.lengths), capacity + self.block)
        return cached_context(
            self, empty, fused(self, prompts.features), positions_of(prompts.tokens)
        )

    def propose(
        self, target: Target, state: KVCache, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, KVCache]:
        """See `Drafter`."""
        hidden, state = filled_in(self, target, state, seen)
        places = seen.length[:, None] + jnp.arange(self.count, dtype=jnp.int32)[None]
        said = self.logits(target, hidden[:, 1 : 1 + self.count])
        return Guess(sampler(said, places), logits=said), state

    def grower(
        self, target: Target, state: KVCache, seen: Seen, sampler: Sampler
    ) -> tuple[Any, KVCache]:
        """See `growth.Grower`: what a level says is the same behind all of its nodes."""
        hidden, state = filled_in(self, target, state, seen)

        def continued(level: int, token: jax.Array | None, above: jax.Array | None) -> jax.Array:
            own = self.logits(target, hidden[:, level + 1 : level + 2])
            said = sampler.scores(own, (seen.length + level)[:, None])
            count = 1 if token is None else token.shape[1]
            return jnp.repeat(jax.nn.log_softmax(said, axis=-1), count, axis=1)

        return continued, state

    def logits(self, target: Target, hidden: jax.Array) -> jax.Array:
        """float32 [B, N, V] of hidden states [B, N, D], by the model's output head."""
        return logits(self.config, target.params, hidden)


# What the head computes

# (weights of "self_attn", normed block [B, n, D]) -> what its queries gather, [B, n, H, d].
Attend = Callable[[Mapping[str, Any], jax.Array], jax.Array]


def fused(head: DFlash, features: jax.Array) -> jax.Array:
    """c [B, T, D] of features [B, T, F]."""
    c = linear(features.astype(head.config.dtype), head.params["fc"]["weight"])
    return rms_norm(c, head.params["hidden_norm"]["weight"], head.config.rms_norm_eps)


def embedded_block(head: DFlash, target: Target, anchor: jax.Array) -> jax.Array:
    """[B, n, D]: the anchors int32 [B], and masks behind them. The embedding is the model's, its
    factor the head's own."""
    masks = ((0, 0), (0, head.block - 1))
    tokens = jnp.pad(anchor[:, None], masks, constant_values=head.mask_token)
    return embed_tokens(head.config, target.params, tokens)


def block_layer(
    config: ModelConfig, layer: Mapping[str, Any], x: jax.Array, attend: Attend
) -> jax.Array:
    """The block [B, n, D] behind a layer."""
    weights, eps = layer["self_attn"], config.rms_norm_eps
    mixed = attend(weights, rms_norm(x, layer["input_layernorm"]["weight"], eps))
    out = weights["o_proj"]
    x = x + linear(mixed.reshape(*x.shape[:2], -1), out["weight"], out.get("bias"))
    normed = rms_norm(x, layer["post_attention_layernorm"]["weight"], eps)
    return x + feed_forward(config, layer["mlp"], normed)


def queries(
    config: ModelConfig, weights: Mapping[str, Any], x: jax.Array, positions: jax.Array
) -> jax.Array:
    """[B, T, H, d] of [B, T, D], rotated to positions int32 [B, T]."""
    return rotate(_heads(config, weights, "q", x), positions, config.rope)


def keys_values(
    config: ModelConfig, weights: Mapping[str, Any], x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each [B, T, G, d] of [B, T, D], of the text before the anchor or of a block alike."""
    keys = rotate(_heads(config, weights, "k", x), positions, config.rope)
    return keys, _heads(config, weights, "v", x)


def _heads(config: ModelConfig, weights: Mapping[str, Any], name: str, x: jax.Array) -> jax.Array:
    module, norm = weights[f"{name}_proj"], weights.get(f"{name}_norm")
    out = linear(x, module["weight"], module.get("bias"))
    out = out.reshape(*x.shape[:2], -1, config.head_dim)
    return out if norm is None else rms_norm(out, norm["weight"], config.rms_norm_eps)


def final_hidden(head: DFlash, x: jax.Array) -> jax.Array:
    """What the output head reads of a block [B, n, D] behind the last layer."""
    return rms_norm(x, head.params["norm"]["weight"], head.config.rms_norm_eps)


# Beside a cache


def cached_context(
    head: DFlash, cache: KVCache, c: jax.Array, positions: jax.Array, slots: Any = None
) -> KVCache:
    """The cache with keys and values of c [B, T, D] at its positions, or at other slots."""
    slots = positions if slots is None else slots
    return tuple(
        entry.append(*keys_values(head.config, layer["self_attn"], c, positions), slots)
        for layer, entry in zip(head.params["layers"], cache, strict=True)
    )


def filled_in(
    head: DFlash, target: Target, cache: KVCache, seen: Seen
) -> tuple[jax.Array, KVCache]:
    """(hidden states [B, n, D] of the block that begins with the last token; cache).

    The block's own keys and values stand behind those of the text. Those of the next pass cover
    them: its text reaches as far as it is longer, and its block from there on.
    """
    width, before = seen.features.shape[1], seen.length - 1
    column = jnp.arange(width, dtype=jnp.int32)[None]
    places = (before - seen.count)[:, None] + column
    nowhere = cache[0].keys.shape[2]
    slots = jnp.where(column < seen.count[:, None], places, nowhere)
    cache = cached_context(head, cache, fused(head, seen.features), places, slots)

    at = before[:, None] + jnp.arange(head.block, dtype=jnp.int32)[None]
    end = jnp.broadcast_to(at[:, -1:], at.shape)  # every place sees the whole block
    anchor = jnp.take_along_axis(seen.tokens, before[:, None], axis=1)[:, 0]
    x, config, after = embedded_block(head, target, anchor), head.config, []
    for layer, entry in zip(head.params["layers"], cache, strict=True):

        def attend(weights: Any, normed: jax.Array, entry: Any = entry) -> jax.Array:
            entry = entry.append(*keys_values(config, weights, normed, at), at)
            after.append(entry)
            query, (key, value) = queries(config, weights, normed, at), entry.read(config.dtype)
            return cached_attend(query, key, value, end, scale=config.query_scale)

        x = block_layer(config, layer, x, attend)
    return final_hidden(head, x), tuple(after)
