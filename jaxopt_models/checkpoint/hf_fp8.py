"""How an FP8 checkpoint stores its matrices: E4M3 codes beside float32 scales, `w = code * scale`.

Two layouts are read. Block-wise ("quant_method": "fp8", DeepSeek V3 and Qwen3-FP8) has a scale for
each 128 x 128 tile in `<name>_scale_inv`; compressed-tensors ("float-quantized") has one for the
tensor or for each row in `<name>_scale`. Inputs of the products are quantized at run time, in
groups of 128 along the last axis or by token.

Reference: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec, resolve
from jaxopt_models.qtensor import InputQuantizer


@dataclass(frozen=True)
class Fp8Scheme:
    """Layout of the quantized matrices of one checkpoint.

    Attributes:
      spec: number format of the weights.
      suffix: what a scale's name has behind its weight's.
      input: quantizer of the inputs; None where they stay as they are.
    """

    spec: QuantSpec
    suffix: str
    input: InputQuantizer | None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a matrix [N, K]: one for each tile, partial ones included."""
        tiles = self.spec.tile(shape)
        return tuple(-(-extent // tile) for extent, tile in zip(shape, tiles, strict=True))


def read_scheme(path: Path, hf: Mapping[str, Any]) -> Fp8Scheme | None:
    """The scheme that `quantization_config` describes; None for a checkpoint without one.

    Args:
      path: the config.json, for messages.
      hf: its contents.

    Raises:
      UserError: for every other way of quantizing, by its name.
    """
    settings = hf.get("quantization_config")
    if not settings:
        if (path.parent / "hf_quant_config.json").exists():
            raise _unsupported(path, "modelopt")
        return None
    method = settings.get("quant_method")
    if method == "fp8":
        return _read_blockwise(path, settings)
    if method == "compressed-tensors":
        return _read_compressed(path, settings)
    raise _unsupported(path, str(method))


def _read_blockwise(path: Path, settings: Mapping[str, Any]) -> Fp8Scheme:
    block = settings.get("weight_block_size")
    if not block or len(block) != 2 or block[0] != block[1]:
        raise _unsupported(path, f"fp8 with weight_block_size {block}")
    if settings.get("fmt", "e4m3") != "e4m3" or settings.get("scale_fmt") not in (None, "float"):
        raise _unsupported(path, "fp8 with other than e4m3 codes and float32 scales")
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise _unsupported(path, "fp8 with static activation scales")
    inputs = resolve("fp8", granularity="block", block_size=block[1])
    spec = resolve("fp8", granularity="block2d", block_size=block[0])
    return Fp8Scheme(spec, "_scale_inv", InputQuantizer(None, inputs))


def _read_compressed(path: Path, settings: Mapping[str, Any]) -> Fp8Scheme:
    groups = list((settings.get("config_groups") or {}).values())
    if settings.get("format") != "float-quantized" or len(groups) != 1:
        raise _unsupported(path, f"compressed-tensors with format {settings.get('format')!r}")
    if settings.get("kv_cache_scheme"):
        raise _unsupported(path, "compressed-tensors with a quantized KV cache")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    granularity = weights.get("strategy")
    if weights.get("num_bits") != 8 or granularity not in ("tensor", "channel"):
        raise _unsupported(path, f"compressed-tensors with weights by {granularity!r}")
    if inputs and not (inputs.get("dynamic") is True and inputs.get("strategy") == "token"):
        raise _unsupported(path, "compressed-tensors with inputs other than dynamic by token")
    by_token = InputQuantizer(None, resolve("fp8", granularity="token")) if inputs else None
    return Fp8Scheme(resolve("fp8", granularity=granularity), "_scale", by_token)


def _unsupported(path: Path, method: str) -> UserError:
    return UserError(
        f"{path}: quantization_config {method!r} is not supported; "
        "start from the unquantized checkpoint"
    )
