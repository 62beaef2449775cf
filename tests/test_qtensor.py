"""The laws of quantized arrays, for every format and option, on ordinary and on nasty arrays."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_models import numerics
from jaxopt_models.errors import UserError
from jaxopt_models.formats import ALIASES, FORMATS, resolve
from jaxopt_models.qtensor import (
    InputQuantizer,
    LowRank,
    dequantize,
    fake_quant,
    from_grid_values,
    pack,
    quantize_array,
    quantize_with,
)

_MX = [name for name in FORMATS if name.startswith("mx")]
_SPECS = [
    resolve("fp8"),
    resolve("fp8", granularity="channel"),
    resolve("fp8", block_size=32),
    resolve("fp8", granularity="block2d", block_size=4),
    resolve("int8"),
    resolve("int8", granularity="channel", scale_dtype="bfloat16"),
    resolve("int4"),
    resolve("int4", block_size=32, scale_dtype="bfloat16"),
    resolve("int4", block_size=32, scale_dtype="float16"),
    resolve("int4", granularity="channel"),
    resolve("int4", block_size=32, symmetric=False),
    resolve("int4", granularity="block2d", block_size=4, symmetric=False),
    resolve("nvfp4"),
    *(resolve(name) for name in _MX),
    resolve("mxfp4", mx_rule="floor"),
    resolve("mxint8", mx_rule="floor"),
    resolve("nf4"),
    resolve("nf4", scale_dtype="bfloat16"),
    resolve("nf4", scale_dtype="float8_e4m3fn"),
]
_DEFAULTS = [resolve(name) for name in FORMATS]
_SHAPE = (2, 3, 151)  # no block divides 151, nor do 2 or 4


def _name(spec):
    default = resolve(spec.format)
    parts = [spec.format, spec.granularity, spec.block_size, spec.scale_dtype]
    kept = [str(part) for part in parts[:3] if part]
    kept += [spec.scale_dtype] if spec.scale_dtype != default.scale_dtype else []
    kept += [] if spec.symmetric else ["asymmetric"]
    return "-".join(kept + (["floor"] if spec.mx_rule == "floor" else []))


def every(specs):
    return pytest.mark.parametrize("spec", specs, ids=_name)


@st.composite
def arrays(draw, shape=_SHAPE, largest=2.0**126):
    """Gaussian numbers, scaled as a whole, by row and by element, snapped to ties, with holes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponent = draw(st.sampled_from([0, 0, 0, -60, 60, 126, -126, -140]))
    x = rng.standard_normal(shape)
    snap = draw(st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0]))
    x = np.round(x / snap) * snap if snap else x
    by_row, by_element = draw(st.sampled_from([(0, 0), (20, 0), (0, 3), (0, 20), (60, 60)]))
    x = x * 2.0 ** (exponent + rng.integers(-by_row, by_row + 1, (*shape[:-1], 1)))
    x = x * 2.0 ** rng.integers(-by_element, by_element + 1, shape)
    hole = draw(st.sampled_from(["none", "none", "all", "rows", "blocks", "all but one"]))
    if hole == "all":
        x *= 0.0  # keeps the signs
    elif hole == "rows":
        x[..., 1::2, :] = 0
    elif hole == "blocks":
        x[..., 32:64], x[..., 128:] = 0, 0
    elif hole == "all but one":
        x.reshape(-1)[np.arange(x.size) != x.size // 2] = 0
    return jnp.asarray(np.clip(x, -largest, largest).astype(np.float32))


@cache
def _jitted(function, spec, *options):
    return jax.jit(lambda *args: function(spec, *options, *args))


def run(function, spec, *args):
    """Runs `function(spec, *args)` compiled, once for each spec."""
    return jax.tree.map(np.asarray, _jitted(function, spec)(*args))


def _gaussian(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _to_unit(x):
    """`x` with amax 1: far from the ends of every range, float16's in particular."""
    amax = float(jnp.max(jnp.abs(x)))
    return x / jnp.float32(amax) if amax > 2.0**-100 else jnp.zeros_like(x)


def same_bits(a, b):
    """Equality that tells -0 from 0 and NaN from all else."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- the law ------------------------------------------------------------------------------------


def _restored(spec, q):
    again = replace(q, codes=pack(q.unpack(), spec))
    return {"values": dequantize(q), "repacked": again.dequantize(), "codes": again.codes}


def _vmapped(spec, x):
    rows = jax.vmap(lambda row: quantize_array(row, spec))(x)
    return jax.vmap(dequantize)(rows), jax.vmap(lambda row: _fake(spec, row))(x)


def _fake(spec, x):
    return fake_quant(x, spec)


def _quantized(spec, x):
    return quantize_array(x, spec)


@every(_SPECS)
@given(x=arrays())
@settings(max_examples=15)
def test_fake_quant_is_quantize_then_dequantize(spec, x):
    """Each way is a program of its own, as when codes come from a file."""
    fake, q = run(_fake, spec, x), run(_quantized, spec, x)
    restored = run(_restored, spec, q)
    assert same_bits(fake, restored["values"])
    assert same_bits(fake, restored["repacked"])
    assert same_bits(q.codes, restored["codes"])
    one_by_one = np.stack([run(_fake, spec, row) for row in x])
    assert all(same_bits(one_by_one, vmapped) for vmapped in run(_vmapped, spec, x))
    assert np.isfinite(fake).all()
    assert not fake[np.abs(np.asarray(x)) < 2.0**-126].any()


def _two_ways(spec, x):
    narrow = [x.astype(jnp.bfloat16), x.astype(jnp.float16)]
    return [(fake_quant(x, spec), quantize_array(x, spec).dequantize()) for x in narrow]


@every(_DEFAULTS)
@given(x=arrays(shape=(4, 70), largest=3e4))
@settings(max_examples=5)
def test_the_law_holds_in_narrow_dtypes(spec, x):
    for dtype, ways in zip(["bfloat16", "float16"], run(_two_ways, spec, x), strict=True):
        assert [way.dtype.name for way in ways] == [dtype, dtype]
        assert same_bits(*ways)


@every([spec for spec in _DEFAULTS if spec.format in ("int8", "nvfp4", "mxfp6_e3m2", "nf4")])
def test_jit_changes_nothing(spec):
    x = _gaussian(_SHAPE) * 2.0 ** np.arange(-75, 76).reshape(1, 1, -1)
    q = quantize_array(x, spec)
    assert same_bits(q.codes, run(_quantized, spec, x).codes)
    assert same_bits(q.dequantize(), run(_fake, spec, x))


# ---- what quantization promises -----------------------------------------------------------------


def _facts(spec, x, factor):
    """Everything the properties below compare, in one compilation for each format."""
    q = quantize_array(x, spec)
    tile = spec.tile(q.shape)
    tiles = numerics.tile_reduce(jnp.abs(x), tile)
    whole = spec.two_level or spec.granularity == "tensor"
    own = None if not spec.symmetric else jnp.max(tiles) if whole else tiles
    x_hat = q.dequantize()
    return {
        "x_hat": x_hat,
        "twice": fake_quant(x_hat, spec),
        "of -x": fake_quant(-x, spec),
        "of factor x": fake_quant(x * factor, spec),
        "factor of": x_hat * factor,
        "own amax": fake_quant(x, spec, amax=own),
        "scale": numerics.tile_expand(numerics.real_scale(q.scales, spec), tile, q.shape),
        "zero": jnp.zeros(q.shape)
        if q.zero_point is None
        else numerics.tile_expand(q.zero_point.astype(jnp.float32), tile, q.shape),
        "amax": numerics.tile_expand(tiles, tile, q.shape),
    }


def facts(spec, x, factor=1.0):
    return run(_facts, spec, x, jnp.float32(factor))


def _grid_of(spec):
    element = spec.element
    if element.storage == "int8":
        return np.arange(element.lowest, element.largest + 1)
    codes = np.arange(2**element.bits, dtype=np.uint8)
    stored = codes.view(element.storage) if element.bits == 8 else codes
    values = np.asarray(element.decode(jnp.asarray(stored)), np.float64)
    return np.unique(values[np.isfinite(values)])


@every(_SPECS)
@given(x=arrays())
@settings(max_examples=6)
def test_every_value_goes_to_the_nearest_of_its_grid(spec, x):
    """The error bound, exactly: half a step inside the range, the distance to its end outside."""
    got = facts(spec, x)
    x = np.where(np.abs(x) < 2.0**-126, 0, np.asarray(x, np.float64))
    scale = np.asarray(got["scale"], np.float64)[..., None]
    choices = (_grid_of(spec) - np.asarray(got["zero"], np.float64)[..., None]) * scale
    least = np.abs(x[..., None] - choices).min(axis=-1)
    noise = 2.0**-126 + 1e-6 * (np.abs(x) + np.abs(got["zero"]) * scale[..., 0])
    assert np.all(np.abs(x - got["x_hat"]) <= least + noise)


@every([spec for spec in _SPECS if spec.symmetric])
@given(x=arrays())
@settings(max_examples=6)
def test_the_scale_fits_the_amax(spec, x):
    got = facts(spec, x)
    amax = np.where(got["amax"] < 2.0**-126, 0, got["amax"]).astype(np.float64)
    reach = spec.element.largest * got["scale"].astype(np.float64)
    one = got["scale"] == (1.0 if not spec.two_level else got["scale"])
    assert np.all(one | (amax > 0))
    nonzero = amax > 2.0**-80  # below, some scales stand at the smallest they can be
    amax, reach = amax[nonzero], reach[nonzero]
    if spec.scale_dtype == "float8_e8m0fnu":
        if spec.mx_rule == "ceil":
            assert np.all((reach >= amax) & (reach < 2 * amax))
        else:
            power = 2.0 ** np.floor(np.log2(spec.element.largest))
            assert np.all((reach <= 2 * amax) & (amax < 2 * reach / spec.element.largest * power))
    elif spec.scale_dtype == "float32":
        assert np.allclose(reach, amax, rtol=3e-7, atol=0)
    elif spec.scale_dtype == "bfloat16":
        assert np.allclose(reach, amax, rtol=2.0**-8, atol=0)


_IDEMPOTENT = [
    spec
    for spec in _SPECS
    if spec.symmetric and not spec.two_level and (spec.format, spec.mx_rule) != ("mxint8", "floor")
]


@every(_IDEMPOTENT)
@given(x=arrays())
@settings(max_examples=6)
def test_quantizing_twice_is_quantizing_once(spec, x):
    """The amax goes to the end of the grid (or half of it, for powers of two), and stays there.

    Not so for two-level scales, whose first level moves by a rounding; for zero points; for MXINT8
    under "floor", where -127.6 becomes -128 and so takes the next power of two; and where a scale
    stands at the least its dtype can hold.
    """
    amax = float(jnp.max(jnp.abs(x)))
    x = jnp.where(jnp.abs(x) < amax * 2.0**-20, 0.0, x) if amax > 2.0**-100 else jnp.zeros_like(x)
    x = _to_unit(x) if spec.scale_dtype == "float16" else x
    got = facts(spec, x)
    assert np.array_equal(got["x_hat"], got["twice"])


@every([resolve("nvfp4"), *(spec for spec in _SPECS if not spec.symmetric)])
def test_quantizing_twice_moves_little_otherwise(spec):
    x = _gaussian(_SHAPE, 2)
    got = facts(spec, x)
    assert np.allclose(got["x_hat"], got["twice"], rtol=1e-6, atol=0)


_SIGNED = [s for s in _SPECS if s.symmetric and s.format != "nf4" and s.scale_dtype != "float16"]


@every(_SIGNED)
@given(x=arrays())
@settings(max_examples=6)
def test_quantization_commutes_with_the_sign(spec, x):
    """Not where integers saturate, since -128 has no opposite: MXINT8 under "floor", float16 scales
    below its normal range, an amax from elsewhere."""
    got = facts(spec, x)
    plus, minus = got["x_hat"], got["of -x"]
    if spec.format == "mxint8" and spec.mx_rule == "floor":
        saturated = np.abs(plus + minus) > 0
        plus, minus = plus[~saturated], minus[~saturated]
    assert np.array_equal(plus, -minus)


@pytest.mark.parametrize(("name", "low", "high"), [("int8", -128.0, 127.0), ("int4", -8.0, 7.0)])
def test_integers_saturate_at_both_ends(name, low, high):
    x = jnp.asarray([-1000.0, 1000.0, low, high, 0.4])
    got = jax.jit(lambda x: fake_quant(x, name, granularity="tensor", amax=high))(x)
    assert got.tolist() == [low, high, low, high, 0.0]


@every([spec for spec in _SPECS if spec.scale_dtype != "float16"])
@given(x=arrays(), exponent=st.integers(-30, 30))
@settings(max_examples=6)
def test_powers_of_two_pass_through(spec, x, exponent):
    """q(2^n x) = 2^n q(x), bit for bit, as long as no scale meets the end of its range."""
    x = _to_unit(x)
    x = jnp.where(jnp.abs(x) < 2.0**-40, 0.0, x)
    got = facts(spec, x, 2.0**exponent)
    assert same_bits(got["factor of"], got["of factor x"])


def test_more_bits_make_smaller_errors():
    x = _gaussian((64, 256), 3)

    @jax.jit
    def errors(x):
        names = ["nvfp4", *_MX, "int8", "int4", "nf4"]
        rounded = {name: fake_quant(x, name) for name in names}
        rounded["int4-32"] = fake_quant(x, "int4", block_size=32)
        rounded["int4-asymmetric"] = fake_quant(x, "int4", block_size=32, symmetric=False)
        return {name: jnp.mean((y - x) ** 2) for name, y in rounded.items()}

    error = jax.tree.map(float, errors(x))
    order = ["mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8"]
    assert sorted(order, key=error.get, reverse=True) == order
    assert error["mxfp4"] > error["nvfp4"] > error["mxfp6_e2m3"]
    assert error["mxfp8_e5m2"] > error["mxfp8_e4m3"]
    assert error["int4"] > error["int4-32"] > error["int4-asymmetric"] > error["int8"]
    assert error["int4"] > error["nf4"]


def test_first_level_of_nvfp4_and_its_floor():
    """A block far below the others gets the smallest block scale, and is zero there."""
    x = np.zeros(_SHAPE, np.float32)
    x[0, 0, :16], x[1, 1, 16:32] = 1e-9, 5.0
    got = facts(resolve("nvfp4"), x)
    assert got["scale"][0, 0, 0] == pytest.approx(5.0 / 2688 * 2.0**-9)
    assert got["scale"][1, 1, 16] == pytest.approx(5.0 / 6)
    assert not got["x_hat"][0].any()
    assert got["x_hat"][1, 1, 16:32] == pytest.approx(5.0)


@every([spec for spec in _SPECS if spec.two_level])
def test_block_scales_are_nearest_to_their_float32_quotient(spec):
    """For NF4 a little less than 3.5 steps of E4M3, which float32 rounds to the tie."""
    x = np.full(_SHAPE, 1.5 * 2.0**-16, np.float32)
    x[:, 2, 100:] = 1.5
    largest = np.float32(spec.element.largest)
    first = np.float32(1.5) / (largest * np.float32(448))
    expected = (x[0, 0, 0] / (largest * first)).astype(ml_dtypes.float8_e4m3fn)
    for array in (x, x[0]):
        q = run(_quantized, spec, jnp.asarray(array))
        assert q.scale.reshape(-1)[0] == expected


# ---- calibrated magnitudes ----------------------------------------------------------------------


@every(_SPECS)
def test_an_amax_of_its_own_changes_nothing(spec):
    got = facts(spec, _gaussian(_SHAPE))
    assert same_bits(got["x_hat"], got["own amax"])


@jax.jit
def _clipped(x):
    return fake_quant(x, "fp8", amax=1.0), fake_quant(x, "nvfp4", amax=1.0)


def test_a_smaller_amax_clips():
    fp8, nvfp4 = _clipped(jnp.asarray([[-3.0, -1.0, 0.5, 2.0]]))
    assert fp8.tolist() == [[-1.0, -1.0, 0.5, 1.0]]
    assert float(jnp.max(jnp.abs(nvfp4))) == pytest.approx(1.0)


@jax.jit
def _inputs(x):
    static = InputQuantizer(jnp.float32(2.0), resolve("fp8"))
    dynamic = InputQuantizer(None, resolve("fp8", granularity="token"))
    rows = jnp.stack([fake_quant(row, "fp8") for row in x])
    return (static(x), fake_quant(x, "fp8", amax=2.0)), (dynamic(x), rows)


def test_input_quantizer_is_fake_quant_with_its_amax():
    static, dynamic = _inputs(_gaussian((3, 64), 5, jnp.bfloat16))
    assert same_bits(*static)
    assert same_bits(*dynamic)


def _by_hand(spec, x):
    scales = numerics.find_scales(x, spec)
    grid = numerics.to_grid(x, scales, spec)
    return quantize_with(x, scales, spec), from_grid_values(grid, scales, spec, "float32")


def test_given_scales_and_grid_values():
    """What algorithms use that choose scales or codes themselves."""
    x, spec = _gaussian(_SHAPE, 6), resolve("int4")
    codes = run(_quantized, spec, x).codes
    assert all(same_bits(q.codes, codes) for q in run(_by_hand, spec, x))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [quantize_array, fake_quant])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            jnp.zeros((0, 4)),
            r"non-empty float arrays of rank 1 or more; this one is float32\[0, 4\]",
        ),
        (jnp.zeros((2, 4), jnp.int32), r"this one is int32\[2, 4\]"),
        (jnp.float32(1), r"this one is float32\[\]"),
        (jnp.asarray([1.0, jnp.nan]), r"the array float32\[2\] holds NaN or infinity; find where"),
        (jnp.asarray([1.0, -jnp.inf], jnp.bfloat16), r"the array bfloat16\[2\] holds NaN or inf"),
    ],
)
def test_arrays_that_are_refused(quantize, x, message):
    with pytest.raises(UserError, match=message):
        quantize(x, "int8")


def test_square_blocks_need_a_matrix():
    with pytest.raises(UserError, match="arrays of rank 2 or more"):
        quantize_array(jnp.zeros(4), "fp8", granularity="block2d")


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("fp9", {}, "format 'fp9' is unknown; known are fp8, int8"),
        ("nvfp4", {"granularity": "channel"}, "no granularity 'channel'; choose one of block$"),
        ("fp8", {"granularity": "row"}, "no granularity 'row'; choose one of tensor, channel"),
        ("fp8", {"granularity": "channel", "block_size": 8}, "block_size 8 does not go with"),
        ("int4", {"block_size": 0}, "block_size 0 does not go with granularity 'block'"),
        ("int4", {"block_size": -3}, "block_size -3 does not go with granularity 'block'"),
        ("fp8", {"block_size": 0}, "block_size 0 does not go with granularity 'tensor'"),
        ("mxfp4", {"block_size": 16}, "'mxfp4' is defined with blocks of 32, not 16"),
        ("int8", {"symmetric": False}, "'int8' has no zero point; symmetric=False needs 'int4'"),
        ("nvfp4", {"scale_dtype": "float32"}, "no scale_dtype 'float32'; choose one of float8"),
        ("int4", {"scale_dtype": "float8_e4m3fn"}, "no scale_dtype 'float8_e4m3fn'; choose"),
        ("mxfp4", {"mx_rule": "round"}, "mx_rule 'round' is unknown; choose 'ceil' or 'floor'"),
        ("fp8", {"mx_rule": "floor"}, "'fp8' has no power-of-two scale; leave mx_rule at"),
    ],
)
def test_options_that_are_refused(format, options, message):
    with pytest.raises(UserError, match=message):
        quantize_array(jnp.ones(4), format, **options)
    with pytest.raises(UserError, match=message):
        resolve(format, **options)


def test_other_mistakes_in_calls():
    with pytest.raises(UserError, match="gradient 'ste' is unknown; choose 'identity' or 'clip'"):
        fake_quant(jnp.ones(4), "fp8", gradient="ste")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="a QuantSpec is complete; options go with a format's name"):
        quantize_array(jnp.ones(4), resolve("fp8"), granularity="channel")


def test_names_and_implied_options():
    assert all(resolve(alias) == resolve(name) for alias, name in ALIASES.items())
    assert resolve("fp8", granularity="token") == resolve("fp8", granularity="channel")
    assert resolve("fp8", block_size=64) == resolve("fp8", granularity="block", block_size=64)
    assert resolve("fp8", granularity="block2d").block_size == 128
    assert resolve("int4", granularity="channel").block_size == 0


@every(_SPECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inside_jit_nan_spreads_over_what_shares_its_scale(spec, bad):
    x = np.random.default_rng(7).standard_normal(_SHAPE).astype(np.float32)
    clean = run(_fake, spec, x)
    where = (1, 1, 40)
    shares = np.zeros(_SHAPE, bool)
    if spec.two_level:
        shares[:] = True
    else:
        tile = spec.tile(_SHAPE)
        shares[
            tuple(slice(i // t * t, (i // t + 1) * t) for i, t in zip(where, tile, strict=True))
        ] = 1
    x[where] = bad
    restored = run(_restored, spec, run(_quantized, spec, x))
    for got in (run(_fake, spec, x), restored["values"]):
        assert np.array_equal(np.isnan(got), shares)
        assert np.array_equal(got[~shares], clean[~shares])


# ---- gradients ----------------------------------------------------------------------------------


@every(_DEFAULTS)
def test_gradient_is_that_of_the_identity(spec):
    x, weight = (
        jnp.asarray(np.random.default_rng(seed).standard_normal((4, 64)), jnp.float32)
        for seed in (8, 9)
    )

    def loss(x):
        return jnp.sum(fake_quant(x, spec) * weight)

    assert same_bits(jax.jit(jax.grad(loss))(x), weight)


def test_clipped_gradient_stops_outside_the_range():
    x = jnp.asarray([[-9.0, -8.0, -7.4, 0.1, 7.0, 7.1]])

    def loss(x, amax):
        return jnp.sum(
            fake_quant(x, "int4", granularity="tensor", amax=amax, gradient="clip") * 3.0
        )

    grad, of_amax = jax.jit(jax.grad(loss, (0, 1)))(x, jnp.float32(7.0))
    assert grad.tolist() == [[0.0, 3.0, 3.0, 3.0, 3.0, 0.0]]
    assert float(of_amax) == 0.0


@every([s for s in _SPECS if s.symmetric and s.scale_dtype == "float32"] + [resolve("mxfp8")])
def test_clipped_gradient_passes_everything_under_its_own_amax(spec):
    """No value is outside the range that its own magnitude set, roundings notwithstanding."""
    x = _gaussian((64, 64), 10)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(fake_quant(x, spec, gradient="clip"))))(x)
    assert np.all(np.asarray(grad) == 1)


@pytest.mark.parametrize("gradient", ["identity", "clip"])
def test_gradient_under_vmap_and_in_bfloat16(gradient):
    x = _gaussian((3, 4, 32), 11, jnp.bfloat16)

    def loss(row):
        return jnp.sum(fake_quant(row, "nvfp4", amax=1.0, gradient=gradient).astype(jnp.float32))

    grad = jax.jit(jax.vmap(jax.grad(loss)))(x)
    assert grad.dtype == x.dtype
    inside = np.abs(np.asarray(x, np.float32)) <= 1.0
    assert np.all(np.asarray(grad)[inside] == 1)
    clipped = np.asarray(grad)[~inside]
    assert np.all(clipped == (1 if gradient == "identity" else 0))


def test_gradient_reaches_what_is_before_the_quantizer():
    """As in training: the loss falls when the master weights follow the straight-through slope."""
    target = jnp.asarray([0.5, -1.0, 0.25, 2.0])

    @jax.jit
    def step(weight):
        error = jax.grad(lambda w: jnp.sum((fake_quant(w, "int8") - target) ** 2))(weight)
        return weight - 0.1 * error

    weight = jnp.ones(4)
    for _ in range(40):
        weight = step(weight)
    assert np.allclose(fake_quant(weight, "int8"), target, atol=0.02)


# ---- sizes and leaves ---------------------------------------------------------------------------


def _abstract(shape, format, dtype="float32", **options):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda x: quantize_array(x, format, **options), x)


@pytest.mark.parametrize(
    ("format", "options", "bits"),
    [
        ("fp8", {}, 8 + 32 / 2**15),
        ("fp8", {"granularity": "channel"}, 8 + 32 / 256),
        ("int8", {"granularity": "channel", "scale_dtype": "bfloat16"}, 8 + 16 / 256),
        ("int4", {"scale_dtype": "bfloat16"}, 4.125),
        ("int4", {"symmetric": False, "scale_dtype": "bfloat16"}, 4.125 + 8 / 128),
        ("fp8", {"granularity": "block2d"}, 8 + 32 / 128**2),
        ("nvfp4", {}, 4.5 + 32 / 2**15),
        ("mxfp4", {}, 4.25),
        ("mxfp6_e3m2", {}, 6.25),
        ("mxfp8_e4m3", {}, 8.25),
        ("nf4", {}, 4.5),
        ("nf4", {"scale_dtype": "float8_e4m3fn"}, 4.125 + 32 / 2**15),
    ],
)
def test_bits_of_a_weight_are_exact(format, options, bits):
    q = _abstract((128, 256), format, **options)
    assert q.weight_bits / q.size == bits


def test_corrections_count_and_activation_scales_do_not():
    q = _abstract((8, 32), "mxfp4")
    bare = q.weight_bits
    q = jax.eval_shape(
        lambda q: replace(
            q,
            pre_scale=jnp.ones(32, jnp.bfloat16),
            low_rank=LowRank(jnp.ones((2, 32)), jnp.ones((8, 2))),
            input=InputQuantizer(jnp.float32(1), resolve("fp8")),
        ),
        q,
    )
    assert q.weight_bits == bare + 32 * 16 + (2 * 32 + 8 * 2) * 32


@every(_SPECS)
def test_shape_and_dtype_are_those_of_the_array(spec):
    for shape in [(3, 5), (1, 1), (2, 3, 130)]:
        q = _abstract(shape, spec, "float16")
        assert (q.shape, q.ndim, q.size) == (shape, len(shape), int(np.prod(shape)))
        out = jax.eval_shape(dequantize, q)
        assert (out.shape, out.dtype) == (shape, jnp.float16)
        wide = jax.eval_shape(lambda q: q.dequantize(jnp.float32), q)
        assert (wide.shape, wide.dtype) == (shape, jnp.float32)


_BY_ROW = [s for s in _SPECS if s.granularity in ("channel", "block") and not s.two_level]


def _parts(spec, x):
    q = quantize_array(x, spec)
    rows = jax.tree.map(lambda a: a[1:3], q)
    halves = [
        jax.tree.map(lambda a, i=i: a[:, i * a.shape[1] // 2 : (i + 1) * a.shape[1] // 2], q)
        for i in range(2)
    ]
    by_block = spec.granularity == "block"
    return {
        "whole": q.dequantize(),
        "rows": (rows, quantize_array(x[1:3], spec), rows.dequantize()),
        "halves": [half.dequantize() for half in halves] if by_block else [],
    }


@every(_BY_ROW)
def test_parts_of_a_leaf_are_leaves_of_the_parts(spec):
    """So that rows, and blocks of the contraction axis, may be sharded or sliced like arrays."""
    got = run(_parts, spec, _gaussian((4, 512), 12))
    sliced, direct, values = got["rows"]
    assert jax.tree.structure(sliced) == jax.tree.structure(direct)
    assert all(map(same_bits, jax.tree.leaves(sliced), jax.tree.leaves(direct)))
    assert sliced.shape == (2, 512)
    assert same_bits(values, got["whole"][1:3])
    if got["halves"]:
        assert same_bits(np.concatenate(got["halves"], axis=1), got["whole"])


def _stacks(spec, x):
    stacked = jax.vmap(lambda w: quantize_array(w, spec))(x)
    each = [quantize_array(w, spec) for w in x]

    def step(carry, layer):
        assert layer.shape == x.shape[1:]
        return carry, layer.dequantize()

    return {
        "stacked": stacked,
        "each": jax.tree.map(lambda *leaves: jnp.stack(leaves), *each),
        "scanned": jax.lax.scan(step, 0, stacked)[1],
        "vmapped": jax.vmap(dequantize)(stacked),
        "dequantized": jnp.stack([q.dequantize() for q in each]),
    }


@every([resolve("fp8"), resolve("int4", symmetric=False), resolve("nvfp4"), resolve("mxfp6")])
def test_layers_and_experts_stack(spec):
    """`vmap` quantizes each expert on its own; `scan` walks over a stacked leaf."""
    x = _gaussian((3, 4, 50), 14) * jnp.asarray([1.0, 100.0, 0.01]).reshape(3, 1, 1)
    got = run(_stacks, spec, x)
    assert got["stacked"].shape == x.shape
    assert all(map(same_bits, jax.tree.leaves(got["stacked"]), jax.tree.leaves(got["each"])))
    assert same_bits(got["scanned"], got["dequantized"])
    assert same_bits(got["vmapped"], got["dequantized"])


def test_a_leaf_is_a_pytree_with_static_format():
    q = _abstract((2, 32), "nvfp4")
    assert len(jax.tree.leaves(q)) == 3
    assert jax.tree.structure(q) == jax.tree.structure(_abstract((7, 48), "nvfp4"))
    assert jax.tree.structure(q) != jax.tree.structure(_abstract((2, 32), "mxfp4"))
    assert hash(q.spec) == hash(resolve("nvfp4"))


def test_a_rotation_is_static_and_stores_nothing():
    """The codes are those of the rotated weight, and so is what they are restored to."""
    q = quantize_array(_gaussian((2, 32)), "int8")
    rotated = replace(q, rotate=16)
    assert (q.rotate, rotated.rotate, rotated.weight_bits) == (0, 16, q.weight_bits)
    assert jax.tree.structure(q) != jax.tree.structure(rotated)
    assert jax.jit(lambda leaf: jax.tree.map(lambda a: a, leaf))(rotated).rotate == 16
    assert same_bits(rotated.dequantize(), q.dequantize())
