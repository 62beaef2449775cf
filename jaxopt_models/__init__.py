"""Model optimization for JAX: quantize, measure, save, generate — pure functions over
parameters."""
