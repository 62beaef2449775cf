"""Which axis of which weight is split over which axis of a mesh.

    axis      splits                               moves, a layer
    model     products among devices               their sums, twice
    fsdp      what is stored of a weight           the weight, to where it is multiplied
    data      nothing                              gradients

Training splits the rows of a batch over `BATCH`, and weights, their gradients and what the
optimizer keeps of them over "model" and "fsdp".

References: Shoeybi et al. 2019, arXiv:1909.08053 (model); Rajbhandari et al. 2019, arXiv:1910.02054
(fsdp, there "stage 3").
"""

from collections.abc import Mapping

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

# A tuple of specs is an order of preference: the first that splits evenly all that it names.
type Rules = Mapping[str, P | tuple[P, ...]]

AXES = ("data", "fsdp", "model")  # of a mesh of training
BATCH = ("data", "fsdp")

_OUTPUTS, _INPUTS = P("model", None), P(None, "model")
_FIRST, _SECOND = ("q", "k", "v", "gate", "up"), ("o", "down")
_FIRST_EXPERTS, _SECOND_EXPERTS = ("gate", "up"), ("down",)

# A layer's first products split their outputs and its second ones their inputs, so activations are
# summed over devices twice a layer. Covers every architecture, hence some of these rules match
# nothing in a given model.
DEFAULT_RULES: dict[str, P | tuple[P, ...]] = {
    **{f"*/{name}_proj/weight": _OUTPUTS for name in _FIRST},
    **{f"*/{name}_proj/bias": P("model") for name in _FIRST},
    **{f"*/{name}_proj/weight": _INPUTS for name in _SECOND},
    "*embed_tokens/weight": _OUTPUTS,
    "*lm_head/weight": _OUTPUTS,
    **{
        f"*/experts/{name}_proj/weight": (P("model", None, None), P(None, *_OUTPUTS))
        for name in _FIRST_EXPERTS
    },
    **{
        f"*/experts/{name}_proj/weight": (P("model", None, None), P(None, *_INPUTS))
        for name in _SECOND_EXPERTS
    },
}

# "fsdp" splits what "model" leaves whole, or the same axis once more. Vectors it leaves: all of a
# model's are smaller than one matrix.
_OUTPUTS_TOO = P("model", "fsdp"), P(("model", "fsdp"), None), P(None, "fsdp"), _OUTPUTS
_INPUTS_TOO = P("fsdp", "model"), P(None, ("model", "fsdp")), P("fsdp", None), _INPUTS
_EXPERTS = P("model", None, "fsdp"), P("model", "fsdp", None)

TRAINING_RULES: dict[str, P | tuple[P, ...]] = {
    **DEFAULT_RULES,
    **{f"*/{name}_proj/weight": _OUTPUTS_TOO for name in _FIRST},
    **{f"*/{name}_proj/weight": _INPUTS_TOO for name in _SECOND},
    # Whole rows, since rows are looked up.
    "*embed_tokens/weight": (P(("model", "fsdp"), None), *_OUTPUTS_TOO),
    "*lm_head/weight": _OUTPUTS_TOO,
    "*/router/weight": P(None, "fsdp"),
    **{
        f"*/experts/{name}_proj/weight": (*_EXPERTS, *(P(None, *spec) for spec in _OUTPUTS_TOO))
        for name in _FIRST_EXPERTS
    },
    **{
        f"*/experts/{name}_proj/weight": (*_EXPERTS, *(P(None, *spec) for spec in _INPUTS_TOO))
        for name in _SECOND_EXPERTS
    },
}


def rows_spec(mesh: Mesh) -> P:
    """The spec of rows that are split over all that a mesh has of `BATCH`."""
    return P(tuple(axis for axis in BATCH if axis in mesh.shape))


def batch_spec(rows: P, parts: int) -> P:
    """Of a batch [B, ...], that of its rows; of one in several parts, [parts, B, ...]."""
    return rows if parts == 1 else P(None, *rows)


def splits_rows_alone(mesh: Mesh) -> bool:
    """Whether each device of a mesh has whole weights, and nothing but its rows is its own."""
    return all(size == 1 for axis, size in mesh.shape.items() if axis != "data")
