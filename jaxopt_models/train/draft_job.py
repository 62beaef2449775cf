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
from jaxopt_models.models.model import Model
from jaxopt_models.speculative.draft import Target
from jaxopt_models.speculative.eagle3 import Eagle3
from jaxopt_models.speculative.eagle3_files import export_eagle3
from jaxopt_models.speculative.eagle3_params import init_eagle3
from jaxopt_models.speculative.medusa import Medusa, init_medusa
from jaxopt_models.speculative.medusa_files import export_medusa
from jaxopt_models.speculative.mtp import Mtp, init_mtp
from jaxopt_models.speculative.mtp_files import export_mtp
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
    config = replace(model.config, dtype=settings.dtype)
    head = _new(chosen, Target(config, model.params), rows, settings.seed)
    optimizer = settings.optimizer.transformation(settings.steps)
    state = start(sharded(head.params, mesh), optimizer, settings.trained, settings.freeze)
    cast_model = looped(partial(cast, dtype=settings.dtype), config, settings.scan_layers)
    context = cast_model(sharded(model.params, mesh))
    remat = settings.remat != "none"
    options: dict[str, Any] = {"steps": chosen.steps, "decay": chosen.decay, "remat": remat}
    loss = draft_loss(config, head, settings.terms("draft"), **options)
    prepare = partial(computed, dtype=settings.dtype)

    def finish(params: Any) -> Eagle3 | Medusa | Mtp:
        return replace(head, params=_rounded(params))

    def write(one: Eagle3 | Medusa | Mtp, report: Any) -> None:
        name = model.source and str(model.source)
        options: dict[str, Any] = {"dtype": _SAVED, "verifier": name, "overwrite": overwrite}
        if isinstance(one, Medusa):
            export_medusa(out, one, **options)
        elif isinstance(one, Mtp):
            export_mtp(out, one, model.config, **options)
        else:
            export_eagle3(out, one, model.config, **options)

    return Job(
        state,
        step_of(loss, settings, prepare, mesh, places_of(state, mesh)),
        context,
        measure=_measurement(loss, model, settings, context, chosen.steps, mesh),
        best="refused",
        finish=finish,
        save=write,
    )


def _new(
    chosen: DraftHead, target: Target, rows: dict[str, Any], seed: int
) -> Eagle3 | Medusa | Mtp:
    """The head before training."""
    if chosen.kind == "medusa":
        return init_medusa(target, chosen.steps)
    if chosen.kind == "mtp":
        return init_mtp(target, jax.random.key(seed), chosen.count)
    count = target.config.num_layers
    if not all(0 <= i < count for i in chosen.layers or ()):
        raise UserError(
            f"head.layers are {list(chosen.layers or ())}, and the model's layers 0 to {count - 1}"
        )
    return init_eagle3(
        target,
        jax.random.key(seed),
        layers=chosen.layers,
        vocabulary=most_frequent(rows, target.config.vocab_size, chosen.vocabulary),
        intermediate_size=chosen.intermediate_size,
        count=chosen.count,
    )


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


def _rounded(params: Any) -> Any:
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
        own = _rounded(params)
        found = [sums(own, context, jnp.asarray(batch)) for batch in batches]
        count = sum(float(one.count) for one in found)
        names = [f"refused_{s + 1}" for s in range(steps)]
        refused = [sum(float(one.others[name]) for one in found) / count for name in names]
        used = float(np.cumprod(1.0 - np.asarray(refused)).sum())
        whole = {"acceptance_length": 1.0 + used, "refused": 1.0 - used / steps}
        return whole | dict(zip(names, refused, strict=True))

    return measure
