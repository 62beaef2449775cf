"""Smaller models: their shapes and descriptions, files of both kinds, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, masks_of, params_of, tokens

from jaxopt_models import tree
from jaxopt_models.checkpoint.export import export_hf
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import save
from jaxopt_models.errors import UserError
from jaxopt_models.models.cache import empty_cache
from jaxopt_models.models.cached import prefill
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import abstract_params, forward
from jaxopt_models.prune.masks import apply_masks, keep_all
from jaxopt_models.prune.slicing import slice_model

_forward = jax.jit(forward, static_argnums=0)
WIDTHS = ("hidden", "layers", "heads", "groups", "neurons")


def _shapes(params):
    return {path: tuple(leaf.shape) for path, leaf in tree.leaves_with_paths(params)}


def _round_to_two_bytes(params):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)


@pytest.mark.parametrize("name", ["tied", "gemma3", "qwen3_moe"])
def test_a_uniform_result_goes_to_hugging_face_and_back(name, tmp_path):
    config, params, text = CONFIGS[name], _round_to_two_bytes(params_of(name)), tokens()
    masks = masks_of(name, WIDTHS)
    masked = _forward(config, apply_masks(config, params, masks), text)
    small, cut = slice_model(config, params, masks, uniform=True)
    assert _shapes(cut) == _shapes(abstract_params(small))
    assert ("lm_head" in cut) == ("lm_head" in params)
    np.testing.assert_allclose(_forward(small, cut, text), masked, rtol=1e-5, atol=1e-5)
    export_hf(tmp_path / "hf", Model(small, cut))
    back = load(tmp_path / "hf", dtype="float32")
    assert dataclasses.replace(back.config, dtype=small.dtype) == small
    # Gemma's table and final norm took a factor, which the two bytes of the file round.
    near = 0.05 if name == "gemma3" else 1e-5
    again = _forward(dataclasses.replace(back.config, dtype="float32"), back.params, text)
    np.testing.assert_allclose(again, masked, rtol=near, atol=near)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_layers_of_different_widths_are_saved_as_they_are_and_not_exported(name, tmp_path):
    config, params, text = CONFIGS[name], params_of(name), tokens()
    small, cut = slice_model(config, params, masks_of(name, (*WIDTHS, "experts")))
    queries = tree.select(cut, "layers/*/q_proj/weight").values()
    assert len({weight.shape for weight in queries}) == 2
    save(tmp_path / "own", small, cut)
    back = load(tmp_path / "own")
    assert back.config == small
    jax.tree.map(np.testing.assert_array_equal, back.params, cut)
    np.testing.assert_array_equal(
        _forward(back.config, back.params, text), _forward(small, cut, text)
    )
    with pytest.raises(UserError, match="use `save` if their layers differ in width"):
        export_hf(tmp_path / "hf", Model(small, cut))


def test_layers_of_different_widths_are_generated_with():
    config, params, text = CONFIGS["tied"], params_of("tied"), tokens()
    small, cut = slice_model(config, params, masks_of("tied", WIDTHS))
    lengths = jnp.full(2, text.shape[1], jnp.int32)
    last, _ = prefill(small, cut, text, lengths, empty_cache(small, cut, 2, 16))
    np.testing.assert_allclose(last, forward(small, cut, text)[:, -1], rtol=1e-4, atol=1e-4)


def test_the_config_says_what_is_left():
    config = CONFIGS["qwen3_moe"]
    small, _ = slice_model(config, params_of("qwen3_moe"), masks_of("qwen3_moe", ("layers",)))
    assert (small.num_layers, small.moe_layers, small.head_dim) == (2, (0, 1), 8)
    gemma = CONFIGS["gemma3"]
    small, _ = slice_model(gemma, params_of("gemma3"), masks_of("gemma3", ("layers", "hidden")))
    assert gemma.attention_kinds == ("sliding", "full", "sliding")
    assert (small.attention_kinds, small.hidden_size) == (("sliding", "sliding"), 20)
    masks = dataclasses.replace(
        keep_all(gemma, params_of("gemma3")), layers=jnp.asarray([0.0, 1.0, 0.0])
    )
    small, _ = slice_model(gemma, params_of("gemma3"), masks)
    assert (small.attention_kinds, small.sliding_window) == (("full",), None)


def test_feed_forward_widths_are_rounded_up_with_neurons_that_nothing_reads():
    config, params = CONFIGS["llama"], params_of("llama")
    masks = masks_of("llama", ("neurons",))
    small, cut = slice_model(config, params, masks, multiple=16)
    assert small.intermediate_size == 48
    assert [layer["mlp"]["up_proj"]["weight"].shape[0] for layer in cut["layers"]] == [48, 48, 32]
    last = cut["layers"][2]["mlp"]["down_proj"]["weight"]
    assert int(jnp.sum(jnp.all(last == 0, axis=0))) == 0
    assert int(jnp.sum(jnp.all(cut["layers"][1]["mlp"]["down_proj"]["weight"] == 0, axis=0))) == 14
    text = tokens()
    plain = forward(*slice_model(config, params, masks), text)
    np.testing.assert_allclose(forward(small, cut, text), plain, rtol=1e-5, atol=1e-5)


def test_host_arrays_stay_on_the_host_and_what_is_not_cut_is_shared():
    params = jax.tree.map(np.asarray, params_of("tied"))
    masks = masks_of("tied", ("neurons",))
    _, cut = slice_model(CONFIGS["tied"], params, masks)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(cut))
    assert cut["embed_tokens"]["weight"] is params["embed_tokens"]["weight"]
    q_proj = cut["layers"][0]["self_attn"]["q_proj"]["weight"]
    assert q_proj is params["layers"][0]["self_attn"]["q_proj"]["weight"]


def test_masks_that_leave_no_model_are_refused():
    config, params = CONFIGS["qwen3_moe"], params_of("qwen3_moe")
    masks = keep_all(config, params)

    def refused(match, uniform=False, multiple=1, **changed):
        with pytest.raises(UserError, match=match):
            bad = dataclasses.replace(masks, **changed)
            slice_model(config, params, bad, uniform=uniform, multiple=multiple)

    refused("hold only 0 and 1", hidden=masks.hidden * 0.5)
    refused("all channels or all layers", hidden=masks.hidden * 0)
    refused(
        "20 hidden channels, which is no multiple of 16", multiple=16, hidden=jnp.arange(32) < 20
    )
    refused("no heads of layer 1", heads=(masks.heads[0], masks.heads[1] * 0, masks.heads[2]))
    refused("no neurons of layer 2", neurons=(*masks.neurons[:2], masks.neurons[2] * 0))
    one = jnp.asarray([1.0, 0, 0, 0])
    refused("1 experts of layer 0, and each token is sent to 2", experts=(one, None, one))
    three = jnp.asarray([1.0, 1, 1, 0])
    refused("3 experts in one layer and 4", uniform=True, experts=(three, None, masks.experts[2]))
    refused("cannot be multiples of 0", multiple=0)
    refused("next multiple of 32", multiple=32)
