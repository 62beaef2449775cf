"""AutoRound of a decoder layer: its matrices rounded together, for the layer's output."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream
from jaxopt_models.errors import UserError
from jaxopt_models.models.block import block
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import positions_of
from jaxopt_models.qtensor import DenseTensor
from jaxopt_models.quantize.autoround import autoround
from jaxopt_models.quantize.groups import Plan
from jaxopt_models.quantize.layer import Rounded, prepare_layer, static_amax
from jaxopt_models.quantize.layer_smoothing import LayerJob
from jaxopt_models.quantize.matrix import find_scales


def reconstruct(stream: Stream, kind: Any, job: LayerJob, plan: Plan) -> dict[str, Rounded]:
    """Rounds the matrices of a layer whose method says "autoround".

    Args:
      stream: at the input of the layer.
      kind: its kind of attention.
      job: from `layer_smoothing.smooth_layer`.
      plan: method by linear; those of other methods stay dense here.

    Returns:
      Grid values and scales by linear; nothing without such methods.

    Raises:
      UserError: for batches of windows of different lengths, of which no minibatch can be made.
    """
    chosen = {name: m for name, m in plan.items() if m.rounding.method == "autoround"}
    if not chosen:
        return {}
    lengths = sorted({x.shape[1] for x in stream.values})
    if len(lengths) > 1:
        raise UserError(
            f"rounding 'autoround' needs calibration windows of one length, not of {lengths}; "
            "cut the text evenly"
        )
    prepared, shared = prepare_layer(job, chosen)
    find = jax.jit(find_scales, static_argnames="method")
    scales, leaves = {}, {}
    for name, method in chosen.items():
        statistics = job.statistics[name]
        scales[name] = find(
            prepared[name],
            replace(statistics, histogram=None, sample=None),
            method,
            shared.get(name),
        )
        quantizer = None
        if method.activation is not None:
            quantizer = method.activation.quantizer(static_amax(statistics, method))
        leaves[f"{name}/weight"] = DenseTensor(
            prepared[name].weight,
            pre_scale=job.pre_scale.get(name),
            low_rank=prepared[name].low_rank,
            input=quantizer,
            rotate=method.rotate,
        )
    how = next(iter(chosen.values())).rounding
    inputs = jnp.concatenate([jnp.asarray(x) for x in stream.values])
    targets = jnp.concatenate([jnp.asarray(x) for x in stream.outputs(job.layer, kind)])
    grids, found, _ = autoround(
        _layer_function(stream.config, kind),
        tree.replace(job.layer, leaves),
        {name: prepared[name].weight for name in chosen},
        scales,
        {name: method.weight.spec() for name, method in chosen.items() if method.weight},
        inputs,
        targets,
        steps=how.steps,
        batch=how.batch,
        learning_rate=how.learning_rate,
        seed=how.seed,
    )
    return {name: Rounded(grids[name], found[name]) for name in chosen}


@cache
def _layer_function(config: ModelConfig, kind: Any) -> Callable[..., jax.Array]:
    """`apply` of AutoRound for all layers of one kind; its context is the layer."""

    def apply(layer: Any, dense: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        leaves = {path: leaf for path, leaf in tree.leaves_with_paths(layer)}
        new = {
            f"{name}/weight": replace(leaves[f"{name}/weight"], weight=weight)
            for name, weight in dense.items()
        }
        return block(config, tree.replace(layer, new), x, positions_of(x), kind=kind)[0]

    return apply
