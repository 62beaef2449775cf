"""Reads a GGUF file as a model: its metadata as a config, its tensors as weights.

What the format changes and this module changes back:
  - Llama's rows of q and k are stored in pairs (2j, 2j+1) to rotate, not in halves (j, j + d/2);
  - Gemma's norms are stored as 1 + w;
  - Llama 3 stores the rescaling of its rotary frequencies as a tensor instead of its parameters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.checkpoint.gguf_file import GgufFile
from jaxopt_models.checkpoint.weights import Place, as_weight, check_shape, copy_to_device
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.tree import map_with_path

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
# Keys of metadata, behind "<architecture>.", and what config.json calls them.
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_REQUIRED = tuple(_KEYS)[:5] + ("attention.layer_norm_rms_epsilon",)
_MODULES = {
    "self_attn/q_proj": "attn_q",
    "self_attn/k_proj": "attn_k",
    "self_attn/v_proj": "attn_v",
    "self_attn/o_proj": "attn_output",
    "self_attn/q_norm": "attn_q_norm",
    "self_attn/k_norm": "attn_k_norm",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_MODULES = _MODULES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_ROPE_FACTORS = "rope_freqs.weight"


def read_config(path: str | Path) -> ModelConfig:
    """Reads the metadata as a `ModelConfig`.

    Raises:
      UserError: for an architecture other than llama (Mistral and SmolLM included), qwen2, qwen3,
        gemma3, and for options of theirs that are not supported.
    """
    return _config(GgufFile(path))


def read_params(
    path: str | Path, config: ModelConfig, *, dtype: Any = jnp.bfloat16, place: Place | None = None
) -> Any:
    """Reads and dequantizes the weights into the tree of `abstract_params(config)`.

    Args:
      path: of the file.
      config: from `read_config`.
      dtype: of the weights. The file's own 4- to 8-bit numbers fit in bfloat16 only rounded; the
        rounding is small beside what the quantization took away.
      place: `place(path, array)` decides where an array goes.

    Raises:
      UserError: naming the tensor that is missing, misshapen, left over, not finite or of a type
        that is not supported.
    """
    file = GgufFile(path)
    place, target, used = place or copy_to_device, jnp.dtype(dtype), {_ROPE_FACTORS}

    def leaf(path: str, expected: jax.ShapeDtypeStruct) -> Any:
        name = _tensor_name(config, path)
        used.add(name)
        where = f"{file.path}: tensor {name!r}"
        check_shape(where, file.shape(name), expected.shape)
        array = _restored(config, path, file.read(name, _read_dtype(config, path, target)))
        return place(path, as_weight(where, array, target))

    params = map_with_path(leaf, abstract_params(config))
    left_over = sorted(set(file.names()) - used)
    if left_over:
        raise UserError(
            f"{file.path}: tensor {left_over[0]!r} has no place in a {config.model_type} model; "
            "the model has parts that are not supported"
        )
    return params


def _tensor_name(config: ModelConfig, path: str) -> str:
    """`layers/3/self_attn/q_proj/weight` is `blk.3.attn_q.weight`."""
    module, _, leaf = path.rpartition("/")
    if not module.startswith("layers/"):
        return f"{_TOP[module]}.{leaf}"
    _, layer, module = module.split("/", 2)
    modules = _GEMMA_MODULES if config.sandwich_norm else _MODULES
    return f"blk.{layer}.{modules[module]}.{leaf}"


def _is_offset_norm(config: ModelConfig, path: str) -> bool:
    return config.unit_offset_norm and path.endswith("norm/weight")


def _read_dtype(config: ModelConfig, path: str, dtype: np.dtype) -> np.dtype:
    """Norms that an offset is taken from come in full precision, the rest in the final dtype."""
    return np.dtype(np.float32) if _is_offset_norm(config, path) else dtype


def _restored(config: ModelConfig, path: str, array: np.ndarray) -> np.ndarray:
    """Undoes what the conversion to GGUF did to a tensor."""
    if _is_offset_norm(config, path):
        return array - np.float32(1)
    if config.model_type == "llama" and path.split("/")[-2] in ("q_proj", "k_proj"):
        # [heads, pairs, 2, ...] -> [heads, 2, pairs, ...]
        pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)
    return array


def _config(file: GgufFile) -> ModelConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture not in _MODEL_TYPES:
        raise UserError(
            f"{file.path}: architecture {architecture!r} is not supported; "
            f"supported are {', '.join(_MODEL_TYPES)}"
        )
    values = _below(file, f"{architecture}.")
    for key in _REQUIRED:
        _need(file, values, key)
    _refuse_variants(file, architecture, values)
    hf = {name: values[key] for key, name in _KEYS.items() if key in values}
    hf |= {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": file.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in file,
        "rope_scaling": _rope_scaling(file, values, hf),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(file.metadata),
    }
    if architecture in ("llama", "qwen3"):
        hf["attention_bias"] = "blk.0.attn_q.bias" in file
    if architecture == "llama":
        hf["mlp_bias"] = "blk.0.ffn_up.bias" in file
    if architecture == "gemma3":
        hf |= _gemma3(file, values, hf)
    return ModelConfig.from_hf(hf)


def _below(file: GgufFile, prefix: str) -> dict[str, Any]:
    """Metadata behind a prefix; arrays that repeat one number for each layer become that number."""
    found = {}
    for key, value in file.metadata.items():
        if key.startswith(prefix):
            if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
                value = value[0].item()
            # Files hold float32; its shortest decimal is the number that was meant.
            found[key.removeprefix(prefix)] = (
                float(str(np.float32(value))) if isinstance(value, float) else value
            )
    return found


def _need(file: GgufFile, values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise UserError(f"{file.path}: metadata key '*.{key}' is missing; convert the model again")
    return values[key]


def _refuse_variants(file: GgufFile, architecture: str, values: Mapping[str, Any]) -> None:
    width = values["embedding_length"] // values["attention.head_count"]
    head_dim = values.get("attention.key_length", width)
    window = values.get("attention.sliding_window", 0)
    problems = {
        "expert_count": values.get("expert_count", 0) > 0,
        "attention.value_length": values.get("attention.value_length", head_dim) != head_dim,
        "rope.dimension_count": values.get("rope.dimension_count", head_dim) != head_dim,
        "attention.sliding_window": architecture != "gemma3" and 0 < window,
    }
    problems |= {key: True for key, value in values.items() if isinstance(value, np.ndarray)}
    for key, is_problem in problems.items():
        if is_problem:
            raise UserError(
                f"{file.path}: '{architecture}.{key}' = {values[key]} is not supported; "
                "load the safetensors checkpoint of this model"
            )


def _eos_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """End of sequence, of turn and of message: generation stops at each."""
    ids = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


def _gemma3(file: GgufFile, values: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """What GGUF leaves to the reader.

    The query scale comes from the head's width in all models but the one of 27B, with 62 layers.
    """
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    scalar = hf["hidden_size"] // heads if layers == 62 else hf.get("head_dim", 256)
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": _need(file, values, "attention.sliding_window"),
        "sliding_window_pattern": values.get("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": values.get("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": values.get("final_logit_softcapping"),
        "attn_logit_softcapping": values.get("attn_logit_softcapping"),
    }


def _rope_scaling(
    file: GgufFile, values: Mapping[str, Any], hf: Mapping[str, Any]
) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type", "none")
    if _ROPE_FACTORS in file:
        return _llama3_scaling(file, hf)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _need(file, values, "rope.scaling.factor")}
    raise UserError(
        f"{file.path}: rope scaling {kind!r} is not supported; supported are none, linear, llama3"
    )


def _llama3_scaling(file: GgufFile, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Recovers Llama 3's parameters from the factors that divide each rotary frequency.

    All published Llama 3 models share three of them; the fourth is the largest factor. The factors
    that follow from these are compared with the file's.
    """
    stored = file.read(_ROPE_FACTORS)
    low, high, original, factor = 1.0, 4.0, 8192, float(stored.max())
    size = 2 * stored.size
    wavelength = 2 * np.pi * hf.get("rope_theta", 10000.0) ** (np.arange(0, size, 2) / size)
    blend = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
        raise UserError(
            f"{file.path}: tensor {_ROPE_FACTORS!r} is not the rescaling of Llama 3; "
            "load the safetensors checkpoint of this model"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
