"""Which weights of a matrix become zero: by patterns, and by scores that need no update of others.

    magnitude   |w_nk|
    Wanda       |w_nk| · sqrt(H_kk),    H = E[x xᵀ] of the input

Magnitudes are compared within the whole matrix, Wanda's scores within each row, since only weights
of one output are added up. References: Han et al. 2015, arXiv:1506.02626; Sun et al. 2023,
arXiv:2306.11695.
"""

import re
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxopt_models.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """How many weights are zero, and where; static.

    Attributes:
      sparsity: share of zeros, 0 < sparsity < 1.
      group: with m here, every m neighbours of a row, from its beginning, have that share. 0 leaves
        the places free.
    """

    sparsity: float
    group: int = 0

    @classmethod
    def parse(cls, text: str | float) -> "Pattern":
        """ "2:4" is two weights of every four; "0.5" or 0.5 is half of them, anywhere.

        Raises:
          UserError: for what is neither.
        """
        found = re.fullmatch(r"(\d+):(\d+)", str(text))
        if found:
            kept, group = map(int, found.groups())
            if 0 < kept < group:
                return cls(1 - kept / group, group)
        else:
            try:
                share = float(text)
            except ValueError:
                share = 0.0
            if 0 < share < 1:
                return cls(share)
        raise UserError(
            f"sparsity {text!r} is unknown; give n:m with 0 < n < m, as 2:4, or a share between 0 "
            "and 1"
        )

    @property
    def zeros(self) -> int:
        """In each group."""
        return round(self.sparsity * self.group)

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raises UserError for a matrix whose rows are not whole groups."""
        if self.group and shape[-1] % self.group:
            raise UserError(
                f"{path} has {shape[-1]} columns, which are no whole groups of {self.group}; leave "
                "it out, or choose another pattern"
            )


def magnitude_mask(weight: jax.Array, pattern: Pattern) -> jax.Array:
    """bool [.., N, K]: the largest |w| of each matrix, or of each group."""
    return mask_of(jnp.abs(weight.astype(jnp.float32)), pattern, "matrix")


def wanda_mask(weight: jax.Array, second_moment: jax.Array, pattern: Pattern) -> jax.Array:
    """bool [.., N, K]: the largest |w| · ‖x‖ of each row, or of each group.

    Args:
      weight: [.., N, K].
      second_moment: float32 [.., K, K], E[x xᵀ]; its scale does not matter.
      pattern: static.
    """
    norms = jnp.sqrt(jnp.diagonal(second_moment, axis1=-2, axis2=-1))
    return mask_of(jnp.abs(weight.astype(jnp.float32)) * norms[..., None, :], pattern, "row")


def mask_of(scores: jax.Array, pattern: Pattern, within: Literal["row", "matrix"]) -> jax.Array:
    """bool [.., N, K], False at the smallest scores; of equal ones the last become zero.

    Args:
      scores: float32 [.., N, K].
      pattern: static.
      within: what weights are compared in, where the pattern has no groups; static.
    """
    if pattern.group:
        groups = scores.reshape(*scores.shape[:-1], -1, pattern.group)
        return _largest(groups, pattern.group - pattern.zeros).reshape(scores.shape)
    rows = scores if within == "row" else scores.reshape(*scores.shape[:-2], -1)
    size = rows.shape[-1]
    return _largest(rows, size - round(pattern.sparsity * size)).reshape(scores.shape)


def _largest(scores: jax.Array, count: int) -> jax.Array:
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count
