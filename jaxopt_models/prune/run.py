"""Pruning by settings: the cut, zeros in what is left, and what both cost on other text."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.cut import Cut, Cutter
from jaxopt_models.prune.latency import Clock
from jaxopt_models.prune.masks import check_plain
from jaxopt_models.prune.prune_report import PruneReport
from jaxopt_models.prune.settings import PruneSettings, Zeros
from jaxopt_models.prune.sizes import cost_of
from jaxopt_models.prune.sparsity import SparseReport, sparsify
from jaxopt_models.prune.stages import Stages, run_of


def prune(
    model: Model,
    settings: PruneSettings,
    calibration: Sequence[Any],
    evaluation: Sequence[Any],
    progress: Progress = silent,
    *,
    training: Any = None,
    resume: str | Path | None = None,
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
      training: int32 [N, T], rows besides those of `calibration`, that finalists learn from if
        they are to; see `teaching.rows_between`.
      resume: directory that keeps what is finished; a run that was killed goes on with it, and ends
        as it would have. None keeps nothing.
      clock: seconds that a decode step of (config, params) takes, for a budget of latency; None
        times it on this device.

    Returns:
      (config, params, report).

    Raises:
      UserError: for a model that cannot be pruned, for settings that do not go with it, and for a
        directory to resume from that is of another run.
    """
    config, params = model.config, model.params
    check_plain(params)
    if settings.search.distill is not None and training is None:
        raise UserError("search.distill needs rows to learn from; give `training`")
    stages = Stages()
    if resume is not None:
        stages = Stages(Path(resume), run_of(model, calibration=calibration, training=training))
    cutter = Cutter(model, settings, calibration, evaluation, progress, stages, training, clock)
    result = Cut(config, params)
    if settings.budget is not None or settings.keep is not None:
        result = cutter.cut()
    small, smaller, rows = result.config, result.params, []
    if settings.sparsity is not None:
        with cutter.timed("sparsity"):
            smaller, rows = _with_zeros(settings.sparsity, small, smaller, cutter)
    with cutter.timed("evaluation"):
        teacher = cutter.reference()
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


def _with_zeros(
    zeros: Zeros, config: ModelConfig, params: Any, cutter: Cutter
) -> tuple[Any, list[SparseReport]]:
    """(parameters, a row for each weight that got zeros)."""

    def make() -> tuple[ModelConfig, Any, Any]:
        how = zeros.sparsity()
        sparse, rows = sparsify(config, params, how, cutter.calibration, cutter.progress)
        return config, sparse, [asdict(row) for row in rows]

    of = cutter.deciding() | {"sparsity": zeros.model_dump(mode="json")}
    _, sparse, rows = cutter.stages.model("sparse", make, **of)
    return sparse, [SparseReport(**row) for row in rows]
