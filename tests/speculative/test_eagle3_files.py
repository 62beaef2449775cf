"""EAGLE-3 heads in the files that other engines read, and as those write them."""

import json
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import LLAMA

from jaxopt_models.checkpoint.safetensors import open_index
from jaxopt_models.checkpoint.safetensors_writer import write_sharded
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import init
from jaxopt_models.qtensor import quantize_array
from jaxopt_models.speculative import Target, init_eagle3
from jaxopt_models.speculative.eagle3_files import Layout, export_eagle3, is_eagle3, read_eagle3

VOCABULARY = jnp.asarray([0, 1, 5, 9, 20, 33, 40, 63], jnp.int32)
# Names of tensors in each layout: those of the layer, with or without a prefix of its own.
LAYER = {"eagle3": "midlayer", "speculators": "layers.0"}
IN_LAYER = (
    "hidden_norm input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj "
    "self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
).split()
ALONE = "fc norm lm_head".split()


@pytest.fixture(scope="module")
def head():
    target = Target(LLAMA, init(LLAMA, jax.random.key(0)))
    head = init_eagle3(target, jax.random.key(1), layers=(0, 1, 1), vocabulary=VOCABULARY)
    return replace(head, norm_before_residual=True)


@pytest.mark.parametrize("layout", LAYER)
def test_a_head_is_read_as_it_was_written(head, tmp_path, layout):
    export_eagle3(tmp_path / "head", head, LLAMA, layout, dtype=jnp.float32, verifier="its")
    assert is_eagle3(tmp_path / "head")
    index = open_index(tmp_path / "head")
    names = {f"{LAYER[layout]}.{name}.weight" for name in IN_LAYER}
    assert set(index.names()) == names | {f"{name}.weight" for name in ALONE} | {"d2t", "t2d"}
    offsets = index.read("d2t")
    assert offsets.dtype == np.int64 and (offsets + np.arange(8) == np.asarray(VOCABULARY)).all()
    assert index.dtype("t2d") == np.bool_ and np.flatnonzero(index.read("t2d")).tolist() == list(
        VOCABULARY
    )
    found = read_eagle3(tmp_path / "head", LLAMA)
    assert found.config == head.config and found.layers == head.layers
    assert found.norm_before_residual and found.count == head.count
    assert jax.tree.structure(found.params) == jax.tree.structure(head.params)
    for own, its in zip(*map(jax.tree.leaves, (found.params, head.params)), strict=True):
        np.testing.assert_array_equal(own, its)


