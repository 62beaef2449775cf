"""The one door finds out what kind of model a path is."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import jaxopt_models.checkpoint
from jaxopt_models.checkpoint.load import load
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward


def test_a_directory_of_safetensors(golden, golden_run, write_checkpoint):
    directory = write_checkpoint(*golden("qwen2"))
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    model = load(str(directory))
    assert model.config.dtype == "float32" and model.source == str(directory)
    assert model.tokenizer("b").input_ids == [1]
    tokens, logits = golden_run("qwen2")
    out = forward(model.config, model.params, jnp.asarray(tokens))
    np.testing.assert_allclose(out, logits, atol=2e-5)


def test_a_directory_without_tokenizer(golden, write_checkpoint):
    assert load(write_checkpoint(*golden("qwen2"))).tokenizer is None


def test_dtype_is_that_of_the_computation_only(golden, write_checkpoint):
    model = load(write_checkpoint(*golden("qwen2")), dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    with pytest.raises(UserError, match="dtype 'fp32' is not one of float32"):
        load("anything", dtype="fp32")


def test_place_reaches_the_reader(golden, write_checkpoint):
    device = jax.devices()[-1]
    directory = write_checkpoint(*golden("qwen2"))
    model = load(directory, place=lambda path, array: jax.device_put(array, device))
    assert {leaf.device for leaf in jax.tree.leaves(model.params)} == {device}


def test_a_gguf_file(builtin):
    model = load(builtin("smollm2-135m"))
    assert model.config.model_type == "llama" and model.config.num_layers == 30
    assert model.params["norm"]["weight"].dtype == jnp.bfloat16
    assert model.tokenizer.decode(model.tokenizer("In 2024.").input_ids) == "In 2024."


def test_our_own_checkpoint(tmp_path, golden, monkeypatch):
    (tmp_path / "jaxopt_models.json").write_text("{}")
    config = ModelConfig.from_hf(golden("qwen2")[0])
    native = types.ModuleType("jaxopt_models.checkpoint.native")
    monkeypatch.setattr(
        native, "restore", lambda path, place: Model(config, {"from": path}), raising=False
    )
    monkeypatch.setitem(sys.modules, native.__name__, native)
    monkeypatch.setattr(jaxopt_models.checkpoint, "native", native, raising=False)
    model = load(tmp_path, dtype="bfloat16")
    assert model.params == {"from": tmp_path} and model.config.dtype == "bfloat16"


def test_something_else(tmp_path):
    with pytest.raises(UserError, match="not a model; give a directory with config.json"):
        load(tmp_path)
