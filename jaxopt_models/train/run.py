"""Whole training runs: a model and settings in, a directory with the trained model out.

OUT/run.json       the settings
OUT/states/        checkpoints of training
OUT/log.jsonl      metrics
OUT/board/         the same for TensorBoard, if it is wanted
OUT/model/         the result, a checkpoint that `load` reads: quantized leaves, or float ones,
                    with adapters beside them or merged; or a draft head, see `draft_job`

Several processes run it together (`distributed`), each with the same arguments and one file system
among them; the first one writes.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxopt_models.checkpoint.load import load
from jaxopt_models.distributed import agree
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.progress import Progress, silent
from jaxopt_models.settings import first_difference
from jaxopt_models.sharding import make_mesh
from jaxopt_models.sharding_rules import AXES
from jaxopt_models.train.checkpoints import Checkpoints
from jaxopt_models.train.draft_job import draft_job
from jaxopt_models.train.job import Job
from jaxopt_models.train.loop import Log, Pace, fit
from jaxopt_models.train.model_job import model_job
from jaxopt_models.train.rows import cached_teacher, training_batches, training_rows
from jaxopt_models.train.settings import RunSettings, Technique
from jaxopt_models.train.tensorboard import board, summary_writer


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
      model: a `Model`, trained, whose quantized leaves are true ones; or the head that guesses for
        one.
      log: lines of `loop.Log`.
    """

    model: Any
    log: list[dict[str, Any]]


def train(
    technique: Technique,
    settings: RunSettings,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Result:
    """Trains a model, or a head that guesses for it.

    Args:
      technique: "qat" and "qad" train under the recipe's quantization, for the text or for what the
        unquantized model says; "distill" trains a student, unquantized, for what the model says.
        With adapters, the first two are QLoRA and the last is LoRA. "draft" trains a head for what
        the model will say, some tokens ahead.
      settings: see `settings`.
      out: directory to create; see above.
      resume: goes on with a directory of the same settings, whatever the mesh, where it stopped.
      progress: wraps loops.

    Raises:
      UserError: for settings that do not go together, a directory that is there (or is not, to
        resume), text that is too short, or a run that is lost.
    """
    settings.check(technique)
    if settings.tensorboard:
        summary_writer()  # or it is known at once that there is none
    mesh = _mesh(settings)
    out = Path(out).expanduser()
    described = {"technique": technique} | settings.model_dump(mode="json")
    lasting = {name: value for name, value in described.items() if name != "mesh"}
    _check_directory(out, lasting, resume)
    agree(described | {"out": str(out), "resume": resume})
    model = load(settings.model)
    rows = training_rows(model, settings)  # first, since quantizing takes long
    if settings.teacher_cache is not None:
        terms = settings.terms(technique)
        rows |= {"teacher": cached_teacher(model, rows, terms, settings, mesh, progress)}
    given = model, mesh, out / "model"
    if technique == "draft":
        job = draft_job(settings, *given, rows, overwrite=resume)
    else:
        made = {"source": model.source, "run": described}
        job = model_job(technique, settings, *given, made, overwrite=resume, progress=progress)
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_json(out / "run.json", described)
    trained, log = _run(job, settings, rows, mesh, out, lasting, progress)
    result = job.finish(trained)
    job.save(result, log.lines[-1])
    return Result(result, log.lines)


def _run(
    job: Job,
    settings: RunSettings,
    rows: dict[str, Any],
    mesh: Mesh | None,
    out: Path,
    signature: dict[str, Any],
    progress: Progress,
) -> tuple[Any, Log]:
    """(parameters behind the last step, log), from the last checkpoint on if there is one."""
    best, state = job.best if settings.keep_best else None, job.state
    with Checkpoints(out / "states", keep=settings.keep, best=best, signature=signature) as states:
        if states.steps:
            state = states.restore(state)
        begun = int(state.step)
        with _board(settings, out, begun) as also:
            log = Log(out / "log.jsonl", begun, also)
            state = fit(
                job.step,
                state,
                training_batches(rows, settings, mesh),
                job.context,
                Pace(settings.steps, settings.log, settings.save, settings.evaluation.every),
                evaluate=job.measure,
                checkpoints=states,
                log=log,
                least_seconds=job.least_seconds,
                progress=progress,
            )
    return state.params, log


def _board(settings: RunSettings, out: Path, step: int) -> AbstractContextManager[Any]:
    shown = settings.tensorboard and jax.process_index() == 0
    return board(out / "board", step) if shown else nullcontext()


def _mesh(settings: RunSettings) -> Mesh | None:
    """The devices that train, None for a single one."""
    sizes: dict[str, int] = {axis: settings.mesh.get(axis, 1) for axis in AXES}
    mesh = make_mesh(sizes) if settings.mesh else None
    devices = 1 if mesh is None else mesh.size
    if jax.process_count() > 1 and devices != jax.device_count():
        raise UserError(
            f"{jax.process_count()} processes with {jax.device_count()} devices need a mesh of as "
            f"many, and mesh {settings.mesh} has {devices}; set mesh.data or mesh.fsdp"
        )
    return mesh


def _check_directory(out: Path, lasting: dict[str, Any], resume: bool) -> None:
    """Of settings that a run keeps when it is gone on with."""
    if not resume:
        if out.exists():
            raise UserError(f"{out} exists already; choose another one, or resume the run in it")
        return
    try:
        before = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out} holds no run to resume (it has no readable run.json)") from error
    name = first_difference(before | {"mesh": None}, lasting)
    if name is not None:
        raise UserError(
            f"{out} is a run with {name} {before.get(name)!r}, and now it is "
            f"{lasting.get(name)!r}; resume with the same settings, or choose another directory"
        )
