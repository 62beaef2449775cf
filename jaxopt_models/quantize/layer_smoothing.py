"""Smoothing of one decoder layer: factors for each input, folded into what is before it where that
is exact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.hadamard import hadamard
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.quantize import fold
from jaxopt_models.quantize.groups import GROUPS, Plan, group_of, leader_tap, weight_of
from jaxopt_models.quantize.method import Method
from jaxopt_models.quantize.smooth import FREE, Tied, awq, search_smoothquant, smoothed, smoothquant
from jaxopt_models.statistics import InputStatistics


@dataclass
class LayerJob:
    """A layer on its way: dense weights with smoothing folded in, and what is known of its inputs.

    Attributes:
      layer: dense weights; computes what the original does.
      statistics: of the inputs as they reach the quantizer, by linear.
      factors: smoothing factors [K] or [E, K] that are not folded: those linears' weights are still
        to be multiplied with them.
      pre_scale: [K], their inverse, for the leaf.
      dtypes: of the original weights.
    """

    layer: Any
    statistics: dict[str, InputStatistics]
    factors: dict[str, jax.Array]
    pre_scale: dict[str, jax.Array]
    dtypes: dict[str, str]


def smooth_layer(
    config: ModelConfig,
    layer: Any,
    plan: Plan,
    taps: Mapping[str, InputStatistics],
    folding: bool,
) -> LayerJob:
    """Chooses smoothing factors and folds them where that is exact.

    Args:
      layer: original weights.
      plan: method by linear, relative to the layer ("self_attn/q_proj").
      taps: statistics by tap, of the original layer.
      folding: whether factors may be folded at all.

    A linear without statistics, as of a recipe that needs no text, stays as it is.
    """
    dtypes = {name: weight_of(layer, name).dtype.name for name in plan}
    job = LayerJob(layer, {}, {}, {}, dtypes)
    # Backwards: what reads o_proj's or down_proj's input is folded into v_proj's or up_proj's rows,
    # which must be final before their columns are looked at.
    for group in dict.fromkeys([*reversed(GROUPS), *map(group_of, plan)]):
        members = [name for name in group if name in plan]
        for method in dict.fromkeys(plan[name] for name in members):
            alike = [name for name in members if plan[name] == method]
            statistics = taps.get(leader_tap(alike[0]))
            if statistics is None:
                continue
            if method.smooth is None:
                job.statistics |= dict.fromkeys(alike, statistics)
                continue
            exact = folding and _can_fold(config, job.layer, plan, group, alike)
            tied = fold.ties(job.layer, config, alike[0]) if exact else FREE
            dense = [weight_of(job.layer, name) for name in alike]
            if exact:
                factors = _factors(method, dense, statistics, tied)
                job.layer = fold.fold(job.layer, config, alike[0], factors)
                columns = jnp.expand_dims(factors, -2)
                job.layer = tree.replace(
                    job.layer,
                    {
                        f"{name}/weight": weight.astype(jnp.float32) * columns
                        for name, weight in zip(alike, dense, strict=True)
                    },
                )
            else:
                factors = _shared_factors(method, dense, statistics)
                job.pre_scale |= dict.fromkeys(alike, 1.0 / factors)
                factors = jnp.broadcast_to(factors, statistics.channel_amax.shape)
                job.factors |= dict.fromkeys(alike, factors)
            changed = smoothed(statistics, factors)
            if method.rotate:
                changed = _rotated(changed, method.rotate)
            job.statistics |= dict.fromkeys(alike, changed)
    return job


def _can_fold(
    config: ModelConfig, layer: Any, plan: Plan, group: Sequence[str], alike: Sequence[str]
) -> bool:
    """Whether a group's factors may go into what is before it: all its readers take part, and a
    linear before it is to be quantized anyway (else it would lose its dtype to exactness)."""
    producer = fold.LINEARS.get(alike[0])
    whole = len(alike) == len(group)
    return whole and fold.foldable(layer, config, alike[0]) and (not producer or producer in plan)


@partial(jax.jit, static_argnames=("method", "tied"))
def _factors(
    method: Method, weights: Sequence[jax.Array], statistics: InputStatistics, tied: Tied
) -> jax.Array:
    """Smoothing factors of linears that read one input: [K], or [E, K] for stacks of experts."""
    weights = [weight.astype(jnp.float32) for weight in weights]
    find = partial(_find_factors, method, tied)
    if weights[0].ndim == 3:
        return jax.vmap(find)(weights, replace(statistics, histogram=None))
    return find(weights, statistics)


def _find_factors(
    method: Method, tied: Tied, weights: Sequence[jax.Array], statistics: InputStatistics
) -> jax.Array:
    assert method.weight is not None and method.smooth is not None
    how, spec = method.smooth, method.weight.spec()
    activation = None if method.activation is None else method.activation.spec()
    if how.method == "smoothquant" and how.alpha != "search":
        return smoothquant(weights, statistics, how.alpha, tied=tied)
    search = method.activation.search if method.activation else "max"
    best = awq if how.method == "awq" else search_smoothquant
    return best(weights, statistics, spec, activation, search=search, tied=tied)[0]


def _shared_factors(
    method: Method, weights: Sequence[jax.Array], statistics: InputStatistics
) -> jax.Array:
    """Factors [K] that all experts share, since one vector multiplies the input of a leaf."""
    if weights[0].ndim == 3:
        weights = [weight.reshape(-1, weight.shape[-1]) for weight in weights]
        statistics = _pooled(statistics)
    return _factors(method, weights, statistics, FREE)


@jax.jit
def _pooled(statistics: InputStatistics) -> InputStatistics:
    """Statistics of all experts' rows together."""
    share = statistics.count / jnp.maximum(jnp.sum(statistics.count), 1.0)
    moment, sample = statistics.second_moment, statistics.sample
    return replace(
        statistics,
        count=jnp.sum(statistics.count),
        amax=jnp.max(statistics.amax),
        channel_amax=jnp.max(statistics.channel_amax, axis=0),
        channel_abs=jnp.sum(statistics.channel_abs * share[:, None], axis=0),
        second_moment=None if moment is None else jnp.sum(moment * share[:, None, None], axis=0),
        sample=None if sample is None else sample.reshape(-1, sample.shape[-1]),
    )


@partial(jax.jit, static_argnames="block")
def _rotated(statistics: InputStatistics, block: int) -> InputStatistics:
    """Second moment and sample of the input after a Hadamard transform; its maxima are unknown."""
    moment, sample = statistics.second_moment, statistics.sample
    if moment is not None:
        moment = jnp.swapaxes(
            hadamard(jnp.swapaxes(hadamard(moment, block), -1, -2), block), -1, -2
        )
    return replace(
        statistics, second_moment=moment, sample=None if sample is None else hadamard(sample, block)
    )
