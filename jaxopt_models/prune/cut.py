"""The cut that settings ask for: parts are scored, candidates compared, and one of them is cut.

importance -> candidates -> successive halving -> the finalists' times and lessons -> slice

What is finished of it is remembered, see `stages`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.evaluate import Reference, evaluate, reference
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init
from jaxopt_models.progress import Progress
from jaxopt_models.prune.candidates import BASELINE, Candidate, Grids, candidates, explicit
from jaxopt_models.prune.damage import Damage, damage
from jaxopt_models.prune.finalists import Models, Slice, taught, timed
from jaxopt_models.prune.importance import Importance, importance, like
from jaxopt_models.prune.latency import Clock, Times, parts, wall_clock
from jaxopt_models.prune.masks import Masks
from jaxopt_models.prune.norm_gains import norm_gains, rescale_norms
from jaxopt_models.prune.per_layer import Block, blocks, mixtures, score
from jaxopt_models.prune.prune_report import Latency
from jaxopt_models.prune.search import Scored, halve
from jaxopt_models.prune.settings import Budget, Distill, PerLayer, PruneSettings
from jaxopt_models.prune.sizes import AXES, Axis, Costs, Prices, cost_of, grids, sizes_of
from jaxopt_models.prune.slicing import slice_model
from jaxopt_models.prune.stages import Stages
from jaxopt_models.prune.teaching import School, damage_of


@dataclass(frozen=True)
class Cut:
    """A smaller model and how it was chosen; fields as in `PruneReport`."""

    config: ModelConfig
    params: Any
    chosen: Candidate | None = None
    scored: tuple[Scored, ...] = ()
    blocks: tuple[Block, ...] = ()
    uniform: Damage | None = None
    budget: int | None = None
    latency: Latency | None = None


@dataclass(frozen=True)
class Cutter:
    """What all steps read, how long each took, and parameters before the cut by hidden width.

    Attributes:
      stages: of this run.
      training: int32 [N, T], rows that finalists learn from, if they do.
      clock: of a budget of latency; None is `latency.wall_clock`.
    """

    model: Model
    settings: PruneSettings
    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    progress: Progress
    stages: Stages
    training: Any = None
    clock: Clock | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    rescaled: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - began

    def cut(self) -> Cut:
        """To the budget, or to what is to be kept."""
        settings = self.settings
        with self.timed("importance"):
            scores = self.importance()
        if settings.budget is not None:
            return self.to_budget(settings.budget, scores)
        assert settings.keep is not None  # `PruneSettings`
        chosen = explicit(settings.keep.target(settings.multiple), scores)
        with self.timed("slice"):
            small, params = self.slice(chosen, scores)
        return Cut(small, params, replace(chosen, cost=cost_of(params, "parameters")))

    def importance(self) -> Importance:
        config, params = self.model.config, self.model.params
        settings = self.settings
        how = {"equal_sites": settings.equal_sites, "weighted": settings.weighted}

        def make() -> Importance:
            return importance(config, params, self.calibration, None, self.progress, **how)

        return self.stages.arrays("importance", make, like(config, params), **how)

    def to_budget(self, budget: Budget, scores: Importance) -> Cut:
        """The candidate within the budget that loses least."""
        numbers = self.numbers()
        with self.timed("costs"):
            costs = self.costs(budget, numbers)
        limit = budget.of(costs.of_whole)
        given, choices = self.candidates(costs, numbers, limit, scores)
        with self.timed("search"):
            scored = self.search(given, scores)
        cut, models, latency = partial(self.slice, scores=scores), {}, None
        if isinstance(costs, Times):
            latency = self.latency(budget, costs)
            scored = self.timed_whole(budget, limit, scored, cut)
        if self.settings.search.distill is not None:
            scored, models = self.taught(self.settings.search.distill, scored, cut)
        chosen = scored[0].candidate
        with self.timed("uniform"):
            uniform = self.uniform(scored, scores, models)
        with self.timed("slice"):
            small, params = models.get(chosen.name) or cut(chosen)
        return Cut(small, params, chosen, scored, choices, uniform, limit, latency)

    def candidates(
        self, costs: Costs, numbers: Grids, limit: int, scores: Importance
    ) -> tuple[list[Candidate], tuple[Block, ...]]:
        """To compare, and what those were chosen from that have a choice for each layer."""
        search = self.settings.search
        given = candidates(costs, numbers, scores, limit, search.candidates, self.settings.seed)
        if search.per_layer is None:
            return given, ()
        with self.timed("per layer"):
            choices = self.blocks(search.per_layer, numbers, scores)
        known = {(one.target, one.dropped) for one in given}
        mixed = mixtures(self.model.config, costs, numbers, choices, limit)
        new = [one for one in mixed if (one.target, one.dropped) not in known]
        return given + new, tuple(choices)

    def numbers(self) -> Grids:
        """Of each axis, what may be kept of it."""
        settings, config = self.settings, self.model.config
        whole = sizes_of(config, self.model.params)
        axes: tuple[Axis, ...] = tuple(a for a in AXES if a in whole and a != "groups")
        axes = axes if settings.axes is None else settings.axes
        return grids(config, whole, axes, settings.search.least, settings.multiple)

    def costs(self, budget: Budget, numbers: Grids) -> Costs:
        """In the unit of the budget; those of latency are measured here."""
        config, params = self.model.config, self.model.params
        if budget.unit != "nanoseconds":
            return Prices.of(config, params, budget.unit)
        clock, dtype = self.clock_of(budget), params["embed_tokens"]["weight"].dtype
        whole = sizes_of(config, params)
        of = {"decoding": [budget.batch, budget.context], "numbers": numbers}
        remember = self.stages.remember(device=_device(), **of)

        def seconds(number: int, part: ModelConfig) -> float:
            return remember(
                f"part {number}", lambda: clock(part, init(part, jax.random.key(0), dtype))
            )

        numbered = list(enumerate(parts(config, whole, numbers)))
        found = {part: seconds(i, part) for i, part in self.progress(numbered, "timing parts")}
        original = remember("time original", lambda: clock(config, params))
        return Times.of(config, whole, numbers, found.__getitem__, original)

    def clock_of(self, budget: Budget) -> Clock:
        return self.clock or wall_clock(budget.batch, budget.context)

    def blocks(self, how: PerLayer, numbers: Grids, scores: Importance) -> list[Block]:
        """What each layer may become, scored; layer by layer."""
        config, params, found = self.model.config, self.model.params, []
        text = self.calibration[: -(-how.windows // self.settings.batch)]
        whole = sizes_of(config, params)
        offered = blocks(config, numbers, how.widths, self.settings.uniform)
        of = {"numbers": numbers, "uniform": self.settings.uniform}
        remember = self.stages.remember(per_layer=how.model_dump(), **of)
        for layer, own in self.progress(list(enumerate(offered)), "scoring layers"):

            def make(own=own) -> list[float]:
                return score(config, params, text, own, scores, whole) if own else []

            kls = remember(f"layer {layer}", make)
            found += [replace(one, kl=kl) for one, kl in zip(own, kls, strict=True)]
        return found

    def search(self, given: Sequence[Candidate], scores: Importance) -> tuple[Scored, ...]:
        """All candidates, best first."""
        settings = self.settings
        found = halve(
            self.model.config,
            self.model.params,
            self.calibration,
            given,
            lambda candidate: candidate.masks(scores),
            first=-(-settings.search.first // settings.batch),
            finalists=settings.search.finalists,
            always=(BASELINE,),
            changed=self.before_cut if settings.rescale_norms else None,
            remember=self.stages.remember(**self.deciding()),
            progress=self.progress,
        )
        return tuple(found)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is cut."""
        beside = {"text", "evaluation", "sparsity"}
        return self.settings.model_dump(mode="json", exclude=beside)

    def timed_whole(
        self, budget: Budget, limit: int, scored: Sequence[Scored], cut: Slice
    ) -> tuple[Scored, ...]:
        """With the finalists' times, those within the limit first."""
        remember = self.stages.remember(device=_device(), **self.deciding())
        with self.timed("latency"):
            return timed(scored, limit, cut, self.clock_of(budget), remember, self.progress)

    def taught(
        self, how: Distill, scored: Sequence[Scored], cut: Slice
    ) -> tuple[tuple[Scored, ...], Models]:
        """With what finalists lose behind a lesson, and models of the best and the uniform one."""

        @cache
        def school() -> School:
            given = self.model, how, self.settings.seed, self.training
            return School.of(*given, self.calibration, self.progress)

        keep = partial(self.stages.model, **self.deciding())
        with self.timed("distill"):
            return taught(scored, cut, school, keep, always=(BASELINE,))

    def latency(self, budget: Budget, costs: Times) -> Latency:
        return Latency(budget.batch, budget.context, _device(), costs.of_whole, costs.scale)

    def uniform(
        self, scored: Sequence[Scored], scores: Importance, models: Models
    ) -> Damage | None:
        """What the uniform candidate loses on other text, if another was chosen; taught, where
        finalists are."""
        uniform = next((one.candidate for one in scored if one.candidate.name == BASELINE), None)
        if uniform is None or scored[0].candidate is uniform:
            return None
        config, params = self.model.config, self.model.params
        if models:
            found = evaluate(*models[BASELINE], self.evaluation, self.reference(), self.progress)
            return damage_of(found)
        masks = uniform.masks(scores)
        before = self.before_cut(masks)
        (lost,) = damage(config, before, self.evaluation, [masks], params)
        return lost

    def reference(self) -> Reference:
        """The original on the other text."""
        return reference(self.model.config, self.model.params, self.evaluation, self.progress)

    def slice(self, candidate: Candidate, scores: Importance) -> tuple[ModelConfig, Any]:
        """The candidate as a model of its own."""
        masks = candidate.masks(scores)
        before, uniform = self.before_cut(masks), self.settings.uniform
        return slice_model(self.model.config, before, masks, uniform=uniform)

    def before_cut(self, masks: Masks) -> Any:
        """Parameters with gains of norms for the narrower stream, if they are wanted; measured once
        for each width, since equal widths keep the same channels."""
        config, params = self.model.config, self.model.params
        width = int(jnp.sum(masks.hidden))
        if not self.settings.rescale_norms or width == masks.hidden.shape[0]:
            return params
        if width not in self.rescaled:
            text, wrap = self.calibration, self.progress

            def make() -> dict[str, float]:
                gains = norm_gains(config, params, text, masks.hidden, progress=wrap)
                return {path: float(gain) for path, gain in gains.items()}

            of_channels = self.stages.remember(**self.deciding())
            gains = of_channels(f"norms {width}", make)
            self.rescaled[width] = rescale_norms(config, params, gains)
        return self.rescaled[width]


def _device() -> str:
    return jax.devices()[0].device_kind
