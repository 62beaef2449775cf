"""DFlash heads in the files that other engines read, and as those publish them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import LLAMA

from jaxopt_models.checkpoint.safetensors import open_index
from jaxopt_models.checkpoint.safetensors_writer import write_sharded
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import Rope
from jaxopt_models.models.transformer import init
from jaxopt_models.qtensor import quantize_array
from jaxopt_models.speculative import DFlash, Target, init_dflash
from jaxopt_models.speculative.dflash_files import export_dflash, is_dflash, read_dflash
from jaxopt_models.speculative.named import as_tree, load_drafter

ROPE = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
MODEL = replace(LLAMA, rope=ROPE, local_rope=ROPE, num_layers=3, attention_kinds=("full",) * 3)
IN_LAYER = (
    "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    "self_attn.o_proj self_attn.q_norm self_attn.k_norm mlp.gate_proj mlp.up_proj mlp.down_proj"
).split()


@pytest.fixture(scope="module")
def head():
    target = Target(MODEL, init(MODEL, jax.random.key(0)))
    return init_dflash(target, jax.random.key(1), mask_token=60, layers=(0, 2), depth=2, block=6)


def test_a_head_is_read_as_it_was_written(head, tmp_path):
    export_dflash(tmp_path / "head", head, MODEL, dtype=jnp.float32)
    assert is_dflash(tmp_path / "head") and not is_dflash(tmp_path)
    index = open_index(tmp_path / "head")
    names = {f"layers.{i}.{name}.weight" for i in range(2) for name in IN_LAYER}
    assert set(index.names()) == names | {"fc.weight", "hidden_norm.weight", "norm.weight"}
    assert index.shape("fc.weight") == (32, 64)
    found = read_dflash(tmp_path / "head", MODEL)
    assert jax.tree.structure(found) == jax.tree.structure(head)  # all that is static, too
    for own, its in zip(*map(jax.tree.leaves, (found, head)), strict=True):
        np.testing.assert_array_equal(own, its)
    assert read_dflash(tmp_path / "head", MODEL, count=2).count == 2
    drafter = load_drafter(str(tmp_path / "head"), MODEL)
    assert isinstance(drafter, DFlash) and as_tree(drafter, "2,3,5").head is drafter


def test_the_config_is_that_of_the_reference(head, tmp_path):
    """Behind layer i of the model is i, without the one that vLLM's own numbers have more."""
    export_dflash(tmp_path / "head", head, MODEL)
    fields = json.loads((tmp_path / "head" / "config.json").read_text())
    assert fields["architectures"] == ["DFlashDraftModel"] and fields["model_type"] == "qwen3"
    assert fields["block_size"] == 6 and fields["num_target_layers"] == 3
    assert fields["dflash_config"] == {"mask_token_id": 60, "target_layer_ids": [0, 2]}
    assert fields["layer_types"] == ["full_attention"] * 2 and fields["num_hidden_layers"] == 2
    assert fields["vocab_size"] == 64 and fields["hidden_size"] == 32
    assert fields["rope_theta"] == 500000.0 and fields["rope_scaling"]["factor"] == 8.0
    assert fields["torch_dtype"] == "bfloat16"


def changed(directory, head, fields=None, tensors=None):
    """A head's directory with changed keys and tensors; None removes one."""
    export_dflash(directory, head, MODEL, dtype=jnp.float32)
    file, index = directory / "config.json", open_index(directory)
    all_fields = json.loads(file.read_text()) | (fields or {})
    file.write_text(json.dumps({k: v for k, v in all_fields.items() if v is not None}))
    all_tensors = {name: index.read(name) for name in index.names()} | (tensors or {})
    (directory / "model.safetensors").unlink()
    write_sharded(directory, {name: t for name, t in all_tensors.items() if t is not None})


