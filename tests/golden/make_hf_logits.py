"""Write `hf/<name>.npz`: tiny random models and what Hugging Face transformers computes with them.

One file a configuration, float32, eager attention, no cache:

    config            the config.json that `save_pretrained` writes today (a JSON string)
    config_published  the same model in the older vocabulary of the checkpoints on the hub
                      (rope_theta, rope_scaling, torch_dtype, sliding_window_pattern)
    seed              the seed of the tensors and tokens
    tokens            int32 [2, 24]
    hidden            float32 [layers, 2, 24, D], the residual stream after each layer
    logits            float32 [2, 24, V]
    greedy            int32 [2, 12], the greedy continuation of tokens[:, :8] (no end token)
    logits_stock      only gemma3_softcap, see `softcapped_gemma3`
    <dotted names>    every tensor of model.safetensors, float32 values that bf16 represents exactly

Each model is saved, filled with random values under its on-disk names, and loaded again, so that
the names are those of a real checkpoint. The first seed is taken for which no argmax and no choice
of experts is nearly a tie. The script fails if an option of a configuration, a norm or a bias does
not change the logits, or if generation with a cache differs from the plain forward pass.

    python3.11 -m venv torch-env
    torch-env/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    torch-env/bin/pip install transformers==5.17.0 numpy
    torch-env/bin/python tests/golden/make_hf_logits.py [NAME ...]
"""

# pyright: reportMissingImports=false
import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3 import modeling_gemma3

OUT = Path(__file__).parent / "hf"
PROMPT, NEW, LENGTH, VOCAB = 8, 12, 24, 96
EFFECT = 0.02  # an option or a vector must move some logit by this much
GREEDY_MARGIN = 0.02  # between the two best logits
EXPERT_MARGIN = 2e-4  # between the last expert chosen and the first one not chosen

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
_MISTRAL = _LLAMA | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 7,
}
_QWEN2 = _LLAMA | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 6,
    "max_window_layers": 2,
    "use_sliding_window": False,
}
_QWEN3 = _QWEN2 | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 16,
    "attention_bias": False,
    "sliding_window": None,
}
_QWEN3_MOE = _QWEN3 | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
_MIXTRAL = _LLAMA | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_GEMMA3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": None,
    "query_pre_attn_scalar": 10,
    "sliding_window": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "torch_dtype": "bfloat16",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

