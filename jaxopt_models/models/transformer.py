"""The decoder as pure functions: parameters, forward, prefill, decode step, taps.

Parameters are nested dicts with Hugging Face's names; linear weights are [N, K] = (out, in):

    embed_tokens/weight [V, D]    norm/weight [D]    lm_head/weight [V, D] (absent when tied)
    layers: tuple of {input_layernorm, post_attention_layernorm, (Gemma: pre_feedforward_layernorm,
                      post_feedforward_layernorm), self_attn: {q_proj, k_proj, v_proj, o_proj,
                      (q_norm, k_norm), (kv_cache: `kv_quantizer.KVQuantizer`)},
                      mlp: {gate_proj, up_proj, down_proj}
                      or {router, experts: {gate_proj, up_proj, down_proj} stacked [E, N, K]}}
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.block import block
from jaxopt_models.models.config import AttentionKind, ModelConfig
from jaxopt_models.models.repeated import run_layers
from jaxopt_models.ops import embed, linear
from kernels_pallas import add_rms_norm, rms_norm

_NO_TAPS: frozenset[str] = frozenset()

# What gradients find of a layer: all of its activations; its input and its products with weights
# (attention and what is between them is computed again); or its input alone.
Remat = Literal["none", "products", "layers"]


def abstract_params(config: ModelConfig, dtype: Any = jnp.bfloat16) -> Any:
    """Shapes of a model's parameters: the tree above with `jax.ShapeDtypeStruct` leaves."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def module(out: int, width: int, bias: bool) -> dict[str, Any]:
        return {"weight": array(out, width)} | ({"bias": array(out)} if bias else {})

    params = {
        "embed_tokens": {"weight": array(config.vocab_size, config.hidden_size)},
        "layers": tuple(_abstract_layer(config, i, module) for i in range(config.num_layers)),
        "norm": {"weight": array(config.hidden_size)},
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = module(config.vocab_size, config.hidden_size, False)
    return params


def _abstract_layer(config: ModelConfig, index: int, module: Any) -> dict[str, Any]:
    width, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    array = module(1, 1, False)["weight"]

    def vector(size: int) -> dict[str, Any]:
        return {"weight": jax.ShapeDtypeStruct((size,), array.dtype)}

    def stacked(out: int, inner: int) -> dict[str, Any]:
        return {"weight": jax.ShapeDtypeStruct((config.num_experts, out, inner), array.dtype)}

    attention = {
        "q_proj": module(queries, width, config.qkv_bias),
        "k_proj": module(keys, width, config.qkv_bias),
        "v_proj": module(keys, width, config.qkv_bias),
        "o_proj": module(width, queries, config.o_bias),
    }
    if config.qk_norm:
        attention |= {"q_norm": vector(dim), "k_norm": vector(dim)}
    if index in config.moe_layers:
        size = config.expert_size
        experts = {"gate_proj": stacked(size, width), "up_proj": stacked(size, width)}
        experts["down_proj"] = stacked(width, size)
        mlp = {"router": module(config.num_experts, width, False), "experts": experts}
    else:
        size = config.intermediate_size
        mlp = {
            "gate_proj": module(size, width, config.mlp_bias),
            "up_proj": module(size, width, config.mlp_bias),
            "down_proj": module(width, size, config.mlp_bias),
        }
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich_norm:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return {name: vector(width) for name in norms} | {"self_attn": attention, "mlp": mlp}


def init(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    """Random parameters: matrices N(0, 1/K), embeddings N(0, 0.02²), norms identity, biases
    zero."""

    def leaf(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if "norm" in path:
            return jnp.full(shape.shape, 0.0 if config.unit_offset_norm else 1.0, dtype)
        if path.endswith("bias"):
            return jnp.zeros(shape.shape, dtype)
        scale = 0.02 if path.startswith("embed") else shape.shape[-1] ** -0.5
        drawn = jax.random.normal(tree.key_at(key, path), shape.shape, jnp.float32)
        return (drawn * scale).astype(dtype)

    return tree.map_with_path(leaf, abstract_params(config, dtype))


def forward(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Next-token logits.

    Args:
      config: static architecture.
      params: parameter tree; leaves may be of any kind.
      tokens: int32 [B, T], positions 0..T-1.

    Returns:
      float32 [B, T, V].
    """
    return logits(config, params, hidden_states(config, params, tokens))


def hidden_states(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    starts: jax.Array | None = None,
    remat: Remat = "none",
    sharding: Sharding | None = None,
) -> jax.Array:
    """What the output head reads: the residual stream after the final norm, [B, T, D].

    Args:
      config: static architecture.
      params: parameter tree; its layers may be a `Repeated`, which are run in a loop.
      tokens: int32 [B, T].
      starts: int32 [B, T], where in its row the document of each token begins: each is processed as
        if it stood alone. None is one document a row.
      remat: what is computed again for gradients, static; see `Remat`.
      sharding: of the residual stream between layers, and of its gradient. On several devices it
        decides what moves: with its rows split, weights come to them. None leaves it to XLA.
    """
    return hidden_states_with_layers(config, params, tokens, (), starts, remat, sharding)[0]


def hidden_states_with_layers(
    config: ModelConfig,
    params: Any,
    tokens: jax.Array,
    layers: Collection[int],
    starts: jax.Array | None = None,
    remat: Remat = "none",
    sharding: Sharding | None = None,
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """`hidden_states`, and the residual stream [B, T, D] behind each of these layers by its number.

    For gradients the stream is kept between layers whatever `remat` says, so a trained model's
    layers take no more memory for being returned.
    """
    x, positions = _placed(embed_tokens(config, params, tokens), sharding), positions_of(tokens)
    if starts is not None:
        positions = positions - starts

    def one(kind: AttentionKind, layer: Any, x: jax.Array) -> jax.Array:
        return block(config, layer, x, positions, kind=kind, starts=starts)[0]

    def run(kind: AttentionKind, layer: Any, x: jax.Array) -> jax.Array:
        return _placed(_rematerialized(partial(one, kind), remat)(layer, x), sharding)

    x, behind = run_layers(run, config.attention_kinds, params["layers"], x, layers)
    return final_norm(config, params, x), behind


def _placed(x: jax.Array, sharding: Sharding | None) -> jax.Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _rematerialized[**P, T](function: Callable[P, T], remat: Remat) -> Callable[P, T]:
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    products = policies.dots_with_no_batch_dims_saveable
    policy = products if remat == "products" else policies.nothing_saveable
    return jax.checkpoint(function, policy=policy)


def forward_with_taps(
    config: ModelConfig, params: Any, tokens: jax.Array, taps: Iterable[str]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`forward` that also returns intermediate activations.

    Args:
      taps: names or globs of names. For layer i: "layers/i/input", "layers/i/output" (the residual
        stream), ".../{norm}/unnormed" and "output", ".../self_attn/{q,k,v,o}_proj/input",
        ".../self_attn/query", "key", "value" (after rotary embedding, before a `kv_cache` quantizes
        them), ".../mlp/{gate,up,down}_proj/input", for experts ".../mlp/experts/{...}/input",
        ".../mlp/router/input" and what else `moe.moe_feed_forward` says; and
        "embed_tokens/output", "norm/output", "logits".

    Returns:
      (logits, activations by name).

    Raises:
      UserError: for a tap that names nothing.
    """
    wanted = _matching_taps(config, params, tokens, tuple(taps))
    x, positions = embed_tokens(config, params, tokens), positions_of(tokens)
    saved = {"embed_tokens/output": x}
    for i, (kind, layer) in enumerate(zip(config.attention_kinds, params["layers"], strict=True)):
        prefix = f"layers/{i}/"
        inside = frozenset(t.removeprefix(prefix) for t in wanted if t.startswith(prefix))
        x, _, values = block(config, layer, x, positions, kind=kind, wanted=inside)
        saved |= {prefix + name: value for name, value in values.items()}
    saved["norm/output"] = final_norm(config, params, x)
    saved["logits"] = logits(config, params, saved["norm/output"])
    return saved["logits"], {name: saved[name] for name in sorted(wanted)}


def _matching_taps(
    config: ModelConfig, params: Any, tokens: jax.Array, patterns: tuple[str, ...]
) -> set[str]:
    names = {"embed_tokens/output", "norm/output", "logits"}
    x = jax.eval_shape(lambda p: embed_tokens(config, p, tokens), params)
    for i, (kind, layer) in enumerate(zip(config.attention_kinds, params["layers"], strict=True)):

        def trace(layer: Any, x: jax.Array, kind=kind) -> Any:
            return block(config, layer, x, positions_of(tokens), kind=kind, wanted=None)[2]

        names |= {f"layers/{i}/{name}" for name in jax.eval_shape(trace, layer, x)}
    for pattern in patterns:
        if not any(tree.matches(name, pattern) for name in names):
            raise UserError(f"tap {pattern!r} names no activation of this model")
    return {name for name in names if tree.matches(name, patterns)}


def embed_tokens(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """First residual stream, [B, T, D] in the compute dtype."""
    x = embed(tokens, params["embed_tokens"]["weight"], config.dtype)
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, config.dtype)


def final_norm(
    config: ModelConfig, params: Any, x: jax.Array, update: jax.Array | None = None
) -> jax.Array:
    """The norm before the output head, of `x`, or of `x + update`."""
    weight = params["norm"]["weight"], config.rms_norm_eps, config.unit_offset_norm
    return rms_norm(x, *weight) if update is None else add_rms_norm(x, update, *weight)[1]


def logits(config: ModelConfig, params: Any, hidden: jax.Array) -> jax.Array:
    """Output head on normed hidden states [..., D]: float32 [..., V], soft cap included."""
    (head,) = output_head(params).values()
    out = linear(hidden, head["weight"], dtype=jnp.float32)
    cap = config.final_softcap
    return out if cap is None else cap * jnp.tanh(out / cap)


def output_head(params: Any) -> dict[str, Any]:
    """The parameters that `logits` reads."""
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {name: params[name]}


def positions_of(x: jax.Array) -> jax.Array:
    """Positions 0..T-1 of each row of tokens [B, T] or of a stream [B, T, D]: int32 [B, T]."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
