"""Products of 8-bit matrices: numbers in the interpreter, lowering for Hopper, both on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas import EightBit, dispatch, quantize_rows, w8a8, w8a8_product
from kernels_pallas.eight_bit import KINDS, Kind, decode
from kernels_pallas.w8a8 import w8a8_reference
from kernels_pallas.w8a8_kernel import w8a8_kernel
from kernels_pallas.w8a8_tiling import SHARED_MEMORY, EightBitTiling, default_tiling, tilings

# Few processors, so that one walks over several tiles; fewer slots than steps, and more.
INTERPRETED = [
    ((3, 80, 256), EightBitTiling(8, 64, 3, warpgroups=1), 1),
    ((70, 144, 384), EightBitTiling(32, 128, 2), 2),
    ((70, 272, 512), EightBitTiling(64, 256, 3), 1),
    ((70, 144, 384), EightBitTiling(128, 32, 2, weight_left=False), 3),
    ((40, 160, 128), EightBitTiling(16, 64, 3, warpgroups=1, cluster=2), 4),
    ((70, 144, 384), EightBitTiling(64, 32, 3, 1, weight_left=False, cluster=2), 6),
]
_TILINGS = [
    (1, EightBitTiling(8, 64, 16, warpgroups=1)),
    (16, EightBitTiling(16, 128, 8)),
    (16, EightBitTiling(64, 32, 16, 1, weight_left=False)),
    (2048, EightBitTiling(256, 128, 4, cluster=2)),
    (2048, EightBitTiling(128, 256, 4, weight_left=False)),
    (2048, EightBitTiling(128, 128, 4)),
    (2000, EightBitTiling(256, 128, 3, weight_left=False, cluster=2)),
]
LOWERED = [(kind, m, t) for kind in KINDS for m, t in _TILINGS if t.fits(kind == "fp8_block")]


def random_weight(kind: Kind, n: int, k: int, seed: int = 0) -> EightBit:
    rng = np.random.default_rng(seed)
    if kind == "int8":
        codes = rng.integers(-128, 128, (n, k)).astype(np.int8)
    else:
        codes = (30 * rng.standard_normal((n, k))).astype(ml_dtypes.float8_e4m3fn)
    shape = (-(-n // 128), k // 128) if kind == "fp8_block" else (n,)
    scales = rng.uniform(0.01, 3, shape).astype(np.float32)
    return EightBit(jnp.asarray(codes), jnp.asarray(scales), kind)


def random_activations(kind: Kind, m: int, k: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    return quantize_rows(activations(m, k, seed), kind)


def activations(m: int, k: int, seed: int = 0) -> jax.Array:
    spread = jnp.exp(jax.random.normal(jax.random.key(seed + 1), (m, 1)))
    x = jax.random.normal(jax.random.key(seed), (m, k)) * spread
    return x.astype(jnp.bfloat16)


def relative_error(found: jax.Array, codes, scales, weight: EightBit) -> float:
    exact = np.asarray(decode(codes, scales, weight.kind), np.float64)
    exact = exact @ np.asarray(weight.dequantize(), np.float64).T
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "tiling", "processors"), INTERPRETED)
def test_interpreted(kind, sizes, tiling, processors):
    m, n, k = sizes
    codes, scales = random_activations(kind, m, k)
    weight = random_weight(kind, n, k)
    run = partial(w8a8_kernel, tiling=tiling, processors=processors, interpret=True)
    found = run(codes, scales, weight.codes, weight.scales)
    assert found.shape == (m, n) and found.dtype == jnp.bfloat16
    assert relative_error(found, codes, scales, weight) < 3e-3  # rounding to bfloat16
    if kind == "int8":
        np.testing.assert_array_equal(found, w8a8_reference(codes, scales, weight))


def test_columns_need_not_be_whole_steps():
    codes, scales = random_activations("fp8", 5, 224)
    weight = random_weight("fp8", 48, 224)
    tiling = EightBitTiling(8, 64, 3, warpgroups=1)
    found = w8a8_kernel(codes, scales, weight.codes, weight.scales, tiling, interpret=True)
    assert relative_error(found, codes, scales, weight) < 3e-3


def test_the_two_floats_of_8_bits_mix():
    codes, scales = random_activations("fp8", 5, 256)
    weight = random_weight("fp8", 48, 256)
    weight = EightBit(weight.codes.astype(jnp.float8_e5m2), weight.scales, "fp8")
    tiling = EightBitTiling(8, 64, 3, warpgroups=1)
    found = w8a8_kernel(codes, scales, weight.codes, weight.scales, tiling, interpret=True)
    assert relative_error(found, codes, scales, weight) < 3e-3
    assert relative_error(w8a8_product(codes, scales, weight), codes, scales, weight) < 3e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 8, 128), (70, 136, 384), (5, 129, 256)])
def test_the_reference_is_the_product_of_the_values(kind, sizes):
    m, n, k = sizes
    codes, scales = random_activations(kind, m, k)
    weight = random_weight(kind, n, k)
    found = w8a8_product(codes, scales, weight)
    assert found.shape == (m, n) and found.dtype == jnp.bfloat16
    assert relative_error(found, codes, scales, weight) < 3e-3


def lowered(kind: Kind, m: int, n: int, k: int, tiling: EightBitTiling | None, rows: int = 0):
    """The kernel as compiled for an H100, which needs none; `rows` maps it over as many."""
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    weight = jax.eval_shape(lambda: _blank(kind, n, k))
    codes, scales = jax.eval_shape(lambda: quantize_rows(jnp.zeros((m, k), jnp.bfloat16), kind))
    shapes = codes, scales, weight.codes, weight.scales
    run = partial(w8a8_kernel, tiling=tiling)
    if rows:
        run = jax.vmap(run, in_axes=(0, 0, None, None))
        codes, scales = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((rows, *s.shape), s.dtype), (codes, scales)
        )
        shapes = codes, scales, *shapes[2:]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def _blank(kind: Kind, n: int, k: int) -> EightBit:
    dtype = jnp.int8 if kind == "int8" else jnp.float8_e4m3fn
    shape = (-(-n // 128), k // 128) if kind == "fp8_block" else (n,)
    return EightBit(jnp.zeros((n, k), dtype), jnp.zeros(shape), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 16, 64, 2048, 16384])
def test_lowers_for_hopper_with_its_default_tiling(kind, m):
    assert "mosaic_gpu" in lowered(kind, m, 4096, 4096, None)


@pytest.mark.parametrize(("kind", "m", "tiling"), LOWERED)
def test_lowers_for_hopper_with_any_tiling(kind, m, tiling):
    assert "mosaic_gpu" in lowered(kind, m, 4112, 4224, tiling)


def test_lowers_for_hopper_under_vmap():
    assert "mosaic_gpu" in lowered("fp8", 16, 256, 512, None, rows=3)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (28672, 4096), (6144, 4096), (4096, 14336), (128256, 4096), (8, 128)]
)
def test_default_tilings_are_among_those_worth_trying(n, k, blocked):
    for m in (1, 8, 64, 300, 2048, 16384):
        tiling = default_tiling(m, n, k, 132, blocked)
        assert tiling in set(tilings(m, n, k, blocked))
        assert tiling.shared_memory(blocked) <= SHARED_MEMORY
        if n >= 4096:  # half of the processors at least have something to do
            groups = -(-n // (tiling.channels * tiling.cluster))
            assert tiling.cluster * groups * -(-m // tiling.tokens) >= 64


def test_rounds_activations_and_multiplies():
    x, weight = activations(6, 256).reshape(2, 3, 256), random_weight("fp8", 24, 256)
    codes, scales = quantize_rows(x.reshape(6, 256), "fp8")
    found = jax.jit(w8a8)(x, weight)
    assert found.shape == (2, 3, 24)
    np.testing.assert_array_equal(found.reshape(6, 24), w8a8_product(codes, scales, weight))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_so(kind):
    x, weight = activations(6, 256).astype(jnp.float32) / 3, random_weight(kind, 24, 256)
    codes, scales = quantize_rows(x, kind)
    found = jax.jit(w8a8)(x, weight)
    assert found.dtype == jnp.float32
    assert relative_error(found, codes, scales, weight) < 3e-7
    np.testing.assert_array_equal(found, w8a8_product(codes, scales, weight, jnp.float32))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_static_scales(kind):
    """Those of the codes, also of a batch and of its gradient."""
    x, weight, amax = activations(6, 256), random_weight(kind, 24, 256), jnp.float32(2)
    found = jax.jit(w8a8)(x, weight, amax)
    np.testing.assert_array_equal(found, w8a8_product(*quantize_rows(x, kind, amax), weight))
    assert np.any(np.asarray(found) != np.asarray(w8a8(x, weight)))
    batches = jax.vmap(w8a8, (0, None, None))(x.reshape(2, 3, 256), weight, amax)
    np.testing.assert_array_equal(batches.reshape(6, 24), found)
    own = jax.vmap(w8a8, (0, None, 0))(x.reshape(2, 3, 256), weight, jnp.array([2.0, 4.0]))
    np.testing.assert_array_equal(own[0], found[:3])
    np.testing.assert_array_equal(own[1], w8a8(x[3:], weight, jnp.float32(4)))

    def total(x: jax.Array, amax: jax.Array | None) -> jax.Array:
        return jnp.sum(w8a8(x, weight, amax).astype(jnp.float32))

    of_x, of_amax = jax.grad(total, (0, 1))(x, amax)
    np.testing.assert_array_equal(of_x, jax.grad(total)(x, None))
    assert of_amax == 0


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_is_a_loop(kind):
    x = activations(3 * 5, 256).reshape(3, 5, 256)
    weight = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(random_weight(kind, 24, 256, s) for s in range(3))
    )
    found = jax.vmap(w8a8)(x, weight)
    for i in range(3):
        one = w8a8(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], weight))
        np.testing.assert_allclose(
            np.asarray(found[i], np.float32), np.asarray(one, np.float32), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_goes_straight_through_the_rounding(kind):
    weight = random_weight(kind, 24, 256)
    x, ahead = activations(3, 256), jnp.arange(72.0).reshape(3, 24).astype(jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda x: jnp.vdot(w8a8(x, weight), ahead).astype(jnp.float32)))(x)
    exact = np.asarray(ahead, np.float64) @ np.asarray(weight.dequantize(), np.float64)
    assert gradient.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(gradient, np.float64) - exact) / np.linalg.norm(exact)
    assert error < 6e-3


def test_misfits_are_named():
    weight, blocks = random_weight("fp8", 16, 256), random_weight("fp8_block", 16, 256)
    codes, scales = random_activations("fp8", 3, 256)
    with pytest.raises(ValueError, match="x has 200 columns, the weight 256"):
        w8a8(jnp.zeros((1, 200), jnp.bfloat16), weight)
    with pytest.raises(ValueError, match=r"codes have shape \(3, 128\); needed is \[M, 256\]"):
        w8a8_product(codes[:, :128], scales, weight)
    with pytest.raises(ValueError, match=r"scales have shape \(3,\); codes .* need \(2, 4\)"):
        w8a8_product(codes, scales, blocks)
    with pytest.raises(ValueError, match="codes are float8_e4m3fn; the weight is int8"):
        w8a8_product(codes, scales, random_weight("int8", 16, 256))
    with pytest.raises(ValueError, match=r"a fp8 weight \(16, 256\) has scales \(1, 2\); needed"):
        w8a8_product(codes, scales, EightBit(weight.codes, blocks.scales, "fp8"))
    with pytest.raises(ValueError, match="do not fit: K has to be a multiple of 32, N of 16"):
        w8a8_kernel(codes, scales, weight.codes[:12], weight.scales[:12])
    with pytest.raises(ValueError, match=r"EightBitTiling\(tokens=8, channels=96.* does not fit"):
        w8a8_kernel(codes, scales, weight.codes, weight.scales, EightBitTiling(8, 96))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    """Whatever memory held before; and sums are always the same."""
    shapes = [(1, 4096, 4096), (8, 528, 14336), (16, 28672, 4096), (70, 1008, 1152), (3, 48, 640)]
    shapes += [(300, 4112, 1024), (2048, 4096, 4096)]
    for seed, (m, n, k) in enumerate(shapes):
        with jax.default_device(jax.devices("gpu")[0]):
            codes, scales = random_activations(kind, m, k, seed)
            weight = random_weight(kind, n, k, seed)
            run = partial(w8a8_kernel, processors=132)
            found = run(codes, scales, weight.codes, weight.scales)
            # Of FP8 sums over all of K the hardware keeps about 14 bits.
            limit = 4e-3 if kind == "fp8" else 3e-3
            assert relative_error(found, codes, scales, weight) < limit, (m, n, k)
            for _ in range(20):
                poison = jnp.full((m, n), jnp.nan, jnp.bfloat16).block_until_ready()
                del poison
                np.testing.assert_array_equal(
                    run(codes, scales, weight.codes, weight.scales), found
                )
            if kind == "int8":
                np.testing.assert_array_equal(found, w8a8_reference(codes, scales, weight))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "m", "tiling"), LOWERED)
def test_any_tiling_on_a_gpu(kind, m, tiling):
    with jax.default_device(jax.devices("gpu")[0]):
        codes, scales = random_activations(kind, m, 1152)
        weight = random_weight(kind, 4112, 1152)
        found = w8a8_kernel(codes, scales, weight.codes, weight.scales, tiling)
        assert relative_error(found, codes, scales, weight) < 4e-3


@pytest.mark.gpu
def test_dispatch_takes_the_kernel_on_a_gpu():
    with jax.default_device(jax.devices("gpu")[0]):
        weight, x = random_weight("fp8", 256, 1024), activations(4, 1024)
        text = jax.jit(w8a8).lower(x, weight).as_text()
        assert ("mosaic_gpu" in text) == (dispatch.hopper_processors() is not None)
