"""Packed leaves stand for the same weights, and a product takes either kind."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxopt_models import quantize_array
from jaxopt_models.formats import resolve
from jaxopt_models.ops import linear
from jaxopt_models.packed import PackedTensor, has_kernel, pack_leaf
from jaxopt_models.qtensor import InputQuantizer, LowRank, QTensor
from jaxopt_models.tree import weight_bits
from kernels_pallas import EightBit, quantize_rows
from kernels_pallas.eight_bit import decode

INT4 = {
    "blocks of 128": {"scale_dtype": "bfloat16"},
    "blocks of 256": {"block_size": 256, "scale_dtype": "bfloat16"},
    "rows": {"granularity": "channel", "scale_dtype": "bfloat16"},
    "one scale": {"granularity": "tensor", "scale_dtype": "bfloat16"},
    "squares": {"granularity": "block2d", "scale_dtype": "bfloat16"},
}


def by_token(format: str) -> InputQuantizer:
    return InputQuantizer(None, resolve(format, granularity="token"))


def static(format: str, amax: float = 3.0) -> InputQuantizer:
    return InputQuantizer(jnp.float32(amax), resolve(format))


BLOCKS = InputQuantizer(None, resolve("fp8", granularity="block", block_size=128))
BY_CHANNEL: dict[str, Any] = {"granularity": "channel"}
# Formats of weights and inputs.
EIGHT: dict[str, tuple[str, dict[str, Any], InputQuantizer]] = {
    "fp8 by channel and token": ("fp8", BY_CHANNEL, by_token("fp8")),
    "fp8 by tensor and token": ("fp8", {}, by_token("fp8")),
    "fp8 by tensor, static": ("fp8", {}, static("fp8")),
    "fp8 blocks": ("fp8", {"granularity": "block2d"}, BLOCKS),
    "int8 by channel and token": ("int8", BY_CHANNEL, by_token("int8")),
    "int8 by channel, static": ("int8", BY_CHANNEL, static("int8")),
    "int8 by tensor and token": ("int8", {"scale_dtype": "bfloat16"}, by_token("int8")),
}


def eight_bit(name: str, **steps: Any) -> QTensor:
    format, options, input = EIGHT[name]
    return replace(quantize_array(weight(48), format, **options), input=input, **steps)


def activations(m: int = 6, k: int = 384) -> jax.Array:
    spread = jnp.exp2(jnp.arange(m) % 4)[:, None]
    return jax.random.normal(jax.random.key(1), (m, k)) * spread


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


@pytest.mark.parametrize("name", EIGHT)
def test_8_bits_are_the_same(name):
    q = eight_bit(name)
    leaf = packed(q)
    assert isinstance(leaf.weight, EightBit) and leaf.shape == (48, 384)
    np.testing.assert_array_equal(leaf.dequantize(), q.dequantize())
    repeated = 48 - 1 if q.spec.granularity == "tensor" else 0  # scales, one for each channel
    bits = 32 if q.scale.dtype == jnp.float32 else 16
    assert weight_bits(leaf) == weight_bits(q) + 32 * repeated + 32 - bits


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", EIGHT)
def test_8_bits_are_multiplied_with_the_codes_of_the_input(name, dtype):
    leaf, x = packed(eight_bit(name)), activations().astype(dtype)
    assert isinstance(leaf.weight, EightBit) and leaf.input is not None
    codes, scales = jax.jit(quantize_rows, static_argnums=1)(x, leaf.weight.kind, leaf.input.amax)
    found = decode(codes, scales, leaf.weight.kind).astype(dtype)
    np.testing.assert_array_equal(found, jax.jit(InputQuantizer.__call__)(leaf.input, x))


@pytest.mark.parametrize("name", EIGHT)
def test_8_bit_products_in_bfloat16_are_rounded_once(name):
    """Those of the quantized leaf round the input and the weight as well."""
    q, x = eight_bit(name), activations().astype(jnp.bfloat16)
    assert q.input is not None
    exact = np.asarray(q.input(x.astype(jnp.float32)), np.float64)
    exact = exact @ np.asarray(q.dequantize(), np.float64).T
    found, other = (np.asarray(linear(x, leaf), np.float64) for leaf in (packed(q), q))
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-6 * np.abs(exact).max())
    assert np.linalg.norm(found - exact) < 0.9 * np.linalg.norm(other - exact)


def test_a_nan_in_the_input_is_in_the_product():
    x = activations().at[2, 5].set(jnp.nan)
    for name in EIGHT:
        q = eight_bit(name)
        for leaf in (packed(q), q):
            rows = np.isnan(np.asarray(jax.jit(linear)(x, leaf))).all(axis=1)
            assert rows.tolist() == [False, False, True, False, False, False], name


@pytest.mark.parametrize("name", EIGHT)
def test_a_hopper_gpu_gets_kernels(monkeypatch, name):
    """Of bfloat16 products; dynamic scales have one of their own."""
    for module in ("w8a8", "quantize_rows"):
        module = import_module(f"kernels_pallas.{module}")
        monkeypatch.setattr(module, "hopper_processors", lambda: 132)
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    format, options, input = EIGHT[name]
    leaf = packed(replace(quantize_array(weight(48, 512), format, **options), input=input))

    def kernels(dtype: Any) -> int:
        x = jax.ShapeDtypeStruct((3, 5, 512), dtype)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
            lowered = jax.jit(linear).trace(x, leaf).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("custom_call @mosaic_gpu")

    assert kernels(jnp.bfloat16) == (2 if input.amax is None else 1)
    assert kernels(jnp.float32) == 0


@pytest.mark.parametrize(
    ("format", "options", "input", "shape"),
    [
        ("fp8", BY_CHANNEL, None, (32, 256)),  # nothing multiplies codes with floats
        ("int8", {}, None, (32, 256)),
        ("fp8", BY_CHANNEL, by_token("int8"), (32, 256)),
        ("int8", BY_CHANNEL, by_token("fp8"), (32, 256)),
        ("fp8", BY_CHANNEL, InputQuantizer(None, resolve("nvfp4")), (32, 256)),
        ("fp8", BY_CHANNEL, BLOCKS, (32, 256)),
        ("fp8", {"granularity": "block2d"}, by_token("fp8"), (32, 256)),
        ("fp8", {"granularity": "block2d", "block_size": 64}, BLOCKS, (32, 256)),
        ("fp8", {"granularity": "block2d"}, BLOCKS, (32, 192)),
        ("fp8", {"granularity": "block"}, BLOCKS, (32, 256)),
        ("fp8", {}, InputQuantizer(None, resolve("fp8")), (32, 256)),  # tokens share a scale
        ("fp8", {}, replace(by_token("fp8"), search="mse"), (32, 256)),
        ("int8", {}, InputQuantizer(None, resolve("int8", **BY_CHANNEL, scale_dtype="bfloat16")),
         (32, 256)),
        ("mxfp8_e4m3", {}, by_token("fp8"), (32, 256)),
        ("fp8", BY_CHANNEL, by_token("fp8"), (40, 256)),
        ("int8", BY_CHANNEL, by_token("int8"), (32, 200)),
        ("int8", BY_CHANNEL, by_token("int8"), (4, 32, 256)),
    ],
)  # fmt: skip
def test_8_bits_without_a_kernel_stay_as_they_are(format, options, input, shape):
    assert not has_kernel(resolve(format, **options), shape, input)
    q = replace(quantize_array(jnp.ones(shape), format, **options), input=input)
    assert pack_leaf(q) is q


@pytest.mark.parametrize(
    ("format", "options", "shape"),
    [
        ("int4", {"symmetric": False}, (32, 256)),
        ("int4", {"block_size": 64}, (32, 256)),
        ("int4", {}, (32, 192)),
        ("int4", {"block_size": 192}, (32, 384)),
        ("nf4", {}, (32, 256)),
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
    "quantized input": {"input": by_token("fp8")},
    "static input": {"input": static("fp8")},
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


@pytest.mark.parametrize("steps", ["none", "pre_scale", "rotated", "low rank"])
@pytest.mark.parametrize("name", EIGHT)
def test_products_of_8_bits_are_those_of_the_quantized_leaf(name, steps):
    """Up to roundings of float32."""
    changes = dict(STEPS[steps])
    if steps == "low rank":
        changes["low_rank"] = LowRank(jnp.ones((2, 384)) / 64, jnp.ones((48, 2)))
    q = eight_bit(name, **changes)
    x, bias = activations().reshape(2, 3, 384), jnp.arange(48.0)
    run = jax.jit(linear)
    found, expected = run(x, packed(q), bias), run(x, q, bias)
    assert found.shape == (2, 3, 48) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_products_differ_by_roundings():
    """The kernel's result is rounded before the bias is added."""
    q = quantize_array(weight().astype(jnp.bfloat16), "nvfp4")
    x = jax.random.normal(jax.random.key(1), (5, 384), jnp.bfloat16)
    found, expected = (linear(x, leaf, jnp.ones(40)) for leaf in (packed(q), q))
    assert found.dtype == jnp.bfloat16
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["mxfp4", *EIGHT])
def test_gradients_reach_the_input(name):
    q = eight_bit(name) if name in EIGHT else quantize_array(weight(), name)
    x = jax.random.normal(jax.random.key(1), (3, 384))

    def total(x: jax.Array, leaf: object) -> jax.Array:
        return jnp.sum(linear(x, leaf) ** 2)

    found, expected = (jax.grad(total)(x, leaf) for leaf in (packed(q), q))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())
