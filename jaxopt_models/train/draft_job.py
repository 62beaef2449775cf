"""Training a head that guesses for a model, which stays as it is."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.speculative.dflash import DFlash
from jaxopt_models.speculative.dflash_files import export_dflash
from jaxopt_models.speculative.dflash_params import init_dflash
from jaxopt_models.speculative.draft import Target
from jaxopt_models.speculative.eagle3_files import export_eagle3
from jaxopt_models.speculative.eagle3_params import init_eagle3
from jaxopt_models.speculative.medusa import Medusa, init_medusa
from jaxopt_models.speculative.medusa_files import export_medusa
from jaxopt_models.speculative.mtp import Mtp, init_mtp
from jaxopt_models.speculative.mtp_files import export_mtp
from jaxopt_models.speculative.named import Head
from jaxopt_models.train.block_objective import block_loss
from jaxopt_models.train.choices import DraftHead
from jaxopt_models.train.draft_objective import draft_loss
from jaxopt_models.train.job import Job, step_of
from jaxopt_models.train.leaves import cast, computed, looped
from jaxopt_models.train.loop import Evaluate
from jaxopt_models.train.rows import evaluation_batches, places_of, sharded
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.step import Loss, start

_SAVED = jnp.bfloat16


def draft_job(
    settings: RunSettings,
    model: Model,
    mesh: Mesh | None,
    out: Path,
    rows: dict[str, Any],
    *,
    overwrite: bool = False,
) -> Job:
    """A head to train, which `out` is to hold as the export of its kind writes it.

    Args:
      model: that it guesses for, of leaves of any kind.
      rows: the text that is trained on, whose most frequent tokens it may say.
    """
    chosen = settings.head or DraftHead()
    _check_rows(chosen, settings)
    config = replace(model.config, dtype=settings.dtype)
    head = _new(chosen, Target(config, model.params), rows, settings.seed)
    optimizer = settings.optimizer.transformation(settings.steps)
    state = start(sharded(head.params, mesh), optimizer, settings.trained, settings.freeze)
    cast_model = looped(partial(cast, dtype=settings.dtype), config, settings.scan_layers)
    context = cast_model(sharded(model.params, mesh))
    loss = _loss(chosen, config, head, settings)
    prepare = partial(computed, dtype=settings.dtype)

    def finish(params: Any) -> Head:
        return replace(head, params=as_saved(params))

    def write(one: Head, report: Any) -> None:
        name = model.source and str(model.source)
        options: dict[str, Any] = {"dtype": _SAVED, "overwrite": overwrite}
        if isinstance(one, DFlash):
            export_dflash(out, one, model.config, **options)
        elif isinstance(one, Medusa):
            export_medusa(out, one, verifier=name, **options)
        elif isinstance(one, Mtp):
            export_mtp(out, one, model.config, verifier=name, **options)
        else:
            export_eagle3(out, one, model.config, verifier=name, **options)

    return Job(
        state,
        step_of(loss, settings, prepare, mesh, places_of(state, mesh)),
        context,
        measure=_measurement(loss, model, settings, context, chosen.ahead, mesh),
        best="refused",
        finish=finish,
        save=write,
    )


def _check_rows(chosen: DraftHead, settings: RunSettings) -> None:
    """Raises UserError for rows, of training or of what is measured, that hold no block."""
    rows = {"length": settings.length, "evaluation.length": settings.evaluation.length}
    for name, length in rows.items() if chosen.kind == "dflash" else ():
        if length <= chosen.block:
            raise UserError(
                f"{name} is {length}, and a block of {chosen.block} places needs a text before it; "
                "make it longer, or head.block smaller"
            )


def _new(chosen: DraftHead, target: Target, rows: dict[str, Any], seed: int) -> Head:
    """The head before training."""
    if chosen.kind == "medusa":
        return init_medusa(target, chosen.steps)
    if chosen.kind == "mtp":
        return init_mtp(target, jax.random.key(seed), chosen.count)
    count, size = target.config.num_layers, target.config.vocab_size
    if not all(0 <= i < count for i in chosen.layers or ()):
        raise UserError(
            f"head.layers are {list(chosen.layers or ())}, and the model's layers 0 to {count - 1}"
        )
    if chosen.kind == "dflash":
        mask = least_frequent(rows, size) if chosen.mask_token is None else chosen.mask_token
        return init_dflash(
            target,
            jax.random.key(seed),
            mask_token=mask,
            layers=chosen.layers,
            depth=chosen.depth,
            block=chosen.block,
            intermediate_size=chosen.intermediate_size,
        )
    return init_eagle3(
        target,
        jax.random.key(seed),
        layers=chosen.layers,
        vocabulary=most_frequent(rows, size, chosen.vocabulary),
        intermediate_size=chosen.intermediate_size,
        count=chosen.count,
    )


def _loss(chosen: DraftHead, config: ModelConfig, head: Head, settings: RunSettings) -> Loss:
    """What the head is trained for."""
    terms, decay = settings.terms("draft"), chosen.decay
    if isinstance(head, DFlash):
        anchors, seed = chosen.anchors, settings.seed
        return block_loss(config, head, terms, anchors=anchors, decay=decay, seed=seed)
    remat = settings.remat != "none"
    return draft_loss(config, head, terms, steps=chosen.steps, decay=decay, remat=remat)


def least_frequent(rows: dict[str, Any], vocab_size: int) -> int:
    """The token that is least often in the text, the last of equals: often one that is reserved."""
    often = np.bincount(np.ravel(rows["tokens"]), minlength=vocab_size)
    return int(vocab_size - 1 - np.argmin(often[::-1]))


def most_frequent(rows: dict[str, Any], vocab_size: int, count: int | None) -> jax.Array:
    """So many tokens that are most often learnt in the text, rising: int32 [count]; None is all."""
    if count is None:
        return jnp.arange(vocab_size, dtype=jnp.int32)
    if count > vocab_size:
        raise UserError(f"head.vocabulary is {count}, and the model has {vocab_size} tokens")
    tokens = rows["tokens"]
    learnt = rows.get("mask", np.ones_like(tokens)) > 0
    often = np.bincount(tokens[learnt], minlength=vocab_size)
    return jnp.asarray(np.sort(np.argsort(-often, kind="stable")[:count]), jnp.int32)


def as_saved(params: Any) -> Any:
    """As they are saved."""
    return jax.tree.map(lambda x: x.astype(_SAVED) if x.dtype == jnp.float32 else x, params)


def _measurement(
    loss: Loss, model: Model, settings: RunSettings, context: Any, steps: int, mesh: Mesh | None
) -> Evaluate:
    """Parameters -> what they would be worth if the run ended, on text that is not trained on:

        acceptance_length = 1 + Σ_k Π_{i <= k} (1 - refused_i)

    tokens that a pass would give, if guesses were sampled and refusals did not depend on each
    other; refused_i of those i tokens ahead; and "refused", the share of guesses that go unused.
    """
    batches = evaluation_batches(model, settings, mesh)

    @jax.jit
    def sums(params: Any, context: Any, tokens: jax.Array) -> Any:
        own = computed(params, settings.dtype)
        return loss(own, context, {"tokens": tokens}, jnp.zeros((), jnp.int32))

    def measure(params: Any) -> dict[str, float]:
        own = as_saved(params)
        found = [sums(own, context, jnp.asarray(batch)) for batch in batches]
        count = sum(float(one.count) for one in found)
        names = [f"refused_{s + 1}" for s in range(steps)]
        refused = [sum(float(one.others[name]) for one in found) / count for name in names]
        used = float(np.cumprod(1.0 - np.asarray(refused)).sum())
        whole = {"acceptance_length": 1.0 + used, "refused": 1.0 - used / steps}
        return whole | dict(zip(names, refused, strict=True))

    return measure
