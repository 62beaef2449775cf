"""8-bit products and quantizers on several devices: what stays split, and the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import EightBit, quantize_rms_norm, quantize_rows, quantize_silu_mul, w8a8
from kernels_pallas.eight_bit import BLOCK, KINDS, code_dtype


def eight_bit(kind, n: int, k: int) -> EightBit:
    first, second = jax.random.split(jax.random.key(3))
    codes = jnp.clip(jnp.round(40 * jax.random.normal(first, (n, k))), -127, 127)
    shape = (-(-n // BLOCK), k // BLOCK) if kind == "fp8_block" else (n,)
    scales = jax.random.uniform(second, shape, minval=0.1)
    return EightBit(codes.astype(code_dtype(kind)), scales, kind)


def compiled(function, *arguments) -> tuple[Any, dict[str, int]]:
    jitted = jax.jit(function)
    text = str(jitted.lower(*arguments).compile().as_text())
    counts = {name: text.count(f" {name}(") for name in ("all-gather", "all-reduce")}
    return jitted(*arguments), {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [P("model"), P(None, "model"), P()])
def test_products(activations, mesh, kind, where):
    weight, x = eight_bit(kind, 512, 1024), activations(32, 1024)
    alone = w8a8(x, weight)

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    specs = EightBit(where, where if kind == "fp8_block" else P(*where[:1]), kind)  # type: ignore[arg-type]
    shards = EightBit(put(weight.codes, specs.codes), put(weight.scales, specs.scales), kind)
    found, collectives = compiled(w8a8, put(x, P("data", *where[1:])), shards)
    if where == P(None, "model"):
        # A token's scale needs the whole of it, which is gathered; the weight is not.
        wanted = {"all-reduce": 1} | ({} if kind == "fp8_block" else {"all-gather": 1})
        assert collectives == wanted
        difference = np.asarray(found, np.float64) - np.asarray(alone, np.float64)
        assert np.linalg.norm(difference) <= 5e-3 * np.linalg.norm(np.asarray(alone, np.float64))
    else:
        assert collectives == {}
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("where", [P("model"), P(None, "model")])
def test_static_scales_need_no_other_columns(activations, mesh, kind, where):
    """INT8 looks for a NaN in all of a row."""
    weight, x, amax = eight_bit(kind, 512, 1024), activations(32, 1024), jnp.float32(3)
    alone = w8a8(x, weight, amax)

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    shards = EightBit(put(weight.codes, *where), put(weight.scales, *where[:1]), kind)
    found, collectives = compiled(w8a8, put(x, "data", *where[1:]), shards, amax)
    split = where == P(None, "model")
    assert collectives == ({"all-reduce": 2 if kind == "int8" else 1} if split else {})
    limit = 5e-3 if split else 0
    difference = np.asarray(found, np.float64) - np.asarray(alone, np.float64)
    assert np.linalg.norm(difference) <= limit * np.linalg.norm(np.asarray(alone, np.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["rows", "rms_norm", "silu_mul"])
def test_quantizers(activations, mesh, kind, source):
    x, other = activations(16, 1024), activations(16, 1024, seed=1)
    run = {
        "rows": lambda x: quantize_rows(x, kind),
        "rms_norm": lambda x: quantize_rms_norm(x, other[0], 1e-6, kind),
        "silu_mul": lambda x: quantize_silu_mul(x, other, kind),
    }[source]
    alone = run(x)
    found, collectives = compiled(run, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert collectives == {}
    for shared, one in zip(found, alone, strict=True):
        np.testing.assert_array_equal(shared, one)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_divide_are_gathered(activations, mesh, kind):
    weight, x = eight_bit(kind, 48, 640), activations(6, 640)
    shards = jax.device_put(x, NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(jax.jit(w8a8)(shards, weight), w8a8(x, weight))


@pytest.mark.parametrize("kind", KINDS)
def test_batches(activations, kind):
    weight, x = eight_bit(kind, 48, 640), activations(12, 640).reshape(3, 4, 640)
    found = jax.jit(jax.vmap(w8a8, (0, None)))(x, weight)
    np.testing.assert_array_equal(found.reshape(12, 48), w8a8(x.reshape(12, 640), weight))
    codes, scales = jax.vmap(lambda x: quantize_rows(x, kind))(x)
    for i in range(3):
        for all_of, one in zip((codes, scales), quantize_rows(x[i], kind), strict=True):
            np.testing.assert_array_equal(all_of[i], one)
