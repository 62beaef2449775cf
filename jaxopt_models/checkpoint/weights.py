"""From a tensor in a file to a placed weight: the checks and the hook that all readers share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.errors import UserError

# Puts one array of the tree where it is to stay; its path says which array it is.
Place = Callable[[str, np.ndarray], Any]

_CHUNK = 2**22  # elements widened to float32 at a time


def copy_to_device(path: str, array: np.ndarray) -> jax.Array:
    """The default `Place`. It copies, because a mapped file may change under an alias of it."""
    return jnp.array(array)


def keep_on_host(path: str, array: np.ndarray) -> np.ndarray:
    """The `Place` that leaves arrays where they are, mapped files among them.

    Only dtypes that JAX would narrow are narrowed now, so that leaves say what will be computed.
    """
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def check_shape(where: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError unless the shapes agree; `where` names file and tensor."""
    if shape != expected:
        raise UserError(
            f"{where} has shape {list(shape)} where the config needs {list(expected)}; "
            "config and weights are of different models"
        )


def as_weight(where: str, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """A float array in `dtype`, or in its own where that is None.

    Raises:
      UserError: for integers, and for NaN or infinity in the result.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{where} has dtype {array.dtype}, not a float; it is no weight")
    if dtype is not None:
        with np.errstate(over="ignore"):  # what overflows is found below
            array = array.astype(dtype, copy=False)
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        if not np.isfinite(flat[start : start + _CHUNK].astype(np.float32)).all():
            raise UserError(
                f"{where} holds NaN or infinity as {array.dtype}; "
                "the checkpoint is damaged, or the dtype too narrow for it"
            )
    return array
