"""Packed 4-bit weights stand for what was packed, exactly, whatever the shape."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import concatenate, pack_int4, pack_mxfp4
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


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "mxfp4"])
def test_joined_weights_keep_their_values(weight, kind):
    """Tensor scales of their own included: the second one is scaled by 3."""
    (first, above), (second, below) = (weight(kind, n, 640, n) for n in (64, 40))
    second = replace(second, factor=second.factor * 3)
    joined = jax.jit(concatenate)([first, second])
    assert joined.shape == (104, 640) and joined.kind == kind
    expected = np.concatenate([first.dequantize(), second.dequantize()])
    np.testing.assert_array_equal(joined.dequantize(), expected)
    exact = np.concatenate([above, 3 * below])
    np.testing.assert_allclose(joined.dequantize(), exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "to join them; found: $"),
        ([("int4", 16, 128), ("nvfp4", 16, 128)], r"found: int4 \(16, 128\), nvfp4 \(16, 128\)"),
        ([("int4", 16, 128), ("int4", 16, 256)], "weights of one kind and one K"),
        ([("int4", 20, 128), ("int4", 16, 128)], "all but the last must be a multiple of 64"),
    ],
)
def test_weights_that_do_not_join(weight, sizes, message):
    with pytest.raises(ValueError, match=message):
        concatenate([weight(*size)[0] for size in sizes])
