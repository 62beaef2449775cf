"""Hugging Face `config.json` to `ModelConfig` and back: one table row for each architecture."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import AttentionKind, ModelConfig, Rope

_KINDS: dict[str, AttentionKind] = {"full_attention": "full", "sliding_attention": "sliding"}

# Keys of config.json that name things outside the forward computation.
_BOOKKEEPING = frozenset(
    """architectures model_type torch_dtype dtype transformers_version use_cache initializer_range
    pad_token_id
    attention_dropout pretraining_tp output_router_logits router_aux_loss_coef cache_implementation
    name_or_path
    is_llama_config rope_interleaved hidden_dropout chunk_size_feed_forward is_encoder_decoder
    id2label label2id
    output_attentions output_hidden_states return_dict problem_type tf_legacy_loss use_bfloat16
    task_specific_params
    unsloth_fixed unsloth_version quantization_config tokenizer_class finetuning_task
    transformers.js_config
    add_cross_attention is_decoder cross_attention_hidden_size head_dim_original router_jitter_noise
    gradient_checkpointing
    """.split()
)
# Keys every architecture reads here; each architecture adds its own.
_COMMON = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim
    hidden_act hidden_activation rms_norm_eps max_position_embeddings tie_word_embeddings rope_theta
    rope_scaling rope_parameters bos_token_id eos_token_id partial_rotary_factor layer_types
    sliding_window""".split()
)


def _llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    bias = hf.get("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": hf.get("mlp_bias", False)}


def _mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_kinds": _uniform(hf, "sliding" if hf.get("sliding_window") else "full")}


def _qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, "attention_kinds": _qwen_kinds(hf)}


def _qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    bias = hf.get("attention_bias", False)
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, "attention_kinds": _qwen_kinds(hf)}


def _gemma3(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("use_bidirectional_attention"):
        raise UserError(
            "config.json: use_bidirectional_attention is not supported, only causal decoders are"
        )
    layers = int(hf.get("num_hidden_layers", 26))
    every = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6))
    kinds = tuple("full" if (i + 1) % every == 0 else "sliding" for i in range(layers))
    return {
        "attention_kinds": kinds,
        "qkv_bias": hf.get("attention_bias", False),
        "o_bias": hf.get("attention_bias", False),
        "qk_norm": True,
        "unit_offset_norm": True,
        "sandwich_norm": True,
        "embed_scale": math.sqrt(hf["hidden_size"]),
        "query_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": hf.get("attn_logit_softcapping"),
        "final_softcap": hf.get("final_logit_softcapping"),
    }


