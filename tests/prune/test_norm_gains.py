"""Factors of norms: least squares on a text, and the law holds under them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, masks_of, params_of, tokens

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import forward, forward_with_taps
from jaxopt_models.prune.masks import apply_masks, keep_all
from jaxopt_models.prune.norm_gains import norm_gains, rescale_norms
from jaxopt_models.prune.slicing import slice_model


@pytest.mark.parametrize("name", ["tied", "gemma3"])
def test_no_other_factor_keeps_a_norm_nearer_to_what_it_was(name):
    config, params, text = CONFIGS[name], params_of(name), tokens(3)
    masks = masks_of(name, ("hidden",))
    valid = jnp.ones(text.shape).at[1, 7:].set(0.0)
    gains = norm_gains(config, params, [text[:2], text[2:]], masks.hidden, [valid[:2], valid[2:]])
    norms = [path for path, _ in tree.leaves_with_paths(params) if path.endswith("norm/weight")]
    stream = [path for path in norms if "q_norm" not in path and "k_norm" not in path]
    assert gains.keys() == set(stream)
    _, taps = forward_with_taps(config, params, text, ["*layernorm/unnormed", "layers/2/output"])
    taps["norm/unnormed"] = taps["layers/2/output"]
    kept = jnp.flatnonzero(masks.hidden)
    for path, factor in gains.items():
        x = taps[path.removesuffix("weight") + "unnormed"][valid > 0]

        def normed(x):
            return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.rms_norm_eps)

        ours, original = normed(x[:, kept]), normed(x)[:, kept]
        best = jnp.sum(ours * original) / jnp.sum(ours**2)
        # Epsilon makes shorter vectors of small ones, which weigh less in the least squares.
        assert float(factor) == pytest.approx(float(best), rel=0.02)


def test_masked_is_sliced_with_factors_as_well():
    config, params, text = CONFIGS["gemma3"], params_of("gemma3"), tokens()
    masks = masks_of("gemma3", ("hidden", "neurons"))
    gains = norm_gains(config, params, [text], masks.hidden)
    scaled = rescale_norms(config, params, gains)
    masked = forward(config, apply_masks(config, scaled, masks), text)
    small, cut = slice_model(config, scaled, masks)
    np.testing.assert_allclose(forward(small, cut, text), masked, rtol=1e-5, atol=1e-5)
    _, plain = slice_model(config, params, masks)
    after = rescale_norms(config, plain, gains)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), cut, after)


def test_keeping_large_channels_needs_factors_above_one_and_they_help():
    config, text = dataclasses.replace(CONFIGS["tied"], rms_norm_eps=1e-6), tokens(4)
    params = params_of("tied")
    large = jnp.where(jnp.arange(32) < 24, 3.0, 0.3)

    def loud(path, x):
        if path.startswith("embed_tokens"):
            return x * large[None]
        return x * large[:, None] if "o_proj" in path or "down_proj" in path else x

    params = tree.map_with_path(loud, params)
    hidden = (large > 1).astype(jnp.float32)
    gains = norm_gains(config, params, [text], hidden)
    assert min(float(gain) for gain in gains.values()) > 1.05
    masks = dataclasses.replace(keep_all(config, params), hidden=hidden)

    def error(start):
        masked = forward(config, apply_masks(config, start, masks), text)
        return float(jnp.mean((masked - forward(config, params, text)) ** 2))

    assert error(rescale_norms(config, params, gains)) < error(params)


def test_a_mask_of_another_width_is_refused():
    config, params = CONFIGS["tied"], params_of("tied")
    with pytest.raises(UserError, match=r"shape \(20,\) and keeps 20; give one of \[32\]"):
        norm_gains(config, params, [tokens()], jnp.ones(20))
    with pytest.raises(UserError, match="matches no tensor"):
        rescale_norms(config, params, {"layers/7/input_layernorm/weight": 1.0})
