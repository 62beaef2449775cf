"""Pruning to disk: a model and settings in, a checkpoint of the smaller model out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxopt_models import data
from jaxopt_models.checkpoint.native import save
from jaxopt_models.errors import UserError
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune import stages
from jaxopt_models.prune.prune_report import PruneReport
from jaxopt_models.prune.run import prune
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.teaching import lesson_rows


def prune_checkpoint(
    model: Model, settings: PruneSettings, out: Path, progress: Progress = silent
) -> PruneReport:
    """Prunes a model and saves what is left, with the settings and the report beside it.

    Args:
      model: in plain arrays.
      settings: what to remove, by which text, and on which other text to report.
      out: directory to create. OUT.partial keeps what is finished until then; the same call goes on
        with it.
      progress: wraps loops.

    Returns:
      The report.

    Raises:
      UserError: for what `prune` refuses, texts that cannot be read or are one, and an `out` that
        is there.
    """
    calibration, evaluation = _texts(model, settings)
    partial = out.with_name(f"{out.name}.partial")
    small, params, report = prune(
        model,
        settings,
        calibration,
        evaluation,
        progress,
        training=lesson_rows(model, settings),
        resume=partial,
    )
    save(
        out,
        small,
        params,
        model.tokenizer,
        recipe=settings.model_dump(mode="json"),
        report=report.as_dict(),
        provenance={"source": model.source, "calibration": settings.text},
    )
    stages.remove(partial)
    return report


def _texts(model: Model, settings: PruneSettings) -> tuple[Sequence[Any], Sequence[Any]]:
    """(calibration, evaluation) batches.

    Raises:
      UserError: if both are the same text.
    """
    own, other = settings.text, settings.evaluation.text
    texts = data.load_text(own, "calibration"), data.load_text(other, "evaluation")
    if texts[0] == texts[1]:
        raise UserError(
            f"evaluation.text {other!r} is the text that is pruned by, on which everything looks "
            "better than it is; name another"
        )
    counts = settings.windows, settings.evaluation.windows
    calibration, evaluation = (
        data.token_batches(model, text, count, settings.length, settings.batch)
        for text, count in zip(texts, counts, strict=True)
    )
    return calibration, evaluation