def test_a_head_as_others_publish_it(head, tmp_path):
    """With its own keys inside dflash_config or beside it, and with factors that are its own."""
    inside = {"mask_token_id": 60, "target_layer_ids": [0, 2], "block_size": 6}
    more = {"input_embedding_scale": 2.0, "final_logit_softcapping": 30.0, "is_causal": False}
    changed(tmp_path / "inside", head, {"dflash_config": inside | more, "block_size": None})
    found = read_dflash(tmp_path / "inside", MODEL)
    assert (found.block, found.layers, found.mask_token) == (6, (0, 2), 60)
    assert (found.config.embed_scale, found.config.final_softcap) == (2.0, 30.0)
    export_dflash(tmp_path / "again", found, MODEL, dtype=jnp.float32)
    assert read_dflash(tmp_path / "again", MODEL).config == found.config
    published = {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "max_window_layers": 2}
    beside = {"dflash_config": None, "sliding_window": None} | published | inside
    changed(tmp_path / "beside", head, beside)
    assert jax.tree.structure(read_dflash(tmp_path / "beside", MODEL)) == jax.tree.structure(head)


def test_quantized_weights_are_written_as_their_values(head, tmp_path):
    weight = quantize_array(head.params["fc"]["weight"], "int8", granularity="channel")
    quantized = replace(head, params=head.params | {"fc": {"weight": weight}})
    export_dflash(tmp_path / "head", quantized, MODEL, dtype=jnp.float32)
    found = read_dflash(tmp_path / "head", MODEL).params["fc"]["weight"]
    np.testing.assert_array_equal(found, weight.dequantize(jnp.float32))


def own(**changes):
    return {"dflash_config": {"mask_token_id": 60, "target_layer_ids": [0, 2]} | changes}


@pytest.mark.parametrize(
    "fields, tensors, problem",
    [
        ({}, {"fc.weight": None}, "tensor 'fc.weight' of a draft head is missing"),
        ({}, {"norm.weight": np.ones(3, np.float32)}, "tensor 'norm.weight' has shape"),
        ({}, {"lm_head.weight": np.ones(3, np.float32)}, "'lm_head.weight' has no place in a DF"),
        (own(mask_token_id=64), {}, "mask_token is 64, and the model has tokens 0 to 63"),
        (own(mask_token_id=None), {}, "key 'mask_token_id' of a draft head is None, not a number"),
        (own(target_layer_ids=[]), {}, r"key 'target_layer_ids' of a draft head is \[\], not num"),
        (own(target_layer_ids=[0, 3]), {}, r"reads layers \[0, 3\], and the model has 3"),
        (own(target_layer_ids=[1]), {}, r"'fc.weight' has shape \[32, 64\] where .* \[32, 32\]"),
        (own(use_swa=True), {}, "option 'use_swa' of a draft head is not supported"),
        (own(selector_rank=4), {}, "option 'selector_rank' of a draft head is not supported"),
        ({"is_causal": True}, {}, "option 'is_causal' of a draft head is not supported"),
        ({"block_size": None}, {}, "key 'block_size' of a draft head is None"),
        ({"num_target_layers": 36}, {}, "of a model of 36 layers, and this one has 3"),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
            {},
            "those of qwen3 with full attention, and these are of qwen3 with sliding",
        ),
    ],
)
def test_what_is_no_head_of_the_model_is_refused(head, tmp_path, fields, tensors, problem):
    changed(tmp_path / "head", head, fields, tensors)
    with pytest.raises(UserError, match=problem):
        read_dflash(tmp_path / "head", MODEL)


def test_nothing_is_overwritten_or_half_written(head, tmp_path):
    (tmp_path / "head").mkdir()
    with pytest.raises(UserError, match="already exists; choose another directory"):
        export_dflash(tmp_path / "head", head, MODEL)
    nan = head.params | {"norm": {"weight": jnp.full(32, jnp.nan)}}
    with pytest.raises(UserError, match="'norm.weight' holds NaN"):
        export_dflash(tmp_path / "new", replace(head, params=nan), MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]
