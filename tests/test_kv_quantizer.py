"""Rows of keys and values: stored and read back they are what the forward pass computes with."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.formats import resolve
from jaxopt_models.hadamard import hadamard
from jaxopt_models.kv_quantizer import (
    KVQuantizer,
    RowQuantizer,
    Search,
    with_kv_cache,
    without_kv_cache,
)
from jaxopt_models.qtensor import fake_quant

GROUPS, DIM = 3, 32
FORMATS: dict[str, tuple[str, str | None, Search]] = {
    "fp8": ("fp8", "tensor", "max"),
    "fp8 token": ("fp8", "token", "max"),
    "int8": ("int8", "token", "max"),
    "nvfp4": ("nvfp4", None, "max"),
    "nvfp4 four over six": ("nvfp4", None, "four_over_six"),
    "nvfp4 mse": ("nvfp4", None, "mse"),
}
STATIC = [name for name in FORMATS if name not in ("fp8 token", "int8")]
_store, _restore = jax.jit(RowQuantizer.store), jax.jit(RowQuantizer.restore, static_argnums=3)
_fake = jax.jit(RowQuantizer.__call__)


def rows(seed: int = 0, batch: int = 2, length: int = 5, dtype: Any = jnp.float32) -> jax.Array:
    """[B, G, N, d], channels of different means and heads of different sizes, some rows zero."""
    means = 3 * np.random.default_rng(100).normal(size=(GROUPS, 1, DIM))
    x = np.random.default_rng(seed).normal(size=(batch, GROUPS, length, DIM)) + means
    x = x * np.array([0.1, 1.0, 7.0]).reshape(GROUPS, 1, 1)
    x[:, :, 1] = 0
    return jnp.asarray(x, dtype)


def quantizer(name: str, heads: bool = False, biased: bool = False) -> RowQuantizer:
    format, granularity, search = FORMATS[name]
    x = rows(9, length=50)
    bias = jnp.mean(x, axis=(0, 2)) if biased else None
    amax = None
    if name in STATIC:
        centred = x if bias is None else x - bias[None, :, None]
        amax = jnp.max(jnp.abs(centred), axis=(0, 2, 3) if heads else None)
    return RowQuantizer(amax, bias, spec=resolve(format, granularity=granularity), search=search)


VARIANTS = {
    "fp8": quantizer("fp8"),
    "fp8 head bias": quantizer("fp8", heads=True, biased=True),
    "fp8 token bias": quantizer("fp8 token", biased=True),
    "int8": quantizer("int8"),
    "nvfp4": quantizer("nvfp4"),
    "nvfp4 head bias": quantizer("nvfp4", heads=True, biased=True),
    "nvfp4 four over six bias": quantizer("nvfp4 four over six", biased=True),
    "nvfp4 mse head": quantizer("nvfp4 mse", heads=True),
}
every_variant = pytest.mark.parametrize("q", VARIANTS.values(), ids=VARIANTS)


@every_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_law(q, dtype):
    """What is read back is what the forward pass without a cache computes with, bit for bit."""
    x = rows(dtype=dtype)
    codes, scale = _store(q, x)
    read, fake = _restore(q, codes, scale, dtype), _fake(q, x)
    assert read.dtype == fake.dtype == dtype and read.shape == x.shape
    assert np.array_equal(read, fake)


@every_variant
def test_a_row_depends_on_nothing_but_itself(q):
    x = rows(1, batch=3, length=6)
    together = _store(q, x)
    alone = _store(q, x[1:2, :, 4:5])
    same = jax.tree.map(lambda a, b: np.array_equal(a[1:2, :, 4:5], b), together, alone)
    assert jax.tree.all(same)


@every_variant
def test_the_error_is_that_of_the_format(q):
    x = rows(2)
    biased = q.bias is not None
    centred = np.abs(x - (q.bias[None, :, None] if biased else 0))
    largest = centred.max(-1, keepdims=True)
    if q.amax is not None and q.spec.format == "fp8":
        largest = np.broadcast_to(q.amax.reshape(1, -1, 1, 1), centred.shape)
        assert np.all(np.abs(_fake(q, x) - x)[centred <= largest] <= largest.max() / 28 + 1e-6)
    elif q.amax is None:
        steps = {"fp8": 28, "int8": 2 * 127}[q.spec.format]
        assert np.all(np.abs(_fake(q, x) - x) <= largest / steps * 1.001 + 1e-6)
    else:
        assert float(jnp.linalg.norm(_fake(q, x) - x)) < 0.12 * float(np.linalg.norm(centred))


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name][2] == "max"])
def test_without_bias_it_is_the_fake_quantization_of_the_format(name):
    q = quantizer(name)
    expected = jax.jit(lambda x: fake_quant(x, q.spec, amax=q.amax))(rows())
    assert np.array_equal(_fake(q, rows()), expected)


def test_each_head_may_have_its_own_scale():
    x = rows(3)
    whole, each = quantizer("fp8"), quantizer("fp8", heads=True)
    fake = _fake(each, x)
    for head in range(GROUPS):
        assert each.amax is not None
        own = RowQuantizer(each.amax[head], spec=each.spec)
        part = slice(head, head + 1)
        assert np.array_equal(fake[:, part], _fake(own, x[:, part]))
    assert jnp.sum(jnp.abs(fake - x)[:, 0]) < jnp.sum(jnp.abs(_fake(whole, x) - x)[:, 0])


@pytest.mark.parametrize("name", ["nvfp4 four over six", "nvfp4 mse"])
def test_a_search_chooses_the_best_of_its_candidates(name):
    """Against each candidate by its definition, under the global scale amax / (6 · 256)."""
    q, x = quantizer(name), rows(4)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    level = np.float32(q.amax) / np.float32(6 * 256)
    blocks = np.asarray(x, np.float64).reshape(2, GROUPS, 5, 2, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    best = np.full(amax.shape, np.inf)
    for factor in (1, 1.5) if name == "nvfp4 four over six" else (1, 1.5, 0.875, 1.25):
        raw = np.clip(amax * factor / 6 / level, 2.0**-9, 448).astype(np.float32)
        scale = raw.astype(jnp.float8_e4m3fn).astype(np.float64) * level
        nearest = np.abs(np.abs(blocks)[..., None] / scale[..., None] - grid).min(-1) * scale
        best = np.minimum(best, (nearest**2).sum(-1, keepdims=True))
    error = (np.asarray(_fake(q, x), np.float64).reshape(blocks.shape) - blocks) ** 2
    np.testing.assert_allclose(error.sum(-1, keepdims=True), best, rtol=1e-4, atol=1e-9)


def test_more_candidates_lose_less():
    x = rows(5, length=200)
    errors = [
        float(jnp.sum(jnp.square(_fake(quantizer(f"nvfp4{search}"), x) - x)))
        for search in ("", " four over six", " mse")
    ]
    assert errors[0] > 1.05 * errors[1] and errors[1] > 1.02 * errors[2]


@every_variant
def test_blank_storage_has_the_shapes_of_what_is_stored_and_reads_as_the_bias(q):
    x = rows()
    stored, blank = _store(q, x), q.blank(x.shape)
    shape = partial(jax.tree.map, lambda array: (array.shape, array.dtype.name))
    assert shape(stored) == shape(blank)
    expected = np.zeros(x.shape) + (0 if q.bias is None else np.asarray(q.bias)[None, :, None])
    assert np.array_equal(_restore(q, *blank, "float32"), expected.astype(np.float32))


@every_variant
@pytest.mark.parametrize("size", [1, 100])
def test_the_gradient_is_straight_through(q, size):
    """Past the calibrated magnitude, too."""
    x = size * rows()
    rounded, pull = jax.vjp(partial(_fake, q), x)
    assert np.array_equal(rounded, _fake(q, x)) and not np.array_equal(rounded, x)
    assert np.array_equal(pull(rows(6))[0], rows(6))


def test_a_value_past_the_calibrated_magnitude_saturates():
    q = RowQuantizer(jnp.float32(2.0), spec=resolve("fp8"))
    assert np.array_equal(_fake(q, jnp.full((1, 1, 1, 4), -9.0)), np.full((1, 1, 1, 4), -2.0))


@pytest.mark.gpu
@every_variant
def test_a_gpu_stores_and_reads_what_the_cpu_does(q):
    found = []
    for platform in ("gpu", "cpu"):
        own, x = jax.device_put((q, rows()), jax.devices(platform)[0])
        stored = _store(own, x)
        found.append(jax.tree.map(np.asarray, (stored, _restore(own, *stored, "float32"))))
    (stored, values), (stored_by_cpu, values_by_cpu) = found
    assert jax.tree.all(jax.tree.map(np.array_equal, stored, stored_by_cpu))
    # Adding the bias may be fused with the product before it, which is then not rounded by itself:
    # the sum is off by that, and may round to the other side.
    rounded = 0.0
    if q.bias is not None:
        rounded = np.abs(values_by_cpu - q.bias[None, :, None]) + np.abs(values_by_cpu)
    assert np.all(np.abs(values - values_by_cpu) <= 2.0**-23 * rounded)


def test_rotation_keeps_products():
    q = KVQuantizer(quantizer("fp8"), quantizer("fp8"), rotate=True)
    query, key = rows(7), rows(8)
    assert np.array_equal(q.rotated(key), hadamard(key, DIM))
    before, after = jnp.sum(query * key, -1), jnp.sum(q.rotated(query) * q.rotated(key), -1)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)
    assert KVQuantizer(quantizer("fp8"), quantizer("fp8")).rotated(key) is key


def test_it_is_put_into_parameters_and_taken_out_again():
    q = KVQuantizer(quantizer("fp8"), quantizer("fp8", biased=True))
    weight = jnp.ones((4, 4))
    params = {"layers": tuple({"self_attn": {"q_proj": {"weight": weight}}} for _ in range(2))}
    new = with_kv_cache(params, [None, q])
    assert (
        new["layers"][0] == params["layers"][0] and new["layers"][1]["self_attn"]["kv_cache"] is q
    )
    assert without_kv_cache(new) == params
    assert tree.bits_per_weight(new) == tree.bits_per_weight(params) == 32
    assert [path for path, _ in tree.leaves_with_paths(new) if "kv_cache" in path] == [
        f"layers/1/self_attn/kv_cache/{name}" for name in ("key/amax", "value/amax", "value/bias")
    ]
