"""Whole training runs: a model and settings in, a directory with the trained model out.

OUT/run.json       the settings
OUT/states/        checkpoints of training
OUT/log.jsonl      metrics
OUT/model/         the result, a checkpoint that `load` reads: quantized leaves, or float ones
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import data, tree
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import save
from jaxopt_models.distill.hidden import PROJECTION, HiddenLoss, with_projection, without_projection
from jaxopt_models.documents import pack_documents, read_documents
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.files import write_json
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.train.checkpoints import Checkpoints, first_difference
from jaxopt_models.train.leaves import fake_quantized, fold
from jaxopt_models.train.loop import Log, Pace, Step, fit
from jaxopt_models.train.objectives import Term, next_token_loss
from jaxopt_models.train.settings import RunSettings, Technique
from jaxopt_models.train.step import TrainState, make_train_step, start
from jaxopt_models.train.trainable import combine, partition


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
      settings: see `settings`.
      out: directory to create; see above.
      resume: goes on with a directory of the same settings where it stopped.
      progress: wraps loops.

    Raises:
      UserError: for settings that do not go together, a directory that is there (or is not, to
        resume), text that is too short, or a run that is lost.
    """
    settings.check(technique)
    out = Path(out).expanduser()
    described = {"technique": technique} | settings.model_dump(mode="json")
    _check_directory(out, described, resume)
    teacher = load(settings.model)
    rows = _rows(teacher, settings)  # first, since quantizing takes long
    student, terms = _student(technique, settings, teacher, progress), settings.terms(technique)
    if any(isinstance(term.loss, HiddenLoss) for term in terms):
        student = _projected(student, teacher, settings.seed)
    mesh = make_mesh({"data": 1, "model": 1} | settings.mesh) if settings.mesh else None
    if mesh is not None:
        teacher = replace(teacher, params=shard(teacher.params, mesh))
        student = replace(student, params=shard(student.params, mesh))
    needed = any(term.loss.needs_teacher for term in terms)
    step, state = _begun(settings, terms, teacher, student)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "run.json", described)
    best = "kl" if settings.keep_best else None
    with Checkpoints(out / "states", keep=settings.keep, best=best, signature=described) as states:
        if states.steps:
            state = states.restore(state)
        log = Log(out / "log.jsonl", int(state.step))
        state = fit(
            step,
            state,
            _batches(rows, settings, mesh),
            _compute(teacher, settings) if needed else None,
            Pace(settings.steps, settings.log, settings.save, settings.evaluation.every),
            evaluate=_measure(student.config, teacher, settings),
            checkpoints=states,
            log=log,
            progress=progress,
        )
    model = replace(student, params=_finished(state.params, teacher.params))
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


def _begun(
    settings: RunSettings, terms: Sequence[Term], teacher: Model, student: Model
) -> tuple[Step, TrainState]:
    """The step, and the state before the first one."""
    config, taught = (replace(m.config, dtype=settings.dtype) for m in (student, teacher))
    optimizer = settings.optimizer.transformation(settings.steps)
    loss = next_token_loss(config, terms, taught, settings.remat)
    step = make_train_step(loss, optimizer, parts=settings.parts, max_norm=settings.max_norm)
    # A projection learns whatever part of the model does.
    train = settings.train + ((f"{PROJECTION}/*",) if PROJECTION in student.params else ())
    return step, start(student.params, optimizer, train, settings.freeze)


def _check_directory(out: Path, described: dict[str, Any], resume: bool) -> None:
    if not resume:
        if out.exists():
            raise UserError(f"{out} exists already; choose another one, or resume the run in it")
        return
    try:
        before = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out} holds no run to resume (it has no readable run.json)") from error
    name = first_difference(before, described)
    if name is not None:
        raise UserError(
            f"{out} is a run with {name} {before.get(name)!r}, and now it is "
            f"{described.get(name)!r}; resume with the same settings, or choose another directory"
        )