def test_layers_have_the_numbers_of_each_convention(head, tmp_path):
    """Behind layer i is i with the reference, and i + 1, the next one's input, with speculators."""
    for layout in get_args(Layout):
        export_eagle3(tmp_path / layout, head, LLAMA, layout)
    own, its = (json.loads((tmp_path / name / "config.json").read_text()) for name in LAYER)
    assert own["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 1]
    assert its["eagle_aux_hidden_state_layer_ids"] == [1, 2, 2]
    assert own["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (own["vocab_size"], own["draft_vocab_size"]) == (64, 8)
    assert its["architectures"] == ["Eagle3Speculator"]
    assert its["speculators_model_type"] == "eagle3" and its["norm_before_residual"] is True
    assert its["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == head.count
    assert its["transformer_layer_config"]["vocab_size"] == 64


def test_a_head_as_the_reference_publishes_it(head, tmp_path):
    """Without layers, which are the usual three, without rope_theta, which is 10000 whatever the
    model has, and with an embedding of its own."""
    export_eagle3(tmp_path / "head", head, LLAMA, dtype=jnp.float32)
    file = tmp_path / "head" / "config.json"
    fields = json.loads(file.read_text())
    for key in ("eagle_config", "rope_theta", "norm_before_residual"):
        del fields[key]
    file.write_text(json.dumps(fields))
    index = open_index(tmp_path / "head")
    tensors = {name: index.read(name) for name in index.names()}
    table = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    (tmp_path / "head" / "model.safetensors").unlink()
    write_sharded(tmp_path / "head", tensors | {"embed_tokens.weight": table})
    model = replace(LLAMA, rope=replace(LLAMA.rope, theta=5e5))
    found = read_eagle3(tmp_path / "head", model, count=2, dtype="bfloat16")
    assert found.layers == (1, 0, 0) and not found.norm_before_residual and found.count == 2
    assert found.config.rope.theta == 10000.0 and found.config.dtype == "bfloat16"
    np.testing.assert_array_equal(found.params["embed_tokens"]["weight"], table)


def test_quantized_weights_are_written_as_their_values(head, tmp_path):
    weight = quantize_array(head.params["lm_head"]["weight"], "int8", granularity="channel")
    params = head.params | {"lm_head": {"weight": weight}}
    export_eagle3(tmp_path / "head", replace(head, params=params), LLAMA, dtype=jnp.float32)
    found = read_eagle3(tmp_path / "head", LLAMA).params["lm_head"]["weight"]
    np.testing.assert_array_equal(found, weight.dequantize(jnp.float32))


def broken(directory, head, fields=None, tensors=None):
    """A head's directory with changed keys and tensors; None removes one."""
    export_eagle3(directory, head, LLAMA, dtype=jnp.float32)
    file, index = directory / "config.json", open_index(directory)
    changed = json.loads(file.read_text()) | (fields or {})
    file.write_text(json.dumps(changed))
    all_tensors = {name: index.read(name) for name in index.names()} | (tensors or {})
    (directory / "model.safetensors").unlink()
    write_sharded(directory, {name: t for name, t in all_tensors.items() if t is not None})


@pytest.mark.parametrize(
    "fields, tensors, problem",
    [
        ({}, {"fc.weight": None}, "tensor 'fc.weight' of a draft head is missing"),
        ({}, {"norm.weight": np.ones(3, np.float32)}, "tensor 'norm.weight' has shape"),
        ({}, {"more": np.ones(3, np.float32)}, "tensor 'more' has no place in an EAGLE-3 head"),
        ({}, {"d2t": np.full(8, 60)}, "'d2t' does not name 8 rising tokens among the model's 64"),
        ({}, {"t2d": np.zeros(64, bool)}, "'d2t' and 't2d' name different tokens"),
        ({"fc_norm": True}, {}, "option 'fc_norm' of a draft head is not supported"),
        ({"norm_output": False}, {}, "option 'norm_output' of a draft head is not supported"),
        ({"num_hidden_layers": 2}, {}, "a draft head of 2 layers, not of one"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}}, {}, "model has 2"),
    ],
)
def test_what_is_no_head_of_the_model_is_refused(head, tmp_path, fields, tensors, problem):
    broken(tmp_path / "head", head, fields, tensors)
    with pytest.raises(UserError, match=problem):
        read_eagle3(tmp_path / "head", LLAMA)


def test_nothing_is_overwritten_or_half_written(head, tmp_path):
    (tmp_path / "head").mkdir()
    with pytest.raises(UserError, match="already exists; choose another directory"):
        export_eagle3(tmp_path / "head", head, LLAMA)
    with pytest.raises(UserError, match="layout 'vllm' is unknown; choose eagle3, speculators"):
        export_eagle3(tmp_path / "new", head, LLAMA, "vllm")  # pyright: ignore[reportArgumentType]
    nan = head.params | {"norm": {"weight": jnp.full(32, jnp.nan)}}
    with pytest.raises(UserError, match="'norm.weight' holds NaN"):
        export_eagle3(tmp_path / "new", replace(head, params=nan), LLAMA)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]
    assert not is_eagle3(tmp_path / "head")
    with pytest.raises(UserError, match="cannot be read"):
        read_eagle3(tmp_path / "head", LLAMA)
