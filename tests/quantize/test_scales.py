"""What each search of scales promises, for every format, on shapes that no block divides."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxopt_models import numerics
from jaxopt_models.elements import E4M3
from jaxopt_models.errors import UserError
from jaxopt_models.formats import FORMATS, resolve
from jaxopt_models.qtensor import quantize_with
from jaxopt_models.quantize.scales import search_scales, tile_loss

_MX = [resolve(name) for name in FORMATS if name.startswith("mx")]
_SPECS = [
    resolve("fp8"),
    resolve("fp8", granularity="channel"),
    resolve("fp8", granularity="block2d", block_size=8),
    resolve("int8"),
    resolve("int8", granularity="channel", scale_dtype="bfloat16"),
    resolve("int4", block_size=32),
    resolve("int4", block_size=32, scale_dtype="float16"),
    resolve("int4", granularity="channel"),
    resolve("int4", block_size=32, symmetric=False),
    resolve("int4", granularity="block2d", block_size=8, symmetric=False),
    resolve("nvfp4"),
    *_MX,
    resolve("mxfp4", mx_rule="floor"),
    resolve("nf4"),
    resolve("nf4", scale_dtype="float8_e4m3fn"),
]
_SHAPE = (35, 83)


def _name(spec):
    zero = "" if spec.symmetric else "asymmetric"
    rule = "" if spec.mx_rule == "ceil" else spec.mx_rule
    block = str(spec.block_size or "")
    parts = [spec.format, spec.granularity, block, spec.scale_dtype, zero, rule]
    return "-".join(part for part in parts if part)


_every_format = pytest.mark.parametrize("spec", _SPECS, ids=_name)


def _heavy_tailed(shape=_SHAPE, seed=0):
    """Student-t weights with a row and a block of zeros."""
    weight = np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)
    weight[1] = 0
    weight[2, :64] = 0
    return jnp.asarray(weight)


def _inputs(width=_SHAPE[1], tokens=200, seed=1):
    """Correlated inputs with channels of very different size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, width)) @ rng.standard_normal((width, width))
    return (mixed * rng.lognormal(0, 1, width)).astype(np.float32)


def _hessian(x):
    return jnp.asarray(x.T @ x / np.float32(len(x)))


def _rounded(weight, scales, spec):
    return quantize_with(weight, scales, spec).dequantize()


def _described(scales):
    return jax.tree.structure(scales), [(a.shape, a.dtype) for a in jax.tree.leaves(scales)]


def _methods(spec):
    methods = ["mse", "hessian", "clip"]
    methods += ["sweep"] if spec.two_level or spec.power_of_two else []
    return methods + (["four_over_six"] if spec.format == "nvfp4" else [])


@_every_format
def test_no_search_loses_more_than_max_on_its_own_loss(spec):
    weight, hessian = _heavy_tailed(), _hessian(_inputs())
    for method in _methods(spec):
        found = search_scales(weight, spec, method, hessian=hessian)
        h = None if method in ("mse", "sweep") else hessian
        amax = jnp.max(jnp.abs(weight)) * 1.75 if method == "four_over_six" else None
        start = numerics.find_scales(weight, spec, amax)
        assert _described(found) == _described(start)
        loss, most = (tile_loss(weight, s, spec, h) for s in (found, start))
        assert np.all(loss <= most * (1 + 1e-5)), method
        assert np.all(np.isfinite(_rounded(weight, found, spec)))


# One scale for many values of eight bits has next to nothing to win.
_WITH_TRADE = [s for s in _SPECS if s.element.bits == 4 or s.granularity == "channel"]


@pytest.mark.parametrize("spec", [s for s in _WITH_TRADE if not s.power_of_two], ids=_name)
def test_mse_is_better_than_max_on_heavy_tails(spec):
    weight, hessian = _heavy_tailed(), _hessian(_inputs())
    error, most = (
        jnp.sum(tile_loss(weight, search_scales(weight, spec, method, hessian=hessian), spec))
        for method in ("mse", "max")
    )
    assert error < (0.999 if spec.element.bits == 8 else 0.97) * most


