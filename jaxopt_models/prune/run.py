"""Pruning by settings: importance once, a search or an explicit choice, the cut, and what it cost.

importance -> candidates -> successive halving -> slice -> zeros -> measured on other text
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp

from jaxopt_models.evaluate import evaluate, reference
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.candidates import BASELINE, Candidate, candidates, explicit
from jaxopt_models.prune.damage import Damage, damage
from jaxopt_models.prune.importance import Importance, importance
from jaxopt_models.prune.masks import Masks, check_plain
from jaxopt_models.prune.norm_gains import norm_gains, rescale_norms
from jaxopt_models.prune.prune_report import PruneReport
from jaxopt_models.prune.search import Scored, halve
from jaxopt_models.prune.settings import Budget, PruneSettings
from jaxopt_models.prune.sizes import AXES, Axis, Prices, cost_of, grids
from jaxopt_models.prune.slicing import slice_model
from jaxopt_models.prune.sparsity import SparseReport, sparsify


def prune(
    model: Model,
    settings: PruneSettings,
    calibration: Sequence[Any],
    evaluation: Sequence[Any],
    progress: Progress = silent,
) -> tuple[ModelConfig, Any, PruneReport]:
    """The smaller model that the settings ask for.

    Args:
      model: in plain arrays.
      settings: what to remove.
      calibration: int32 [B, T] token arrays of one T, that importance is measured on, candidates
        are compared on, and zeros are placed by.
      evaluation: others, for what is reported.
      progress: wraps loops, as `tqdm` would.

    Returns:
      (config, params, report).

    Raises:
      UserError: for a model that cannot be pruned, and for settings that do not go with it.
    """
    config, params = model.config, model.params
    check_plain(params)
    job = _Job(model, settings, calibration, evaluation, progress)
    result = _Cut(config, params)
    if settings.budget is not None or settings.keep is not None:
        result = job.cut()
    small, smaller = result.config, result.params
    rows: list[SparseReport] = []
    if settings.sparsity is not None:
        with job.timed("sparsity"):
            zeros = settings.sparsity.sparsity()
            smaller, rows = sparsify(small, smaller, zeros, calibration, progress)
    with job.timed("evaluation"):
        teacher = reference(config, params, evaluation, progress)
        original = evaluate(config, params, evaluation, progress=progress)
        pruned = evaluate(small, smaller, evaluation, teacher, progress)
    report = PruneReport(
        unit="parameters" if settings.budget is None else settings.budget.unit,
        budget=result.budget,
        candidates=result.scored,
        chosen=result.chosen,
        parameters=(cost_of(params, "parameters"), cost_of(smaller, "parameters")),
        bytes=(cost_of(params, "bytes"), cost_of(smaller, "bytes")),
        sparsity=tuple(rows),
        original=original,
        pruned=pruned,
        uniform=result.uniform,
        seconds=job.seconds,
    )
    return small, smaller, report


@dataclass(frozen=True)
class _Cut:
    """A smaller model and how it was chosen; fields as in `PruneReport`."""

    config: ModelConfig
    params: Any
    chosen: Candidate | None = None
    scored: tuple[Scored, ...] = ()
    uniform: Damage | None = None
    budget: int | None = None


@dataclass(frozen=True)
class _Job:
    """What all steps read, how long each took, and parameters before the cut by hidden width."""

    model: Model
    settings: PruneSettings
    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    rescaled: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - began

    def cut(self) -> _Cut:
        """To the budget, or to what is to be kept."""
        settings, config = self.settings, self.model.config
        with self.timed("importance"):
            scores = importance(
                config,
                self.model.params,
                self.calibration,
                progress=self.progress,
                equal_sites=settings.equal_sites,
                weighted=settings.weighted,
            )
        scored, uniform, budget = (), None, None
        if settings.budget is not None:
            budget = settings.budget.of(cost_of(self.model.params, settings.budget.unit))
            with self.timed("search"):
                scored = self.search(settings.budget, budget, scores)
            chosen = scored[0].candidate
            with self.timed("uniform"):
                uniform = self.uniform(scored, scores)
        else:
            assert settings.keep is not None  # `PruneSettings`
            chosen = explicit(settings.keep.target(settings.multiple), scores)
        masks = chosen.masks(scores)
        with self.timed("slice"):
            before = self.before_cut(masks)
            small, params = slice_model(config, before, masks, uniform=settings.uniform)
        cost = cost_of(params, "parameters" if settings.budget is None else settings.budget.unit)
        return _Cut(small, params, replace(chosen, cost=cost), scored, uniform, budget)

    def search(self, budget: Budget, limit: int, scores: Importance) -> tuple[Scored, ...]:
        """All candidates, best first."""
        settings, config, params = self.settings, self.model.config, self.model.params
        prices = Prices.of(config, params, budget.unit)
        axes: tuple[Axis, ...] = tuple(a for a in AXES if a in prices.whole and a != "groups")
        axes = axes if settings.axes is None else settings.axes
        choices = grids(config, prices.whole, axes, settings.search.least, settings.multiple)
        count = settings.search.candidates
        found = halve(
            config,
            params,
            self.calibration,
            candidates(prices, choices, scores, limit, count, settings.seed),
            lambda candidate: candidate.masks(scores),
            first=-(-settings.search.first // settings.batch),
            finalists=settings.search.finalists,
            always=(BASELINE,),
            changed=self.before_cut if settings.rescale_norms else None,
            progress=self.progress,
        )
        return tuple(found)

    def uniform(self, scored: Sequence[Scored], scores: Importance) -> Damage | None:
        """What the uniform candidate loses on other text, if another was chosen."""
        uniform = next((one.candidate for one in scored if one.candidate.name == BASELINE), None)
        if uniform is None or scored[0].candidate is uniform:
            return None
        masks, params = uniform.masks(scores), self.model.params
        before = self.before_cut(masks)
        (found,) = damage(self.model.config, before, self.evaluation, [masks], params)
        return found

    def before_cut(self, masks: Masks) -> Any:
        """Parameters with gains of norms for the narrower stream, if they are wanted; measured once
        for each width, since equal widths keep the same channels."""
        config, params = self.model.config, self.model.params
        width = int(jnp.sum(masks.hidden))
        if not self.settings.rescale_norms or width == masks.hidden.shape[0]:
            return params
        if width not in self.rescaled:
            text, wrap = self.calibration, self.progress
            gains = norm_gains(config, params, text, masks.hidden, progress=wrap)
            self.rescaled[width] = rescale_norms(config, params, gains)
        return self.rescaled[width]
