"""Linears that read the same input, each for itself or joined into one product.

A module holds either layout: {"q_proj", "k_proj", "v_proj"} or {"qkv_proj"}, the former's rows one
below the other; {"gate_proj", "up_proj"} or {"gate_up_proj"} likewise. Widths follow from shapes:
o_proj has as many columns as q_proj rows, k_proj as many rows as v_proj, gate_proj as up_proj.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.ops import linear

# The joined linear's name, and those that it stands for.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def widths(module: Mapping[str, Any], joined: str) -> tuple[int, ...]:
    """Outputs of each linear that `joined` stands for, in either layout of the module."""
    if joined not in module:
        return tuple(module[name]["weight"].shape[0] for name in JOINED[joined])
    total = module[joined]["weight"].shape[0]
    if joined == "gate_up_proj":
        return total // 2, total // 2
    queries = module["o_proj"]["weight"].shape[1]
    keys = (total - queries) // 2
    return queries, keys, keys


def project(
    module: Mapping[str, Any], joined: str, x: jax.Array, save: Callable[[str, jax.Array], None]
) -> list[jax.Array]:
    """Outputs [..., N] of each linear that `joined` stands for, of the same input.

    Args:
      module: weights, in either layout.
      joined: a key of `JOINED`.
      x: [..., K].
      save: receives the tap "{name}/input" of each linear, by its own name.
    """
    for name in JOINED[joined]:
        save(f"{name}/input", x)
    if joined not in module:
        parts = (module[name] for name in JOINED[joined])
        return [linear(x, part["weight"], part.get("bias")) for part in parts]
    out = linear(x, module[joined]["weight"], module[joined].get("bias"))
    ends = [sum(widths(module, joined)[: i + 1]) for i in range(len(JOINED[joined]) - 1)]
    return jnp.split(out, ends, axis=-1)
