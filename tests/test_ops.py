"""Products with weight leaves of every kind against the formula they stand for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxopt_models.errors import UserError
from jaxopt_models.formats import resolve
from jaxopt_models.hadamard import hadamard
from jaxopt_models.ops import embed, expert_linear, linear
from jaxopt_models.qtensor import InputQuantizer, LowRank, fake_quant, quantize_array

_N, _K = 12, 70


def _random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _with(weight, format, static=None, dynamic=None, smooth=False, rotate=0, rank=None, **options):
    """A quantized leaf; `static` is a format and the amax of its input, `rank` a correction's."""
    leaf = quantize_array(weight, format, **options)
    quantizer = (
        None if dynamic is None else InputQuantizer(None, resolve(dynamic, granularity="token"))
    )
    if static is not None:
        quantizer = InputQuantizer(jnp.float32(static[1]), resolve(static[0]))
    lead, (n, k) = leaf.shape[:-2], leaf.shape[-2:]
    low_rank = rank and LowRank(
        jnp.asarray(_random(1, *lead, rank, k)), jnp.asarray(_random(2, *lead, n, rank))
    )
    pre_scale = jnp.asarray(1 + _random(3, k) ** 2) if smooth else None
    return replace(leaf, input=quantizer, pre_scale=pre_scale, low_rank=low_rank, rotate=rotate)


_LEAVES = {
    "array": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "fp8": lambda w: quantize_array(w, "fp8", granularity="channel"),
    "fp8 blocks": lambda w: quantize_array(w, "fp8", granularity="block2d", block_size=8),
    "int4": lambda w: quantize_array(w, "int4", block_size=32, symmetric=False),
    "mxfp6": lambda w: quantize_array(w, "mxfp6"),
    "nf4": lambda w: quantize_array(w, "nf4"),
    "static input": lambda w: _with(w, "fp8", static=("fp8", 2.5)),
    "dynamic input": lambda w: _with(w, "int8", dynamic="int8"),
    "micro input": lambda w: _with(w, "nvfp4", static=("nvfp4", 3.0)),
    "smoothed": lambda w: _with(w, "int4", smooth=True),
    "rotated": lambda w: _with(w, "int8", rotate=2),
    "all": lambda w: _with(w, "nvfp4", smooth=True, rotate=2, rank=3, dynamic="int8"),
}


