"""Tiny models of every architecture, no two weights alike, and masks of every kind for them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_models import SIZES

from jaxopt_models import tree
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import init
from jaxopt_models.prune.importance import Importance
from jaxopt_models.prune.masks import Masks, keep_all

# Three layers, and two query heads for each of two key-value groups.
_SIZES = SIZES | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def _model(**keys: Any) -> ModelConfig:
    return ModelConfig.from_hf(_SIZES | {"head_dim": 8} | keys)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA3 = _model(model_type="gemma3_text", sliding_window=5, sliding_window_pattern=2)
CONFIGS = {
    "llama": _model(model_type="llama", attention_bias=True, mlp_bias=True),
    "tied": _model(model_type="llama", tie_word_embeddings=True, rms_norm_eps=0.03),
    "mistral": _model(model_type="mistral", sliding_window=6),
    "qwen2": _model(model_type="qwen2"),
    "qwen3": _model(model_type="qwen3", tie_word_embeddings=True),
    # No config.json of ours describes it, but the forward pass computes it.
    "gemma2": dataclasses.replace(
        GEMMA3, qk_norm=False, attention_softcap=20.0, final_softcap=10.0, rms_norm_eps=0.03
    ),
    "gemma3": GEMMA3,
    "mixtral": _model(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _model(model_type="qwen3_moe", mlp_only_layers=[1], **_EXPERTS),
}


@functools.cache
def params_of(name: str) -> Any:
    """Random in every leaf, gains of norms and biases as well."""
    config = CONFIGS[name]

    def leaf(path: str, array: jax.Array) -> jax.Array:
        key = tree.key_at(jax.random.key(1), path)
        spread = 0.2 if array.ndim == 1 else 0.05
        return array + spread * jax.random.normal(key, array.shape)

    return tree.map_with_path(leaf, init(config, jax.random.key(0)))


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> jax.Array:
    ids = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (rows, length))
    return jnp.asarray(ids, jnp.int32)


def _some(rng: np.random.Generator, shape: tuple[int, ...], kept: int) -> jax.Array:
    """So many ones in each row of the last axis."""
    ranks = np.argsort(np.argsort(rng.random(shape), axis=-1), axis=-1)
    return jnp.asarray(ranks < kept, jnp.float32)


def masks_of(name: str, axes: tuple[str, ...], seed: int = 0) -> Masks:
    """Random masks of these axes, different in each layer; everything else is kept."""
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    masks = keep_all(config, params_of(name))
    layers = range(config.num_layers)
    if "hidden" in axes:
        masks = dataclasses.replace(masks, hidden=_some(rng, (config.hidden_size,), 20))
    if "layers" in axes:
        masks = dataclasses.replace(masks, layers=jnp.asarray([1.0, 0.0, 1.0]))
    heads = [np.ones((2, 2), np.float32) for _ in layers]
    if "heads" in axes:
        heads = [np.array(_some(rng, (2, 2), 1 + (i > 0))) for i in layers]
        heads[2][0, 1] = 0  # groups of one layer differ: one head, and two
    if "groups" in axes:
        for i, kept in enumerate((1, 0, 1)):
            heads[i][1 - kept] = 0
    masks = dataclasses.replace(masks, heads=tuple(jnp.asarray(h) for h in heads))
    if "neurons" in axes:
        kept = [mask.shape[-1] * 3 // 4 - 2 * i for i, mask in enumerate(masks.neurons)]
        masks = dataclasses.replace(
            masks,
            neurons=tuple(
                _some(rng, mask.shape, k) for mask, k in zip(masks.neurons, kept, strict=True)
            ),
        )
    if "experts" in axes:
        masks = dataclasses.replace(
            masks,
            experts=tuple(
                None if mask is None else _some(rng, mask.shape, 3 - i % 2)
                for i, mask in enumerate(masks.experts)
            ),
        )
    return masks


def random_importance(name: str, seed: int = 0) -> Importance:
    rng = np.random.default_rng(seed)
    ones = keep_all(CONFIGS[name], params_of(name))

    def scores(mask) -> Any:
        return None if mask is None else jnp.asarray(rng.random(mask.shape), jnp.float32)

    return Importance(
        hidden=jnp.asarray(rng.random(ones.hidden.shape), jnp.float32),
        layers=jnp.asarray(rng.random(ones.layers.shape), jnp.float32),
        heads=tuple(map(scores, ones.heads)),
        neurons=tuple(map(scores, ones.neurons)),
        experts=tuple(map(scores, ones.experts)),
        expert_tokens=tuple(None for _ in ones.experts),
    )
