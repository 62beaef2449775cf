"""How much of what devices could multiply a step of training does (MFU).

    MFU = tokens a second · operations a token / peak rate of the devices

Operations are those that the model asks for, a multiplication and an addition each, whatever is
computed again to save memory. With N weights that a token is multiplied with, L layers of H heads
of d, and rows of T tokens:

    training    6 N + 12 L H d T        forward alone    2 N + 4 L H d T

as in appendix B of Chowdhery et al. 2022, arXiv:2204.02311: attention counts all T keys, although
half of them are behind the causal mask; under a window only those in it. Of experts a token's own
count; embeddings are looked up and count as the output head, if they are tied to it. What is frozen
has no gradient and counts 4 N.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxopt_models import tree
from jaxopt_models.models.config import ModelConfig

# Dense bfloat16 operations a second with sums in float32, of the vendors' data sheets, which often
# print twice that, for sparse matrices. NVIDIA: A100 2021, H100 2023, H200 2024, GH200 2023, B200
# 2024, L40S 2023; Google Cloud TPU system architecture, a chip each.
_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_rate(devices: Sequence[Any]) -> float | None:
    """Dense bfloat16 operations a second of all devices together; None if one is not known."""
    peaks = [_PEAKS.get(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


def forward_flops(config: ModelConfig, params: Any, length: int) -> float:
    """Operations of a token's forward pass, in rows of `length` tokens."""
    return 2.0 * sum(size for _, size in _matrices(config, params)) + 4.0 * _mixed(
        config, params, length
    )


def training_flops(config: ModelConfig, params: Any, trained: Any, length: int) -> float:
    """Operations of a token's forward and backward pass, in rows of `length` tokens.

    Args:
      config: static architecture.
      params: parameter tree; arrays may be abstract.
      trained: those that are, as `trainable.partition` gives them. Gradients of activations are
        taken to go through all layers.
      length: T.
    """
    sizes, known = dict(_matrices(config, params)), dict(tree.arrays_with_paths(trained))
    learnt = sum(size for path, size in sizes.items() if path in known)
    return 4.0 * sum(sizes.values()) + 2.0 * learnt + 12.0 * _mixed(config, params, length)


def least_seconds(flops: float, devices: Sequence[Any]) -> float | None:
    """Time that so many operations take at the peak rate; None if that is not known."""
    peak = peak_rate(devices)
    return None if peak is None else flops / peak


def _matrices(config: ModelConfig, params: Any) -> Iterator[tuple[str, float]]:
    """(path of an array that rows are multiplied with, weights of it that a token meets)."""
    unread = () if "lm_head" not in params else ("embed_tokens/*",)
    for path, leaf in tree.leaves_with_paths(params):
        if not path.endswith("/weight") or leaf.ndim < 2 or tree.matches(path, unread):
            continue
        share = config.experts_per_token / leaf.shape[0] if leaf.ndim == 3 else 1.0
        yield path + ("/weight" if hasattr(leaf, "weight") else ""), share * leaf.size
        if getattr(leaf, "low_rank", None) is not None:
            for name in ("down", "up"):
                size = getattr(leaf.low_rank, name).size
                yield f"{path}/low_rank/{name}", share * size


def _mixed(config: ModelConfig, params: Any, length: int) -> float:
    """Entries of keys that a token's queries meet, and as many of values: Σ H d T."""
    total = 0.0
    for kind, layer in zip(config.attention_kinds, params["layers"], strict=True):
        window = config.sliding_window if kind == "sliding" else None
        seen = length if window is None else min(length, window)
        total += layer["self_attn"]["o_proj"]["weight"].shape[-1] * seen
    return total
