"""Which linears of a decoder layer read one input, and what calibration remembers of it."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxopt_models.errors import UserError
from jaxopt_models.quantize.method import Method
from jaxopt_models.statistics import Wanted

# Linears that read one input, by path relative to the layer; the first names the statistics.
# Engines fuse those of one group, so they share what scales a whole tensor.
GROUPS = (
    ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    ("self_attn/o_proj",),
    ("mlp/gate_proj", "mlp/up_proj"),
    ("mlp/down_proj",),
    ("mlp/experts/gate_proj", "mlp/experts/up_proj"),
    ("mlp/experts/down_proj",),
)
_SAMPLE = 256

Plan = Mapping[str, Method]


def group_of(name: str) -> tuple[str, ...]:
    """The linears that read the same input as the one called `name`, itself included."""
    return next((group for group in GROUPS if name in group), (name,))


def leader_tap(name: str) -> str:
    """The tap whose statistics stand for the input of a linear."""
    return f"{group_of(name)[0]}/input"


def wants(plan: Plan) -> dict[str, Wanted]:
    """What calibration must remember of each input of a layer for the methods in `plan`."""
    found: dict[str, Wanted] = {}
    for name, method in plan.items():
        mine = Wanted(
            second_moment=method.needs_second_moment,
            histogram=method.needs_histogram,
            sample=_SAMPLE,
            rotate=0 if method.smooth else method.rotate,
        )
        tap = leader_tap(name)
        known = found.get(tap, mine)
        if known.rotate != mine.rotate:
            raise UserError(
                f"{name} and others that read its input ask for different rotations; "
                "give the group one 'rotate'"
            )
        found[tap] = Wanted(
            known.second_moment or mine.second_moment,
            known.histogram or mine.histogram,
            _SAMPLE,
            known.rotate,
        )
    return found


def weight_of(layer: Any, name: str) -> jax.Array:
    """The weight of a linear, by its path relative to the layer."""
    node = layer
    for part in name.split("/"):
        node = node[part]
    return node["weight"]
