"""Training a model: under quantization, or as the student of another."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxopt_models.checkpoint.native import save
from jaxopt_models.distill.hidden import PROJECTION
from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress
from jaxopt_models.train import flops
from jaxopt_models.train.job import Job, by_device, rows_of, step_of
from jaxopt_models.train.leaves import cast, computed, looped
from jaxopt_models.train.loop import Step
from jaxopt_models.train.objectives import Term, next_token_loss
from jaxopt_models.train.rows import evaluation_batches, places_of, sharded
from jaxopt_models.train.settings import RunSettings, Technique
from jaxopt_models.train.step import TrainState, start
from jaxopt_models.train.student import finished, student_of


def model_job(
    technique: Technique,
    settings: RunSettings,
    teacher: Model,
    mesh: Mesh | None,
    out: Path,
    provenance: dict[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress,
) -> Job:
    """A model to train, which `out` is to hold, with where it comes from."""
    terms = settings.terms(technique)
    student = student_of(technique, settings, teacher, progress)
    teacher, student = (replace(m, params=sharded(m.params, mesh)) for m in (teacher, student))
    state, context = first_state(settings, student), context_of(settings, terms, teacher)
    step = make_step(settings, terms, teacher.config, student.config, mesh, places_of(state, mesh))
    taught = None if context is None else teacher

    def finish(params: Any) -> Model:
        return replace(student, params=finished(params, teacher.params, settings))

    def write(model: Model, report: Any) -> None:
        parts = model.config, model.params, model.tokenizer
        save(out, *parts, report=report, provenance=provenance, overwrite=overwrite)

    return Job(
        state,
        step,
        context,
        measure=partial(measurement(teacher, settings, mesh), student.config),
        best="kl",
        finish=finish,
        save=write,
        least_seconds=_least_seconds(settings, state, student, taught, mesh),
    )


def make_step(
    settings: RunSettings,
    terms: Sequence[Term],
    teacher: ModelConfig,
    student: ModelConfig,
    mesh: Mesh | None = None,
    shardings: TrainState | None = None,
) -> Step:
    """The jitted step; runs whose settings differ in the seed alone may share it.

    On a mesh it needs to know where the arrays of the state lie, and stay.
    """
    config, taught = (replace(one, dtype=settings.dtype) for one in (student, teacher))
    rows = None if by_device(mesh) else rows_of(mesh)
    loss = next_token_loss(config, terms, taught, settings.remat, rows)
    prepare = looped(partial(computed, dtype=config.dtype), config, settings.scan_layers)
    return step_of(loss, settings, prepare, mesh, shardings)


def first_state(settings: RunSettings, student: Model) -> TrainState:
    """Before the first step."""
    optimizer = settings.optimizer.transformation(settings.steps)
    # A projection learns whatever part of the model does.
    train = settings.trained + ((f"{PROJECTION}/*",) if PROJECTION in student.params else ())
    return start(student.params, optimizer, train, settings.freeze)


def context_of(settings: RunSettings, terms: Sequence[Term], teacher: Model) -> Any:
    """What the step reads besides the batch: the teacher's parameters as they compute; None if no
    loss needs them, or what the teacher says comes with the batch."""
    cached = settings.teacher_cache is not None
    if not any(
        term.loss.needs_teacher and not (cached and isinstance(term.loss, LogitLoss))
        for term in terms
    ):
        return None
    prepare = partial(cast, dtype=settings.dtype)
    return looped(prepare, teacher.config, settings.scan_layers)(teacher.params)


def _least_seconds(
    settings: RunSettings,
    state: TrainState,
    student: Model,
    teacher: Model | None,
    mesh: Mesh | None,
) -> float | None:
    """Of a step in bfloat16, at the peak rate of the devices; None if that is not known."""
    if settings.dtype != "bfloat16":
        return None
    each = flops.training_flops(student.config, student.params, state.trained, settings.length)
    if teacher is not None:
        each += flops.forward_flops(teacher.config, teacher.params, settings.length)
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    return flops.least_seconds(settings.batch * settings.length * each, devices)


def measurement(
    teacher: Model, settings: RunSettings, mesh: Mesh | None = None
) -> Callable[[ModelConfig, Any], dict[str, float]]:
    """(config, parameters) -> what they would be worth if the run ended: perplexity and divergence
    from the teacher, which runs once, on text that is not trained on."""
    batches = evaluation_batches(teacher, settings, mesh)
    original = reference(teacher.config, teacher.params, batches)

    def measure(config: ModelConfig, params: Any) -> dict[str, float]:
        found = evaluate(config, finished(params, teacher.params, settings), batches, original)
        assert found.kl is not None and found.top1_agreement is not None
        return {
            "perplexity": found.perplexity,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
        }

    return measure
