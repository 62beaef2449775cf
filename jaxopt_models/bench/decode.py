"""How fast models decode: the loop of `generate` on random weights of a published shape.

A row is beside the same model in bfloat16 and beside the time that reading its bytes takes. Times
are wall clock of the loop on the device, without prompt and compilation, cache reads and sampling
included. They are of the cache's last positions, so that it is nearly full.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.bench.bandwidth import read_bandwidth
from jaxopt_models.bench.quality_results import device, device_file, today
from jaxopt_models.checkpoint.native import package_version
from jaxopt_models.decode_time import decode_seconds
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.formats import resolve
from jaxopt_models.inference import prepare
from jaxopt_models.kv_quantizer import KVQuantizer, RowQuantizer, with_kv_cache
from jaxopt_models.models.cache import cache_bytes, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import init
from jaxopt_models.progress import Progress, silent
from jaxopt_models.qtensor import InputQuantizer, quantize_array

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5}
_GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": _LLAMA
    | _GROUPED
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "llama-1b": _LLAMA
    | _GROUPED
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"tie_word_embeddings": True},
    "tiny": _LLAMA
    | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
FORMATS = ("bf16", "int4", "nvfp4", "mxfp4", "fp8", "int8")
KV_FORMATS = ("bf16", "fp8")
_BY_CHANNEL = {"granularity": "channel"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "int4": {"scale_dtype": "bfloat16"},
    "fp8": _BY_CHANNEL,
    "int8": _BY_CHANNEL,
}
_BY_TOKEN = ("fp8", "int8")  # inputs are quantized as well, to dynamic scales
_DTYPE = jnp.bfloat16
FEW = 8  # steps of the shorter loop


def bench_decode(
    model: str = "llama-8b",
    formats: Sequence[str] = FORMATS,
    batches: Sequence[int] = (1, 8),
    *,
    context: int = 2048,
    steps: int = 136,
    head: str = "bf16",
    kv_format: str = "bf16",
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Times decoding, a format and a batch at a time.

    Args:
      model: a key of `MODELS`.
      formats: of the decoder's matrices; bf16 first gives the others their baseline. FP8 and INT8
        have a scale for each channel, and their inputs, in the same format, one for each token.
      batches: rows that are decoded together.
      context: positions that the cache holds; the last ones are decoded.
      steps: of the longer loop, more than 8; the shorter one has 8.
      head: "bf16", or "same" for the output head in the weights' format, unless it is tied.
      kv_format: of the cache.
      out: a .json file or a directory for `decode_<device>.json`, rewritten after each row.
      progress: wraps the loop over formats.

    Returns:
      `{read_bytes_per_second, rows, device, versions, date}`, a row `{model, format, head,
      kv_format, batch, context, ms_per_step, tokens_per_s, bytes_per_step, byte_limit_fraction,
      bf16_ms_per_step}` each. The limit is reading weights, looked-up embeddings and cache once at
      the measured bandwidth; bf16_ms_per_step is None without such a row.

    Raises:
      UserError: for an unknown model or format, sizes that do not fit, or an `out` that cannot be
        written.
    """
    check_names(model=[model], format=formats, head=[head], cache=[kv_format])
    check_steps(context, steps)
    config = replace(ModelConfig.from_hf(MODELS[model]), dtype=_DTYPE.dtype.name)
    file, bandwidth = out and device_file(out, "decode"), read_bandwidth()
    packages = ("jaxopt-models", "jax", "jaxlib")
    result: dict[str, Any] = {
        "read_bytes_per_second": bandwidth,
        "rows": [],
        "device": device(),
        "versions": {name: package_version(name) for name in packages},
        "date": today(),
    }
    setting = {"model": model, "head": head, "kv_format": kv_format, "context": context}
    baseline: dict[int, float] = {}
    for format in progress(formats, "formats"):
        params = random_params(config, format, head, kv_format)
        for batch in batches:
            seconds = decode_seconds(config, params, batch, context, (FEW, steps))
            baseline |= {batch: seconds} if format == "bf16" else {}
            read = bytes_per_step(config, params, batch, context)
            result["rows"].append(
                setting
                | {"format": format, "batch": batch, "ms_per_step": seconds * 1e3}
                | {"tokens_per_s": batch / seconds, "bytes_per_step": read}
                | {"byte_limit_fraction": read / bandwidth / seconds}
                | {"bf16_ms_per_step": _milliseconds(baseline.get(batch))}
            )
            if file:
                write_json(file, result)
        del params  # before the next ones are made
        gc.collect()
    return result


def random_params(config: ModelConfig, format: str, head: str, kv_format: str) -> Any:
    """Prepared parameters with matrices N(0, 1/K), made on the device one layer at a time."""
    key, layers = jax.random.key(0), []
    one, none = (
        replace(config, num_layers=n, attention_kinds=config.attention_kinds[:n]) for n in (1, 0)
    )
    of_head = format if head == "same" else "bf16"
    ends = jax.jit(lambda key: _quantized(of_head, "lm_head/weight", init(none, key, _DTYPE)))
    layer = jax.jit(lambda key: _quantized(format, "*_proj/weight", init(one, key, _DTYPE)))
    params = prepare(ends(key))
    for i in range(config.num_layers):
        made = prepare({"layers": layer(jax.random.fold_in(key, i))["layers"]})
        layers += jax.block_until_ready(made["layers"])  # one at a time in memory
    params |= {"layers": tuple(layers)}
    if kv_format == "bf16":
        return params
    part = RowQuantizer(jnp.float32(8), spec=resolve(kv_format, granularity="tensor"))
    return with_kv_cache(params, [KVQuantizer(part, part)] * config.num_layers)


def _quantized(format: str, pattern: str, params: Any) -> Any:
    def leaf(path: str, weight: jax.Array) -> Any:
        if format == "bf16" or not tree.matches(path, pattern):
            return weight
        q = quantize_array(weight, format, **_OPTIONS.get(format, {}))
        return replace(q, input=InputQuantizer(None, q.spec)) if format in _BY_TOKEN else q

    return tree.map_with_path(leaf, params)


def bytes_per_step(config: ModelConfig, params: Any, batch: int, context: int) -> int:
    """What a step has to read: weights, an embedding for each row, the cache."""
    weights = tree.size_in_bits(params) // 8
    if "lm_head" in params:
        table = params["embed_tokens"]["weight"]
        weights -= table.nbytes - batch * table[0].nbytes
    make = partial(empty_cache, config, batch=batch, capacity=context)
    return weights + cache_bytes(jax.eval_shape(make, params))


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def check_names(**chosen: Sequence[str]) -> None:
    """Raises UserError for the first model, format, head or cache that there is none of."""
    known = {"model": MODELS, "format": FORMATS, "head": ("bf16", "same"), "cache": KV_FORMATS}
    for kind, names in chosen.items():
        for name in names:
            if name not in known[kind]:
                raise UserError(f"{kind} {name!r} is unknown; choose {', '.join(known[kind])}")


def check_steps(context: int, steps: int) -> None:
    """Raises UserError for a longer loop that is none, or that the context does not hold."""
    if not FEW < steps <= context:
        raise UserError(
            f"{steps} steps at the end of a context of {context} cannot be timed; choose more than "
            f"{FEW} and at most the context"
        )
