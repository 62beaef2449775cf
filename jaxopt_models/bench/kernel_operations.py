"""The products that the kernel bench times. One more kernel is one more entry of `OPERATIONS`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.bench.kernel_timing import activations
from kernels_pallas import (
    EightBit,
    FourBit,
    pack_int4,
    pack_mxfp4,
    pack_nvfp4,
    quantize_rows,
    reference,
    tuning,
    w8a8_tiling,
)
from kernels_pallas.decode_tiling import (
    MOST_ROWS,
    Tiling,
    default_tiling,
    sizes_of,
    tilings,
)
from kernels_pallas.eight_bit import BLOCK, code_dtype
from kernels_pallas.eight_bit import Kind as EightBitKind
from kernels_pallas.w4a16_decode import w4a16_decode
from kernels_pallas.w4a16_wide import w4a16_wide
from kernels_pallas.w8a8 import w8a8_reference
from kernels_pallas.w8a8_kernel import w8a8_kernel
from kernels_pallas.w8a8_tiling import EightBitTiling
from kernels_pallas.wide_tiling import WideTiling, default_wide_tiling, wide_tilings


@dataclass(frozen=True)
class Operation:
    """A kernel and what the bench has to know of it.

    Attributes:
      op: the product that it computes, as rows call it.
      kernel: its name in tables of tilings.
      formats: of weights.
      rate: the ceiling that bounds its arithmetic, a key of `kernel_timing.ceilings`.
      supports: whether it takes M rows.
      weight: (key, format, N, K) -> a random packed weight, a pytree with `shape`.
      activations: (M, K) -> random activations, an array or a pytree of them.
      run: (activations, weight, tiling, processors) -> the product.
      reference: (activations, weight) -> the same product without a kernel.
      tiling: dataclass of integers.
      default: (M, weight, processors) -> tiling, None if there is none that fits.
      candidates: (M, weight) -> every tiling worth trying.
    """

    op: str
    kernel: str
    formats: tuple[str, ...]
    rate: str
    supports: Callable[[int], bool]
    weight: Callable[[jax.Array, str, int, int], Any]
    activations: Callable[[int, int], Any]
    run: Callable[[Any, Any, Any, int], jax.Array]
    reference: Callable[[Any, Any], jax.Array]
    tiling: Callable[..., Any]
    default: Callable[[int, Any, int], Any]
    candidates: Callable[[int, Any], Iterable[Any]]

    def with_tiling(self, tiling: Any, processors: int) -> Callable[[Any, Any], jax.Array]:
        """(activations, weight) -> the product."""
        return lambda x, weight: self.run(x, weight, tiling, processors)

    def best_known(self, m: int, kind: str, weight: Any, processors: int, device: str) -> Any:
        """The tiling in a table of tilings, else the default; None if there is neither."""
        n, k = weight.shape
        found = tuning.find(self.tiling, self.kernel, kind, m, n, k, device)
        return found or self.default(m, weight, processors)


def nearest(tiling: Any, candidates: Iterable[Any], count: int | None) -> list[Any]:
    """A tiling and others of its kind, those first that differ from it by the fewest doublings.

    Args:
      tiling: comes first.
      candidates: dataclasses of integers.
      count: how many at most; None for all.
    """

    def distance(other: Any) -> float:
        pairs = zip(asdict(tiling).values(), asdict(other).values(), strict=True)
        return sum(abs(math.log2(1 + a) - math.log2(1 + b)) for a, b in pairs)

    unique = dict.fromkeys(other for other in candidates if other != tiling)
    return [tiling, *sorted(unique, key=distance)][:count]


@partial(jax.jit, static_argnums=(1, 2, 3))
def four_bit(key: jax.Array, kind: str, n: int, k: int) -> FourBit:
    """A random 4-bit weight standing for [N, K]."""
    first, second = jax.random.split(key)
    codes = jax.random.randint(first, (n, k), 0, 16)
    if kind == "int4":
        return pack_int4(codes - 8, jax.random.uniform(second, (n, k // 128)))
    if kind == "nvfp4":
        scales = jax.random.uniform(second, (n, k // 16), maxval=448.0)
        return pack_nvfp4(codes, scales.astype(jnp.float8_e4m3fn), jnp.float32(0.01))
    return pack_mxfp4(codes, jax.random.randint(second, (n, k // 32), -8, 8))


def _wide(weight: FourBit) -> tuple[int, int]:
    return weight.tiles, weight.columns


_W4A16_DECODE = Operation(
    op="w4a16",
    kernel="w4a16_decode",
    formats=("int4", "nvfp4", "mxfp4"),
    rate="bf16_tflops",
    supports=lambda m: 0 < m <= MOST_ROWS,
    weight=four_bit,
    activations=activations,
    run=lambda x, weight, tiling, processors: w4a16_decode(
        x, weight, tiling, processors=processors
    ),
    tiling=Tiling,
    reference=reference.w4a16,
    default=lambda m, weight, processors: default_tiling(sizes_of(m, weight), processors),
    candidates=lambda m, weight: tilings(sizes_of(m, weight)),
)

_W4A16_WIDE = replace(
    _W4A16_DECODE,
    kernel="w4a16_wide",
    supports=lambda m: m > MOST_ROWS,
    run=lambda x, weight, tiling, processors: w4a16_wide(x, weight, tiling, processors=processors),
    tiling=WideTiling,
    default=lambda m, weight, processors: default_wide_tiling(m, *_wide(weight), processors),
    candidates=lambda m, weight: wide_tilings(m, *_wide(weight)),
)


@partial(jax.jit, static_argnums=(1, 2, 3))
def eight_bit(key: jax.Array, kind: EightBitKind, n: int, k: int) -> EightBit:
    """A random 8-bit weight standing for [N, K]."""
    first, second = jax.random.split(key)
    values = 100 * jax.random.normal(first, (n, k), jnp.bfloat16)
    codes = jnp.clip(values, -127, 127).astype(code_dtype(kind))
    shape = (-(-n // BLOCK), k // BLOCK) if kind == "fp8_block" else (n,)
    return EightBit(codes, jax.random.uniform(second, shape, minval=0.01), kind)


def _run_w8a8(x: Any, weight: EightBit, tiling: EightBitTiling, processors: int) -> jax.Array:
    codes, scales = x
    return w8a8_kernel(codes, scales, weight.codes, weight.scales, tiling, processors=processors)


def _int8_reference(x: Any, weight: EightBit) -> jax.Array:
    """`w8a8_reference` in float32: XLA doubles sums of INT8 unless it times its own kernels.

    Seen with jax 0.11.2 at `xla_gpu_autotune_level` 0, which the bench compiles references at.
    """
    return w8a8_reference(*x, replace(weight, kind="fp8"))  # whose sums are float32's


def _w8a8(kind: EightBitKind, rate: str) -> Operation:
    """The product alone: activations are quantized before."""
    blocked = kind == "fp8_block"
    return Operation(
        op="w8a8",
        kernel="w8a8",
        formats=(kind,),
        rate=rate,
        supports=lambda m: m > 0,
        weight=eight_bit,
        activations=lambda m, k: quantize_rows(activations(m, k), kind),
        run=_run_w8a8,
        reference=_int8_reference if kind == "int8" else lambda x, w: w8a8_reference(*x, w),
        tiling=EightBitTiling,
        default=lambda m, weight, processors: w8a8_tiling.default_tiling(
            m, weight.shape[0], weight.shape[1], processors, blocked
        ),
        candidates=lambda m, weight: w8a8_tiling.tilings(
            m, weight.shape[0], weight.shape[1], blocked
        ),
    )


OPERATIONS = (
    _W4A16_DECODE,
    _W4A16_WIDE,
    _w8a8("fp8", "fp8_tflops"),
    _w8a8("fp8_block", "fp8_tflops"),
    _w8a8("int8", "int8_tops"),
)
