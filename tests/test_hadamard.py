"""Hadamard rotations against SciPy's matrix, and orthogonal matrices of every size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard, largest_block, orthogonal

_jitted = jax.jit(hadamard, static_argnums=1)


def _random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("block", [1, 2, 16, 128, 256, 512, 2048])
def test_rows_of_the_identity_give_the_matrix(block):
    """Beyond 128 the matrix is a product of several; 2 to an odd power is split unevenly."""
    expected = scipy.linalg.hadamard(block) / np.sqrt(block)
    np.testing.assert_allclose(_jitted(jnp.eye(block), block), expected, rtol=1e-6)


@pytest.mark.parametrize("block", [2, 16, 64, 256])
def test_it_is_orthonormal_and_its_own_inverse(block):
    x = _random(0, 2, 3, 768)
    y = _jitted(x, block)
    assert y.shape == x.shape and y.dtype == jnp.float32
    np.testing.assert_allclose(_jitted(y, block), x, atol=2e-6)
    blocks = (2, 3, -1, block)
    before, after = (np.linalg.norm(a.reshape(blocks), axis=-1) for a in (x, np.asarray(y)))
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_blocks_are_neighbours_on_the_last_axis():
    x = _random(1, 5, 24)
    matrix = np.kron(np.eye(3), scipy.linalg.hadamard(8) / np.sqrt(8))
    np.testing.assert_allclose(_jitted(x, 8), x @ matrix, atol=1e-6)


@pytest.mark.parametrize("block", [64, 1024])
def test_sums_are_float32_whatever_the_dtype(block):
    """One rounding to bfloat16, that of the result; integers come out exactly."""
    x = jnp.asarray(_random(2, 3, 1024), jnp.bfloat16)
    expected = _jitted(x.astype(jnp.float32), block).astype(jnp.bfloat16)
    y = _jitted(x, block)
    assert y.dtype == jnp.bfloat16
    differ = np.mean(np.asarray(y) != np.asarray(expected))  # by the order of sums, at ties
    assert differ < 0.01
    integers = np.random.default_rng(3).integers(-9, 10, (3, 1024)).astype(np.float32)
    whole = integers.reshape(3, -1, block) @ scipy.linalg.hadamard(block).astype(np.float32)
    got = np.asarray(_jitted(integers, block))
    assert np.array_equal(got * np.sqrt(np.float32(block)), whole.reshape(3, 1024))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_rotated_too(dtype):
    x, upstream = (jnp.asarray(_random(seed, 2, 256), dtype) for seed in (4, 5))

    @jax.jit
    def both(x):
        _, pull = jax.vjp(lambda x: hadamard(x, 256), x)
        return pull(upstream)[0], hadamard(upstream, 256)

    grad, expected = both(x)
    assert grad.dtype == dtype
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (grad, expected)), atol=3e-2)


def test_outliers_are_spread():
    x = np.random.default_rng(6).standard_t(2.5, (64, 512)).astype(np.float32)
    x[:, 7] *= 50
    before, after = (scipy.stats.kurtosis(np.ravel(a)) for a in (x, _jitted(jnp.asarray(x), 512)))
    assert before > 100 and after < before / 50
    one = _jitted(jnp.zeros((1, 64)).at[0, 5].set(8.0), 64)
    assert np.array_equal(np.abs(one), np.ones((1, 64)))


@pytest.mark.parametrize("block", [0, -2, 3, 48, 32])
def test_blocks_that_are_refused(block):
    with pytest.raises(UserError, match=f"of 48 channels has no block of {block}; .* 16 at most"):
        hadamard(jnp.ones((2, 48)), block)


def test_largest_block():
    assert [largest_block(n) for n in (1, 2, 3, 48, 576, 1024, 14336)] == [
        1,
        2,
        1,
        16,
        64,
        1024,
        2048,
    ]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 45, 64, 72, 127, 896])
def test_orthogonal_for_every_size(size, seed):
    q = orthogonal(size, seed)
    assert q.shape == (size, size) and q.dtype == np.float64
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-12)
    # No channel stays where it was: the largest entry is that of a Hadamard matrix, or √2 of it.
    assert np.abs(q).max() <= np.sqrt(2 / size) + 1e-12 or size == 1
    assert np.array_equal(q, orthogonal(size, seed))


def test_orthogonal_is_hadamard_for_powers_of_two_with_signs_by_seed():
    plain = orthogonal(32)
    np.testing.assert_allclose(plain, scipy.linalg.hadamard(32) / np.sqrt(32))
    one, two = orthogonal(32, 1), orthogonal(32, 2)
    assert np.array_equal(np.abs(one), np.abs(plain)) and not np.array_equal(one, two)
