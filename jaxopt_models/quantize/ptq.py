"""The driver: a recipe becomes a plan, and layer by layer the plan becomes quantized leaves.

For each layer: put its weights onto the device, observe its inputs, smooth, quantize, keep the
result, move the text on. What is alive at a time is one layer and the residual stream.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream, check, head_statistics
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import orthogonal
from jaxopt_models.inference import refuse_prepared
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.quantize import rotate
from jaxopt_models.quantize.experts import complete
from jaxopt_models.quantize.groups import Plan, leader_tap, wants
from jaxopt_models.quantize.kv import kv_measure, kv_merge, kv_quantizer
from jaxopt_models.quantize.layer import TensorReport, check_weights, quantize_layer
from jaxopt_models.quantize.layer_smoothing import LayerJob, smooth_layer
from jaxopt_models.quantize.method import Method
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.quantize.reconstruct import reconstruct
from jaxopt_models.quantize.resume import LayerStore, signature
from jaxopt_models.statistics import InputStatistics, Wanted


@dataclass(frozen=True)
class Report:
    """A row for each quantized tensor, and what the whole took.

    Attributes:
      recipe: its name.
      tensors: rows in tree order.
      bits_per_weight: of the decoder's matrices; see `tree.bits_per_weight`.
      tokens: of calibration text; 0 without.
      calibration_seconds: wall time of running the text through the layers, compilation included.
      quantization_seconds: all the rest.
      seeds: of everything random, by what it decides.
    """

    recipe: str
    tensors: tuple[TensorReport, ...]
    bits_per_weight: float
    tokens: int
    calibration_seconds: float
    quantization_seconds: float
    seeds: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as JSON values."""
        return asdict(self)


def quantize(
    model: Model,
    recipe: Recipe,
    batches: Iterable[Any] | None = None,
    progress: Progress = silent,
    *,
    mesh: Mesh | None = None,
    resume: str | Path | None = None,
) -> tuple[Any, Report]:
    """Quantizes a model's weights, inputs and cache as a recipe says.

    Args:
      model: the original model. Its leaves may be host arrays (`load(..., host=True)`): then layers
        go to the device one by one, and come back as host arrays.
      recipe: what to do; see `Recipe`.
      batches: int32 [B, T] calibration tokens; may be None if the recipe needs no calibration.
      progress: wraps the loop over layers, as `tqdm` would.
      mesh: spreads the rows of each batch over its axis "data".
      resume: directory that keeps finished layers; a run that was killed goes on behind the last of
        them, and its result is the same bit for bit. None keeps nothing.

    Returns:
      (parameters with `QTensor` leaves, sharing what was left alone; `Report`).

    Raises:
      UserError: for a rule that matches nothing, missing calibration text, an input that no scale
        can be made of, an expert that saw too few tokens, a weight that holds NaN.
    """
    run = _prepare(model, recipe, batches, mesh)
    store = None
    if resume is not None:
        embedding = model.params["embed_tokens"]
        store = LayerStore(Path(resume), signature(model.config, recipe, run.tokens, embedding))
    done: list[Any] = []
    rows: list[TensorReport] = []
    indices = list(range(len(run.params["layers"])))
    for index in progress(indices, f"quantizing to {recipe.name}"):
        layer, of_layer = _resumed(run, index, store)
        done.append(layer)
        rows += of_layer
    params, of_ends = _ends(run, run.params | {"layers": tuple(done)})
    order = {path: i for i, (path, _) in enumerate(tree.leaves_with_paths(params))}
    report = Report(
        recipe=recipe.name,
        tensors=tuple(sorted([*rows, *of_ends], key=lambda row: order[row.path])),
        bits_per_weight=tree.bits_per_weight(params),
        tokens=run.stream.tokens if run.stream else 0,
        calibration_seconds=run.calibration.seconds,
        quantization_seconds=run.total.stop() - run.calibration.seconds,
        seeds=_seeds(recipe),
    )
    return params, report


