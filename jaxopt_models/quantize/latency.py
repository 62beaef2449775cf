"""How long one product with a weight takes on this device."""

import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.ops import expert_linear, linear


def product_seconds(weight: Any, rows: int, dtype: str = "float32", repeats: int = 20) -> float:
    """Median wall time of the jitted product of `rows` inputs with a weight, in seconds.

    What is measured is a call by itself, its launch included: small products on a GPU take longer
    than inside a compiled model, but in the same order.

    Args:
      weight: leaf standing for [N, K], or for experts [E, N, K], among which the rows are spread
        evenly.
      rows: M, inputs of the product.
      dtype: of the inputs.
      repeats: calls timed, after one that compiles.
    """
    x = jnp.ones((rows, weight.shape[-1]), dtype)
    product = linear
    if weight.ndim == 3:
        experts = weight.shape[0]
        spread = [rows * (e + 1) // experts - rows * e // experts for e in range(experts)]
        product = partial(expert_linear, group_sizes=jnp.asarray(spread, jnp.int32))
    run = jax.jit(product)
    jax.block_until_ready(run(x, weight))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(x, weight))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def product_key(weight: Any) -> tuple[Any, ...]:
    """Equal for weights that compile to the same product: kind, formats, shapes and dtypes."""
    arrays, kind = jax.tree.flatten(weight)
    return kind, tuple((array.shape, jnp.dtype(array.dtype).name) for array in arrays)
