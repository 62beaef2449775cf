"""Packed leaves stand for the same weights, and a product takes either kind."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import quantize_array
from jaxopt_models.formats import resolve
from jaxopt_models.ops import linear
from jaxopt_models.packed import PackedTensor, has_kernel, pack_leaf
from jaxopt_models.qtensor import InputQuantizer, LowRank, QTensor
from jaxopt_models.tree import weight_bits

INT4 = {
    "blocks of 128": {"scale_dtype": "bfloat16"},
    "blocks of 256": {"block_size": 256, "scale_dtype": "bfloat16"},
    "rows": {"granularity": "channel", "scale_dtype": "bfloat16"},
    "one scale": {"granularity": "tensor", "scale_dtype": "bfloat16"},
    "squares": {"granularity": "block2d", "scale_dtype": "bfloat16"},
}


def weight(n: int = 40, k: int = 384) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (n, k)) * jnp.exp2(jnp.arange(n) % 9)[:, None]


def packed(q: QTensor) -> PackedTensor:
    leaf = jax.jit(pack_leaf)(q)
    assert isinstance(leaf, PackedTensor)
    return leaf


@pytest.mark.parametrize("options", INT4.values(), ids=INT4)
def test_int4_with_bfloat16_scales_is_the_same(options):
    q = quantize_array(weight(), "int4", **options)
    leaf = packed(q)
    assert leaf.shape == (40, 384) and (leaf.ndim, leaf.size) == (2, 40 * 384)
    np.testing.assert_array_equal(leaf.dequantize(), q.dequantize())


def test_int4_scales_are_rounded_to_bfloat16():
    q = quantize_array(weight(), "int4")
    rounded = replace(q, scale=q.scale.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(packed(q).dequantize(), rounded.dequantize())
    assert np.any(packed(q).dequantize() != q.dequantize())


@pytest.mark.parametrize("rule", ["ceil", "floor"])
def test_mxfp4_is_the_same(rule):
    q = quantize_array(weight(), "mxfp4", mx_rule=rule)
    np.testing.assert_array_equal(packed(q).dequantize(), q.dequantize())


@pytest.mark.parametrize("block", [16, 32])
def test_nvfp4_is_the_same_to_one_rounding(block):
    q = quantize_array(weight(), "nvfp4", block_size=block)
    found, expected = np.asarray(packed(q).dequantize()), np.asarray(q.dequantize())
    assert np.all(np.abs(found - expected) <= np.spacing(np.abs(expected)))


def test_what_the_leaf_says_of_itself():
    q = quantize_array(weight(64, 1024).astype(jnp.bfloat16), "nvfp4")
    leaf = packed(q)
    assert leaf.dequantize().dtype == jnp.bfloat16
    assert leaf.dequantize(jnp.float32).dtype == jnp.float32
    assert weight_bits(leaf) == weight_bits(q) - 32 + 4 * 32  # a factor for each 16 rows


@pytest.mark.parametrize(
    ("format", "options", "shape"),
    [
        ("int4", {"symmetric": False}, (32, 256)),
        ("int4", {"block_size": 64}, (32, 256)),
        ("int4", {}, (32, 192)),
        ("int4", {"block_size": 192}, (32, 384)),
        ("nf4", {}, (32, 256)),
        ("fp8", {}, (32, 256)),
        ("nvfp4", {"block_size": 8}, (32, 256)),
        ("nvfp4", {}, (32, 40)),
        ("mxfp4", {}, (4, 32, 256)),  # stacked experts
    ],
)
def test_without_a_kernel_a_leaf_stays_as_it_is(format, options, shape):
    assert not has_kernel(resolve(format, **options), shape)
    q = quantize_array(jnp.ones(shape), format, **options)
    assert pack_leaf(q) is q


def test_other_leaves_stay_as_they_are():
    array = weight()
    assert pack_leaf(array) is array


STEPS = {
    "none": {},
    "pre_scale": {"pre_scale": jnp.linspace(0.5, 2, 384)},
    "rotated": {"rotate": 128},
    "quantized input": {"input": InputQuantizer(None, resolve("fp8", granularity="token"))},
    "static input": {"input": InputQuantizer(jnp.float32(3), resolve("fp8"))},
    "low rank": {"low_rank": LowRank(jnp.ones((2, 384)) / 64, jnp.ones((40, 2)))},
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("format", ["int4", "nvfp4", "mxfp4"])
def test_products_are_those_of_the_quantized_leaf(format, steps):
    options = INT4["blocks of 128"] if format == "int4" else {}
    q = replace(quantize_array(weight(), format, **options), **steps)
    x = jax.random.normal(jax.random.key(1), (2, 3, 384))
    bias = jnp.arange(40.0)
    run = jax.jit(linear)
    found, expected = run(x, packed(q), bias), run(x, q, bias)
    assert found.shape == (2, 3, 40)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    plain = run(x, packed(replace(q, pre_scale=None, rotate=0, input=None, low_rank=None)), bias)
    assert np.any(np.asarray(found) != np.asarray(plain)) == bool(steps)


def test_bfloat16_products_differ_by_roundings():
    """The kernel's result is rounded before the bias is added."""
    q = quantize_array(weight().astype(jnp.bfloat16), "nvfp4")
    x = jax.random.normal(jax.random.key(1), (5, 384), jnp.bfloat16)
    found, expected = (linear(x, leaf, jnp.ones(40)) for leaf in (packed(q), q))
    assert found.dtype == jnp.bfloat16
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)


def test_gradients_reach_the_input():
    q = quantize_array(weight(), "mxfp4")
    x = jax.random.normal(jax.random.key(1), (3, 384))

    def total(x: jax.Array, leaf: object) -> jax.Array:
        return jnp.sum(linear(x, leaf) ** 2)

    found, expected = (jax.grad(total)(x, leaf) for leaf in (packed(q), q))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())
