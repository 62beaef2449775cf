"""Block scales of activations and cached rows, chosen at run time by squared error.

The amax of a block mapped to the largest grid value wastes range where a block has one outlier, and
on E2M1, whose last gap is between 4 and 6, where values crowd below the largest. A search tries a
few multiples of the amax and keeps, for each block, the one that loses least.

Reference: Cook et al. 2025, arXiv:2512.02010 (four over six).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxopt_models import numerics
from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import Scales

Search = Literal["max", "four_over_six", "mse"]

# Factors on a block's amax, the first of which wins ties.
_FACTORS: dict[str, tuple[float, ...]] = {
    "max": (1.0,),
    "four_over_six": (1.0, 1.5),
    "mse": (1.0, 1.5, 0.875, 1.25),
}
_OCTAVES = (1.0, 0.5)  # of power-of-two scales: the exponent of the amax, and the one below
_ROOM = 1.75  # on NVFP4's global amax, so that larger block scales fit E4M3: 448 / 1.75 = 256


def has_search(spec: QuantSpec, search: Search) -> bool:
    """Whether a format can have its block scales searched so."""
    if search == "max" or (search == "mse" and spec.power_of_two):
        return True
    return spec.two_level


def find_block_scales(
    x: jax.Array, spec: QuantSpec, amax: jax.Array | None, search: Search
) -> Scales:
    """Scales of an array by its blocks' amax times the best factor.

    Args:
      x: float array; the last axis is the blocked one.
      spec: NVFP4 or an MX format, unless `search` is "max".
      amax: magnitude of the global scale; see `numerics.find_scales`.
      search: "max" maps the amax to the largest value (6 of E2M1), "four_over_six" to 6 or to 4,
        "mse" to 6, 6.9, 4.8 or 4, for MX formats to the exponent of the amax or the one below.
    """
    if search == "max":
        return numerics.find_scales(x, spec, amax)
    overall = None if amax is None else global_amax(amax, spec, search)
    tiles, overall = numerics.tile_amax(x, spec, overall)
    if overall is None and spec.two_level:
        overall = global_amax(jnp.max(tiles, keepdims=True), spec, search)
    factors = _OCTAVES if spec.power_of_two else _FACTORS[search]
    tile = spec.tile(x.shape)

    def error(factor: jax.Array) -> jax.Array:
        scales = numerics.scales_from_amax(tiles * factor, spec, overall)
        restored = numerics.from_grid(numerics.to_grid(x, scales, spec), scales, spec)
        return numerics.tile_reduce(jnp.square(restored - x.astype(jnp.float32)), tile, jnp.sum)

    # All factors in one expression, which is compiled once.
    tried = jnp.asarray(factors, jnp.float32)
    best = jnp.argmin(jax.vmap(error)(tried), axis=0)
    return numerics.scales_from_amax(tiles * tried[best], spec, overall)


def global_amax(amax: jax.Array, spec: QuantSpec, search: Search) -> jax.Array:
    """Magnitude that the global scale is made of, with the room that the search needs."""
    return amax * jnp.float32(_ROOM) if spec.two_level and search != "max" else amax
