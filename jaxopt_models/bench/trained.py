"""What benches share that train a student many times and measure it along the way."""

import hashlib
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxopt_models.bench.quality import checksum
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.train.loop import Evaluate, Log, Pace, Step, fit
from jaxopt_models.train.model_job import context_of, first_state, measurement
from jaxopt_models.train.rows import training_batches
from jaxopt_models.train.settings import RunSettings, Technique

# Of the settings, what differs from run to run, or changes no figure.
_UNTOLD = {"model", "recipe", "student", "seed", "save", "keep", "keep_best", "log"}


def trained(
    technique: Technique,
    step: Step,
    settings: RunSettings,
    student: Model,
    teacher: Model,
    rows: Mapping[str, np.ndarray],
    measure: Evaluate,
    start: Mapping[str, float],
    title: str,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Trains a student once.

    Args:
      technique: whose losses are trained for, if the settings name none.
      step: of `model_job.make_step`, for this student; runs may share it.
      settings: of the run.
      student, teacher: the models; neither changes.
      rows: text, of `rows.training_rows`.
      measure: of parameters in training, as often as the settings say, and at the end.
      start: what it says of the student.
      title: for people.
      progress: wraps the loop.

    Returns:
      {learning_rate, tokens_per_second, skipped, curve}: the curve is the measurements, with their
      steps, from step 0 on.
    """
    log = Log(None)
    fit(
        step,
        first_state(settings, student),
        training_batches(dict(rows), settings),
        context_of(settings, settings.terms(technique), teacher),
        Pace(settings.steps, settings.log, evaluate=settings.evaluation.every),
        evaluate=measure,
        log=log,
        progress=lambda items, _: progress(items, title),
    )
    steps = [line for line in log.lines if "loss" in line]
    return {
        "learning_rate": settings.optimizer.learning_rate,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps),
        "skipped": int(sum(line["skipped"] for line in steps)),
        "curve": [{"step": 0} | dict(start), *(line for line in log.lines if "loss" not in line)],
    }


def exact_measurement(
    teacher: Model, settings: RunSettings
) -> Callable[[ModelConfig, Any], Mapping[str, float]]:
    """`model_job.measurement` with float32 products, which a GPU rounds to TF32 otherwise."""
    with jax.default_matmul_precision("highest"):
        measure = measurement(teacher, settings)

    def exactly(config: ModelConfig, params: Any) -> Mapping[str, float]:
        with jax.default_matmul_precision("highest"):
            return measure(config, params)

    return exactly


def training_protocol(settings: RunSettings, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What figures of runs depend on."""
    learnt = hashlib.sha256()
    for name in sorted(rows):
        learnt.update(np.ascontiguousarray(rows[name]).tobytes())
    return {
        "model": _name(settings.model),
        "rows_of_text": len(rows["tokens"]),
        "sha256_of_rows": learnt.hexdigest(),
        "sha256_of_evaluation": checksum(settings.evaluation.text, "evaluation"),
        "settings": told_by_name(settings.model_dump(mode="json", exclude=_UNTOLD)),
    }


def told_by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON whose texts, wherever they stand, are named without their place, which may
    change."""

    def told(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return told_by_name(value)
        return _name(value) if key == "text" else value

    return {key: told(key, value) for key, value in settings.items()}


def _name(source: str) -> str:
    """Of a file or directory the name without its place; of anything else all of it."""
    return Path(source).name if Path(source).exists() else source