# name -> (published config, changes to it each of which must change the logits)
CASES: dict[str, tuple[dict, list[dict]]] = {
    "llama2": (_LLAMA | {"num_key_value_heads": 4}, [{"rope_theta": 100.0}]),
    "llama3": (
        _LLAMA | {"rope_theta": 500.0, "rope_scaling": _LLAMA3_ROPE},
        [{"rope_scaling": None}],
    ),
    "llama_linear_rope": (
        _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        [{"rope_scaling": None}],
    ),
    "llama_bias": (_LLAMA | {"attention_bias": True, "mlp_bias": True}, []),
    "mistral": (_MISTRAL, [{"sliding_window": None}, {"sliding_window": 8}]),
    "qwen2": (_QWEN2, [{"rope_theta": 100.0}]),
    "qwen2_sliding": (
        _QWEN2 | {"use_sliding_window": True, "num_hidden_layers": 4},
        [{"use_sliding_window": False}, {"max_window_layers": 1}, {"max_window_layers": 3}],
    ),
    "qwen3": (_QWEN3, [{"rope_theta": 100.0}]),
    "smollm2": (
        _LLAMA
        | {
            "hidden_size": 72,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        [{"rope_theta": 100.0}],
    ),
    "gemma3": (
        _GEMMA3 | {"layer_types": [_LOCAL, _LOCAL, _GLOBAL, _LOCAL]},
        [
            {"sliding_window": 7},
            {"rope_local_base_freq": 10000.0},
            {"rope_theta": 100.0},
            {"query_pre_attn_scalar": 16},
            {"layer_types": [_GLOBAL, _LOCAL, _GLOBAL, _LOCAL]},
            {"hidden_activation": "silu"},
        ],
    ),
    "gemma3_softcap": (
        _GEMMA3
        | {
            "num_hidden_layers": 3,
            "sliding_window_pattern": 2,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
        [
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"rope_scaling": None},
            {"sliding_window_pattern": 6},
        ],
    ),
    "mixtral": (_MIXTRAL, [{"num_experts_per_tok": 1}]),
    "qwen3_moe": (_QWEN3_MOE, [{"norm_topk_prob": False}]),
    "qwen3_moe_nonorm": (
        _QWEN3_MOE | {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": []},
        [{"norm_topk_prob": True}, {"num_experts_per_tok": 2}],
    ),
}


@contextlib.contextmanager
def softcapped_gemma3(enabled: bool = True) -> Iterator[None]:
    """Pass `attn_logit_softcapping` to Gemma 3's eager attention while the context is open.

    The attention function of transformers 5.17 implements the soft cap, and Gemma 2 hands it over,
    but Gemma 3 keeps the configured value without handing it over: the field does nothing there
    (released Gemma 3 models set it to null). The goldens hold what the field says;
    `logits_stock` holds what transformers gives without this patch.
    """
    eager = modeling_gemma3.eager_attention_forward

    def capped(module, *args, **kwargs):
        return eager(module, *args, softcap=module.attn_logit_softcapping, **kwargs)

    patched = mock.patch.object(modeling_gemma3, "eager_attention_forward", capped)
    with patched if enabled else contextlib.nullcontext():
        yield


def on_disk_shapes(config: dict, directory: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what `save_pretrained` writes for `config`."""
    hf_config = AutoConfig.for_model(**config)
    AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).save_pretrained(directory)
    shapes = {k: v.shape for k, v in load_file(directory / "model.safetensors").items()}
    return dict(sorted(shapes.items()))


def bf16_grid(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, returned as float32."""
    return torch.from_numpy(x.astype(np.float32)).bfloat16().float().numpy()


def random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...], gemma: bool):
    """Draw a tensor whose effect is visible: wide norms, non-zero biases, sharp attention."""
    noise = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        return bf16_grid((0.0 if gemma else 1.0) + 0.3 * noise)
    if name.endswith("bias"):
        return bf16_grid(0.4 * noise)
    if "embed_tokens" in name:
        return bf16_grid(0.5 * noise)
    sharp = name.endswith(("q_proj.weight", "k_proj.weight", "gate.weight"))
    return bf16_grid((2.0 if sharp else 1.2) * noise / shape[-1] ** 0.5)


def load(config: dict, tensors: dict[str, np.ndarray], directory: Path, *, strict: bool = True):
    """Write a checkpoint directory and open it with `from_pretrained`."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {k: v for k, v in info.items() if v}
    if strict and wrong:
        raise SystemExit(f"the checkpoint did not load exactly: {wrong}")
    return model.eval()


def run(model, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Return logits [B, T, V], hidden [L, B, T, D] and the least margin of an expert choice."""
    hidden, margins = [], [float("inf")]

    def keep_hidden(_module, _args, output):
        hidden.append(output[0] if isinstance(output, tuple) else output)

    def keep_margin(module, _args, output):
        probabilities = torch.softmax(output[0].float(), -1).sort(-1, descending=True).values
        chosen, rest = probabilities[:, module.top_k - 1], probabilities[:, module.top_k]
        margins.append((chosen - rest).min().item())

    layers = model.model.layers
    hooks = [layer.register_forward_hook(keep_hidden) for layer in layers]
    gates = [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")]
    hooks += [gate.register_forward_hook(keep_margin) for gate in gates]
    logits = model(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), torch.stack(hidden).numpy(), min(margins)


def greedy(model, tokens: torch.Tensor) -> tuple[np.ndarray, float]:
    """Return the continuation [B, 12] of tokens[:, :8] and the least gap of its two best logits."""
    prompt = tokens[:, :PROMPT]
    model.generation_config.eos_token_id = None
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
    )
    plain, _, expert_margin = run(model, out)
    steps = np.sort(plain[:, PROMPT - 1 : -1], axis=-1)
    new = out[:, PROMPT:].numpy()
    if (plain[:, PROMPT - 1 : -1].argmax(-1) != new).any():
        raise SystemExit("generation with a cache differs from the plain forward pass")
    margin = (steps[..., -1] - steps[..., -2]).min().item()
    return new.astype(np.int32), margin if expert_margin > EXPERT_MARGIN else 0.0


def check_vectors(model, tokens: torch.Tensor, logits: np.ndarray, gemma: bool) -> None:
    """Fail unless neutralising any one norm or bias changes the logits."""
    for name, parameter in model.named_parameters():
        if parameter.ndim != 1:
            continue
        kept = parameter.clone()
        parameter.fill_(1.0 if name.endswith("norm.weight") and not gemma else 0.0)
        effect = np.abs(run(model, tokens)[0] - logits).max()
        parameter.copy_(kept)
        if effect < EFFECT:
            raise SystemExit(f"{name} changes the logits by {effect:.2g} only")


def attempt(config: dict, seed: int, shapes: dict, directory: Path) -> dict | None:
    """Return the arrays of one golden file, or None if a choice in it is nearly a tie."""
    rng = np.random.default_rng(seed)
    gemma = config["model_type"] == "gemma3_text"
    tensors = {name: random_tensor(rng, name, shape, gemma) for name, shape in shapes.items()}
    tokens = torch.from_numpy(rng.integers(3, VOCAB, (2, LENGTH)))
    model = load(config, tensors, directory / "model")
    logits, hidden, expert_margin = run(model, tokens)
    new, margin = greedy(model, tokens)
    if margin < GREEDY_MARGIN or expert_margin < EXPERT_MARGIN:
        return None
    check_vectors(model, tokens, logits, gemma)
    model.config.save_pretrained(directory / "saved")
    return {
        "config": np.array((directory / "saved" / "config.json").read_text()),
        "config_published": np.array(json.dumps(config)),
        "seed": np.array(seed),
        "tokens": tokens.numpy().astype(np.int32),
        "hidden": hidden,
        "logits": logits,
        "greedy": new,
        **tensors,
    }


def logits_with(config: dict, arrays: dict, directory: Path) -> np.ndarray:
    """Return the logits of the tensors and tokens in `arrays` under another config."""
    tensors = {k: v for k, v in arrays.items() if "." in k}
    model = load(config, tensors, directory, strict=False)
    return run(model, torch.from_numpy(arrays["tokens"]).long())[0]


def make(name: str, directory: Path) -> dict[str, np.ndarray]:
    """Return the arrays of `<name>.npz`, from the first seed without near ties."""
    config, changes = CASES[name]
    shapes = on_disk_shapes(config, directory / "names")
    tries = (attempt(config, seed, shapes, directory) for seed in range(100))
    arrays = next(found for found in tries if found is not None)
    same = logits_with(json.loads(str(arrays["config"])), arrays, directory / "saved")
    np.testing.assert_array_equal(same, arrays["logits"])
    for change in changes:
        other = logits_with(config | change, arrays, directory / "changed")
        effect = np.abs(other - arrays["logits"]).max()
        if effect < EFFECT:
            raise SystemExit(f"{name}: {change} changes the logits by {effect:.2g} only")
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden files of tiny HF models.")
    parser.add_argument("names", nargs="*", help=f"default all: {' '.join(CASES)}")
    torch.set_num_threads(1)
    for name in parser.parse_args().names or CASES:
        with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
            with softcapped_gemma3():
                arrays = make(name, Path(temporary))
            if CASES[name][0].get("attn_logit_softcapping") is not None:
                arrays["logits_stock"] = logits_with(
                    CASES[name][0], arrays, Path(temporary) / "stock"
                )
        path = OUT / f"{name}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        print(f"{name}: seed {arrays['seed']}, {path.stat().st_size / 1024:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
