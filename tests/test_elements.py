"""Grids of codes: every code, every midpoint, against ml_dtypes where it has the type."""

from statistics import NormalDist

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxopt_models import elements
from jaxopt_models.elements import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8, NF4

_MINIFLOATS = {
    ml_dtypes.float4_e2m1fn: E2M1,
    ml_dtypes.float6_e2m3fn: E2M3,
    ml_dtypes.float6_e3m2fn: E3M2,
    ml_dtypes.float8_e4m3fn: E4M3,
    ml_dtypes.float8_e5m2: E5M2,
}


@pytest.fixture(params=_MINIFLOATS, ids=lambda dtype: dtype.__name__)
def minifloat(request):
    """A reference dtype and the element that should equal it."""
    return request.param, _MINIFLOATS[request.param]


def _finite_codes(dtype):
    codes = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8)
    return codes[np.isfinite(codes.view(dtype).astype(np.float32))]


def _grid(element):
    """All values of an element in ascending order, computed from its definition."""
    if isinstance(element, elements.Levels):
        return np.asarray(element.table, np.float32)
    if isinstance(element, elements.Integer):
        return np.arange(element.lowest, element.largest + 1, dtype=np.float32)
    dtype = next(d for d, e in _MINIFLOATS.items() if e == element)
    return np.unique(_finite_codes(dtype).view(dtype).astype(np.float32))


def _same_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def test_every_code_is_that_of_ml_dtypes(minifloat):
    dtype, element = minifloat
    codes = _finite_codes(dtype)
    values = codes.view(dtype).astype(np.float32)
    stored = jnp.asarray(codes.view(dtype) if element.bits == 8 else codes)
    assert _same_bits(element.decode(stored), values)
    encoded = element.encode(jnp.asarray(values))
    assert encoded.dtype == element.storage
    assert np.array_equal(np.asarray(encoded).view(np.uint8), codes)
    assert _same_bits(element.round(jnp.asarray(values)), values)


def test_range_is_that_of_ml_dtypes(minifloat):
    dtype, element = minifloat
    info = ml_dtypes.finfo(dtype)
    assert (element.bits, element.mantissa) == (info.bits, info.nmant)
    assert (element.largest, element.lowest) == (float(info.max), float(info.min))
    assert 2.0**element.min_exponent == float(info.smallest_normal)


def test_round_is_the_cast_of_ml_dtypes(minifloat):
    """On codes, midpoints, their float32 neighbours, random and logarithmic values; saturating."""
    dtype, element = minifloat
    grid = _grid(element)
    middle = (grid[1:] + grid[:-1]) / 2
    exact = np.concatenate([grid, middle])
    spread = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    values = np.concatenate(
        [
            exact,
            np.nextafter(exact, np.float32(np.inf)),
            np.nextafter(exact, np.float32(-np.inf)),
            spread * element.largest,
            spread * np.float32(2.0) ** np.arange(4096, dtype=np.float32).clip(0, 40) * 2.0**-30,
        ]
    ).astype(np.float32)
    values = values[np.abs(values) >= 2.0**-126]
    inside = np.clip(values, element.lowest, element.largest)
    assert _same_bits(element.round(jnp.asarray(values)), inside.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("element", [INT8, INT4, *_MINIFLOATS.values()])
def test_ties_go_to_the_even_code(element):
    grid = _grid(element)
    middle = (grid[1:] + grid[:-1]) / 2
    codes = np.asarray(element.encode(element.round(jnp.asarray(middle)))).view(np.uint8)
    assert not np.any(codes & 1)


@pytest.mark.parametrize("element", [INT8, INT4, NF4, *_MINIFLOATS.values()])
def test_beyond_the_range_saturates(element):
    beyond = jnp.asarray([element.largest * 1.5, jnp.inf, element.lowest * 1.5, -jnp.inf])
    ends = np.asarray([element.largest] * 2 + [element.lowest] * 2, np.float32)
    assert np.array_equal(element.round(beyond), ends)


@pytest.mark.parametrize("element", [INT8, INT4, *_MINIFLOATS.values()])
def test_nan_stays_nan(element):
    assert bool(jnp.isnan(element.round(jnp.float32(jnp.nan).reshape(1)))[0])


@pytest.mark.parametrize("element", [INT8, INT4])
def test_integers(element):
    grid = _grid(element)
    assert (element.largest, element.lowest) == (2 ** (element.bits - 1) - 1, grid[0])
    codes = element.encode(jnp.asarray(grid))
    assert codes.dtype == jnp.int8
    assert np.array_equal(element.decode(codes), grid)
    dense = np.linspace(element.lowest, element.largest, 8 * grid.size + 1, dtype=np.float32)
    rounded = np.asarray(element.round(jnp.asarray(dense)))
    assert np.array_equal(rounded, np.round(dense))
    assert not np.signbit(rounded[rounded == 0]).any()


def test_levels_round_to_the_nearest_and_ties_go_down():
    table = np.asarray(NF4.table, np.float32)
    assert np.array_equal(NF4.encode(jnp.asarray(table)), np.arange(16))
    assert np.array_equal(NF4.decode(jnp.arange(16)), table)
    dense = np.linspace(-1.2, 1.2, 4001, dtype=np.float32)
    rounded = np.asarray(NF4.round(jnp.asarray(dense)))
    nearest = np.abs(dense[:, None].astype(np.float64) - table).min(axis=1)
    assert np.allclose(np.abs(dense - rounded), nearest, atol=1e-7)
    halves = elements.Levels((-1.0, 0.0, 0.5, 1.0), bits=2)
    ties = halves.round(jnp.asarray([-0.5, 0.25, 0.75]))
    assert ties.tolist() == [-1.0, 0.0, 0.5]


def test_nf4_is_the_published_table():
    """Equally probable quantiles of N(0, 1), 7 below zero and 8 above, and zero itself."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    quantiles = np.sort([*above, 0.0, *below])
    assert np.allclose(NF4.table, quantiles / quantiles.max(), atol=2e-6)


def test_exponents_and_powers_are_exact():
    exponents = np.arange(-126, 128)
    powers = np.ldexp(np.float32(1), exponents).astype(np.float32)
    assert np.array_equal(elements.power_of_two(jnp.asarray(exponents, jnp.int32)), powers)
    below = np.nextafter(powers[1:], np.float32(0))
    assert np.array_equal(elements.exponent_of(jnp.asarray(-powers)), exponents)
    assert np.array_equal(elements.exponent_of(jnp.asarray(below)), exponents[1:] - 1)
    assert elements.exponent_of(jnp.zeros(1)).tolist() == [-127]
