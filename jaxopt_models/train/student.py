"""Who is trained: a model as it is before training, and as it is when training ends."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import data
from jaxopt_models.checkpoint.load import load
from jaxopt_models.distill.hidden import HiddenLoss, with_projection, without_projection
from jaxopt_models.errors import UserError
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.train.adapters import merged, with_adapters
from jaxopt_models.train.choices import Adapters
from jaxopt_models.train.leaves import fake_quantized, fold
from jaxopt_models.train.settings import RunSettings, Technique
from jaxopt_models.train.trainable import combine, partition


def student_of(
    technique: Technique, settings: RunSettings, teacher: Model, progress: Progress = silent
) -> Model:
    """The model to train, what is trained of it in float32, with a projection if losses need it."""
    student = teacher if settings.student is None else _learner(settings.student, teacher)
    if settings.adapters is not None:  # mistakes are to be known before quantizing, which is long
        jax.eval_shape(partial(_adapted, settings.adapters), student.params)
    if technique != "distill":
        student = replace(student, params=_quantized(settings, student, progress))
    params = student.params
    if settings.adapters is not None:
        params = _adapted(settings.adapters, params, settings.seed)
    params = with_masters(params, settings.trained, settings.freeze)
    if any(isinstance(term.loss, HiddenLoss) for term in settings.terms(technique)):
        configs = student.config, teacher.config
        params = with_projection(params, *configs, jax.random.key(settings.seed))
    return replace(student, params=params)


def finished(params: Any, like: Any, settings: RunSettings) -> Any:
    """As they are saved and measured: quantized, adapters merged if they are to be, plain arrays
    and low-rank parts in the dtype the model came with."""
    dtype = like["embed_tokens"]["weight"].dtype
    params = without_projection(params)
    merge = settings.adapters is not None and settings.adapters.merge
    floats, others = partition(merged(params) if merge else fold(params))
    return combine(
        jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, floats), others
    )


def _adapted(chosen: Adapters, params: Any, seed: int = 0) -> Any:
    """With new adapters, which can be merged if they are to be."""
    key = jax.random.key(seed)
    params = with_adapters(params, key, chosen.rank, chosen.alpha, chosen.match)
    if chosen.merge:
        jax.eval_shape(merged, params)
    return params


def _learner(name: str, teacher: Model) -> Model:
    student = load(name)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"{name} has {student.config.vocab_size} tokens in its vocabulary and "
            f"{teacher.source} {teacher.config.vocab_size}; they have to share a tokenizer"
        )
    return student


def _quantized(settings: RunSettings, student: Model, progress: Progress) -> Any:
    """Parameters under the recipe: codes for adapters to learn beside, else fake-quantized."""
    assert settings.recipe is not None  # `check`
    recipe, known = Recipe.load(settings.recipe), settings.calibration
    batches = None
    if recipe.needs_text:
        text = data.load_text(known.text, "calibration")
        batches = data.token_batches(student, text, known.windows, known.length, settings.batch)
    quantized, _ = quantize(student, recipe, batches, progress)
    if settings.adapters is not None:
        return quantized
    masters = student.params if settings.begin == "original" else None
    return fake_quantized(masters, quantized, settings.scales, settings.gradient)


def with_masters(params: Any, train: Sequence[str] = ("*",), freeze: Sequence[str] = ()) -> Any:
    """With all that is trained in float32; scales stay as they are stored."""
    trained, frozen = partition(params, train, freeze)
    return combine(jax.tree.map(lambda array: array.astype(jnp.float32), trained), frozen)