@pytest.mark.parametrize("spec", [s for s in _SPECS if s.element.bits == 4], ids=_name)
def test_mse_is_as_good_as_a_much_denser_search(spec):
    weight = _heavy_tailed()
    least = np.inf
    for ratio in np.linspace(0.2, 4, 381, dtype=np.float32):
        scales = _scaled_range(weight, ratio, spec)
        least = np.minimum(least, _squared_loss(weight, scales, spec))
    scales = search_scales(weight, spec, "mse", hessian=_hessian(_inputs()))
    found = _squared_loss(weight, scales, spec)
    assert np.sum(found) <= 1.02 * np.sum(least)


@partial(jax.jit, static_argnames="spec")
def _scaled_range(weight, ratio, spec):
    """Scales of a range that is multiplied by `ratio`, under the original global scale."""
    if not spec.symmetric:
        low, high = numerics.tile_range(weight, spec)
        return numerics.scales_from_range(low * ratio, high * ratio, spec)
    tiles, _ = numerics.tile_amax(weight, spec)
    return numerics.scales_from_amax(tiles * ratio, spec, jnp.max(tiles, keepdims=True))


@partial(jax.jit, static_argnames="spec")
def _squared_loss(weight, scales, spec):
    error = weight - numerics.from_grid(numerics.to_grid(weight, scales, spec), scales, spec)
    return numerics.tile_reduce(jnp.square(error), spec.tile(weight.shape), jnp.sum)


