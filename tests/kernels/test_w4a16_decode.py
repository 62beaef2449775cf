"""The decode kernel: its numbers in the interpreter, its lowering for Hopper, both on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas import FourBit, dispatch, reference, w4a16
from kernels_pallas.four_bit import Kind
from kernels_pallas.w4a16_decode import Tiling, default_tiling, tilings, w4a16_decode

KINDS = ("int4", "nvfp4", "mxfp4")
# Few processors, so that one walks over several tiles.
INTERPRETED = [
    ((1, 32, 512), Tiling(1, 1), 2),
    ((8, 72, 1024), Tiling(1, 2), 2),
    ((5, 96, 2048), Tiling(2, 2, depth=2), 2),
    ((16, 64, 2048), Tiling(2, 1, split=2, depth=1), 4),
    ((13, 40, 1152), Tiling(1, 3), 1),
]


def activations(m: int, k: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (m, k), jnp.bfloat16)


def relative_error(found: jax.Array, x: jax.Array, values: np.ndarray) -> float:
    exact = np.asarray(x, np.float64) @ values.T
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "tiling", "processors"), INTERPRETED)
def test_interpreted(weight, kind, sizes, tiling, processors):
    m, n, k = sizes
    packed, values = weight(kind, n, k, seed=m)
    x = activations(m, k)
    run = partial(w4a16_decode, tiling=tiling, processors=processors, interpret=True)
    found = run(x, packed)
    assert found.shape == (m, n) and found.dtype == jnp.bfloat16
    assert relative_error(found, x, values) < 3e-3  # rounding to bfloat16


def lowered(kind: Kind, m: int, n: int, k: int, tiling: Tiling | None) -> str:
    """The kernel as compiled for an H100, which needs none."""
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    packed = jax.eval_shape(lambda: weight_shapes(kind, n, k))
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        traced = jax.jit(partial(w4a16_decode, tiling=tiling)).trace(x, packed)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def weight_shapes(kind: Kind, n: int, k: int) -> FourBit:
    rows, groups = -(-n // 16), -(-k // 512) * 4
    words = {"int4": 8, "nvfp4": 32, "mxfp4": 16}[kind] * groups
    codes, scales = jnp.zeros((rows, 256 * groups), jnp.int32), jnp.zeros((rows, words), jnp.int32)
    return FourBit(codes, scales, jnp.ones(rows, jnp.float32), kind, (n, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 16])
def test_lowers_for_hopper_with_its_default_tiling(kind, m):
    assert "mosaic_gpu" in lowered(kind, m, 4096, 4096, None)


@pytest.mark.parametrize(
    "tiling", [Tiling(2, 2), Tiling(1, 4, depth=2), Tiling(4, 1, 2), Tiling(1, 1, 8), Tiling(4, 2)]
)
def test_lowers_for_hopper_with_any_tiling(tiling):
    assert "mosaic_gpu" in lowered("int4", 16, 4096, 4096, tiling)


@pytest.mark.parametrize(
    ("n", "k"),
    [(4096, 4096), (28672, 4096), (6144, 4096), (4096, 14336), (8192, 28672), (128256, 4096)],
)
def test_default_tilings_of_real_shapes_use_most_processors(n, k):
    for rows in (8, 16):
        tiling = default_tiling(rows, n // 16, k, 132)
        assert tiling is not None and tiling in set(tilings(rows, n // 16, k))
        busy = min(132 // tiling.split, n // 16 // tiling.wn) * tiling.split
        assert busy >= 96


def test_no_tiling_for_an_endless_prime():
    assert default_tiling(16, 4, 512 * 101, 132) is None


def test_elsewhere_the_reference_answers(weight):
    packed, values = weight("nvfp4", 24, 192)
    x = activations(6, 192).reshape(2, 3, 192)
    found = jax.jit(w4a16)(x, packed)
    assert found.shape == (2, 3, 24)
    assert relative_error(found.reshape(6, 24), x.reshape(6, 192), values) < 5e-3


def test_gradient_goes_through_the_values_of_the_weight(weight):
    packed, values = weight("int4", 24, 256)
    x, ahead = activations(3, 256).astype(jnp.float32), jnp.arange(72.0).reshape(3, 24)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(w4a16(x, packed) * ahead)))(x)
    np.testing.assert_allclose(gradient, np.asarray(ahead) @ values, rtol=1e-4, atol=1e-2)


def test_misfits_are_named(weight):
    packed, _ = weight("int4", 16, 512)
    with pytest.raises(ValueError, match="x has 500 columns, the weight 512"):
        w4a16(jnp.zeros((1, 500), jnp.bfloat16), packed)
    with pytest.raises(ValueError, match=r"x is float32\(2, 512\); needed is bfloat16 \[M, 512\]"):
        w4a16_decode(jnp.zeros((2, 512)), packed)
    with pytest.raises(ValueError, match="x has 17 rows; this kernel takes 1 to 16"):
        w4a16_decode(jnp.zeros((17, 512), jnp.bfloat16), packed)
    with pytest.raises(ValueError, match=r"Tiling\(wn=2.* fits 1 x 16 rows, 512 columns"):
        w4a16_decode(jnp.zeros((1, 512), jnp.bfloat16), packed, Tiling(2, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(weight, kind):
    """Registers hold what the packing promises; sums are float32's, and always the same."""
    shapes = [(1, 4096, 4096), (8, 512, 14336), (16, 8192, 4096), (11, 1000, 1152), (3, 48, 640)]
    for seed, (m, n, k) in enumerate(shapes):
        with jax.default_device(jax.devices("gpu")[0]):
            packed, values = weight(kind, n, k, seed)
            x = activations(m, k, seed)
            found = w4a16_decode(x, packed)
            assert relative_error(found, x, values) < 3e-3, (m, n, k)
            for _ in range(20):
                np.testing.assert_array_equal(w4a16_decode(x, packed), found)


@pytest.mark.gpu
def test_dispatch_takes_the_kernel_on_a_gpu(weight):
    with jax.default_device(jax.devices("gpu")[0]):
        packed, values = weight("int4", 256, 1024)
        x = activations(4, 1024)
        text = jax.jit(w4a16).lower(x, packed).as_text()
        assert ("mosaic_gpu" in text) == (dispatch.hopper_processors() is not None)
        assert relative_error(jax.jit(w4a16)(x, packed), x, values) < 3e-3
        assert relative_error(reference.w4a16(x, packed), x, values) < 5e-3
