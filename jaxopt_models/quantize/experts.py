"""Calibration of experts: each needs tokens, which a router need not send it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.calibrate import Stream
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard
from jaxopt_models.models.block import activation, block
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import positions_of
from jaxopt_models.ops import linear
from jaxopt_models.quantize.recipe import Experts
from jaxopt_models.statistics import InputStatistics, Wanted, empty, finished, update

_PREFIX = "mlp/experts/"


def complete(
    stream: Stream,
    layer: Any,
    kind: Any,
    wants: Mapping[str, Wanted],
    found: Mapping[str, InputStatistics],
    experts: Experts,
    prefix: str,
) -> dict[str, InputStatistics]:
    """Statistics in which every expert saw enough tokens.

    Args:
      stream: at the input of the layer.
      layer, kind, wants: as for `Stream.observe`.
      found: what that returned, each expert on the tokens that were routed to it.
      experts: how many are enough, and what to do otherwise.
      prefix: of the layer's paths, for errors.

    Returns:
      `found`, with the statistics of experts replaced by those over all tokens where the recipe
      wants that.

    Raises:
      UserError: for an expert with too few tokens if the recipe has no other remedy.
    """
    taps = {tap: wanted for tap, wanted in wants.items() if tap.startswith(_PREFIX)}
    if not taps:
        return dict(found)
    counts = found[next(iter(taps))].count
    starved = counts < experts.min_tokens
    if experts.tokens == "all":
        starved = jnp.ones_like(starved)
    elif not bool(jnp.any(starved)):
        return dict(found)
    elif experts.starved == "error":
        worst = int(jnp.argmin(counts))
        raise UserError(
            f"expert {worst} of {prefix}mlp saw {int(counts[worst])} calibration tokens, and "
            f"{int(jnp.sum(starved))} experts fewer than {experts.min_tokens}; use more text, or "
            "set experts.starved=all to calibrate such experts on all tokens"
        )
    everything = observe_all(stream, layer, kind, taps)
    return dict(found) | {tap: _chosen(starved, everything[tap], found[tap]) for tap in taps}


def observe_all(
    stream: Stream, layer: Any, kind: Any, wants: Mapping[str, Wanted]
) -> dict[str, InputStatistics]:
    """Statistics of experts' inputs when every expert runs on all tokens."""
    experts = layer["mlp"]["experts"]
    count, width, size = experts["down_proj"]["weight"].shape
    batches = len(stream)
    rotations = tuple((tap, how.rotate) for tap, how in wants.items())
    totals = {
        tap: empty(how, size if "down_proj" in tap else width, batches, count)
        for tap, how in wants.items()
    }
    for i, x in enumerate(stream.values):
        totals = _observe_all(
            stream.config, layer, x, totals, jnp.int32(i), batches, kind, rotations
        )
    return {tap: finished(total) for tap, total in totals.items()}


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _observe_all(
    config: ModelConfig,
    layer: Any,
    x: jax.Array,
    totals: dict[str, InputStatistics],
    index: jax.Array,
    batches: int,
    kind: Any,
    rotations: tuple[tuple[str, int], ...],
) -> dict[str, InputStatistics]:
    tap = "mlp/router/input"
    taps = block(config, layer, x, positions_of(x), kind=kind, wanted=frozenset((tap,)))[2]
    tokens = taps[tap].reshape(-1, x.shape[-1])
    activate = activation(config)
    assert isinstance(tokens, jax.Array)

    def one(expert: Any) -> dict[str, InputStatistics]:
        weights, own = expert
        gate, up = (linear(tokens, weights[name]["weight"]) for name in ("gate_proj", "up_proj"))
        seen = {}
        for name, block_size in rotations:
            rows = activate(gate) * up if "down_proj" in name else tokens
            rows = hadamard(rows, block_size) if block_size else rows
            seen[name] = update(own[name], rows, index, batches)
        return seen

    # The histogram is of all experts together: it stays as the routed tokens made it.
    alone = {name: replace(total, histogram=None) for name, total in totals.items()}
    new = jax.lax.map(one, (layer["mlp"]["experts"], alone))
    return {name: replace(total, histogram=totals[name].histogram) for name, total in new.items()}


def _chosen(
    starved: jax.Array, everything: InputStatistics, routed: InputStatistics
) -> InputStatistics:
    """For each expert the one or the other; the histogram is the routed one."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(starved.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    merged = jax.tree.map(
        pick, replace(everything, histogram=None), replace(routed, histogram=None)
    )
    return replace(merged, histogram=routed.histogram)
