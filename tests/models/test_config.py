"""Reading `config.json`: what is understood, what is refused and how, and the way back."""

import json

import pytest

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig, Rope

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
_GEMMA = _LLAMA | {"model_type": "gemma3_text", "num_key_value_heads": 1}
_QWEN = _LLAMA | {"model_type": "qwen3"}
_MIXTRAL = _LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = _LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def _without(hf, key):
    return {k: v for k, v in hf.items() if k != key}


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            _LLAMA | {"model_type": "gpt2"},
            "config.json: model_type 'gpt2' is not supported; supported are gemma3_text, llama, "
            "mistral, mixtral, qwen2, qwen3, qwen3_moe",
        ),
        (
            _without(_LLAMA, "model_type"),
            "config.json: model_type None is not supported; ",
        ),
        (
            _LLAMA | {"alibi": True},
            "config.json: option 'alibi' is not supported for model_type 'llama'; if it does not "
            "change the computation, remove it from the file",
        ),
        (_LLAMA | {"qk_layernorm": 3}, "option 'qk_layernorm' is not supported for model_type"),
        (
            _LLAMA | {"num_experts": 4},
            "option 'num_experts' is not supported for model_",
        ),
        (
            _LLAMA | {"partial_rotary_factor": 0.5},
            "config.json: partial_rotary_factor other than 1 is not supported",
        ),
        (
            _without(_LLAMA, "hidden_size"),
            "config.json: key 'hidden_size' is missing, which model_type 'llama' needs",
        ),
        (
            _without(_MIXTRAL, "num_local_experts"),
            "config.json: key 'num_local_experts' is missing, which model_type 'mixtral' needs",
        ),
        (
            _without(_QWEN_MOE, "num_experts"),
            "config.json: key 'num_experts' is missing, which model_type 'qwen3_moe' needs",
        ),
        (
            _LLAMA | {"rope_scaling": {"type": "linear"}},
            "config.json: key 'factor' is missing, which model_type 'llama' needs",
        ),
        (
            _LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "config.json: rope_scaling type 'yarn' is not supported; "
            "supported are default, linear, llama3",
        ),
        (
            _LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "config.json: rope_scaling type 'dynamic' is not supported",
        ),
        (
            _LLAMA | {"hidden_act": "gelu"},
            "config.json: activation 'gelu' is not supported; supported are silu, swish, gelu_",
        ),
        (
            _QWEN | {"layer_types": ["full_attention"] * 2},
            "config.json: layer_types must hold 3 entries of full_attention, sliding_attention; "
            "it holds 2",
        ),
        (
            _QWEN | {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            "it holds 3, among them 'chunked_attention'",
        ),
        (
            _QWEN | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            "config.json: layers use sliding attention but sliding_window is missing",
        ),
        (
            _LLAMA | {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4},
            "config.json: layer_types say otherwise than the other keys, and model_type 'llama' "
            "ignores them; remove layer_types or make them agree",
        ),
        (
            _GEMMA | {"use_bidirectional_attention": True},
            "config.json: use_bidirectional_attention is not supported, only causal decoders are",
        ),
        (
            _LLAMA | {"num_attention_heads": "four"},
            "config.json: a value has the wrong type for model_type 'llama' (invalid literal",
        ),
        (
            _LLAMA | {"rope_scaling": {"type": "linear", "factor": [2]}},
            "config.json: a value has the wrong type for model_type 'llama' (float",
        ),
    ],
)
def test_what_is_refused(hf, message):
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(hf)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_that_do_not_compute_are_ignored():
    plain = ModelConfig.from_hf(_LLAMA)
    noise = {"torch_dtype": "bfloat16", "_name_or_path": "x", "use_cache": True, "new": False}
    assert ModelConfig.from_hf(_LLAMA | noise) == plain
    assert ModelConfig.from_hf(_LLAMA | {"alibi": True}, ignore=("alibi",)) == plain
    assert ModelConfig.from_hf(_LLAMA | {"rope_scaling": None, "head_dim": None}) == plain


