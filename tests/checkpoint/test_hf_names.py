"""Names of tensors in Hugging Face checkpoints."""

import pytest

from jaxopt_models.checkpoint.hf_names import hf_names, may_be_ignored, text_tensors
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.tree import leaves_with_paths


def test_leaves_and_tensors_match_one_to_one(golden_name, golden):
    hf, tensors = golden(golden_name)
    config = ModelConfig.from_hf(hf)
    leaves = leaves_with_paths(abstract_params(config))
    names = [name for path, _ in leaves for name in hf_names(config, path)]
    assert sorted(names) == sorted(tensors)


def test_experts_come_in_order(golden):
    mixtral = ModelConfig.from_hf(golden("mixtral")[0])
    names = hf_names(mixtral, "layers/1/mlp/experts/up_proj/weight")
    prefix = "model.layers.1.block_sparse_moe.experts"
    assert names == tuple(f"{prefix}.{e}.w3.weight" for e in range(8))
    gate, down = (
        hf_names(mixtral, f"layers/1/mlp/experts/{p}_proj/weight")[5] for p in ("gate", "down")
    )
    assert (gate, down) == (f"{prefix}.5.w1.weight", f"{prefix}.5.w2.weight")


def test_names_of_scales_follow_those_of_weights(golden):
    qwen = ModelConfig.from_hf(golden("qwen3_moe")[0])
    names = hf_names(qwen, "layers/0/mlp/experts/gate_proj/weight_scale_inv")
    assert names[7] == "model.layers.0.mlp.experts.7.gate_proj.weight_scale_inv"
    assert hf_names(qwen, "layers/0/mlp/router/weight") == ("model.layers.0.mlp.gate.weight",)


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
    ],
)
def test_text_model_is_found_in_every_layout(body, head):
    stored = [f"{body}embed_tokens.weight", f"{body}layers.0.mlp.up_proj.weight", f"{head}weight"]
    towers = ["vision_tower.x", "model.vision_tower.x", "model.multi_modal_projector.y"]
    found = text_tensors([*stored, *(towers if body != "model." else [])])
    plain = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    assert found == dict(zip(plain, stored, strict=True))


def test_what_may_be_ignored(golden):
    tied = ModelConfig.from_hf(golden("smollm2")[0])
    untied = ModelConfig.from_hf(golden("llama2")[0])
    assert may_be_ignored(tied, "lm_head.weight") and not may_be_ignored(untied, "lm_head.weight")
    assert may_be_ignored(untied, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not may_be_ignored(tied, "model.norm.weight")