def _student(
    technique: Technique, settings: RunSettings, teacher: Model, progress: Progress
) -> Model:
    """What is trained: masters in float32."""
    if technique == "distill":
        assert settings.student is not None  # `check`
        student = load(settings.student)
        if student.config.vocab_size != teacher.config.vocab_size:
            raise UserError(
                f"{settings.student} has {student.config.vocab_size} tokens in its vocabulary and "
                f"{settings.model} {teacher.config.vocab_size}; they have to share a tokenizer"
            )
        return replace(student, params=_wide(student.params))
    assert settings.recipe is not None
    recipe, known = Recipe.load(settings.recipe), settings.calibration
    batches = None
    if recipe.needs_text:
        text = data.load_text(known.text, "calibration")
        batches = data.token_batches(teacher, text, known.windows, known.length, settings.batch)
    quantized, _ = quantize(teacher, recipe, batches, progress)
    masters = teacher.params if settings.begin == "original" else None
    fakes = fake_quantized(masters, quantized, settings.scales, settings.gradient)
    return replace(teacher, params=_wide(fakes))


def _projected(student: Model, teacher: Model, seed: int) -> Model:
    configs = student.config, teacher.config
    return replace(student, params=with_projection(student.params, *configs, jax.random.key(seed)))


def _wide(params: Any) -> Any:
    """With all that can be trained in float32; scales stay as they are stored."""
    trained, frozen = partition(params)
    return combine(jax.tree.map(lambda array: array.astype(jnp.float32), trained), frozen)


def _finished(params: Any, like: Any) -> Any:
    """As they are saved and measured: quantized, plain arrays in the dtype the model came with."""
    dtype = like["embed_tokens"]["weight"].dtype

    def narrow(leaf: Any) -> Any:
        plain = isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
        return leaf.astype(dtype) if plain else leaf

    return tree.map_with_path(lambda _, leaf: narrow(leaf), fold(without_projection(params)))


def _compute(teacher: Model, settings: RunSettings) -> Any:
    """The teacher's parameters in the dtype of computation, those that are plain arrays."""
    dtype = jnp.dtype(settings.dtype)

    def cast(_: str, leaf: Any) -> Any:
        return leaf if tree.is_leaf(leaf) else leaf.astype(dtype)

    return tree.map_with_path(cast, teacher.params)


def _rows(model: Model, settings: RunSettings) -> dict[str, np.ndarray]:
    tokenizer = data.tokenizer_of(model)
    if settings.packing == "documents":
        return pack_documents(
            read_documents(settings.text, tokenizer, settings.learn), settings.length
        )
    text = data.load_text(settings.text, "calibration")
    return {"tokens": data.pack([data.tokenize(tokenizer, text)], settings.length)}


def _batches(rows: dict[str, np.ndarray], settings: RunSettings, mesh: Any) -> Any:
    stream = data.PackedBatches(rows, settings.batch, settings.seed)
    spec = jax.P("data") if settings.parts == 1 else jax.P(None, "data")

    def placed(own: np.ndarray) -> jax.Array:
        if settings.parts > 1:
            own = own.reshape(settings.parts, -1, own.shape[1])
        return jnp.asarray(own) if mesh is None else data.global_batch(own, mesh, spec)

    return lambda number: jax.tree.map(placed, stream.batch(number))


def _measure(config: ModelConfig, teacher: Model, settings: RunSettings) -> Any:
    """Parameters -> what they would be worth if the run ended: perplexity and divergence from the
    teacher, on text that is not trained on."""
    chosen = settings.evaluation
    text = data.load_text(chosen.text, "evaluation")
    batches = data.token_batches(teacher, text, chosen.windows, chosen.length, settings.batch)
    original = reference(teacher.config, teacher.params, batches)

    def measure(params: Any) -> dict[str, float]:
        found = evaluate(config, _finished(params, teacher.params), batches, original)
        assert found.kl is not None and found.top1_agreement is not None
        return {
            "perplexity": found.perplexity,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
        }

    return measure
