"""Float32 division that gives the same bits on every backend.

XLA compiles a division by a constant or a broadcast to a product with the reciprocal, x / (a / b)
to x · b / a, and on GPUs divides with an error of up to two units in the last place. Scales are
quotients, and codes at ties hang on their last bit; so a quotient is corrected by its remainder,
which is computed exactly.
"""

import jax
import jax.numpy as jnp

from jaxopt_models.elements import exponent_of, float_bits, float_from_bits, power_of_two


def divide(a: jax.Array | float, b: jax.Array | float) -> jax.Array:
    """Nearest float32 to a / b, elementwise with broadcasting; subnormal operands count as zero.

    With mantissas a, b in [1, 2) and q ≈ a / b, the result is q + (a - q b) / b. The remainder is a
    sum of products of 12-bit halves, none of which rounds, whether or not the compiler fuses them.

    Reference: Dekker 1971, "A floating-point technique for extending the available precision".
    """
    a, b = jnp.broadcast_arrays(jnp.float32(a), jnp.float32(b))
    top, bottom = _mantissa(a), _mantissa(b)
    # An integer operation, because top · (1 / bottom) may be fused, unrounded, into the sum below,
    # to which the remainder of the rounded quotient would not belong.
    quotient = float_from_bits(float_bits(top / bottom) & -2)
    quotient = quotient + _remainder(top, quotient, bottom) / bottom
    shift = exponent_of(a) - exponent_of(b)
    # In two steps, since a shift by up to 253 binades has no power of two of its own.
    half = shift // 2
    exact = quotient * power_of_two(half) * power_of_two(shift - half)
    regular = _is_normal(a) & _is_normal(b)
    return jnp.where(regular, exact, a / b)


def _remainder(a: jax.Array, q: jax.Array, b: jax.Array) -> jax.Array:
    """a - q b without rounding, for q within a few units in the last place of a / b."""
    (q_high, q_low), (b_high, b_low) = _halves(q), _halves(b)
    return a - q_high * b_high - q_high * b_low - q_low * b_high - q_low * b_low


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x as a sum of its upper and lower 12 mantissa bits."""
    high = float_from_bits(float_bits(x) & -4096)
    return high, x - high


def _mantissa(x: jax.Array) -> jax.Array:
    """x scaled by a power of two to magnitude [1, 2)."""
    sign_and_fraction = float_bits(x) & jnp.int32(-2139095041)  # all but the exponent bits
    return float_from_bits(sign_and_fraction | 0x3F800000)


def _is_normal(x: jax.Array) -> jax.Array:
    exponent = exponent_of(x)
    return (exponent > -127) & (exponent < 128)
