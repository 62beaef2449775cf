"""Time on a GPU: of a product over rotating weights, and the fastest that the device can do.

Weights rotate through copies larger than the L2 cache together, so that each is read from memory.
Times are those of the kernels alone, as the GPU's profiler (CUPTI) counts them.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxopt_models.bench.alone import alone
from jaxopt_models.bench.bandwidth import read_bandwidth

L2 = 50 * 2**20
_LARGE = 8192  # rows and columns of the products whose rate is the ceiling
_RATES = {"bf16_tflops": jnp.bfloat16, "fp8_tflops": jnp.float8_e4m3fn, "int8_tops": jnp.int8}


def measured[X, W](run: Callable[[X, W], Any], x: X, weights: Sequence[W]) -> tuple[float, Any]:
    """Mean time of `run(x, weight)` on the GPU over the weights, the median of five rounds.

    Args:
      run: jitted, so that it is lowered once for all weights.
      x: its first argument.
      weights: its second ones, read one after another.

    Returns:
      (microseconds, what it gives for the first weight).
    """
    from jax.experimental.mosaic.gpu import profiler  # needs CUPTI, so only here

    def once(x: X, weights: Sequence[W]) -> list[Any]:
        return [run(x, weight) for weight in weights]

    compiled = jax.jit(once).lower(x, weights).compile()
    with alone():
        results, times = profiler.measure(compiled, iterations=5)(x, weights)
    assert times is not None  # the profiler saw kernels
    return statistics.median(times) * 1e3 / len(weights), results[0]


def copies(size: int) -> int:
    """How many weights of `size` bytes have to rotate."""
    return max(2, math.ceil(4 * L2 / size))


def ceilings(say: Callable[[str], None]) -> dict[str, float]:
    """What XLA's own kernels reach on this device.

    Args:
      say: is told of a type whose product fails.

    Returns:
      `read_tb_s`, 10^12 bytes a second, of the largest entry of a large array; `bf16_tflops`,
      `fp8_tflops` and `int8_tops`, 10^12 operations a second, of products of 8192^3, both operands
      contiguous along the contraction; without the types that fail.
    """
    found = {"read_tb_s": read_bandwidth() / 1e12}
    for name, dtype in _RATES.items():
        try:
            found[name] = _rate(dtype)
        except Exception as error:  # the others' rates are worth having
            say(f"{name} was not measured: {type(error).__name__}: {error}")
    return found


def least_microseconds(processors: int) -> float:
    """Time of a kernel in which each processor copies 512 bytes: nothing takes less."""

    def copy(source: Any, target: Any) -> None:
        mine = lax.axis_index("processor")
        target[mine] = source[mine]

    def run(_: None, x: jax.Array) -> jax.Array:
        return plgpu.kernel(
            copy,
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(processors,),
            grid_names=("processor",),
        )(x)

    return measured(run, None, list(jnp.ones((16, processors, 128), jnp.float32)))[0]


def _rate(dtype: Any) -> float:
    integral = jnp.issubdtype(dtype, jnp.integer)

    @jax.jit
    def make(key: jax.Array) -> jax.Array:
        values = jax.random.normal(key, (_LARGE, _LARGE), jnp.float32)
        return (values * 40 if integral else values).astype(dtype)

    @jax.jit
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        out = jnp.int32 if integral else jnp.bfloat16
        return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=out)

    x, weight = map(make, jax.random.split(jax.random.key(0)))
    return 2 * _LARGE**3 / measured(product, x, [weight])[0] / 1e6


class Dense:
    """Products with a random bfloat16 weight [N, K] by XLA."""

    def __init__(self, n: int, k: int) -> None:
        keys = jax.random.split(jax.random.key(0), copies(2 * n * k))
        self.weights = [jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys]

    def microseconds(self, m: int) -> float:
        x = activations(m, self.weights[0].shape[1])
        return measured(jax.jit(lambda x, weight: x @ weight.T), x, self.weights)[0]


def activations(m: int, k: int) -> jax.Array:
    """Random bfloat16 [M, K]."""
    return jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
