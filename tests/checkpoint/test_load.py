"""The one door finds out what kind of model a path is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import save
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate
from jaxopt_models.generate import generate
from jaxopt_models.models.transformer import forward
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.sharding import make_mesh
from jaxopt_models.tree import bits_per_weight, size_in_bits


def test_a_directory_of_safetensors(golden, golden_run, write_checkpoint):
    directory = write_checkpoint(*golden("qwen2"))
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    model = load(str(directory))
    assert model.config.dtype == "float32" and model.source == str(directory)
    assert model.tokenizer("b").input_ids == [1]
    tokens, logits = golden_run("qwen2")
    out = forward(model.config, model.params, jnp.asarray(tokens))
    np.testing.assert_allclose(out, logits, atol=1e-4)


def test_a_directory_without_tokenizer(golden, write_checkpoint):
    assert load(write_checkpoint(*golden("qwen2"))).tokenizer is None


def test_dtype_is_that_of_the_computation_only(golden, write_checkpoint):
    model = load(write_checkpoint(*golden("qwen2")), dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    with pytest.raises(UserError, match="dtype 'fp32' is not one of float32"):
        load("anything", dtype="fp32")


def test_onto_a_mesh(golden, write_checkpoint):
    config, tensors = golden("qwen2")
    directory = write_checkpoint(config, tensors)
    plain, mesh = load(directory), make_mesh({"data": 2, "model": 4})
    spread = load(directory, mesh=mesh)
    weight = spread.params["layers"][0]["mlp"]["up_proj"]["weight"]
    assert weight.sharding.spec == PartitionSpec("model", None)
    assert all(len(leaf.devices()) == 8 for leaf in jax.tree.leaves(spread.params))
    for ours, theirs in zip(
        jax.tree.leaves(spread.params), jax.tree.leaves(plain.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def assert_on_host(params, like):
    """NumPy arrays of the dtypes, shapes and bits of `like`."""
    assert jax.tree.structure(params) == jax.tree.structure(like)
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(like), strict=True):
        assert type(found) is np.ndarray
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "gemma3"])
def test_on_the_host(name, golden, write_checkpoint):
    directory = write_checkpoint(*golden(name))
    assert_on_host(load(directory, host=True).params, load(directory).params)


def test_on_the_host_weights_are_views_of_the_file(golden, write_checkpoint):
    config, tensors = golden("qwen2")
    wide = "model.layers.0.mlp.up_proj.weight"
    tensors[wide] = tensors[wide].astype(np.float64)
    params = load(write_checkpoint(config, tensors), host=True).params
    mlp = params["layers"][0]["mlp"]
    assert not mlp["down_proj"]["weight"].flags.owndata
    assert not mlp["down_proj"]["weight"].flags.writeable
    assert mlp["up_proj"]["weight"].dtype == np.float32  # as JAX has it


def test_on_the_host_or_on_a_mesh(golden, write_checkpoint):
    with pytest.raises(UserError, match="not both; leave out 'host' or 'mesh'"):
        load(write_checkpoint(*golden("qwen2")), host=True, mesh=make_mesh([1, 8]))


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_model_on_the_host_works_like_any_other(name, tmp_path, golden, write_checkpoint):
    directory = write_checkpoint(*golden(name))
    device, host = load(directory), load(directory, host=True)
    config, tokens = device.config, np.arange(24).reshape(2, 12) % device.config.vocab_size
    assert size_in_bits(host.params) == size_in_bits(device.params)
    assert bits_per_weight(host.params) == bits_per_weight(device.params)
    assert evaluate(config, host.params, [tokens]) == evaluate(config, device.params, [tokens])
    assert (
        generate(config, host.params, tokens.tolist(), max_new_tokens=3).tokens
        == generate(config, device.params, tokens.tolist(), max_new_tokens=3).tokens
    )
    save(tmp_path / "own", config, host.params)
    assert_on_host(host.params, load(tmp_path / "own").params)


def test_a_model_on_the_host_is_quantized_to_the_same_and_stays_there(
    tmp_path, golden, write_checkpoint
):
    """Embedding and output head too, where a recipe rotates or quantizes them."""
    directory = write_checkpoint(*golden("qwen2"))
    device, host = load(directory), load(directory, host=True)
    tokens = np.arange(48).reshape(2, 24) % device.config.vocab_size
    rule = {"match": ["*_proj/weight", "lm_head/*"], "weight": "fp8", "activation": "fp8"}
    recipe = Recipe.model_validate({"rules": [rule], "skip": [], "rotation": {"hidden": True}})
    expected, _ = quantize(device, recipe, [tokens])
    params, report = quantize(host, recipe, [tokens])
    assert_on_host(params, expected)
    assert evaluate(host.config, params, [tokens]) == evaluate(host.config, expected, [tokens])
    save(tmp_path / "own", host.config, params, report=report)
    assert_on_host(params, load(tmp_path / "own").params)
    assert_on_host(load(tmp_path / "own", host=True).params, params)


def test_a_gguf_file_on_the_host(builtin):
    params = load(builtin("smollm2-135m"), host=True).params
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {np.ndarray}
    assert_on_host(params["layers"][0], load(builtin("smollm2-135m")).params["layers"][0])


def test_a_gguf_file(builtin):
    model = load(builtin("smollm2-135m"))
    assert model.config.model_type == "llama" and model.config.num_layers == 30
    assert model.params["norm"]["weight"].dtype == jnp.bfloat16
    assert model.tokenizer.decode(model.tokenizer("In 2024.").input_ids) == "In 2024."


def test_our_own_checkpoint(tmp_path, golden, write_checkpoint):
    model = load(write_checkpoint(*golden("qwen2")))
    save(tmp_path / "own", model.config, model.params)
    own = load(tmp_path / "own", dtype="bfloat16")
    assert own.config == dataclasses.replace(model.config, dtype="bfloat16")
    for ours, theirs in zip(
        jax.tree.leaves(own.params), jax.tree.leaves(model.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_something_else(tmp_path):
    with pytest.raises(UserError, match="not a model; give a directory with config.json"):
        load(tmp_path)
