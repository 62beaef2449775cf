"""Products of other implementations, for `peer_kernels`: torch's own, gemlite's, humming's.

Imports nothing of this package. Each peer takes a bfloat16 weight [N, K], quantizes it its own way,
and gives a `Product`.
"""

import copy
import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

Tensor = Any  # torch.Tensor, where there is torch
_ROTATED = 200 * 2**20  # bytes that rotate: four times the L2 cache of an H100
_GROUP = 128  # columns of an INT4 scale
_FP8_MOST, _INT8_MOST = 448.0, 127.0


@dataclass
class Product:
    """A peer's product.

    Attributes:
      weights: copies of the weight, larger than the L2 cache together.
      run: (activations as the peer wants them, one of the weights) -> its result; this is timed.
      prepare: bfloat16 [M, K] -> activations as the peer wants them.
      finish: (result, activations) -> [M, N].
      tunes: whether its first call times kernels on the GPU.
    """

    weights: list[Any]
    run: Callable[[Any, Any], Any]
    prepare: Callable[[Any], Any] = lambda x: x
    finish: Callable[[Any, Any], Any] = lambda y, x: y
    tunes: bool = False


def _rotating(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    size = sum(tensor.nbytes for tensor in tensors)
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(_copies(size) - 1))]


def _copies(size: int) -> int:
    return max(2, math.ceil(_ROTATED / size))


def _quantized(x: Tensor, most: float, dtype: Any, dim: int | None) -> tuple[Tensor, Tensor]:
    """Codes, and float32 scales of each row (`dim` 1) or of all (None)."""
    amax = x.abs().amax().float() if dim is None else x.abs().amax(dim, keepdim=True).float()
    scale = amax / most
    codes = x.float() / scale
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def torch_bf16(w: Tensor, form: str) -> Product:
    return Product(_rotating(w), lambda x, weight: torch.nn.functional.linear(x, weight[0]))