def _least_nvfp4_error(blocks, global_scale):
    """Least squared error of blocks [..., 16] under any E4M3 scale, by trying all of them."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    least = np.inf
    for scale in codes.astype(np.float64) * global_scale:
        distance = np.abs(np.abs(blocks)[..., None] - levels * scale).min(axis=-1)
        least = np.minimum(least, np.sum(distance**2, axis=-1))
    return least


def test_sweep_finds_the_best_of_all_126_block_scales():
    rng = np.random.default_rng(0)
    weight = np.concatenate(
        [
            rng.standard_t(3, (40, 96)),
            rng.uniform(-1, 1, (20, 96)),
            rng.choice([-1, 1], (20, 96)) * rng.lognormal(0, 4, (20, 96)),
            # Tiny blocks, whose scale is among the subnormals of E4M3.
            rng.standard_normal((40, 96)) * np.exp2(-rng.uniform(3, 14, (40, 1))),
        ]
    ).astype(np.float32)
    weight[0, 0] = 300
    spec = resolve("nvfp4")
    scales = search_scales(jnp.asarray(weight), spec, "sweep")
    assert scales.global_scale is not None
    global_scale = float(scales.global_scale[0, 0])
    least = _least_nvfp4_error(weight.astype(np.float64).reshape(120, 6, 16), global_scale)
    np.testing.assert_allclose(tile_loss(jnp.asarray(weight), scales, spec), least, rtol=1e-4)


def test_sweep_is_no_worse_than_mse_in_any_block():
    weight, hessian, spec = _heavy_tailed(), _hessian(_inputs()), resolve("nvfp4")
    swept, searched = (
        tile_loss(weight, search_scales(weight, spec, method, hessian=hessian), spec)
        for method in ("sweep", "mse")
    )
    assert np.all(swept <= searched * (1 + 1e-6))


@pytest.mark.parametrize("spec", [*_MX, resolve("mxfp4", mx_rule="floor")], ids=_name)
def test_sweep_of_mx_is_as_good_as_any_power_of_two(spec):
    weight = _heavy_tailed()
    tiles, _ = numerics.tile_amax(weight, spec)
    candidates = [numerics.scales_from_amax(tiles * 2.0**k, spec) for k in range(-8, 5)]
    least = np.min([tile_loss(weight, scales, spec) for scales in candidates], axis=0)
    scales = search_scales(weight, spec, "sweep", hessian=_hessian(_inputs()))
    found = tile_loss(weight, scales, spec)
    np.testing.assert_allclose(found, least, rtol=1e-6)


@_every_format
def test_hessian_search_has_less_output_error_than_mse(spec):
    weight, hessian = _heavy_tailed(), _hessian(_inputs())
    found, mse, clip = (
        jnp.sum(tile_loss(weight, search_scales(weight, spec, m, hessian=hessian), spec, hessian))
        for m in ("hessian", "mse", "clip")
    )
    assert found <= mse * (1 + 1e-5)
    assert found < mse or spec.power_of_two  # exponents leave little to choose
    # Its candidates are those of clip and more, but for rounding of their ratios.
    assert found <= clip * 1.05


@pytest.mark.parametrize("spec", _SPECS[:3] + _SPECS[5:6] + _SPECS[9:11], ids=_name)
def test_output_loss_is_the_mean_over_tokens_of_each_tiles_squared_share(spec):
    weight, x = _heavy_tailed(), _inputs()
    scales = search_scales(weight, spec, "max")
    error = np.asarray(weight - _rounded(weight, scales, spec), np.float64)
    height, width = spec.tile(weight.shape)
    expected = np.zeros(scales.scale.shape)
    for i in range(0, weight.shape[0], height):
        for j in range(0, weight.shape[1], width):
            share = x[:, j : j + width] @ error[i : i + height, j : j + width].T
            expected[i // height, j // width] = np.sum(share**2) / len(x)
    loss = tile_loss(weight, scales, spec, _hessian(x))
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6 * expected.max())


@pytest.mark.parametrize(
    "spec",
    [resolve("int4", block_size=32), resolve("int4", block_size=32, symmetric=False),
     resolve("nvfp4"), resolve("int8", granularity="channel")],
    ids=_name,
)  # fmt: skip
def test_clip_takes_the_best_ratio_from_a_half_to_one(spec):
    weight, hessian = _heavy_tailed(), _hessian(_inputs())
    candidates = [_scaled_range(weight, jnp.float32(r), spec) for r in np.linspace(0.5, 1, 11)]
    least = np.min([tile_loss(weight, scales, spec, hessian) for scales in candidates], axis=0)
    found = search_scales(weight, spec, "clip", hessian=hessian)
    loss = np.asarray(tile_loss(weight, found, spec, hessian))
    np.testing.assert_allclose(loss, least, rtol=1e-4, atol=1e-5 * least.max())


def test_four_over_six_maps_the_amax_of_each_block_to_six_or_to_four():
    weight, spec = _heavy_tailed((64, 96)), resolve("nvfp4")
    scales = search_scales(weight, spec, "four_over_six")
    assert scales.global_scale is not None
    global_scale = float(scales.global_scale[0, 0])
    np.testing.assert_allclose(global_scale, np.abs(weight).max() / (6 * 256), rtol=1e-6)
    amax = np.abs(np.asarray(weight)).reshape(64, 6, 16).max(axis=-1)
    raw = jnp.asarray(np.where(amax == 0, global_scale, amax) / global_scale, jnp.float32)
    six, four = (np.asarray(E4M3.round(raw / largest)) for largest in (6, 4))
    scale = np.asarray(scales.scale, np.float32)
    on_four = (scale == four) & (amax > 0)
    assert np.all((scale == six) | on_four | (amax == 0))
    assert 0.1 < on_four.mean() < 0.9
    assert four.max() == 384  # below 448: the largest block may map to 4 without saturating


def test_four_over_six_has_less_error_than_max_and_minds_the_hessian():
    weight, spec, hessian = _heavy_tailed(), resolve("nvfp4"), _hessian(_inputs())
    plain = search_scales(weight, spec, "four_over_six")
    maximal = search_scales(weight, spec, "max")
    assert jnp.sum(tile_loss(weight, plain, spec)) < jnp.sum(tile_loss(weight, maximal, spec))
    weighted = search_scales(weight, spec, "four_over_six", hessian=hessian)
    losses = [np.asarray(tile_loss(weight, s, spec, hessian)) for s in (weighted, plain)]
    assert np.all(losses[0] <= losses[1] * (1 + 1e-5))
    assert losses[0].sum() < losses[1].sum()


@_every_format
def test_zeros_have_scale_one(spec):
    weight = jnp.zeros(_SHAPE)
    for method in _methods(spec):
        scales = search_scales(weight, spec, method, hessian=jnp.eye(83))
        np.testing.assert_array_equal(numerics.real_scale(scales, spec), 1)
        np.testing.assert_array_equal(_rounded(weight, scales, spec), 0)


def test_an_asymmetric_grid_keeps_an_exact_zero():
    spec = resolve("int4", block_size=32, symmetric=False)
    weight = jnp.abs(_heavy_tailed()) + 1  # a range that does not hold zero by itself
    scales = search_scales(weight, spec, "mse")
    zeros = jnp.zeros_like(weight)
    np.testing.assert_array_equal(_rounded(zeros, scales, spec), 0)


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        (resolve("nvfp4"), "sweep"),
        (resolve("nvfp4"), "four_over_six"),
        (resolve("int4", block_size=32, symmetric=False), "clip"),
        (resolve("fp8"), "hessian"),
    ],
)
def test_experts_together_are_experts_one_by_one(spec, method):
    weights = jnp.stack([_heavy_tailed(seed=seed) for seed in range(3)])
    hessians = jnp.stack([_hessian(_inputs(seed=seed)) for seed in range(3)])
    find = partial(search_scales, spec=spec, method=method)
    together = jax.vmap(find)(weights, hessian=hessians)
    for i in range(3):
        alone = find(weights[i], hessian=hessians[i])
        for one, stacked in zip(*map(jax.tree.leaves, (alone, together)), strict=True):
            np.testing.assert_array_equal(one, stacked[i])


@pytest.mark.parametrize("method", ["max", "mse", "sweep", "four_over_six"])
def test_fused_matrices_share_their_global_scale(method):
    weights = [_heavy_tailed(seed=seed) for seed in range(2)]
    amax = jnp.max(jnp.abs(jnp.stack(weights)))
    find = partial(search_scales, spec=resolve("nvfp4"), method=method)
    one, other = (find(w, amax=amax).global_scale for w in weights)
    np.testing.assert_array_equal(one, other)


def test_amax_counts_only_where_the_format_has_a_scale_of_the_whole():
    weight = _heavy_tailed()
    for spec in (resolve("int4"), resolve("mxfp4"), resolve("int8", granularity="channel")):
        one, other = (search_scales(weight, spec, "mse", amax=a) for a in (None, jnp.float32(99)))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    whole = search_scales(weight, resolve("int8"), "max", amax=jnp.float32(254))
    assert whole.scale == 2


def test_nan_stays_in_its_tile():
    spec, hessian = resolve("int4", block_size=32), _hessian(_inputs())
    weight = _heavy_tailed()
    broken = weight.at[0, 40].set(jnp.nan)
    one, other = (search_scales(w, spec, "mse", hessian=hessian).scale for w in (weight, broken))
    assert np.isnan(other[0, 1])
    np.testing.assert_array_equal(one.at[0, 1].set(0), other.at[0, 1].set(0))


@pytest.mark.parametrize("method", ["mse", "sweep"])
def test_nan_in_a_two_level_format_is_everywhere(method):
    spec, hessian = resolve("nvfp4"), _hessian(_inputs())
    broken = _heavy_tailed().at[0, 40].set(jnp.nan)
    scales = search_scales(broken, spec, method, hessian=hessian)
    assert np.all(np.isnan(numerics.real_scale(scales, spec)))


@pytest.mark.parametrize(
    ("format", "method", "message"),
    [
        ("int4", "sweep", "choose 'mse'"),
        ("int4", "hessian", "second moments"),
        ("nvfp4", "clip", "second moments"),
        ("mxfp4", "four_over_six", "belongs to 'nvfp4'"),
        ("nvfp4", "best", "unknown"),
    ],
)
def test_what_cannot_be_searched_is_refused(format, method, message):
    with pytest.raises(UserError, match=message):
        search_scales(_heavy_tailed(), resolve(format), method)


def test_the_hessian_of_another_linear_is_refused():
    with pytest.raises(UserError, match="do not belong"):
        search_scales(_heavy_tailed(), resolve("int4"), "clip", hessian=jnp.eye(5))