class _Clock:
    """Adds up the wall time between entering and leaving; running since it was made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since

    def stop(self) -> float:
        return time.perf_counter() - self._since


@dataclass(frozen=True)
class _Run:
    """What stays the same over the layers of one call of `quantize`, but for stream and clocks."""

    config: ModelConfig
    recipe: Recipe
    params: dict[str, Any]
    methods: dict[str, Method]
    basis: np.ndarray | None
    tokens: list[np.ndarray]
    stream: Stream | None
    total: _Clock
    calibration: _Clock


def _prepare(
    model: Model, recipe: Recipe, batches: Iterable[Any] | None, mesh: Mesh | None
) -> _Run:
    """Everything before the first layer."""
    total, calibration = _Clock(), _Clock()
    refuse_prepared(model.params, "quantized")
    params, basis = dict(model.params), None
    methods = {path: rule.method for path, rule in recipe.plan(params).items()}
    if recipe.rotation.hidden:
        basis = orthogonal(params["embed_tokens"]["weight"].shape[-1], recipe.rotation.seed)
        _, rotated = rotate.rotate_ends(model.config, params, basis)
        ends = {name: part for name, part in rotated.items() if name != "layers"}
        params |= _where(params["embed_tokens"], ends)
    tokens: list[np.ndarray] = []
    stream = None
    if recipe.needs_text:
        if batches is None:
            raise UserError(
                f"recipe {recipe.name} reads calibration text (for static scales, or algorithms "
                "that measure outputs); give calibration batches"
            )
        tokens = [np.asarray(batch) for batch in batches]
        with calibration:
            stream = Stream(model.config, params, tokens, mesh)
    return _Run(model.config, recipe, params, methods, basis, tokens, stream, total, calibration)


def _resumed(run: _Run, index: int, store: LayerStore | None) -> tuple[Any, list[TensorReport]]:
    """A layer from the store, or quantized now and stored. The text moves on either way."""
    source = run.params["layers"][index]
    found = store.get(index, source) if store else None
    if found is None:
        layer, rows = _quantize_layer(run, index)
        if store:
            store.put(index, source, layer, rows)
    else:
        layer, rows = found
        _move_on(run, index, layer)
    return _where(source, layer), rows


def _where(source: Any, result: Any) -> Any:
    """The result on the host if its source is there."""
    on_host = any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(source))
    return jax.device_get(result) if on_host else result


def _move_on(run: _Run, index: int, layer: Any) -> None:
    """Takes the text through a layer that was stored, by the very program that an uninterrupted
    run takes: another one might round differently."""
    if run.stream is None:
        return
    kind = run.config.attention_kinds[index]
    with run.calibration:
        if run.recipe.sequential:
            run.stream.advance(layer, kind)
        else:
            wanted = wants(_plan(run, index))
            run.stream.observe(_dense(run, run.params["layers"][index]), kind, wanted, True)


def _plan(run: _Run, index: int) -> Plan:
    """Methods of one layer's matrices, by linear relative to it."""
    prefix = f"layers/{index}/"
    return {
        path.removeprefix(prefix).removesuffix("/weight"): method
        for path, method in run.methods.items()
        if path.startswith(prefix)
    }


def _dense(run: _Run, source: Any) -> Any:
    """An original layer on the device, rotated if the recipe rotates."""
    layer = jax.device_put(source)
    if run.basis is not None:
        layer = rotate.rotate_layer(run.config, layer, run.basis)
    if run.recipe.rotation.heads:
        layer = rotate.rotate_layer_heads(run.config, layer)
    return layer


