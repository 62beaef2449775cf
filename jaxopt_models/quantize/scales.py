"""Scales of a weight's tiles: that of the largest magnitude, or the candidate that loses least.

For a tile w of the weight and its rounded values ŵ under a candidate scale, the loss is

    squared error   ||w - ŵ||²
    output error    (w - ŵ) H (w - ŵ)ᵀ,  H = E[x xᵀ] of the inputs that the tile multiplies

the latter being the mean over tokens of the squared error of the tile's share of the output. Each
tile takes its own best candidate. The scale of its amax is the first and wins ties, so that no
search ends above "max" on the loss that it minimises.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_models.elements import E4M3
from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import (
    Scales,
    find_scales,
    from_grid,
    scales_from_amax,
    scales_from_range,
    tile_amax,
    tile_range,
    tile_reduce,
    to_grid,
)

ScaleMethod = Literal["max", "mse", "sweep", "hessian", "four_over_six", "clip"]

# What the amax is multiplied with. Twice a scale under which nothing saturates has a subset of its
# values, so that the search may end at 2; below 1.1, where amax and rounding are traded, the steps
# are finer than those of an E4M3 scale. In every list the scale of the amax itself comes first.
_RATIOS = np.concatenate(
    [[1.0], np.linspace(0.25, 0.35, 3), np.linspace(0.4, 1.1, 29), np.geomspace(1.12, 2.0, 32)]
)
# A Hessian's loss costs far more. Above 1.1 that of 4 bits falls by luck alone, by less than a
# hundredth; that of 8 bits by up to four.
_FEWER_RATIOS = np.concatenate([_RATIOS[_RATIOS <= 1.1], np.geomspace(1.2, 2.0, 6)])
# An E8M0 scale is a power of two: the exponents beside that of the amax.
_OCTAVES = np.array([1.0, 0.25, 0.5, 2.0])
_CLIPPING = np.linspace(1.0, 0.5, 11)
_SIX_OR_FOUR = np.array([1.0, 1.5])
# Steps between E4M3 codes, eight an octave. For the squared error of a block of 16 they are as good
# as all 126 codes. Above twice the amax's scale, values are a subset of those at half the scale,
# which is itself a code from code 16 on. Below an eighth, the amax alone loses (7/8 amax)², while
# under its own scale the fifteen others lose at most (amax/6)² each.
_CODE_STEPS = np.array([0, *range(-24, 0), *range(1, 15)])
_LARGEST_CODE = 126  # 448; 127 is NaN

# Scales as a function of a number for each tile: a ratio, or steps between codes.
_Choice = Callable[[jax.Array], Scales]


@partial(jax.jit, static_argnames=("spec", "method"))
def search_scales(
    weight: jax.Array,
    spec: QuantSpec,
    method: ScaleMethod,
    *,
    hessian: jax.Array | None = None,
    amax: jax.Array | None = None,
) -> Scales:
    """Scales of one matrix, each tile's chosen to minimise the loss of rounding to nearest.

    method         candidates                                            loss
    max            amax                                                  none
    mse            amax · 0.25 … 2; exponents k - 2 … k + 1 of E8M0      squared error
    sweep          every E4M3 block scale under the fixed global scale,  squared error
                   or the exponents k - 2 … k + 1
    hessian        those of sweep, or of mse if the format has no sweep  output error
    clip           amax · 0.5, 0.55 … 1                                  output error
    four_over_six  largest value on 6 or on 4, with global = amax / (6 · 256) so that the block
                   scale of the latter fits E4M3; output error if there is a Hessian, else squared

    The candidates are scales that the format can hold, compared as they round. With a zero point
    both ends of the range shrink alike. A tile that holds NaN or infinity keeps the scale NaN.

    Args:
      weight: [N, K].
      spec: the format; static.
      method: see above; static.
      hessian: [K, K], E[x xᵀ] of the linear's input.
      amax: float32 scalar, magnitude that fixes the global level of two-level scales, or that the
        candidates of granularity "tensor" are ratios of; None takes the matrix's own. Other formats
        have no such level and leave it unread.

    Raises:
      UserError: for a method that the format does not have or that lacks its Hessian.

    References: Lin et al. 2023, arXiv:2306.00978 ("clip"); Cook et al. 2025, arXiv:2512.02010
    ("four_over_six").
    """
    _check(weight, spec, method, hessian)
    weight = weight.astype(jnp.float32)
    amax = amax if spec.two_level or spec.granularity == "tensor" else None
    if method == "max":
        return find_scales(weight, spec, amax)
    blocks = None
    if hessian is not None and method in ("hessian", "clip", "four_over_six"):
        blocks = _diagonal_blocks(hessian, spec.tile(weight.shape)[1])
    rows = _tiles_as_rows(weight, spec)
    choice, candidates, shape = _candidates(rows, spec, method, amax)

    def loss(chosen: jax.Array) -> jax.Array:
        return _loss(rows, choice(chosen), spec, blocks)

    return _by_tile(choice(_argmin(loss, candidates, shape)), spec, weight.shape)


@partial(jax.jit, static_argnames="spec")
def tile_loss(
    weight: jax.Array, scales: Scales, spec: QuantSpec, hessian: jax.Array | None = None
) -> jax.Array:
    """Loss of each tile of a matrix [N, K] rounded to nearest, float32 of the scale's shape.

    Squared error, or output error if there is a Hessian [K, K]. The sum of the latter over tiles is
    tr((W - Ŵ) H (W - Ŵ)ᵀ) for granularities "tensor" and "channel"; for blocks it leaves out what
    lies between one block and another.
    """
    width = spec.tile(weight.shape)[1]
    blocks = None if hessian is None else _diagonal_blocks(hessian, width)
    rows = _tiles_as_rows(weight.astype(jnp.float32), spec)
    return _by_tile(_loss(rows, _by_row(scales), spec, blocks), spec, weight.shape)


def _check(
    weight: jax.Array, spec: QuantSpec, method: ScaleMethod, hessian: jax.Array | None
) -> None:
    check_method(spec, method)
    if method in ("hessian", "clip") and hessian is None:
        raise UserError(
            f"scale method {method!r} needs second moments of the input; "
            "calibrate with them, or choose 'mse'"
        )
    width = weight.shape[-1]
    if hessian is not None and hessian.shape != (width, width):
        raise UserError(
            f"second moments {list(hessian.shape)} do not belong to a weight "
            f"{list(weight.shape)}; calibrate the linear that it is of"
        )


def check_method(spec: QuantSpec, method: ScaleMethod) -> None:
    """Refuses a search that a format does not have.

    Raises:
      UserError: naming one that it has.
    """
    if method not in get_args(ScaleMethod):
        raise UserError(
            f"scale method {method!r} is unknown; choose one of {', '.join(get_args(ScaleMethod))}"
        )
    if method == "sweep" and not (spec.two_level or spec.power_of_two):
        raise UserError(
            f"scale method 'sweep' goes through all scales, of which {spec.format!r} with "
            f"{spec.scale_dtype} has too many; choose 'mse'"
        )
    if method == "four_over_six" and spec.format != "nvfp4":
        raise UserError(
            f"scale method 'four_over_six' belongs to 'nvfp4'; choose 'mse' for {spec.format!r}"
        )


def _candidates(
    weight: jax.Array, spec: QuantSpec, method: ScaleMethod, amax: jax.Array | None
) -> tuple[_Choice, np.ndarray, tuple[int, ...]]:
    """(scales as a function of each tile's candidate, the candidates, shape of the tiles)."""
    ratios = {"clip": _CLIPPING, "four_over_six": _SIX_OR_FOUR}.get(method, _RATIOS)
    if method == "hessian" and spec.element.bits <= 4:
        ratios = _FEWER_RATIOS
    if not spec.symmetric:
        low, high = tile_range(weight, spec)
        return lambda ratio: scales_from_range(low * ratio, high * ratio, spec), ratios, low.shape
    tiles, overall = tile_amax(weight, spec, amax)
    if overall is None:
        overall = jnp.max(tiles, keepdims=True)
    if spec.two_level and method in ("sweep", "hessian"):
        start = scales_from_amax(tiles, spec, overall)
        return partial(_stepped, start), _CODE_STEPS, tiles.shape
    if method == "four_over_six":
        overall = overall * (448 / 256)
    if spec.power_of_two and method in ("mse", "sweep", "hessian"):
        ratios = _OCTAVES
    return lambda ratio: scales_from_amax(tiles * ratio, spec, overall), ratios, tiles.shape


def _stepped(start: Scales, steps: jax.Array) -> Scales:
    """Block scales so many E4M3 codes up or down; positive codes are in the order of values."""
    code = lax.bitcast_convert_type(start.scale, jnp.uint8).astype(jnp.int32) + steps
    code = jnp.where(jnp.isnan(start.scale), 127, jnp.clip(code, 1, _LARGEST_CODE))
    return replace(start, scale=lax.bitcast_convert_type(code.astype(jnp.uint8), E4M3.storage))


def _argmin(
    loss: Callable[[jax.Array], jax.Array], candidates: np.ndarray, shape: tuple[int, ...]
) -> jax.Array:
    """The candidate of least loss for each tile, the first where none has a finite one.

    One candidate at a time, in the memory of one.
    """
    dtype = jnp.int32 if candidates.dtype == int else jnp.float32

    def step(best, candidate):
        chosen, least = best
        value = loss(jnp.full(shape, candidate))
        better = value < least
        return (jnp.where(better, candidate, chosen), jnp.where(better, value, least)), None

    start = jnp.full(shape, candidates[0], dtype), jnp.full(shape, jnp.inf, jnp.float32)
    (chosen, _), _ = lax.scan(step, start, jnp.asarray(candidates, dtype))
    return chosen


def _loss(rows: jax.Array, scales: Scales, spec: QuantSpec, blocks: jax.Array | None) -> jax.Array:
    """Loss of each tile, float32 [T · N / height, 1].

    Args:
      rows: [T · N, W], from `_tiles_as_rows`.
      scales: in the same order, as of a matrix with one tile a row.
      blocks: [T, W, W], those of the Hessian's diagonal; None is the squared error.
    """
    height, width = spec.tile(rows.shape)
    error = rows - from_grid(to_grid(rows, scales, spec), scales, spec)
    if blocks is None:
        return tile_reduce(error * error, (height, width), jnp.sum)
    error = error.reshape(blocks.shape[0], -1, width)
    weighted = jnp.einsum("tnj,tij->tni", error, blocks, precision="highest")
    return tile_reduce(jnp.sum(error * weighted, axis=-1).reshape(-1, 1), (height, 1), jnp.sum)


def _tiles_as_rows(weight: jax.Array, spec: QuantSpec) -> jax.Array:
    """[N, K] as [T · N, W], T tiles of width W; both axes are completed with zeros.

    Then rows that meet one block of the Hessian lie together, and their product with it is one
    matrix product, without a transposed copy for each candidate.
    """
    height, width = spec.tile(weight.shape)
    whole = jnp.pad(weight, ((0, -weight.shape[0] % height), (0, -weight.shape[1] % width)))
    return jnp.swapaxes(whole.reshape(whole.shape[0], -1, width), 0, 1).reshape(-1, width)


def _by_row(scales: Scales) -> Scales:
    """Entries of tiles [N / height, T] in the order of `_tiles_as_rows`."""
    return jax.tree.map(lambda entries: entries.T.reshape(-1, 1), scales)


def _by_tile[T: (jax.Array, Scales)](entries: T, spec: QuantSpec, shape: tuple[int, ...]) -> T:
    """The way back: entries [T · N / height, 1] as [N / height, T]; one of the whole stays."""
    tiles = -(-shape[1] // spec.tile(shape)[1])

    def back(array: jax.Array) -> jax.Array:
        return array if array.size == 1 else array.reshape(tiles, -1).T

    return jax.tree.map(back, entries)


def _diagonal_blocks(hessian: jax.Array, width: int) -> jax.Array:
    """Diagonal blocks [tiles, width, width] of a matrix [K, K], the last completed with zeros."""
    count = -(-hessian.shape[0] // width)
    pad = count * width - hessian.shape[0]
    square = jnp.pad(hessian.astype(jnp.float32), ((0, pad), (0, pad)))
    tile = jnp.arange(count)
    return square.reshape(count, width, count, width)[tile, :, tile, :]
