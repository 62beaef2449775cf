"""Whole training runs: a model and settings in, a directory with the trained model out.

OUT/run.json       the settings
OUT/states/        checkpoints of training
OUT/log.jsonl      metrics
OUT/board/         the same for TensorBoard, if it is wanted
OUT/model/         the result, a checkpoint that `load` reads: quantized leaves, or float ones,
                    with adapters beside them or merged

Several processes run it together (`distributed`), each with the same arguments and one file system
among them; the first one writes.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_models import data
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import save
from jaxopt_models.distill.hidden import PROJECTION
from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.distributed import agree
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.files import write_json
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.sharding import make_mesh, place
from jaxopt_models.sharding_rules import AXES, BATCH, rows_spec, splits_rows_alone
from jaxopt_models.train import flops
from jaxopt_models.train.checkpoints import Checkpoints, first_difference
from jaxopt_models.train.leaves import cast, computed, looped
from jaxopt_models.train.loop import Log, Pace, Step, fit
from jaxopt_models.train.objectives import Term, next_token_loss
from jaxopt_models.train.rows import cached_teacher, sharded, training_batches, training_rows
from jaxopt_models.train.settings import RunSettings, Technique
from jaxopt_models.train.step import TrainState, make_train_step, start
from jaxopt_models.train.student import finished, student_of
from jaxopt_models.train.tensorboard import board, summary_writer


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
      model: trained; its quantized leaves are true ones.
      log: lines of `loop.Log`.
    """

    model: Model
    log: list[dict[str, Any]]


def train(
    technique: Technique,
    settings: RunSettings,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Result:
    """Trains a model.

    Args:
      technique: "qat" and "qad" train under the recipe's quantization, for the text or for what the
        unquantized model says; "distill" trains a student, unquantized, for what the model says.
        With adapters, the first two are QLoRA and the last is LoRA.
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
    teacher = load(settings.model)
    rows = training_rows(teacher, settings)  # first, since quantizing takes long
    terms = settings.terms(technique)
    if settings.teacher_cache is not None:
        rows |= {"teacher": cached_teacher(teacher, rows, terms, settings, mesh, progress)}
    student = student_of(technique, settings, teacher, progress)
    teacher, student = (replace(m, params=sharded(m.params, mesh)) for m in (teacher, student))
    state, context = first_state(settings, student), context_of(settings, terms, teacher)
    places = None if mesh is None else jax.tree.map(lambda array: array.sharding, state)
    step = make_step(settings, terms, teacher.config, student.config, mesh, places)
    taught = None if context is None else teacher
    least = _least_seconds(settings, state, student, taught, mesh)
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_json(out / "run.json", described)
    best = "kl" if settings.keep_best else None
    with Checkpoints(out / "states", keep=settings.keep, best=best, signature=lasting) as states:
        if states.steps:
            state = states.restore(state)
        begun = int(state.step)
        with _board(settings, out, begun) as also:
            log = Log(out / "log.jsonl", begun, also)
            state = fit(
                step,
                state,
                training_batches(rows, settings, mesh),
                context,
                Pace(settings.steps, settings.log, settings.save, settings.evaluation.every),
                evaluate=measurement(student.config, teacher, settings, mesh),
                checkpoints=states,
                log=log,
                least_seconds=least,
                progress=progress,
            )
    model = replace(student, params=finished(state.params, teacher.params, settings))
    provenance = {"source": teacher.source, "run": described}
    save(
        out / "model",
        model.config,
        model.params,
        model.tokenizer,
        report=log.lines[-1],
        provenance=provenance,
        overwrite=resume,
    )
    return Result(model, log.lines)


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
    rows = None if mesh is None else NamedSharding(mesh, rows_spec(mesh))
    alone = mesh is not None and splits_rows_alone(mesh)
    loss = next_token_loss(config, terms, taught, settings.remat, None if alone else rows)
    return make_train_step(
        loss,
        settings.optimizer.transformation(settings.steps),
        parts=settings.parts,
        max_norm=settings.max_norm,
        prepare=looped(partial(computed, dtype=config.dtype), config, settings.scan_layers),
        shardings=shardings,
        rows=rows if alone else None,
    )


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


def measurement(
    config: ModelConfig, teacher: Model, settings: RunSettings, mesh: Mesh | None = None
) -> Callable[[Any], dict[str, float]]:
    """Parameters -> what they would be worth if the run ended: perplexity and divergence from the
    teacher, on text that is not trained on."""
    chosen = settings.evaluation
    text = data.load_text(chosen.text, "evaluation")
    batches = data.token_batches(teacher, text, chosen.windows, chosen.length, settings.batch)
    if mesh is not None:
        batches = [_shared(batch, mesh) for batch in batches]
    original = reference(teacher.config, teacher.params, batches)

    def measure(params: Any) -> dict[str, float]:
        found = evaluate(config, finished(params, teacher.params, settings), batches, original)
        assert found.kl is not None and found.top1_agreement is not None
        return {
            "perplexity": found.perplexity,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
        }

    return measure


def _shared(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """On the devices of a mesh: its rows among them, or all of it on each if they do not divide."""
    shares = math.prod(mesh.shape[axis] for axis in BATCH)
    spec = rows_spec(mesh) if len(batch) % shares == 0 else P()
    return place(batch, NamedSharding(mesh, spec))