def _rotation(block):
    """The block-diagonal matrix [K, K] of an online rotation."""
    return jnp.asarray(np.kron(np.eye(_K // block), scipy.linalg.hadamard(block)), jnp.float32)


def _formula(x, leaf, bias):
    """Q(z) Wᵀ + z downᵀ upᵀ + b with z = (x · s) H / √block, written out."""
    if not hasattr(leaf, "spec"):
        return x @ leaf.astype(jnp.float32).T + bias
    smooth = x if leaf.pre_scale is None else x * jnp.broadcast_to(leaf.pre_scale, x.shape)
    if leaf.rotate:
        smooth = smooth @ _rotation(leaf.rotate) / jnp.sqrt(jnp.float32(leaf.rotate))
    quantized = smooth
    if leaf.input is not None and x.size:
        quantized = fake_quant(smooth, leaf.input.spec, amax=leaf.input.amax)
    out = quantized @ leaf.dequantize(jnp.float32).T + bias
    if leaf.low_rank is not None:
        out = out + smooth @ leaf.low_rank.down.T @ leaf.low_rank.up.T
    return out


@pytest.mark.parametrize("kind", _LEAVES)
def test_linear_is_its_formula(kind):
    @jax.jit
    def both(x, weight, bias):
        leaf = _LEAVES[kind](weight)
        assert leaf.shape == (_N, _K)
        added = jnp.broadcast_to(bias, (2, 5, _N))
        return linear(x, leaf, bias), linear(x, leaf) + added, _formula(x, leaf, added)

    out, without_bias, expected = both(_random(4, 2, 5, _K), _random(6, _N, _K), _random(5, _N))
    assert (out.shape, out.dtype) == ((2, 5, _N), jnp.float32)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(out, without_bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("block", [16, 64])
def test_a_rotation_and_its_inverse_cancel(block):
    """For a weight that 8 bits hold exactly once it is rotated, the leaf is the plain product."""
    grid = np.random.default_rng(8).integers(-126, 127, (_N, 128)).astype(np.float32)
    grid[:, 0] = 127

    @jax.jit
    def both(x, grid):
        weight = hadamard(grid / 64, block)
        leaf = quantize_array(hadamard(weight, block), "int8", granularity="channel")
        return linear(x, replace(leaf, rotate=block)), linear(x, weight), leaf.unpack()

    rotated, plain, codes = both(_random(4, 3, 128), grid)
    assert np.array_equal(codes, grid)
    np.testing.assert_allclose(rotated, plain, rtol=1e-5, atol=1e-5)


def test_a_rotation_that_does_not_fit_is_named():
    leaf = replace(quantize_array(jnp.ones((_N, _K)), "int8"), rotate=16)
    with pytest.raises(UserError, match="of 70 channels has no block of 16"):
        linear(jnp.ones((2, _K)), leaf)


def test_linear_accumulates_in_float32_and_keeps_the_dtype_of_its_input():
    """4096 products of 1: a bfloat16 sum would stop growing at 256."""

    @jax.jit
    def products(x):
        leaf = quantize_array(jnp.ones((2, 4096)), "fp8")
        return [linear(x, w) for w in (leaf, jnp.ones((2, 4096)), jnp.ones((2, 4096), x.dtype))]

    for out in products(jnp.ones((1, 4096), jnp.bfloat16)):
        assert out.dtype == jnp.bfloat16 and np.all(np.asarray(out) == 4096)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_training_in_bfloat16_multiplies_nothing_in_float32(dtype):
    """Forward and backward, whatever the dtype of the result, of masters in float32."""

    def loss(x, weight):
        return jnp.sum(jnp.sin(linear(x, weight, dtype=dtype).astype(jnp.float32)))

    def products(x, weight):
        text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weight))
        return [line for line in text.splitlines() if "= dot_general" in line]

    given = jnp.asarray(_random(4, 2, 5, _K), jnp.bfloat16), jnp.asarray(_random(6, _N, _K))
    assert [line.split(":")[1][:4] for line in products(*given)[1:]] == ["bf16", "bf16"]
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*given).as_text()
    operands = [line.split(": (")[1] for line in text.splitlines() if "dot_general" in line]
    assert len(operands) == 3
    for types in operands:
        assert all(one.endswith("xbf16>") for one in types.split(") -> ")[0].split(", "))


def test_gradients_of_a_bfloat16_product_are_those_of_its_rounded_cotangent():
    x, weight = (jnp.asarray(_random(seed, *shape)) for seed, shape in ((4, (7, _K)), (6, (3, _K))))
    x, weight, upstream = (a.astype(jnp.bfloat16) for a in (x, weight, _random(5, 7, 3)))
    out, pull = jax.vjp(lambda *pair: linear(*pair, dtype=jnp.float32), x, weight)
    assert out.dtype == jnp.float32
    exact = [np.asarray(a, np.float64) for a in (x, weight, upstream)]
    expected = exact[2] @ exact[1], exact[2].T @ exact[0]
    for found, best in zip(pull(upstream.astype(jnp.float32)), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), best, rtol=2**-8, atol=1e-6)


_EXPERTS = {
    "array": lambda w: w,
    "fp8": lambda w: quantize_array(w, "fp8", granularity="channel"),
    "nvfp4": lambda w: jax.vmap(lambda e: quantize_array(e, "nvfp4"))(w),
    "all": lambda w: _with(w, "mxfp4", smooth=True, rotate=2, rank=3, dynamic="int8"),
}


