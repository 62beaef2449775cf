"""Pruning by settings: the cut, zeros in what is left, and what both cost on other text."""

from collections.abc import Sequence
from typing import Any

from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.cut import Cut, Cutter
from jaxopt_models.prune.latency import Clock
from jaxopt_models.prune.masks import check_plain
from jaxopt_models.prune.prune_report import PruneReport
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.sizes import cost_of
from jaxopt_models.prune.sparsity import SparseReport, sparsify


def prune(
    model: Model,
    settings: PruneSettings,
    calibration: Sequence[Any],
    evaluation: Sequence[Any],
    progress: Progress = silent,
    *,
    clock: Clock | None = None,
) -> tuple[ModelConfig, Any, PruneReport]:
    """The smaller model that the settings ask for.

    Args:
      model: in plain arrays.
      settings: what to remove.
      calibration: int32 [B, T] token arrays of one T, that importance is measured on, candidates
        are compared on, and zeros are placed by.
      evaluation: others, for what is reported.
      progress: wraps loops, as `tqdm` would.
      clock: seconds that a decode step of (config, params) takes, for a budget of latency; None
        times it on this device.

    Returns:
      (config, params, report).

    Raises:
      UserError: for a model that cannot be pruned, and for settings that do not go with it.
    """
    config, params = model.config, model.params
    check_plain(params)
    cutter = Cutter(model, settings, calibration, evaluation, progress, clock)
    result = Cut(config, params)
    if settings.budget is not None or settings.keep is not None:
        result = cutter.cut()
    small, smaller = result.config, result.params
    rows: list[SparseReport] = []
    if settings.sparsity is not None:
        with cutter.timed("sparsity"):
            zeros = settings.sparsity.sparsity()
            smaller, rows = sparsify(small, smaller, zeros, calibration, progress)
    with cutter.timed("evaluation"):
        teacher = reference(config, params, evaluation, progress)
        original = evaluate(config, params, evaluation, progress=progress)
        pruned = evaluate(small, smaller, evaluation, teacher, progress)
    report = PruneReport(
        unit="parameters" if settings.budget is None else settings.budget.unit,
        budget=result.budget,
        candidates=result.scored,
        blocks=result.blocks,
        chosen=result.chosen,
        parameters=(cost_of(params, "parameters"), cost_of(smaller, "parameters")),
        bytes=(cost_of(params, "bytes"), cost_of(smaller, "bytes")),
        sparsity=tuple(rows),
        original=original,
        pruned=pruned,
        uniform=result.uniform,
        latency=result.latency,
        seconds=cutter.seconds,
    )
    return small, smaller, report
