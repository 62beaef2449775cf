"""How fast kernels are, beside XLA on bfloat16 and beside the time that reading the weight takes.

Weights rotate through copies larger than the L2 cache together, so that each is read from memory.
Times are those of the kernels alone, as the GPU's profiler (CUPTI) counts them.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.bench.quality_results import device, today
from jaxopt_models.checkpoint.native import package_version
from jaxopt_models.errors import UserError
from jaxopt_models.progress import Progress, silent
from jaxopt_models.report import write_json
from kernels_pallas import FourBit, pack_int4, pack_mxfp4, pack_nvfp4
from kernels_pallas.dispatch import hopper_processors
from kernels_pallas.w4a16_decode import (
    Tiling,
    default_tiling,
    padded_rows,
    tilings,
    w4a16_decode,
)

# (N, K) of Llama-3.1-8B: q/k/v together, output, gate/up together, down.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (1, 4, 8, 16)
KINDS = ("int4", "nvfp4", "mxfp4")
_L2 = 50 * 2**20
_READ = 2**31  # bytes read to find out how fast memory can be read


def bench_kernels(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    kinds: Sequence[str] = KINDS,
    *,
    tune: bool = False,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Times products of 4-bit weights [N, K] with a few rows of activations.

    Args:
      shapes: of weights.
      rows: M, numbers of rows.
      kinds: formats.
      tune: times every tiling and keeps the fastest, instead of the default.
      out: a .json file, rewritten after each weight.
      progress: wraps the loop over weights.

    Returns:
      `{read_bytes_per_second, rows, device, versions, date}`, a row `{n, k, m, kind, us, tiling,
      limit_us, share_of_limit, xla_bf16_us, speedup_over_xla_bf16}` for each product. The limit is
      what reading codes and scales takes at the measured bandwidth.

    Raises:
      UserError: without a Hopper GPU, or for a format that has no kernel.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"no kernel for {unknown[0]}; choose {', '.join(KINDS)}")
    processors = hopper_processors()
    if processors is None:
        raise UserError(f"bench kernels needs a Hopper GPU; the default device is {device()}")
    bandwidth = _read_bandwidth()
    result: dict[str, Any] = {
        "read_bytes_per_second": bandwidth,
        "rows": [],
        "device": device(),
        "versions": {name: package_version(name) for name in ("jaxopt-models", "jax", "jaxlib")},
        "date": today(),
    }
    for n, k in progress(shapes, "shapes"):
        dense = _Dense(n, k)
        baseline = {m: dense.microseconds(m) for m in rows}
        del dense
        for kind in kinds:
            weights = _weights(kind, n, k)
            limit = _bytes(weights[0]) / bandwidth * 1e6
            for m in rows:
                us, tiling = _fastest(weights, m, processors, tune)
                result["rows"].append(
                    {"n": n, "k": k, "m": m, "kind": kind, "us": us, "tiling": vars(tiling)}
                    | {"limit_us": limit, "share_of_limit": limit / us}
                    | {"xla_bf16_us": baseline[m], "speedup_over_xla_bf16": baseline[m] / us}
                )
            if out:
                write_json(out, result)
    return result


def microseconds[W](
    run: Callable[[jax.Array, W], Any], x: jax.Array, weights: Sequence[W]
) -> float:
    """Mean time of `run(x, weight)` on the GPU over the weights, the median of five rounds.

    Args:
      run: jitted, so that it is lowered once for all weights.
      x: its first argument.
      weights: its second ones, read one after another.
    """
    from jax.experimental.mosaic.gpu import profiler  # needs CUPTI, so only here

    def once(x: jax.Array, weights: Sequence[W]) -> list[Any]:
        return [run(x, weight) for weight in weights]

    _, times = profiler.measure(jax.jit(once), iterations=5)(x, weights)
    assert times is not None  # the profiler saw kernels
    return statistics.median(times) * 1e3 / len(weights)


def _fastest(
    weights: Sequence[FourBit], m: int, processors: int, tune: bool
) -> tuple[float, Tiling]:
    tiles, words = weights[0].codes.shape
    sizes = padded_rows(m), tiles, words // 2
    default = default_tiling(*sizes, processors)
    assert default is not None
    x = _activations(m, weights[0].shape[1])
    timed: list[tuple[float, Tiling]] = []
    for tiling in _deepened(tilings(*sizes), words // 2) if tune else [default]:
        run = partial(w4a16_decode, tiling=tiling, processors=processors)
        timed.append((microseconds(run, x, weights), tiling))
    return min(timed, key=lambda pair: pair[0])


def _deepened(candidates: Iterator[Tiling], columns: int) -> Iterator[Tiling]:
    """Each with the depths that divide its steps."""
    for tiling in candidates:
        steps = tiling.steps(columns)
        for depth in {math.gcd(depth, steps) for depth in (2, 4, 7, 8)}:
            yield Tiling(tiling.wn, tiling.wk, tiling.split, depth)


class _Dense:
    """The same products in bfloat16 by XLA."""

    def __init__(self, n: int, k: int) -> None:
        keys = jax.random.split(jax.random.key(0), _copies(2 * n * k))
        self.weights = [jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys]

    def microseconds(self, m: int) -> float:
        x = _activations(m, self.weights[0].shape[1])
        return microseconds(jax.jit(lambda x, weight: x @ weight.T), x, self.weights)


def _weights(kind: str, n: int, k: int) -> list[FourBit]:
    @jax.jit
    def make(key: jax.Array) -> FourBit:
        first, second = jax.random.split(key)
        codes = jax.random.randint(first, (n, k), 0, 16)
        if kind == "int4":
            return pack_int4(codes - 8, jax.random.uniform(second, (n, k // 128)))
        if kind == "nvfp4":
            scales = jax.random.uniform(second, (n, k // 16), maxval=448.0)
            return pack_nvfp4(codes, scales.astype(jnp.float8_e4m3fn), jnp.float32(0.01))
        return pack_mxfp4(codes, jax.random.randint(second, (n, k // 32), -8, 8))

    one = make(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), _copies(_bytes(one)) - 1)
    return [one, *map(make, keys)]


def _activations(m: int, k: int) -> jax.Array:
    return jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)


def _bytes(weight: FourBit) -> int:
    return weight.codes.nbytes + weight.scales.nbytes


def _copies(size: int) -> int:
    return max(2, math.ceil(4 * _L2 / size))


def _read_bandwidth() -> float:
    """Bytes a second of the largest entry of a large array."""
    data = jax.random.normal(jax.random.key(0), (_READ // 4,), jnp.float32)
    largest = jax.jit(lambda least, array: jnp.maximum(least, jnp.max(array)))
    return _READ / (microseconds(largest, jnp.float32(0), [data]) * 1e-6)