def torch_scaled_mm(w: Tensor, form: str, dim: int | None) -> Product:
    """FP8 by cuBLASLt, with a scale for each row of both operands, or one for each operand."""

    def run(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> Tensor:
        (codes, scale), (weight_codes, weight_scale) = x, weight
        return torch._scaled_mm(
            codes,
            weight_codes.t(),
            scale_a=scale,
            scale_b=weight_scale if dim is None else weight_scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        return _quantized(x, _FP8_MOST, torch.float8_e4m3fn, dim)

    return Product(_rotating(*quantized(w)), run, quantized)


def torch_int_mm(w: Tensor, form: str) -> Product:
    """INT8 by cuBLASLt, without the multiplication by scales."""

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        return _quantized(x, _INT8_MOST, torch.int8, 1)

    codes, scale = quantized(w)
    return Product(
        _rotating(codes),
        lambda x, weight: torch._int_mm(x[0], weight[0].t()),
        quantized,
        lambda y, x: y.float() * x[1] * scale.t(),
    )


def _int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0..15 [N, K], 8 standing for zero, and scales [N, K / 128]."""
    groups = w.float().view(len(w), -1, _GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16)
    codes = (groups / scales.float()).round().clamp(-8, 7) + 8
    return codes.view(w.shape).to(torch.uint8), scales[..., 0]


def torch_tinygemm(w: Tensor, form: str) -> Product:
    codes, scales = _int4(w)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    both = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    return Product(
        _rotating(packed, both),
        lambda x, weight: torch.ops.aten._weight_int4pack_mm(x, weight[0], _GROUP, weight[1]),
    )


def _layers(layer: Any) -> list[Any]:
    size = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
    return [layer, *(copy.deepcopy(layer) for _ in range(_copies(size) - 1))]


def gemlite(w: Tensor, form: str) -> Product:
    from gemlite import DType, GemLiteLinear  # pyright: ignore[reportMissingImports]
    from gemlite.helper import A16W4_MXFP, A16W4_NVFP  # pyright: ignore[reportMissingImports]

    n, k = w.shape
    if form == "int4":
        codes, scales = _int4(w)
        types = {"input_dtype": DType.BF16, "output_dtype": DType.BF16}
        layer = GemLiteLinear(4, group_size=_GROUP, in_features=k, out_features=n, **types)
        layer.pack(codes, scales, torch.full_like(scales, 8), None)
    else:
        linear = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=w.device)
        linear.weight.data = w
        maker = {"nvfp4": A16W4_NVFP, "mxfp4": A16W4_MXFP}[form]
        layer = maker(device=str(w.device), dtype=torch.bfloat16).from_linear(linear)
    return Product(_layers(layer), lambda x, layer: layer(x), tunes=True)


_HUMMING: dict[str, tuple[dict[str, Any], str | None]] = {
    "int4": ({"dtype": "int4", "group_size": _GROUP}, None),
    "nvfp4": (
        {
            "dtype": "float4e2m1",
            "group_size": 16,
            "scale_dtype": "float8e4m3",
            "scale_2_type": "tensor",
        },
        None,
    ),
    "mxfp4": ({"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}, None),
    "fp8": ({"dtype": "float8e4m3"}, "float8e4m3"),
    "int8": ({"dtype": "int8"}, "int8"),
}


def humming(w: Tensor, form: str) -> Product:
    """W4A16; for 8 bits W8A8, a scale for each row of both, activations quantized beforehand."""
    from humming.forward import may_quant_input  # pyright: ignore[reportMissingImports]
    from humming.layer import HummingLayer  # pyright: ignore[reportMissingImports]

    weight, activation = _HUMMING[form]
    n, k = w.shape
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config=dict(weight),
        input_config=activation and {"dtype": activation},
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized(w)
    layer.transform()
    if activation is None:
        return Product(_layers(layer), lambda x, layer: layer(x))
    return Product(
        _layers(layer),
        lambda x, layer: layer(x[0], input_scale=x[1]),
        lambda x: may_quant_input(layer.humming_config, x),
    )


def humming_needs() -> str:
    """What humming compiles with: what of it is here."""
    names = ("nvcc", "ninja", "g++")
    found = {name: shutil.which(name) for name in names}
    toolkit = Path("/usr/local/cuda/bin/nvcc")
    found["nvcc"] = found["nvcc"] or (str(toolkit) if toolkit.exists() else None)
    modules = ("cuda.bindings", "triton", "jinja2", "safetensors", "filelock", "tabulate", "tqdm")
    missing = [name for name in modules if not _importable(name)]
    try:
        from humming.utils.cuda import find_all_cuda_paths  # pyright: ignore[reportMissingImports]

        headers = {
            place["path"]: [
                name
                for name in ("cuda_runtime.h", "nvrtc.h", "cuda/std/cstdint")
                if any((Path(folder) / name).exists() for folder in place["include_paths"])
            ]
            for place in find_all_cuda_paths()
        }
    except Exception as error:
        headers = f"unknown, since humming itself does not import ({error})"
    return (
        f"here are {', '.join(f'{name}: {place}' for name, place in found.items())}; CUDA headers: "
        f"{headers}; modules that are missing: {', '.join(missing) or 'none'}; "
        "HUMMING_COMPILER=nvcc or nvrtc chooses the compiler"
    )


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False


# Name -> the formats that it has, and what builds its product.
PEERS: dict[str, tuple[tuple[str, ...], Callable[[Tensor, str], Product]]] = {
    "torch bf16": (("bf16",), torch_bf16),
    "torch fp8 rows": (("fp8",), lambda w, form: torch_scaled_mm(w, form, 1)),
    "torch fp8 tensor": (("fp8",), lambda w, form: torch_scaled_mm(w, form, None)),
    "torch int8": (("int8",), torch_int_mm),
    "torch tinygemm": (("int4",), torch_tinygemm),
    "gemlite": (("int4", "nvfp4", "mxfp4"), gemlite),
    "humming": (tuple(_HUMMING), humming),
}
