"""Division that rounds to nearest in whatever program it is compiled into."""

import jax
import numpy as np
import pytest

from jaxopt_models.division import divide


def _numbers(seed, *shape):
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], shape)
    mantissas = 1 + rng.integers(0, 2**23, shape) / 2**23
    return (signs * mantissas * 2.0 ** rng.integers(-60, 60, shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(400, 128), (1, 1), (400, 1), (1, 128)])
def test_nearest_quotient_of_arrays_and_broadcasts(shape):
    a, b = _numbers(0, 400, 128), _numbers(1, *shape)
    assert np.array_equal(jax.jit(divide)(a, b), a / b)


@pytest.mark.parametrize("constant", [3.0, 6.0, 7.0, 15.0, 127.0, 448.0, 2688.0])
def test_nearest_quotient_by_a_constant(constant):
    a = _numbers(2, 4000)
    assert np.array_equal(jax.jit(lambda a: divide(a, constant))(a), a / np.float32(constant))
    assert np.array_equal(jax.jit(lambda a: divide(constant, a))(a), np.float32(constant) / a)


def test_nearest_quotient_under_vmap():
    a, b = _numbers(3, 50, 64), _numbers(4, 64)
    assert np.array_equal(jax.jit(jax.vmap(divide, (0, None)))(a, b), a / b)


def test_zeros_infinities_and_nan_are_those_of_division():
    a = np.asarray([0.0, 1.0, -1.0, np.inf, 2.0, np.nan, 0.0], np.float32)
    b = np.asarray([3.0, 0.0, 0.0, 2.0, np.inf, 1.0, 0.0], np.float32)
    with np.errstate(all="ignore"):
        expected = a / b
    np.testing.assert_array_equal(jax.jit(divide)(a, b), expected)


def test_ends_of_the_range():
    a = np.asarray([3e38, 2e-38, 3e38, 2.0**-120, -(2.0**127)], np.float32)
    b = np.asarray([7.0, 0.5, 0.5, 2.0**20, 2.0**-126], np.float32)
    expected = [np.float32(3e38) / 7, np.float32(4e-38), np.inf, 0.0, -np.inf]
    got = np.asarray(jax.jit(divide)(a, b))
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=2e-7)
