"""The kernel for many activations: in the interpreter, its lowering for Hopper, both on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.w4a16_wide import w4a16_wide
from kernels_pallas.wide_tiling import WideTiling, default_wide_tiling, wide_tilings

KINDS = ("int4", "nvfp4", "mxfp4")
# Few processors, so that one walks over several tiles.
INTERPRETED = [
    ((20, 200, 512), WideTiling(32, 2, span=1)),
    ((70, 264, 1024), WideTiling(64, 2, span=2, in_flight=1)),
    ((40, 136, 640), WideTiling(40, 2, across=2, split=2, depth=3)),
    ((9, 64, 1024), WideTiling(16, 4, split=2, span=2, in_flight=1)),
    ((17, 88, 1000), WideTiling(8, 1, stages=2, span=8, depth=1)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "tiling"), INTERPRETED)
def test_interpreted(weight, activations, relative_error, kind, sizes, tiling):
    m, n, k = sizes
    k -= k % {"int4": 128, "nvfp4": 16, "mxfp4": 32}[kind]
    packed, values = weight(kind, n, k, seed=m)
    x = activations(m, k)
    found = w4a16_wide(x, packed, tiling, processors=3, interpret=True)
    assert found.shape == (m, n) and found.dtype == jnp.bfloat16
    assert relative_error(found, x, values) < 4e-3  # of the result, and of INT4 times its scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tiling",
    [
        WideTiling(64),
        WideTiling(32, split=4),
        WideTiling(64, 1, split=2),
        WideTiling(128, 2, 2, span=2),
        WideTiling(64, 3),
        WideTiling(256, 2, span=1, in_flight=1),
    ],
)
def test_lowers_for_hopper(lowered, kind, tiling):
    text = lowered(partial(w4a16_wide, tiling=tiling), kind, 301, 1000, 4080)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("n", "k"),
    [(4096, 4096), (28672, 4096), (6144, 4096), (4096, 14336), (8192, 28672), (128256, 4096)],
)
@pytest.mark.parametrize("m", [17, 64, 200, 2048, 16384])
def test_default_tilings_of_real_shapes_use_most_processors(m, n, k):
    tiling = default_wide_tiling(m, n // 16, k, 132)
    assert tiling is not None and tiling in set(wide_tilings(m, n // 16, k))
    tiles = -(-m // tiling.tokens) * -(-n // tiling.weight_rows)
    assert min(132 // tiling.split, tiles) * tiling.split >= 96


def test_misfits_are_named(weight):
    packed, _ = weight("int4", 64, 512)
    with pytest.raises(ValueError, match=r"x is float32\(2, 512\); needed is bfloat16 \[M, 512\]"):
        w4a16_wide(jnp.zeros((2, 512)), packed)
    x = jnp.zeros((20, 512), jnp.bfloat16)
    for tiling in (WideTiling(64, split=2), WideTiling(64, across=2), WideTiling(256, 2, stages=8)):
        with pytest.raises(ValueError, match=r"WideTiling\(.* fits 4 x 16 rows, 512 columns"):
            w4a16_wide(x, packed, tiling)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(weight, activations, relative_error, kind):
    """Registers hold what the packing promises; sums are float32's, and always the same."""
    shapes = [(64, 4096, 4096), (301, 1000, 1152), (2048, 2048, 2048), (17, 6144, 640)]
    tilings = [None, WideTiling(32, split=3), WideTiling(256, 2, span=1, in_flight=1), None]
    for seed, ((m, n, k), tiling) in enumerate(zip(shapes, tilings, strict=True)):
        with jax.default_device(jax.devices("gpu")[0]):
            packed, values = weight(kind, n, k, seed)
            x = activations(m, k, seed)
            found = w4a16_wide(x, packed, tiling)
            assert relative_error(found, x, values) < 4e-3, (m, n, k)
            for _ in range(20):
                np.testing.assert_array_equal(w4a16_wide(x, packed, tiling), found)
