"""One decoder layer: which linears read one input, smoothing them together, then each matrix.

A layer is quantized as a whole because its parts constrain each other: smoothing factors are folded
into the norm or the linear before, and matrices that engines fuse share a global scale.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.numerics import Scales
from jaxopt_models.qtensor import QTensor
from jaxopt_models.quantize import fold
from jaxopt_models.quantize.calibrators import input_amax
from jaxopt_models.quantize.matrix import Figures, Prepared, assemble, finish, prepare
from jaxopt_models.quantize.method import Method
from jaxopt_models.quantize.smooth import FREE, Tied, awq, search_smoothquant, smoothed, smoothquant
from jaxopt_models.statistics import InputStatistics, Wanted

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


@dataclass(frozen=True)
class TensorReport:
    """What was done to one weight.

    Attributes:
      path: its leaf path.
      format, granularity, algorithm: how it was quantized.
      activation: format of its input, or "".
      shape: of the weight.
      bits: stored bits for each weight, scales included.
      weight_error: relative error ||W - Ŵ|| / ||W||, after smoothing.
      output_error: that of the product with a sample of the calibration text, the rounding of the
        input included; None without text.
      clipped: share of weights beyond the range of their scale.
      damping: what GPTQ added to the Hessian's diagonal, relative to its mean; None without GPTQ.
      seconds: wall time of scale search and rounding, compilation included.
    """

    path: str
    format: str
    granularity: str
    algorithm: str
    activation: str
    shape: tuple[int, ...]
    bits: float
    weight_error: float
    output_error: float | None
    clipped: float
    damping: float | None
    seconds: float


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
        static = method.activation is not None and method.activation.calibrated
        histogram = (
            static and method.activation is not None and method.activation.calibrator != "max"
        )
        mine = Wanted(
            second_moment=method.needs_second_moment,
            histogram=histogram,
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
    dtypes = {name: _weight(layer, name).dtype.name for name in plan}
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
            dense = [_weight(job.layer, name) for name in alike]
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


@dataclass(frozen=True)
class Rounded:
    """What AutoRound chose for one matrix: grid values and scales of the prepared weight."""

    grid: jax.Array
    scales: Scales


def check_weights(layer: Any, plan: Plan, prefix: str) -> None:
    """Refuses weights that cannot be rounded, before all that would spread them.

    Raises:
      UserError: naming the first of the plan that holds NaN or infinity.
    """
    finite = _finite({name: _weight(layer, name) for name in plan})
    for name in plan:
        if not bool(finite[name]):
            raise _not_finite(f"{prefix}{name}/weight")


@jax.jit
def _finite(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda weight: jnp.all(jnp.isfinite(weight)), weights)


def _not_finite(path: str) -> UserError:
    return UserError(f"{path} holds NaN or infinity; repair the checkpoint before quantizing")


def prepare_layer(job: LayerJob, plan: Plan) -> tuple[dict[str, Prepared], dict[str, jax.Array]]:
    """(matrices in the space in which they are quantized, magnitudes that some of them share)."""
    prepared = {
        name: prepare(_weight(job.layer, name), method, job.factors.get(name))
        for name, method in plan.items()
    }
    return prepared, shared_amax({name: p.weight for name, p in prepared.items()}, plan)


def quantize_layer(
    job: LayerJob, plan: Plan, prefix: str, rounded: Mapping[str, Rounded]
) -> tuple[Any, list[TensorReport]]:
    """Quantizes every matrix of the plan.

    Args:
      job: from `smooth_layer`.
      plan: method by linear.
      prefix: of the layer's paths, for reports and errors ("layers/3/").
      rounded: what has been rounded already, by linear.

    Returns:
      (layer with `QTensor` leaves, a row for each).

    Raises:
      UserError: where GPTQ finds no factorisation.
    """
    prepared, shared = prepare_layer(job, plan)
    layer, rows = job.layer, []
    for name, method in plan.items():
        began = time.perf_counter()
        statistics = job.statistics.get(name)
        amax = static_amax(statistics, method)
        statistics = _for_method(statistics, method)
        if name in rounded:
            grid, scales = rounded[name].grid, rounded[name].scales
            leaf, figures = assemble(prepared[name], grid, scales, statistics, method, amax)
        else:
            leaf, figures = finish(prepared[name], statistics, method, shared.get(name), amax)
        figures = jax.block_until_ready(figures)
        path = f"{prefix}{name}/weight"
        rows.append(report_row(path, method, leaf, figures, time.perf_counter() - began))
        leaf = replace(leaf, pre_scale=job.pre_scale.get(name), dtype=job.dtypes[name])
        layer = tree.replace(layer, {f"{name}/weight": leaf})
    return layer, rows


def shared_amax(weights: Mapping[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    """Common magnitude of matrices that are fused, for formats with two-level scales."""
    shared: dict[str, jax.Array] = {}
    for name, method in plan.items():
        if name in shared or method.weight is None or not method.weight.spec().two_level:
            continue
        fused = [n for n in group_of(name) if n in plan and plan[n].weight == method.weight]
        amax = [jnp.max(jnp.abs(weights[n]), axis=(-2, -1)) for n in fused]
        shared |= dict.fromkeys(fused, jnp.max(jnp.stack(amax), axis=0))
    return shared


def static_amax(statistics: InputStatistics | None, method: Method) -> jax.Array | None:
    """Magnitude of a static input scale, one for all experts; None for dynamic scales."""
    activation = method.activation
    if activation is None or not activation.calibrated:
        return None
    assert statistics is not None  # else the scale would be that of whatever batch comes
    spec = activation.spec()
    whole = replace(statistics, amax=jnp.max(statistics.amax))
    return input_amax(whole, activation.calibrator, percentile=activation.percentile, spec=spec)


def report_row(
    path: str, method: Method, leaf: QTensor, figures: Figures, seconds: float
) -> TensorReport:
    """The figures as a row.

    Raises:
      UserError: if they are not finite.
    """
    weight_error, output_error = float(figures.weight_error), float(figures.output_error)
    damping = float(figures.damping)
    if damping != damping:
        raise UserError(
            f"{path}: the Hessian of its input has no Cholesky factor at any damping; "
            "use more calibration text, or rounding 'nearest' for it"
        )
    if weight_error != weight_error or weight_error == float("inf"):
        raise _not_finite(path)
    return TensorReport(
        path=path,
        format=leaf.spec.format,
        granularity=leaf.spec.granularity,
        algorithm=method.algorithm,
        activation=method.activation.format if method.activation else "",
        shape=tuple(leaf.shape),
        bits=leaf.weight_bits / leaf.size,
        weight_error=weight_error,
        output_error=None if output_error != output_error else output_error,
        clipped=float(figures.clipped),
        damping=damping if method.rounding.method == "gptq" else None,
        seconds=seconds,
    )


def _can_fold(
    config: ModelConfig, layer: Any, plan: Plan, group: Sequence[str], alike: Sequence[str]
) -> bool:
    """Whether a group's factors may go into what is before it: all its readers take part, and a
    linear before it is to be quantized anyway (else it would lose its dtype to exactness)."""
    producer = fold.LINEARS.get(alike[0])
    whole = len(alike) == len(group)
    return whole and fold.foldable(layer, config, alike[0]) and (not producer or producer in plan)


def _weight(layer: Any, name: str) -> jax.Array:
    node = layer
    for part in name.split("/"):
        node = node[part]
    return node["weight"]


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
    search = method.activation.search if method.activation else "max"
    if how.method == "awq":
        return awq(weights, statistics, spec, activation, search=search, tied=tied)[0]
    if how.alpha == "search":
        return search_smoothquant(weights, statistics, spec, activation, search=search, tied=tied)[
            0
        ]
    return smoothquant(weights, statistics, how.alpha, tied=tied)


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


def _for_method(statistics: InputStatistics | None, method: Method) -> InputStatistics | None:
    """Only what `finish` reads, so that it is compiled once whatever else was remembered."""
    if statistics is None:
        return None
    needed = method.rounding.method == "gptq" or method.scales in ("hessian", "clip")
    return replace(
        statistics,
        histogram=None,
        second_moment=statistics.second_moment if needed else None,
    )
