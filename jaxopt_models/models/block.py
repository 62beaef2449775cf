"""One decoder layer, jitted once for each kind of layer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.models.attention import angles, cached_attend, rotate, self_attend
from jaxopt_models.models.cache import LayerCache
from jaxopt_models.models.config import AttentionKind, ModelConfig
from jaxopt_models.models.moe import moe_feed_forward
from jaxopt_models.models.projections import project
from jaxopt_models.models.tree_attention import Branches, tree_attend
from jaxopt_models.ops import linear
from kernels_pallas import add_rms_norm, rms_norm, silu_mul

Save = Callable[[str, jax.Array], None]


def ignore(name: str, value: jax.Array) -> None:
    """Saves nothing."""


class Recorder:
    """Collects intermediate activations by name while a function is traced.

    `wanted` holds the names to keep; None keeps all.
    """

    def __init__(self, wanted: frozenset[str] | None):
        self.wanted = wanted
        self.values: dict[str, jax.Array] = {}

    def __call__(self, name: str, value: jax.Array) -> None:
        if self.wanted is None or name in self.wanted:
            self.values[name] = value


@partial(jax.jit, static_argnames=("config", "kind", "wanted"))
def block(
    config: ModelConfig,
    layer: Mapping[str, Any],
    x: jax.Array,
    positions: jax.Array,
    cache: LayerCache | None = None,
    *,
    kind: AttentionKind,
    wanted: frozenset[str] | None = frozenset(),
    starts: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache | None, dict[str, jax.Array]]:
    """Attention and feed-forward with residual connections.

    Called outside jit it compiles once for each kind of layer and runs layer by layer; inside jit
    it is inlined.

    Args:
      layer: weights of this layer.
      x: residual stream, [B, T, D].
      positions: int32 [B, T]; consecutive in each document where there is no cache.
      cache: keys and values of earlier positions, to which this call's are appended; None attends
        among the given positions only.
      kind: "full" or "sliding" attention; static.
      wanted: names of the taps to return, relative to the layer; static, None is all.
      starts: where there is no cache, see `attention.self_attend`.

    Returns:
      (residual stream after the layer, cache, taps by name).
    """
    x, update, cache, taps = deferred_block(
        config, layer, x, None, positions, cache, kind=kind, wanted=wanted, starts=starts
    )
    return x + update, cache, taps


@partial(jax.jit, static_argnames=("config", "kind", "wanted"))
def deferred_block(
    config: ModelConfig,
    layer: Mapping[str, Any],
    x: jax.Array,
    update: jax.Array | None,
    positions: jax.Array,
    cache: LayerCache | None = None,
    *,
    kind: AttentionKind,
    wanted: frozenset[str] | None = frozenset(),
    starts: jax.Array | None = None,
    branches: Branches | None = None,
) -> tuple[jax.Array, jax.Array, LayerCache | None, dict[str, jax.Array]]:
    """`block` on a residual stream whose last addition is left to whoever reads it.

    That is a norm, which adds in passing; a kernel for the addition alone costs as much.

    Args:
      x, update: the residual stream is their sum, or `x` where there is no update; [B, T, D].
      branches: where there is a cache, if the tokens form a tree.

    Returns:
      (x, update, cache, taps by name).
    """
    save = Recorder(wanted)
    norm, add_norm = partial(_norm, config, layer, save), partial(_add_norm, config, layer, save)

    if update is None:
        normed = norm("input_layernorm", x)
    else:
        x, normed = add_norm("input_layernorm", x, update)
    save("input", x)
    attended, cache = attention(
        config, layer["self_attn"], normed, positions, cache, kind, save, starts, branches
    )
    if config.sandwich_norm:
        attended = norm("post_attention_layernorm", attended)
        x, normed = add_norm("pre_feedforward_layernorm", x, attended)
        fed = feed_forward(config, layer["mlp"], normed, save)
        update = norm("post_feedforward_layernorm", fed)
    else:
        x, normed = add_norm("post_attention_layernorm", x, attended)
        update = feed_forward(config, layer["mlp"], normed, save)
    save("output", x + update)
    return x, update, cache, save.values


def _norm(config: ModelConfig, layer: Mapping[str, Any], save: Save, name: str, x: jax.Array):
    save(f"{name}/unnormed", x)
    out = rms_norm(x, layer[name]["weight"], config.rms_norm_eps, config.unit_offset_norm)
    save(f"{name}/output", out)
    return out


def _add_norm(
    config: ModelConfig, layer: Mapping[str, Any], save: Save, name: str, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`x + y`, and the norm of it."""
    options = config.rms_norm_eps, config.unit_offset_norm
    x, out = add_rms_norm(x, y, layer[name]["weight"], *options)
    save(f"{name}/unnormed", x)
    save(f"{name}/output", out)
    return x, out


