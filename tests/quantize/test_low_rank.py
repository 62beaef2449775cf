"""The low-rank part is the best there is, and a residual is easier to quantize than its whole."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models.errors import UserError
from jaxopt_models.formats import resolve
from jaxopt_models.ops import linear
from jaxopt_models.qtensor import LowRank, fake_quant, quantize_array
from jaxopt_models.quantize.low_rank import low_rank, residual
from jaxopt_models.tree import weight_bits

SHAPES = pytest.mark.parametrize("shape", [(96, 40), (40, 96), (48, 48)], ids=str)
RANK = 6


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def weight_like(seed, shape):
    """A few strong directions and outlier columns over noise, as smoothing leaves weights."""
    rows, width = shape
    strong = normal(seed, rows, 4) @ normal(seed + 1, 4, width)
    values = normal(seed + 2, rows, width) + 2 * strong
    values[:, ::17] *= 6
    return jnp.asarray(values / np.sqrt(width), jnp.float32)


def moment_like(seed, width, tokens=400):
    x = (
        normal(seed, tokens, width)
        @ normal(seed + 1, width, width)
        * np.exp(normal(seed + 2, width))
    )
    return jnp.asarray(x.T @ x / tokens, jnp.float32)


def output_error(error, moment):
    """sqrt(tr(error · H · errorᵀ))"""
    error, moment = np.asarray(error, np.float64), np.asarray(moment, np.float64)
    return float(np.sqrt(max(np.sum((error @ moment) * error), 0)))


def smallest_error(weight, moment, rank):
    """Root of the sum of squares of the singular values that rank R leaves out, in float64."""
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    root = vectors * np.sqrt(np.maximum(values, 0))
    singular = np.linalg.svd(np.asarray(weight, np.float64) @ root, compute_uv=False)
    return float(np.sqrt(np.sum(singular[rank:] ** 2)))


@SHAPES
def test_the_error_is_the_eckart_young_optimum(shape):
    weight, identity = weight_like(0, shape), np.eye(shape[1])
    parts = low_rank(weight, RANK)
    assert parts.down.shape == (RANK, shape[1]) and parts.up.shape == (shape[0], RANK)
    error = output_error(residual(weight, parts), identity)
    np.testing.assert_allclose(error, smallest_error(weight, identity, RANK), rtol=1e-6)


@SHAPES
def test_known_inputs_give_the_least_output_error(shape):
    weight, moment = weight_like(0, shape), moment_like(5, shape[1])
    plain, aware = low_rank(weight, RANK), low_rank(weight, RANK, moment)
    error = output_error(residual(weight, aware), moment)
    np.testing.assert_allclose(error, smallest_error(weight, moment, RANK), rtol=1e-5)
    assert error < 0.9 * output_error(residual(weight, plain), moment)


@SHAPES
def test_fewer_tokens_than_channels(shape):
    """A singular second moment needs no damping: outputs of rank 4 are reproduced by rank 4."""
    weight, moment = weight_like(0, shape), moment_like(5, shape[1], tokens=4)
    error = output_error(residual(weight, low_rank(weight, 4, moment)), moment)
    assert error < 1e-5 * output_error(weight, moment)


@SHAPES
@pytest.mark.parametrize("known", [False, True], ids=["plain", "aware"])
def test_full_rank_leaves_nothing(shape, known):
    weight = weight_like(0, shape)
    parts = low_rank(weight, min(shape), moment_like(5, shape[1]) if known else None)
    rest = residual(weight, parts)
    np.testing.assert_allclose(rest, np.zeros(shape), atol=3e-6 * float(jnp.max(jnp.abs(weight))))


@SHAPES
def test_up_is_orthonormal_also_of_a_matrix_of_low_rank(shape):
    weight = jnp.asarray(normal(0, shape[0], 3) @ normal(1, 3, shape[1]), jnp.float32)
    parts = low_rank(weight, RANK)
    np.testing.assert_allclose(parts.up.T @ parts.up, np.eye(RANK), atol=1e-5)
    assert jnp.linalg.norm(residual(weight, parts)) < 1e-5 * jnp.linalg.norm(weight)


def test_a_matrix_of_zeros():
    parts = low_rank(jnp.zeros((8, 16), jnp.float32), 2)
    np.testing.assert_array_equal(parts.down, 0.0)
    assert jnp.all(jnp.isfinite(parts.up))


@SHAPES
def test_experts_together_are_experts_one_by_one(shape):
    """Compared as products: the factors themselves may differ by signs."""
    weights = jnp.stack([weight_like(i, shape) for i in range(3)])
    moments = jnp.stack([moment_like(i, shape[1]) for i in range(3)])
    together = jax.vmap(lambda w, h: low_rank(w, RANK, h))(weights, moments)
    for i in range(3):
        alone = residual(weights[i], low_rank(weights[i], RANK, moments[i]))
        one = LowRank(together.down[i], together.up[i])
        np.testing.assert_allclose(residual(weights[i], one), alone, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 41])
def test_impossible_ranks(rank):
    with pytest.raises(UserError, match="does not fit a matrix 96x40"):
        low_rank(weight_like(0, (96, 40)), rank)


# ---- with quantization --------------------------------------------------------------------------

LARGE = (256, 256)


def quantized(weight, parts, spec):
    leaf = quantize_array(residual(weight, parts), spec)
    return replace(leaf, low_rank=jax.tree.map(lambda a: a.astype(jnp.bfloat16), parts))


@pytest.mark.parametrize("format", ["nvfp4", "int4", "mxfp4"])
def test_a_quantized_residual_beats_a_quantized_weight(format):
    """The same format, with 16 directions beside it: relative error of the weight."""
    weight = weight_like(0, LARGE)
    rest = residual(weight, low_rank(weight, 16))
    plain = jnp.linalg.norm(fake_quant(weight, format) - weight)
    assert jnp.linalg.norm(fake_quant(rest, format) - rest) < 0.6 * plain


def test_it_beats_finer_scales_of_as_many_bits():
    """Stored bits, factors in bfloat16 included: int4 in blocks of 128 with rank 6 against int4 in
    blocks of 16, which takes more."""
    weight, x = weight_like(0, LARGE), jnp.asarray(normal(7, 64, LARGE[1]), jnp.float32)
    coarse = resolve("int4", scale_dtype="bfloat16")
    fine = resolve("int4", block_size=16, scale_dtype="bfloat16")
    ours, peer = quantized(weight, low_rank(weight, 6), coarse), quantize_array(weight, fine)
    assert weight_bits(ours) <= weight_bits(peer)
    exact = linear(x, weight)
    errors = [jnp.linalg.norm(linear(x, leaf) - exact) for leaf in (ours, peer)]
    assert errors[0] < 0.8 * errors[1]


def test_a_correction_of_the_rounding_error_lowers_the_output_error():
    """The other use: of W - Ŵ, with its inputs known, after rounding."""
    weight, moment = weight_like(0, LARGE), moment_like(5, LARGE[1])
    error = weight - fake_quant(weight, "nvfp4")
    plain = output_error(error, moment)
    corrected = output_error(residual(error, low_rank(error, 16, moment)), moment)
    assert corrected < 0.8 * plain
    np.testing.assert_allclose(corrected, smallest_error(error, moment, 16), rtol=1e-5)
