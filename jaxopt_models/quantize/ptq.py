"""The driver: a recipe becomes a plan, the plan statistics, the statistics quantized leaves."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.calibrate import input_amax
from jaxopt_models.errors import UserError
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.qtensor import InputQuantizer
from jaxopt_models.quantize.recipe import Recipe, Rule
from jaxopt_models.quantize.rtn import round_to_nearest, weight_amax

# Linears that read one input; engines fuse them, so they share what scales a whole tensor.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class TensorReport:
    """What was done to one weight.

    Attributes:
      path: its leaf path.
      format, granularity, algorithm: how it was quantized.
      activation: format of its input, or "".
      shape: of the weight.
      bits: stored bits for each weight, scales included.
      weight_error: relative error ||W - Ŵ|| / ||W||.
      seconds: wall time, compilation included.
    """

    path: str
    format: str
    granularity: str
    algorithm: str
    activation: str
    shape: tuple[int, ...]
    bits: float
    weight_error: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """A row for each quantized tensor, and what the whole took.

    Attributes:
      recipe: its name.
      tensors: rows in tree order.
      bits_per_weight: of the decoder's matrices; see `tree.bits_per_weight`.
      calibration_seconds, quantization_seconds: wall time, compilation included.
    """

    recipe: str
    tensors: tuple[TensorReport, ...]
    bits_per_weight: float
    calibration_seconds: float
    quantization_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as JSON values."""
        return asdict(self)


def quantize(
    model: Model,
    recipe: Recipe,
    batches: Iterable[Any] | None = None,
    progress: Progress = silent,
) -> tuple[Any, Report]:
    """Quantizes a model's weights, and calibrates the inputs that the recipe wants quantized.

    Args:
      model: the original model.
      recipe: what to do; see `Recipe`.
      batches: int32 [B, T] calibration tokens; may be None if the recipe needs no calibration.
      progress: wraps loops that take long, as `tqdm` would.

    Returns:
      (parameters with `QTensor` leaves, sharing what was left alone; `Report`).

    Raises:
      UserError: for a rule that matches nothing, missing calibration text, a weight that holds NaN.
    """
    plan = recipe.plan(model.params)
    start = time.perf_counter()
    amax = _calibrated(model, recipe, plan, batches, progress)
    calibrated = time.perf_counter()

    weights = dict(tree.leaves_with_paths(model.params))
    shared = _shared_amax(weights, plan)
    leaves: dict[str, Any] = {}
    rows: list[TensorReport] = []
    for path, rule in progress(list(plan.items()), "quantizing"):
        began = time.perf_counter()
        leaves[path], row = _quantized(path, weights[path], rule, shared.get(path), amax.get(path))
        rows.append(TensorReport(**row, seconds=time.perf_counter() - began))
    params = tree.replace(model.params, leaves)
    report = Report(
        recipe=recipe.name,
        tensors=tuple(rows),
        bits_per_weight=tree.bits_per_weight(params),
        calibration_seconds=calibrated - start,
        quantization_seconds=time.perf_counter() - calibrated,
    )
    return params, report


def _calibrated(
    model: Model,
    recipe: Recipe,
    plan: dict[str, Rule],
    batches: Iterable[Any] | None,
    progress: Progress,
) -> dict[str, jax.Array]:
    static = [path for path, r in plan.items() if r.activation and r.activation.calibrated]
    if not static:
        return {}
    if batches is None:
        raise UserError(
            f"recipe {recipe.name} has static activation scales ({static[0]} among them); "
            "give calibration batches"
        )
    return input_amax(model.config, model.params, batches, static, progress)


def _shared_amax(weights: dict[str, Any], plan: dict[str, Rule]) -> dict[str, jax.Array]:
    """Common amax of the matrices that are fused, for formats with two-level scales."""
    shared: dict[str, jax.Array] = {}
    for path, rule in plan.items():
        if path in shared or rule.weight is None or not rule.weight.spec().two_level:
            continue
        group = [p for p in _fused_with(path) if p in plan and plan[p].weight == rule.weight]
        amax = [weight_amax(weights[p]) for p in group]
        shared |= dict.fromkeys(group, jnp.max(jnp.stack(amax), axis=0))
    return shared


def _fused_with(path: str) -> Sequence[str]:
    parent, name, leaf = path.rsplit("/", 2) if path.count("/") > 1 else ("", "", "")
    for names in _FUSED:
        if name in names:
            return [f"{parent}/{n}/{leaf}" for n in names]
    return [path]


def _quantized(
    path: str, weight: jax.Array, rule: Rule, shared: jax.Array | None, amax: jax.Array | None
) -> tuple[Any, dict[str, Any]]:
    """The leaf of one weight and its row of the report, seconds excepted."""
    assert rule.weight is not None
    spec = rule.weight.spec()
    leaf, error = round_to_nearest(weight, spec, shared)
    if not bool(jnp.isfinite(error)):
        raise UserError(f"{path} holds NaN or infinity; repair the checkpoint before quantizing")
    if rule.activation is not None:
        leaf = replace(leaf, input=InputQuantizer(amax, rule.activation.spec()))
    return leaf, {
        "path": path,
        "format": spec.format,
        "granularity": spec.granularity,
        "algorithm": rule.algorithm,
        "activation": rule.activation.format if rule.activation else "",
        "shape": tuple(weight.shape),
        "bits": leaf.weight_bits / leaf.size,
        "weight_error": float(error),
    }