def _linear(module: Mapping[str, Any], name: str, x: jax.Array, save: Save):
    save(f"{name}/input", x)
    return linear(x, module[name]["weight"], module[name].get("bias"))


def _inside(save: Save, prefix: str) -> Save:
    """Saves under names that begin with the module's."""
    return lambda name, value: save(f"{prefix}/{name}", value)


def attention(
    config: ModelConfig,
    weights: Mapping[str, Any],
    x: jax.Array,
    positions: jax.Array,
    cache: LayerCache | None,
    kind: AttentionKind,
    save: Save = ignore,
    starts: jax.Array | None = None,
    branches: Branches | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """(what attention adds to the residual stream, [B, T, D]; cache).

    Args:
      weights: of "self_attn"; their inputs may be wider than the residual stream.
      x: [B, T, K].
      save: receives taps.
      positions, cache, kind, starts, branches: as of `deferred_block`.
    """
    save = _inside(save, "self_attn")
    query, key, value = queries_keys_values(config, weights, x, save)
    rope, quantizer = config.rope if kind == "full" else config.local_rope, weights.get("kv_cache")
    slots = positions if branches is None else branches.slots
    if cache is None or quantizer is not None:
        query, key = rotate(query, positions, rope), rotate(key, positions, rope)
    else:
        turned = angles(positions, rope, config.head_dim)
        query, key, cache = cache.append_rotated(query, key, value, slots, turned)
    save("query", query)
    save("key", key)
    save("value", value)

    if quantizer is not None:
        query, key = quantizer.rotated(query), quantizer.rotated(key)
    scores = {
        "scale": config.query_scale,
        "window": config.sliding_window if kind == "sliding" else None,
        "softcap": config.attention_softcap,
    }
    if cache is None:
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        if quantizer is not None:
            key, value = quantizer.key(key), quantizer.value(value)
        mixed = self_attend(query, key, value, starts=starts, **scores)
    else:
        if quantizer is not None:
            cache = cache.append(key, value, slots, quantizer)
        key, value = cache.read(x.dtype, quantizer)
        if branches is None:
            mixed = cached_attend(query, key, value, positions, **scores)
        else:
            mixed = tree_attend(query, key, value, branches, **scores)
    return _linear(weights, "o_proj", mixed.reshape(*x.shape[:2], -1), save), cache


def queries_keys_values(
    config: ModelConfig, weights: Mapping[str, Any], x: jax.Array, save: Save = ignore
) -> list[jax.Array]:
    """Queries [B, T, H, d], keys and values [B, T, G, d] before rotary embedding."""
    query, key, value = (
        out.reshape(*x.shape[:2], -1, config.head_dim)
        for out in project(weights, "qkv_proj", x, save)
    )
    if config.qk_norm:
        eps, offset = config.rms_norm_eps, config.unit_offset_norm
        query = rms_norm(query, weights["q_norm"]["weight"], eps, offset)
        key = rms_norm(key, weights["k_norm"]["weight"], eps, offset)
    return [query, key, value]


def feed_forward(
    config: ModelConfig, mlp: Mapping[str, Any], x: jax.Array, save: Save = ignore
) -> jax.Array:
    """`down(activate(gate x) · up x)`, of one dense network or of each token's experts."""
    activate, save = activation(config), _inside(save, "mlp")
    if "experts" in mlp:
        return moe_feed_forward(
            x,
            mlp,
            activate,
            experts_per_token=config.experts_per_token,
            normalize=config.normalize_router,
            save=save,
        )
    gate, up = project(mlp, "gate_up_proj", x, save)
    hidden = silu_mul(gate, up) if config.activation == "silu" else activate(gate) * up
    return _linear(mlp, "down_proj", hidden, save)


def activation(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """The feed-forward network's non-linearity."""
    return jax.nn.silu if config.activation == "silu" else _gelu_tanh


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)
