"""The law: a masked model computes what the smaller one computes that is cut out by its masks."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, masks_of, params_of, tokens

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import forward
from jaxopt_models.prune.masks import apply_masks, drop_layers, keep_all
from jaxopt_models.prune.slicing import slice_model
from jaxopt_models.qtensor import quantize_array

ALL = ("hidden", "layers", "heads", "groups", "neurons", "experts")


@partial(jax.jit, static_argnums=0)
def _masked(config, params, masks, text):
    return forward(config, apply_masks(config, params, masks), text)


_forward = jax.jit(forward, static_argnums=0)


def _check_law(name, axes):
    config, params, text = CONFIGS[name], params_of(name), tokens()
    masks = masks_of(name, axes)
    masked = _masked(config, params, masks, text)
    sliced = _forward(*slice_model(config, params, masks), text)
    np.testing.assert_allclose(sliced, masked, rtol=1e-5, atol=1e-5)
    full = _masked(config, params, keep_all(config, params), text)
    assert float(jnp.max(jnp.abs(masked - full))) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_is_sliced_on_all_axes_together(name):
    _check_law(name, ALL)


@pytest.mark.parametrize("axis", ALL)
def test_masked_is_sliced_on_each_axis_alone(axis):
    _check_law("qwen3_moe" if axis == "experts" else "tied", (axis,))


def test_a_router_keeps_its_own_bias():
    config, params, text = CONFIGS["mixtral"], params_of("mixtral"), tokens()
    biases = [jnp.asarray([0.0, 1, 2, 3]) * i for i in range(3)]
    layers = tuple(
        layer | {"mlp": layer["mlp"] | {"router": layer["mlp"]["router"] | {"bias": bias}}}
        for layer, bias in zip(params["layers"], biases, strict=True)
    )
    biased, masks = params | {"layers": layers}, masks_of("mixtral", ("experts",))
    masked = _masked(config, biased, masks, text)
    sliced = _forward(*slice_model(config, biased, masks), text)
    np.testing.assert_allclose(sliced, masked, rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(masked - _masked(config, params, masks, text)))) > 1e-2


@pytest.mark.parametrize("name", ["tied", "gemma3", "mixtral"])
def test_masks_that_keep_everything_change_nothing(name):
    config, params, text = CONFIGS[name], params_of(name), tokens()
    masked = _masked(config, params, keep_all(config, params), text)
    np.testing.assert_allclose(masked, _forward(config, params, text), rtol=1e-6, atol=1e-6)


def test_one_program_runs_many_candidates():
    """In a loop on the device, or one by one, without another compilation."""
    config, params, text = CONFIGS["tied"], params_of("tied"), tokens()
    candidates = [masks_of("tied", (axis,), seed) for axis in ALL[:5] for seed in range(2)]
    traced = []

    def logits(masks):
        traced.append(masks)
        return forward(config, apply_masks(config, params, masks), text)

    stacked = jax.tree.map(lambda *masks: jnp.stack(masks), *candidates)
    together = jax.jit(partial(jax.lax.map, logits))(stacked)
    traced.clear()
    alone = jax.jit(logits)
    for masks, expected in zip(candidates, together, strict=True):
        np.testing.assert_allclose(alone(masks), expected, rtol=1e-5, atol=1e-5)
    assert len(traced) == 1


def test_a_removed_layer_is_as_if_it_were_not_there():
    config, params, text = CONFIGS["gemma3"], params_of("gemma3"), tokens()
    masks = drop_layers(keep_all(config, params), [1])
    rest = params | {"layers": params["layers"][::2]}
    shorter = dataclasses.replace(config, num_layers=2, attention_kinds=config.attention_kinds[::2])
    expected = _forward(shorter, rest, text)
    masked = _masked(config, params, masks, text)
    np.testing.assert_allclose(masked, expected, rtol=1e-5, atol=1e-5)


def test_weights_of_two_bytes_stay_so_in_a_model_of_two_bytes():
    config = dataclasses.replace(CONFIGS["tied"], dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of("tied"))
    masked = apply_masks(config, params, masks_of("tied", ALL))
    for path, leaf in tree.leaves_with_paths(masked):
        assert leaf.dtype == (jnp.float32 if "norm" in path else jnp.bfloat16), path
    small = slice_model(config, params, masks_of("tied", ALL))
    difference = forward(*small, tokens()) - forward(config, masked, tokens())
    assert float(jnp.max(jnp.abs(difference))) < 0.05


def test_what_cannot_be_masked_is_refused():
    config, params = CONFIGS["tied"], params_of("tied")
    masks = keep_all(config, params)
    with pytest.raises(UserError, match="there is no layer 3"):
        drop_layers(masks, [3])
    with pytest.raises(UserError, match=r"mask 'hidden' has shape \(20,\).* needs \(32,\)"):
        apply_masks(config, params, dataclasses.replace(masks, hidden=jnp.ones(20)))
    with pytest.raises(UserError, match="mask 'experts/0' has shape None"):
        apply_masks(CONFIGS["mixtral"], params_of("mixtral"), masks)
    path = "layers/1/mlp/up_proj/weight"
    quantized = quantize_array(tree.select(params, path)[path], "int8")
    with pytest.raises(UserError, match="is a QTensor.*prune the original model"):
        keep_all(config, tree.replace(params, {path: quantized}))