def _mixtral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _mistral(hf) | {
        "moe_layers": tuple(range(hf["num_hidden_layers"])),
        "num_experts": hf["num_local_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "expert_size": hf["intermediate_size"],
        "normalize_router": True,
    }


def _qwen3_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
    layers = range(hf["num_hidden_layers"])
    # transformers applies its window to every layer of this architecture.
    kinds = _uniform(hf, "sliding" if hf.get("use_sliding_window") else "full")
    return _qwen3(hf) | {
        "attention_kinds": kinds,
        "moe_layers": tuple(i for i in layers if i not in dense and (i + 1) % step == 0),
        # transformers 5 renames the published key when it saves.
        "num_experts": hf["num_local_experts" if "num_local_experts" in hf else "num_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "expert_size": hf["moe_intermediate_size"],
        "normalize_router": hf.get("norm_topk_prob", False),
    }


@dataclass(frozen=True)
class _Architecture:
    """How one `model_type` reads its config, and the keys that it reads beyond the common ones."""

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    class_name: str
    keys: frozenset[str] = frozenset()
    defaults: tuple[tuple[str, Any], ...] = ()


# The others give all layers the same attention in transformers, whatever layer_types say.
_MIXED_ATTENTION = ("qwen2", "qwen3", "gemma3_text")
_QWEN_KEYS = frozenset({"use_sliding_window", "max_window_layers", "attention_bias"})
_ARCHITECTURES = {
    "llama": _Architecture(_llama, "LlamaForCausalLM", frozenset({"attention_bias", "mlp_bias"})),
    "mistral": _Architecture(_mistral, "MistralForCausalLM"),
    "qwen2": _Architecture(_qwen2, "Qwen2ForCausalLM", _QWEN_KEYS - {"attention_bias"}),
    "qwen3": _Architecture(_qwen3, "Qwen3ForCausalLM", _QWEN_KEYS),
    "gemma3_text": _Architecture(
        _gemma3,
        "Gemma3ForCausalLM",
        frozenset(
            """attention_bias query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping
            rope_local_base_freq
            sliding_window_pattern use_bidirectional_attention""".split()
        ),
        # transformers leaves out of the file what equals its defaults.
        (
            ("tie_word_embeddings", True),
            ("head_dim", 256),
            ("rope_theta", 1e6),
            ("sliding_window", 4096),
        ),
    ),
    "mixtral": _Architecture(
        _mixtral, "MixtralForCausalLM", frozenset({"num_local_experts", "num_experts_per_tok"})
    ),
    "qwen3_moe": _Architecture(
        _qwen3_moe,
        "Qwen3MoeForCausalLM",
        _QWEN_KEYS
        | frozenset(
            """num_experts num_local_experts num_experts_per_tok moe_intermediate_size
            norm_topk_prob decoder_sparse_step
            mlp_only_layers""".split()
        ),
    ),
}


def read_hf(hf: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> ModelConfig:
    """Implements `ModelConfig.from_hf`."""
    if hf.get("model_type") == "gemma3" and "text_config" in hf:
        hf = {"model_type": "gemma3_text", **hf["text_config"]}
    kind = hf.get("model_type")
    architecture = _ARCHITECTURES.get(str(kind))
    if architecture is None:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise UserError(f"config.json: model_type {kind!r} is not supported; supported are {known}")
    hf = dict(architecture.defaults) | {key: v for key, v in hf.items() if v is not None}
    _refuse_unknown(hf, architecture.keys, ignore)
    try:
        layers, heads = int(hf["num_hidden_layers"]), int(hf["num_attention_heads"])
        head_dim = int(hf.get("head_dim", hf["hidden_size"] // heads))
        rope, local_rope = _ropes(hf)
        fields = {
            "model_type": str(kind),
            "vocab_size": int(hf["vocab_size"]),
            "hidden_size": int(hf["hidden_size"]),
            "intermediate_size": int(hf["intermediate_size"]),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": int(hf.get("num_key_value_heads", heads)),
            "head_dim": head_dim,
            "rope": rope,
            "local_rope": local_rope,
            "attention_kinds": _uniform(hf, "full"),
            "sliding_window": hf.get("sliding_window"),
            "query_scale": head_dim**-0.5,
            "rms_norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
            "max_position": int(hf.get("max_position_embeddings", 2048)),
            "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "activation": _activation(hf),
            "bos_token_id": hf.get("bos_token_id"),
            "eos_token_ids": _token_ids(hf.get("eos_token_id")),
        } | architecture.read(hf)
    except KeyError as error:
        raise UserError(
            f"config.json: key {error} is missing, which model_type {kind!r} needs"
        ) from error
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"config.json: a value has the wrong type for model_type {kind!r} ({error}); "
            "compare the file with the published one"
        ) from error
    if "layer_types" in hf:
        named = _layer_types(hf["layer_types"], layers)
        if kind not in _MIXED_ATTENTION and named != fields["attention_kinds"]:
            raise UserError(
                "config.json: layer_types say otherwise than the other keys, and model_type "
                f"{kind!r} ignores them; remove layer_types or make them agree"
            )
        fields["attention_kinds"] = named
    if "sliding" not in fields["attention_kinds"]:
        fields["sliding_window"] = None
    elif fields["sliding_window"] is None:
        raise UserError("config.json: layers use sliding attention but sliding_window is missing")
    return ModelConfig(**fields)


def _refuse_unknown(hf: Mapping[str, Any], keys: frozenset[str], ignore: tuple[str, ...]) -> None:
    known = _COMMON | _BOOKKEEPING | keys | frozenset(ignore)
    unknown = sorted(
        key for key in hf if key not in known and not key.startswith("_") and hf[key] is not False
    )
    if unknown:
        raise UserError(
            f"config.json: option {unknown[0]!r} is not supported for model_type "
            f"{hf['model_type']!r}; if it does not change the computation, "
            "remove it from the file"
        )
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported")


def _activation(hf: Mapping[str, Any]) -> str:
    name = hf.get("hidden_activation", hf.get("hidden_act"))
    if name is None:
        name = "gelu_pytorch_tanh" if hf["model_type"] == "gemma3_text" else "silu"
    table = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in table:
        raise UserError(
            f"config.json: activation {name!r} is not supported; supported are {', '.join(table)}"
        )
    return table[name]


def _uniform(hf: Mapping[str, Any], kind: AttentionKind) -> tuple[AttentionKind, ...]:
    return (kind,) * int(hf["num_hidden_layers"])


def _qwen_kinds(hf: Mapping[str, Any]) -> tuple[AttentionKind, ...]:
    first = (
        hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else hf["num_hidden_layers"]
    )
    return tuple("full" if i < first else "sliding" for i in range(hf["num_hidden_layers"]))


def _layer_types(names: list[str], layers: int) -> tuple[AttentionKind, ...]:
    unknown = [name for name in names if name not in _KINDS]
    if unknown or len(names) != layers:
        raise UserError(
            f"config.json: layer_types must hold {layers} entries of {', '.join(_KINDS)}; "
            f"it holds {len(names)}{f', among them {unknown[0]!r}' if unknown else ''}"
        )
    return tuple(_KINDS[name] for name in names)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _ropes(hf: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """Rotary embeddings of full and of sliding layers, from old keys or `rope_parameters`."""
    theta = hf.get("rope_theta", 10000.0)
    table = hf.get("rope_parameters")
    if table is None:
        rope = _rope(hf.get("rope_scaling") or {}, theta)
        local = hf.get("rope_local_base_freq", 10000.0)
        return rope, Rope(local) if hf["model_type"] == "gemma3_text" else rope
    if "full_attention" in table:
        return _rope(table["full_attention"], theta), _rope(
            table.get("sliding_attention", {}), 10000.0
        )
    rope = _rope(table, theta)
    return rope, rope


def _rope(fields: Mapping[str, Any], theta: float) -> Rope:
    kind = fields.get("rope_type", fields.get("type", "default"))
    theta = float(fields.get("rope_theta", theta))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", float(fields["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            float(fields["factor"]),
            float(fields["low_freq_factor"]),
            float(fields["high_freq_factor"]),
            int(fields["original_max_position_embeddings"]),
        )
    raise UserError(
        f"config.json: rope_scaling type {kind!r} is not supported; "
        "supported are default, linear, llama3"
    )


def write_hf(config: ModelConfig) -> dict[str, Any]:
    """Implements `ModelConfig.to_hf`."""
    names = {kind: name for name, kind in _KINDS.items()}
    eos = list(config.eos_token_ids)
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type].class_name],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu" if config.activation == "silu" else "gelu_pytorch_tanh",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config.rope),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    if config.model_type in ("llama", "qwen3", "qwen3_moe", "gemma3_text"):
        hf["attention_bias"] = config.qkv_bias
    if config.model_type == "llama":
        hf["mlp_bias"] = config.mlp_bias
    else:
        hf["sliding_window"] = config.sliding_window
    if config.model_type.startswith(("qwen", "gemma")):
        hf["layer_types"] = [names[kind] for kind in config.attention_kinds]
    if config.model_type.startswith("qwen"):
        hf["use_sliding_window"] = config.sliding_window is not None
        hf["max_window_layers"] = sum(kind == "full" for kind in config.attention_kinds)
    return hf | _family_to_hf(config)


def _family_to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.model_type == "gemma3_text":
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _whole(config.query_scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
            "rope_local_base_freq": config.local_rope.theta,
        }
    if config.model_type == "mixtral":
        return {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
        }
    if config.model_type == "qwen3_moe":
        return {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.expert_size,
            "norm_topk_prob": config.normalize_router,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(config.num_layers) if i not in config.moe_layers],
        }
    return {}


def _whole(value: float) -> int | float:
    """An integer where the value is one up to rounding; transformers refuses 256.0 for 256."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    fields: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        fields |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return fields