def test_defaults_of_a_short_file():
    config = ModelConfig.from_hf(_LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.query_scale) == (4, 8, 8**-0.5)
    assert (config.activation, config.dtype) == ("silu", "float32")
    assert config.rope == config.local_rope == Rope(10000.0)
    assert config.attention_kinds == ("full",) * 3 and config.sliding_window is None
    assert not config.tie_word_embeddings and config.eos_token_ids == ()


def test_gemma_leaves_its_defaults_out_of_the_file():
    config = ModelConfig.from_hf(_GEMMA | {"num_hidden_layers": 7})
    assert config.tie_word_embeddings and config.head_dim == 256 and config.sliding_window == 4096
    assert config.attention_kinds == ("sliding",) * 5 + ("full", "sliding")
    assert (config.rope, config.local_rope) == (Rope(1e6), Rope(10000.0))
    assert config.activation == "gelu_tanh" and config.query_scale == 1 / 16
    assert config.embed_scale == pytest.approx(32**0.5)


def test_multimodal_gemma_is_read_through_its_text_config():
    text = _without(_GEMMA, "model_type")
    both = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 9}}
    assert ModelConfig.from_hf(both) == ModelConfig.from_hf(_GEMMA)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (2, (2,)), ([2, 5], (2, 5))])
def test_end_tokens_are_one_or_many(value, ids):
    config = ModelConfig.from_hf(_LLAMA | {"eos_token_id": value})
    assert config.eos_token_ids == ids
    assert config.to_hf()["eos_token_id"] == value


def test_windows_by_architecture():
    """One window for all layers, one from some layer on, or none although a size is given."""
    sliding = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    kinds = {
        name: ModelConfig.from_hf(hf | sliding).attention_kinds
        for name, hf in {"qwen3": _QWEN, "qwen3_moe": _QWEN_MOE}.items()
    }
    assert kinds == {"qwen3": ("full", "full", "sliding"), "qwen3_moe": ("sliding",) * 3}
    off = ModelConfig.from_hf(_QWEN | sliding | {"use_sliding_window": False})
    assert off.attention_kinds == ("full",) * 3 and off.sliding_window is None
    assert ModelConfig.from_hf(_MIXTRAL | {"sliding_window": 5}).attention_kinds[0] == "sliding"


def test_layer_types_may_repeat_what_the_other_keys_say():
    named = _QWEN_MOE | {"layer_types": ["full_attention"] * 3}
    assert ModelConfig.from_hf(named) == ModelConfig.from_hf(_QWEN_MOE)


def test_layers_of_experts():
    step = ModelConfig.from_hf(_QWEN_MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2})
    assert step.moe_layers == (1, 3, 5)
    dense = ModelConfig.from_hf(_QWEN_MOE | {"mlp_only_layers": [1]})
    assert dense.moe_layers == (0, 2)
    for config in (step, dense):
        assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "hf",
    [
        _LLAMA | {"attention_bias": True, "mlp_bias": True, "rope_theta": 5e5},
        _LLAMA
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        _LLAMA | {"model_type": "mistral", "sliding_window": 8},
        _QWEN | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9},
        _GEMMA | {"final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
        _MIXTRAL,
        _QWEN_MOE | {"norm_topk_prob": True},
        _QWEN_MOE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ],
    ids=lambda hf: hf["model_type"],
)
def test_the_way_back(hf):
    config = ModelConfig.from_hf(hf)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    again = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields | {"from_the_future": 1},
        lambda fields: _without(fields, "vocab_size"),
        lambda fields: _without(fields, "rope"),
        lambda fields: fields | {"rope": {"theta": 1.0, "spiral": True}},
    ],
)
def test_fields_of_another_version(change):
    fields = ModelConfig.from_hf(_LLAMA).to_json()
    with pytest.raises(
        UserError, match="does not fit this version of the library .*; read it with"
    ):
        ModelConfig.from_json(change(fields))
