"""Block scales chosen at run time: what the search promises of each block and each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import numerics
from jaxopt_models.block_search import Search, find_block_scales, global_amax, has_search
from jaxopt_models.formats import FORMATS, QuantSpec, resolve
from jaxopt_models.numerics import Scales
from jaxopt_models.qtensor import InputQuantizer

SEARCHES: list[tuple[str, Search]] = [
    ("nvfp4", "four_over_six"),
    ("nvfp4", "mse"),
    ("mxfp4", "mse"),
    ("mxfp6_e3m2", "mse"),
    ("mxfp8_e4m3", "mse"),
    ("mxint8", "mse"),
]
every_search = pytest.mark.parametrize("format, search", SEARCHES)
AMAX = jnp.float32(40.0)


def rows(seed: int = 0) -> np.ndarray:
    """Tokens of many magnitudes, some with outliers, a row of zeros; no whole number of blocks."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((24, 72)) * np.exp2(rng.integers(-8, 4, (24, 1)))
    x[::3, 5] *= 6
    x[4] = 0
    return np.clip(x, -40, 40).astype(np.float32)


@partial(jax.jit, static_argnames=("spec", "search"))
def restored(
    x: jax.Array, amax: jax.Array | None, spec: QuantSpec, search: Search
) -> tuple[jax.Array, Scales]:
    scales = find_block_scales(x, spec, amax, search)
    return numerics.from_grid(numerics.to_grid(x, scales, spec), scales, spec), scales


def global_of(format: str) -> jax.Array | None:
    return AMAX if format == "nvfp4" else None


def block_errors(format: str, search: Search, x: np.ndarray, room: float = 1.0) -> np.ndarray:
    spec, amax = resolve(format), global_of(format)
    amax = None if amax is None else amax * jnp.float32(room)
    error = np.asarray(restored(jnp.asarray(x), amax, spec, search)[0]) - x
    return np.asarray(numerics.tile_reduce(jnp.asarray(error**2), spec.tile(x.shape), jnp.sum))


@every_search
def test_no_block_loses_more_than_under_the_scale_of_its_amax(format, search):
    """NVFP4: under the same global scale, which leaves room for what is tried."""
    x = rows()
    room = 1.75 if format == "nvfp4" else 1.0
    searched, plain = block_errors(format, search, x), block_errors(format, "max", x, room)
    assert np.all(searched <= plain)
    # E4M3 loses no precision to a scale that is twice too large.
    assert searched.sum() < plain.sum() or format == "mxfp8_e4m3"


def test_a_search_of_nvfp4_pays_for_its_room_and_gains():
    x = rows(1)
    max_, two, four = (
        block_errors("nvfp4", search, x).sum() for search in ("max", "four_over_six", "mse")
    )
    assert max_ > 1.05 * two and two > 1.02 * four


@every_search
def test_what_comes_out_is_what_the_format_stores_under_these_scales(format, search):
    """Scales of the format's own dtype, and values on its grid."""
    spec = resolve(format)
    x, scales = restored(jnp.asarray(rows()), global_of(format), spec, search)
    assert scales.scale.dtype == jnp.dtype(spec.scale_dtype)
    assert scales.zero_point is None
    assert (scales.global_scale is not None) == spec.two_level
    grid = numerics.to_grid(x, scales, spec)
    assert np.array_equal(spec.element.decode(spec.element.encode(grid)), grid)
    assert np.array_equal(numerics.from_grid(grid, scales, spec), x)


@every_search
def test_blocks_of_zeros_stay_zero(format, search):
    x, scales = restored(jnp.asarray(rows()), global_of(format), resolve(format), search)
    assert not np.any(np.asarray(x[4]))
    assert np.all(np.isfinite(np.asarray(scales.scale, np.float32)))
    nothing, _ = restored(jnp.zeros((2, 32)), global_of(format), resolve(format), search)
    assert not np.any(np.asarray(nothing))


@every_search
def test_a_token_does_not_depend_on_its_neighbours(format, search):
    quantizer = InputQuantizer(global_of(format), resolve(format), search)
    run, x = jax.jit(quantizer.__call__), jnp.asarray(rows())
    together = np.asarray(run(x))
    others = np.asarray(run(x.at[:7].multiply(3.0).at[8:].set(0.5)))
    assert np.array_equal(together[7], others[7])
    assert np.array_equal(together[7:9], np.asarray(run(x[7:9])))


@every_search
def test_nan_is_not_hidden(format, search):
    x = jnp.asarray(rows()).at[2, 3].set(jnp.nan)
    out = np.asarray(restored(x, global_of(format), resolve(format), search)[0])
    width = resolve(format).tile(x.shape)[-1]
    assert np.all(np.isnan(out[2, :width])) and not np.any(np.isnan(out[3]))


def test_the_plain_rule_is_a_search_of_one():
    x = jnp.asarray(rows())
    for format in ("nvfp4", "mxfp4", "fp8"):
        spec, amax = resolve(format), global_of(format)
        found = find_block_scales(x, spec, amax, "max")
        assert jax.tree.all(
            jax.tree.map(np.array_equal, found, numerics.find_scales(x, spec, amax))
        )


def test_the_global_scale_leaves_room_for_larger_block_scales():
    nvfp4, mxfp4 = resolve("nvfp4"), resolve("mxfp4")
    assert global_amax(AMAX, nvfp4, "max") == AMAX
    assert global_amax(AMAX, nvfp4, "mse") == 1.75 * AMAX
    assert global_amax(AMAX, mxfp4, "mse") == AMAX
    found = find_block_scales(jnp.full((1, 16), 40.0), nvfp4, AMAX, "four_over_six")
    assert found.global_scale is not None
    assert found.global_scale.item() == pytest.approx(40 / (6 * 256), rel=1e-6)
    # A block of the largest magnitude may still be mapped to 4.
    assert float(found.scale[0, 0]) in (256.0, 384.0)


def test_only_formats_with_block_scales_of_their_own_can_be_searched():
    for format in FORMATS:
        spec = resolve(format)
        assert has_search(spec, "max")
        assert has_search(spec, "four_over_six") == (format == "nvfp4")
        assert has_search(spec, "mse") == (format == "nvfp4" or format.startswith("mx"))
