"""Weights that are multiplied with the same activations, as one weight."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.eight_bit import EightBit
from kernels_pallas.four_bit import FourBit


def concatenate(weights: Sequence[FourBit | EightBit]) -> FourBit | EightBit:
    """One weight [sum of N, K] of several [N, K], one below the other, without repacking.

    Raises:
      ValueError: for none, several kinds or K, or an N before the last that is no whole number of
        pieces: 64 rows for 4 bits, 16 for 8 bits, 128 for 8 bits in blocks.
    """
    if not weights or len({(weight.kind, weight.shape[1]) for weight in weights}) > 1:
        found = ", ".join(f"{weight.kind} {weight.shape}" for weight in weights)
        raise ValueError(f"weights of one kind and one K are needed to join them; found: {found}")
    first, rows = weights[0], weights[0].piece[0]
    if any(weight.shape[0] % rows for weight in weights[:-1]):
        raise ValueError(f"N of all but the last must be a multiple of {rows}")
    # The first axis of all that a weight consists of goes along N.
    parts = zip(*map(jax.tree.leaves, weights), strict=True)
    joined = [jnp.concatenate(arrays) for arrays in parts]
    if isinstance(first, EightBit):
        return EightBit(*joined, kind=first.kind)
    shape = sum(weight.shape[0] for weight in weights), first.shape[1]
    return FourBit(*joined, kind=first.kind, shape=shape)
