"""The decode kernel: its numbers in the interpreter, its lowering for Hopper, both on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import FourBit, pack_int4
from kernels_pallas.decode_tiling import Sizes, Tiling, default_tiling, sizes_of, tilings
from kernels_pallas.w4a16_decode import w4a16_decode

KINDS = ("int4", "nvfp4", "mxfp4")
# Few processors, so that one walks over several tiles.
INTERPRETED = [
    ((1, 32, 512), Tiling(1, 1), 2),
    ((8, 72, 1024), Tiling(1, 2), 2),
    ((5, 96, 2048), Tiling(2, 2, depth=2), 2),
    ((16, 64, 2048), Tiling(2, 1, split=2, depth=1), 4),
    ((13, 40, 1152), Tiling(1, 3), 1),
    # Folded 8, 7, 3, 4, 2 and 2 times.
    ((1, 32, 4096), Tiling(2, 2), 1),
    ((1, 16, 7168), Tiling(1, 1, split=2), 2),
    ((1, 64, 1536), Tiling(2, 1), 2),
    ((2, 32, 4096), Tiling(1, 2, split=2), 2),
    ((3, 72, 2048), Tiling(1, 4), 2),
    ((4, 32, 1024), Tiling(2, 2), 2),
]


def abstract(n: int, k: int) -> FourBit:
    return jax.eval_shape(lambda: pack_int4(jnp.zeros((n, k), jnp.int8), jnp.zeros((n, k // 128))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "tiling", "processors"), INTERPRETED)
def test_interpreted(weight, activations, relative_error, kind, sizes, tiling, processors):
    m, n, k = sizes
    packed, values = weight(kind, n, k, seed=m)
    x = activations(m, k)
    run = partial(w4a16_decode, tiling=tiling, processors=processors, interpret=True)
    found = run(x, packed)
    assert found.shape == (m, n) and found.dtype == jnp.bfloat16
    assert relative_error(found, x, values) < 3e-3  # rounding to bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16])
def test_lowers_for_hopper_with_its_default_tiling(lowered, kind, m):
    assert "mosaic_gpu" in lowered(w4a16_decode, kind, m, 4096, 4096)


@pytest.mark.parametrize(
    "tiling",
    [Tiling(2, 2, depth=4), Tiling(1, 4), Tiling(4, 1, 2), Tiling(1, 1, 8), Tiling(2, 1, 4)],
)
def test_lowers_for_hopper_with_any_tiling(lowered, tiling):
    product = partial(w4a16_decode, tiling=tiling)
    assert "mosaic_gpu" in lowered(product, "int4", 11, 4096, 4032)


@pytest.mark.parametrize(
    ("n", "k"),
    [(4096, 4096), (28672, 4096), (6144, 4096), (4096, 14336), (8192, 28672), (128256, 4096)],
)
def test_default_tilings_of_real_shapes_use_most_processors(n, k):
    for m in (1, 2, 8, 16):
        sizes = sizes_of(m, abstract(n, k))
        tiling = default_tiling(sizes, 132)
        assert tiling is not None and tiling in set(tilings(sizes))
        busy = min(132 // tiling.split, n // 16 // tiling.wn) * tiling.split
        assert busy >= 96


def test_no_tiling_for_an_endless_prime():
    assert default_tiling(Sizes(16, 4, 512 * 101), 132) is None


@pytest.mark.parametrize(
    ("m", "k", "folds"),
    [
        *((1, 4096, 8), (1, 14336, 7), (1, 28672, 8), (1, 512, 1), (1, 640, 1), (1, 2048, 4)),
        *((2, 4096, 4), (2, 14336, 4), (2, 1024, 2), (2, 1536, 1), (3, 4096, 2), (4, 14336, 2)),
        *((4, 28672, 1), (5, 4096, 1), (16, 4096, 1)),
    ],
)
def test_few_activations_are_folded(m, k, folds):
    """As often as 8 rows, whole steps and half of the shared memory allow."""
    sizes = sizes_of(m, abstract(64, k))
    assert sizes.folds == folds and m * folds <= 8 * max(1, m // 8)
    assert sizes.spread == (8 if m == 1 < folds else folds)


@pytest.mark.parametrize("m", [1, 3])
def test_a_row_of_nan_stays_alone(weight, activations, m):
    """Also where rows lie beneath each other in parts."""
    packed, values = weight("int4", 32, 2048)
    x = activations(m, 2048).at[0, 700].set(jnp.nan)
    found = w4a16_decode(x, packed, Tiling(1, 2), interpret=True)
    assert np.all(np.isnan(found[0])) and not np.any(np.isnan(found[1:]))


def test_misfits_are_named(weight):
    packed, _ = weight("int4", 16, 512)
    with pytest.raises(ValueError, match=r"x is float32\(2, 512\); needed is bfloat16 \[M, 512\]"):
        w4a16_decode(jnp.zeros((2, 512)), packed)
    with pytest.raises(ValueError, match="x has 17 rows; this kernel takes 1 to 16"):
        w4a16_decode(jnp.zeros((17, 512), jnp.bfloat16), packed)
    for tiling in (Tiling(3, 1), Tiling(1, 2), Tiling(1, 8)):
        with pytest.raises(ValueError, match=r"Tiling\(wn=.* fits 4 x 16 rows, 512 columns"):
            w4a16_decode(jnp.zeros((1, 512), jnp.bfloat16), packed, tiling)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(weight, activations, relative_error, kind):
    """Registers hold what the packing promises; sums are float32's, and always the same."""
    shapes = [
        *((1, 4096, 4096), (1, 256, 14336), (1, 64, 1536), (2, 256, 4096), (3, 1000, 1024)),
        *((4, 512, 14336), (8, 512, 14336), (16, 8192, 4096), (11, 1000, 1152), (3, 48, 640)),
    ]
    for seed, (m, n, k) in enumerate(shapes):
        with jax.default_device(jax.devices("gpu")[0]):
            packed, values = weight(kind, n, k, seed)
            x = activations(m, k, seed)
            found = w4a16_decode(x, packed)
            assert relative_error(found, x, values) < 3e-3, (m, n, k)
            for _ in range(20):
                np.testing.assert_array_equal(w4a16_decode(x, packed), found)
