"""What is trained on: rows of the text, what the teacher says of them, and batches of both."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_models import data
from jaxopt_models.distill import teacher_cache
from jaxopt_models.distill.losses import TopK
from jaxopt_models.documents import pack_documents, read_documents
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress
from jaxopt_models.sharding import place, shard
from jaxopt_models.sharding_rules import BATCH, TRAINING_RULES, batch_spec, rows_spec
from jaxopt_models.train.leaves import cast
from jaxopt_models.train.objectives import Term, logit_losses
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.step import TrainState


def training_rows(model: Model, settings: RunSettings) -> dict[str, np.ndarray]:
    """The text that is trained on, as rows: "tokens", and what `next_token_loss` reads besides."""
    tokenizer = data.tokenizer_of(model)
    if settings.packing == "documents":
        return pack_documents(
            read_documents(settings.text, tokenizer, settings.learn), settings.length
        )
    text = data.load_text(settings.text, "calibration")
    return {"tokens": data.pack([data.tokenize(tokenizer, text)], settings.length)}


def sharded(params: Any, mesh: Mesh | None) -> Any:
    """Parameters on the devices that train, by the rules of training; None leaves them."""
    return params if mesh is None else shard(params, mesh, TRAINING_RULES)


def places_of(state: TrainState, mesh: Mesh | None) -> TrainState | None:
    """Where its arrays lie on a mesh."""
    return None if mesh is None else jax.tree.map(lambda array: array.sharding, state)


def evaluation_batches(model: Model, settings: RunSettings, mesh: Mesh | None = None) -> list[Any]:
    """Windows of the text that is measured on, int32 [B, T] each, on the devices of a mesh."""
    chosen = settings.evaluation
    text = data.load_text(chosen.text, "evaluation")
    batches = data.token_batches(model, text, chosen.windows, chosen.length, settings.batch)
    return batches if mesh is None else [_shared(batch, mesh) for batch in batches]


def _shared(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """On the devices of a mesh: its rows among them, or all of it on each if they do not divide."""
    shares = math.prod(mesh.shape[axis] for axis in BATCH)
    spec = rows_spec(mesh) if len(batch) % shares == 0 else P()
    return place(batch, NamedSharding(mesh, spec))


def cached_teacher(
    teacher: Model,
    rows: dict[str, np.ndarray],
    terms: Sequence[Term],
    settings: RunSettings,
    mesh: Mesh | None,
    progress: Progress,
) -> TopK:
    """What the teacher says of all rows, from the cache, which is made if it is not there."""
    chosen = settings.teacher_cache
    assert chosen is not None
    temperature = chosen.temperature(logit_losses(terms))
    made_of = teacher_cache.signature(teacher, rows, temperature, settings.dtype)
    if not Path(chosen.directory).expanduser().exists():
        config = replace(teacher.config, dtype=settings.dtype)
        params = sharded(cast(teacher.params, settings.dtype), mesh)
        teacher_cache.write(
            chosen.directory,
            made_of,
            replace(teacher, config=config, params=params),
            rows,
            chosen.top_k,
            batch_size=settings.batch // settings.parts,
            mesh=mesh,
            progress=progress,
        )
    return teacher_cache.read(chosen.directory, made_of, chosen.top_k)


def training_batches(
    rows: dict[str, Any], settings: RunSettings, mesh: Mesh | None = None
) -> Callable[[int], Any]:
    """Number of a step -> its batch, on the devices."""
    stream = data.PackedBatches(rows, settings.batch, settings.seed)

    def taken(own: np.ndarray, numbers: np.ndarray) -> jax.Array:
        if mesh is None:
            return jnp.asarray(own[numbers])
        return data.global_batch(own, numbers, mesh, batch_spec(rows_spec(mesh), settings.parts))

    def batch(step: int) -> Any:
        numbers = stream.numbers(step)
        if settings.parts > 1:
            numbers = numbers.reshape(settings.parts, -1)
        return jax.tree.map(lambda own: taken(own, numbers), rows)

    return batch
