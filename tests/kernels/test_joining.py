"""Weights below one another keep their values, whatever their bits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import EightBit, concatenate
from kernels_pallas.eight_bit import BLOCK, Kind, code_dtype


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


def eight_bit(kind: Kind, n: int, k: int) -> EightBit:
    codes, scales = jax.random.normal(jax.random.key(n), (2, n, k))
    scales = scales[::BLOCK, ::BLOCK] if kind == "fp8_block" else scales[:, 0]
    return EightBit((50 * codes).astype(code_dtype(kind)), scales, kind)


@pytest.mark.parametrize(
    ("kind", "first", "second"), [("fp8", 48, 24), ("int8", 16, 32), ("fp8_block", 256, 80)]
)
def test_so_do_8_bits(kind, first, second):
    parts = [eight_bit(kind, n, 256) for n in (first, second)]
    joined = jax.jit(concatenate)(parts)
    assert joined.shape == (first + second, 256) and joined.kind == kind
    expected = jnp.concatenate([part.dequantize() for part in parts])
    np.testing.assert_array_equal(joined.dequantize(), expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "to join them; found: $"),
        ([("int4", 16, 128), ("nvfp4", 16, 128)], r"found: int4 \(16, 128\), nvfp4 \(16, 128\)"),
        ([("int4", 16, 128), ("int4", 16, 256)], "weights of one kind and one K"),
        ([("int4", 20, 128), ("int4", 16, 128)], "all but the last must be a multiple of 64"),
        ([("int8", 24, 128), ("int8", 16, 128)], "all but the last must be a multiple of 16"),
        ([("fp8_block", 64, 128), ("fp8_block", 64, 128)], "must be a multiple of 128"),
        ([("fp8", 16, 128), ("fp8_block", 16, 128)], r"found: fp8 \(16, 128\), fp8_block"),
    ],
)
def test_weights_that_do_not_join(weight, sizes, message):
    with pytest.raises(ValueError, match=message):
        concatenate([eight_bit(*s) if "8" in s[0] else weight(*s)[0] for s in sizes])
