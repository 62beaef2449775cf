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
from jaxopt_models.models.transformer import forward
from jaxopt_models.sharding import make_mesh


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
