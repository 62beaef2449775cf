"""Packed 4-bit weights stand for what was packed, exactly, whatever the shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import pack_int4, pack_mxfp4
from kernels_pallas.four_bit import FourBit

SHAPES = [(16, 512), (1, 128), (40, 640), (33, 1024), (64, 2176)]


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "mxfp4"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_it_stands_for_what_was_packed(weight, kind, n, k):
    packed, values = weight(kind, n, k)
    found = np.asarray(jax.jit(FourBit.dequantize)(packed))
    np.testing.assert_array_equal(found, values.astype(np.float32))
    stored, padded = packed.codes.nbytes + packed.scales.nbytes, 8 * packed.codes.size
    assert 8 * stored / padded == {"int4": 4.125, "nvfp4": 4.5, "mxfp4": 4.25}[kind]


def test_a_power_of_two_far_below_the_largest_is_zero():
    exponents = jnp.asarray([[100, 100 - 118], [100, 100 - 119]], jnp.int32)
    packed = pack_mxfp4(jnp.full((2, 64), 2), exponents)
    found = np.asarray(packed.dequantize())
    expected = 2.0 ** np.array([[100, -18], [100, -np.inf]])
    np.testing.assert_array_equal(found[:, ::32], expected.astype(np.float32))


@pytest.mark.parametrize(
    ("pack", "codes", "scales", "message"),
    [
        (pack_int4, (4, 100), (4, 1), r"codes have shape \(4, 100\); needed is \[N, K\], K a mul"),
        (
            pack_int4,
            (4, 256),
            (4, 1),
            r"scales have shape \(4, 1\); codes .* need \(4, 2\)",
        ),
        (pack_mxfp4, (2, 4, 32), (2, 4, 1), r"codes have shape \(2, 4, 32\)"),
    ],
)
def test_shapes_that_do_not_fit(pack, codes, scales, message):
    with pytest.raises(ValueError, match=message):
        pack(jnp.zeros(codes, jnp.int32), jnp.zeros(scales, jnp.int32))