@pytest.mark.parametrize("kind", _EXPERTS)
@pytest.mark.parametrize("sizes", [(3, 0, 4, 2), (0, 0, 9, 0)])
def test_expert_linear_is_a_loop_over_experts(kind, sizes):
    ends = np.cumsum(sizes)

    @jax.jit
    def both(x, stacked, group_sizes):
        weights = _EXPERTS[kind](stacked)
        groups = enumerate(zip(ends - sizes, ends, strict=True))
        loop = [_formula(x[start:end], _expert(weights, e), 0.0) for e, (start, end) in groups]
        return expert_linear(x, weights, group_sizes), jnp.concatenate(loop)

    x, stacked = _random(9, sum(sizes), _K), _random(10, 4, _N, _K)
    out, expected = both(x, stacked, jnp.asarray(sizes, jnp.int32))
    assert out.shape == (sum(sizes), _N)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def _expert(weights, index):
    if not hasattr(weights, "spec"):
        return weights[index]
    stacked = replace(weights, pre_scale=None, input=None)
    alone = jax.tree.map(lambda a: a[index], stacked)
    return replace(alone, pre_scale=weights.pre_scale, input=weights.input)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("fp8", {}),
        ("fp8", {"granularity": "channel"}),
        ("int8", {"block_size": 16}),
        ("int8", {"granularity": "block2d", "block_size": 4}),
        ("int4", {"symmetric": False, "block_size": 32}),
        ("int4", {"symmetric": False, "granularity": "block2d", "block_size": 4}),
        ("int4", {"granularity": "tensor"}),
        ("nvfp4", {}),
        ("mxfp6_e3m2", {}),
        ("nf4", {"scale_dtype": "float8_e4m3fn"}),
    ],
)
def test_embedding_rows_are_those_of_the_table(format, options):
    """Bit for bit, for tiles that are higher than a row and widths that no block divides."""
    tokens = jnp.asarray([[0, 9, 3], [3, 8, 1]], jnp.int32)

    @jax.jit
    def rows(table, tokens):
        leaf = quantize_array(table, format, **options)
        return embed(tokens, leaf, jnp.float32), leaf.dequantize()[tokens]

    looked_up, expected = rows(_random(11, 10, 37), tokens)
    assert looked_up.shape == (2, 3, 37)
    assert np.array_equal(looked_up, expected)


def test_embedding_gives_the_dtype_asked_for():
    table = jnp.asarray([[1.0, 2.0], [3.0, 4.0]], jnp.bfloat16)
    tokens = jnp.asarray([1, 0])
    out = embed(tokens, table, "float32")
    assert out.dtype == jnp.float32 and out.tolist() == [[3.0, 4.0], [1.0, 2.0]]
    out = jax.eval_shape(lambda t: embed(tokens, quantize_array(t, "fp8"), "bfloat16"), table)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["array", "mxfp6", "static input", "all"])
def test_gradient_reaches_the_input(kind):
    """d(x)/dx through the quantized weight; the input quantizer is straight-through."""
    upstream = jnp.asarray(_random(12, 4, _N))

    @jax.jit
    def both(x, weight):
        leaf = _LEAVES[kind](weight)
        grad = jax.grad(lambda x: jnp.sum(linear(x, leaf) * upstream))(x)
        expected = upstream @ (leaf.dequantize() if hasattr(leaf, "spec") else leaf)
        if kind == "all":
            expected = expected + upstream @ leaf.low_rank.up @ leaf.low_rank.down
            expected = hadamard(expected, leaf.rotate)
            expected = expected * jnp.broadcast_to(leaf.pre_scale, expected.shape)
        return grad, expected

    np.testing.assert_allclose(*both(_random(13, 4, _K), _random(6, _N, _K)), rtol=1e-5, atol=1e-4)


def test_gradient_reaches_float_parts_of_a_leaf():
    """As when a low-rank correction is trained beside frozen codes."""

    @jax.jit
    def gradient(x, weight):
        leaf = _LEAVES["all"](weight)

        def loss(low_rank):
            return jnp.sum(linear(x, replace(leaf, low_rank=low_rank)) ** 2)

        return jax.grad(loss)(jax.tree.map(jnp.asarray, leaf.low_rank))

    grads = gradient(_random(14, 4, _K), _random(6, _N, _K))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("correction", [{"smooth": True}, {"rotate": 2}, {"rank": 2}])
def test_embedding_refuses_what_would_need_an_input(correction):
    table = _with(_random(7, _N, _K), "int8", **correction)
    with pytest.raises(UserError, match="an embedding table has no input"):
        embed(jnp.arange(3), table, jnp.float32)