def _quantize_layer(run: _Run, index: int) -> tuple[Any, list[TensorReport]]:
    """One layer through the whole pipeline; leaves the stream at the next one's input."""
    prefix, kind = f"layers/{index}/", run.config.attention_kinds[index]
    plan = _plan(run, index)
    layer = _dense(run, run.params["layers"][index])
    check_weights(layer, plan, prefix)
    taps: dict[str, InputStatistics] = {}
    here = None
    if run.stream:
        here = run.stream.fork()
        with run.calibration:
            wanted = wants(plan)
            advance = not run.recipe.sequential
            taps = run.stream.observe(layer, kind, wanted, advance)
            taps = complete(here, layer, kind, wanted, taps, run.recipe.experts, prefix)
        for name in plan:
            check(f"{prefix}{name}/weight", taps[leader_tap(name)])
    job = smooth_layer(run.config, layer, plan, taps, run.recipe.fold)
    if here:
        with run.calibration:
            _look_again(here, kind, job, plan)
    rounded = reconstruct(here, kind, job, plan) if here else {}
    kv_cache = _kv_cache(run, here, kind, job)
    layer, rows = quantize_layer(job, plan, prefix, rounded)
    if kv_cache is not None:
        layer = layer | {"self_attn": layer["self_attn"] | {"kv_cache": kv_cache}}
    if run.stream and run.recipe.sequential:
        with run.calibration:
            run.stream.advance(layer, kind)
    return layer, rows


def _look_again(here: Stream, kind: Any, job: LayerJob, plan: Plan) -> None:
    """Observes static inputs whose magnitude smoothing has made unknown, in the smoothed layer.

    Each channel's maximum is known behind it, but neither what a rotation makes of it nor the
    histogram.
    """
    for method in dict.fromkeys(plan.values()):
        activation = method.activation
        if not method.smooth or activation is None or not activation.calibrated:
            continue
        if method.rotate or method.needs_histogram:
            _observe_smoothed(here, kind, job, [n for n in plan if plan[n] == method], method)


def _observe_smoothed(
    here: Stream, kind: Any, job: LayerJob, names: list[str], method: Method
) -> None:
    """The same for linears of one method."""
    wanted = Wanted(histogram=True, rotate=method.rotate)
    scales = {leader_tap(n): job.pre_scale[n] for n in names if n in job.pre_scale}
    taps = {leader_tap(name): wanted for name in names}
    seen = here.observe(job.layer, kind, taps, scales=scales)
    for name in names:
        new = seen[leader_tap(name)]
        job.statistics[name] = replace(
            job.statistics[name],
            amax=new.amax,
            channel_amax=new.channel_amax,
            histogram=new.histogram,
        )


def _kv_cache(run: _Run, here: Stream | None, kind: Any, job: LayerJob) -> Any:
    """The quantizer of a layer's cached keys and values; None if the recipe has none."""
    choice = run.recipe.kv_cache
    if choice is None:
        return None
    statistics = None
    if choice.calibrated:
        assert here is not None
        taps = frozenset(("self_attn/key", "self_attn/value"))
        measure = kv_measure(choice.rotate)
        with run.calibration:
            statistics = here.reduce(job.layer, kind, taps, measure, kv_merge)
    return kv_quantizer(run.config, choice, statistics)


def _ends(run: _Run, params: Any) -> tuple[Any, list[TensorReport]]:
    """Matrices outside the decoder layers, where a recipe asks for them."""
    rows: list[TensorReport] = []
    for path, method in run.methods.items():
        if path.startswith("layers/"):
            continue
        taps: dict[str, InputStatistics] = {}
        name = path.removesuffix("/weight")
        if method.needs_text:
            if name != "lm_head" or run.stream is None:
                raise UserError(f"no activation reaches {path}; it cannot be calibrated")
            with run.calibration:
                wanted = wants({name: method})[leader_tap(name)]
                taps[leader_tap(name)] = head_statistics(run.stream, params, wanted)
            check(path, taps[leader_tap(name)])
        end = {name: jax.device_put(params[name])}
        check_weights(end, {name: method}, "")
        job = smooth_layer(run.config, end, {name: method}, taps, False)
        quantized, row = quantize_layer(job, {name: method}, "", {})
        params, rows = params | _where(params[name], quantized), rows + row
    return params, rows


def _seeds(recipe: Recipe) -> dict[str, int]:
    seeds = {
        f"rules.{i}.rounding": rule.rounding.seed
        for i, rule in enumerate(recipe.rules)
        if rule.rounding.method == "autoround"
    }
    if recipe.rotation.hidden and recipe.rotation.seed is not None:
        seeds["rotation"] = recipe.rotation.seed
    return seeds
