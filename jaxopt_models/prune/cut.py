"""The cut that settings ask for: parts are scored, candidates compared, and one of them is cut.

importance -> candidates -> successive halving -> the finalists' times -> slice
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init
from jaxopt_models.progress import Progress
from jaxopt_models.prune.candidates import BASELINE, Candidate, Grids, candidates, explicit
from jaxopt_models.prune.damage import Damage, damage
from jaxopt_models.prune.importance import Importance, importance
from jaxopt_models.prune.latency import Clock, Times, parts, wall_clock
from jaxopt_models.prune.masks import Masks
from jaxopt_models.prune.norm_gains import norm_gains, rescale_norms
from jaxopt_models.prune.per_layer import Block, blocks, mixtures, score
from jaxopt_models.prune.prune_report import Latency
from jaxopt_models.prune.search import Scored, halve, measured_most
from jaxopt_models.prune.settings import Budget, PerLayer, PruneSettings
from jaxopt_models.prune.sizes import AXES, Axis, Costs, Prices, cost_of, grids, sizes_of
from jaxopt_models.prune.slicing import slice_model


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
      clock: of a budget of latency; None is `latency.wall_clock`.
    """

    model: Model
    settings: PruneSettings
    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    progress: Progress
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
            scores = importance(
                self.model.config,
                self.model.params,
                self.calibration,
                progress=self.progress,
                equal_sites=settings.equal_sites,
                weighted=settings.weighted,
            )
        if settings.budget is not None:
            return self.to_budget(settings.budget, scores)
        assert settings.keep is not None  # `PruneSettings`
        chosen = explicit(settings.keep.target(settings.multiple), scores)
        with self.timed("slice"):
            small, params = self.slice(chosen, scores)
        return Cut(small, params, replace(chosen, cost=cost_of(params, "parameters")))

    def to_budget(self, budget: Budget, scores: Importance) -> Cut:
        """The candidate within the budget that loses least."""
        numbers = self.numbers()
        with self.timed("costs"):
            costs = self.costs(budget, numbers)
        limit = budget.of(costs.of_whole)
        drawn = self.settings.search.candidates
        given = candidates(costs, numbers, scores, limit, drawn, self.settings.seed)
        choices: list[Block] = []
        if self.settings.search.per_layer is not None:
            with self.timed("per layer"):
                choices = self.blocks(self.settings.search.per_layer, numbers, scores)
            known = {(one.target, one.dropped) for one in given}
            mixed = mixtures(self.model.config, costs, numbers, choices, limit)
            given += [one for one in mixed if (one.target, one.dropped) not in known]
        with self.timed("search"):
            scored = self.search(given, scores)
        if isinstance(costs, Times):
            with self.timed("latency"):
                scored = self.measured(budget, scored, scores)
        chosen = scored[0].candidate
        with self.timed("uniform"):
            uniform = self.uniform(scored, scores)
        with self.timed("slice"):
            small, params = self.slice(chosen, scores)
        latency = self.latency(budget, costs) if isinstance(costs, Times) else None
        return Cut(small, params, chosen, scored, tuple(choices), uniform, limit, latency)

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
        found = {
            part: clock(part, init(part, jax.random.key(0), dtype))
            for part in self.progress(parts(config, whole, numbers), "timing parts")
        }
        return Times.of(config, whole, numbers, found.__getitem__, clock(config, params))

    def clock_of(self, budget: Budget) -> Clock:
        return self.clock or wall_clock(budget.batch, budget.context)

    def blocks(self, how: PerLayer, numbers: Grids, scores: Importance) -> list[Block]:
        """What each layer may become, scored; layer by layer."""
        config, found = self.model.config, []
        text = self.calibration[: -(-how.windows // self.settings.batch)]
        whole = sizes_of(config, self.model.params)
        offered = blocks(config, numbers, how.widths, self.settings.uniform)
        for own in self.progress(offered, "scoring layers"):
            kls = score(config, self.model.params, text, own, scores, whole) if own else []
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
            progress=self.progress,
        )
        return tuple(found)

    def measured(
        self, budget: Budget, scored: Sequence[Scored], scores: Importance
    ) -> tuple[Scored, ...]:
        """With the times of the finalists, each cut and run whole."""
        clock, finalists = self.clock_of(budget), measured_most(scored)
        timed = [
            replace(one, measured=round(clock(*self.slice(one.candidate, scores)) * 1e9))
            for one in self.progress(finalists, "timing finalists")
        ]
        return (*timed, *scored[len(timed) :])

    def latency(self, budget: Budget, costs: Times) -> Latency:
        device = jax.devices()[0].device_kind
        return Latency(budget.batch, budget.context, device, costs.of_whole, costs.scale)

    def uniform(self, scored: Sequence[Scored], scores: Importance) -> Damage | None:
        """What the uniform candidate loses on other text, if another was chosen."""
        uniform = next((one.candidate for one in scored if one.candidate.name == BASELINE), None)
        if uniform is None or scored[0].candidate is uniform:
            return None
        masks, params = uniform.masks(scores), self.model.params
        before = self.before_cut(masks)
        (found,) = damage(self.model.config, before, self.evaluation, [masks], params)
        return found

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
            gains = norm_gains(config, params, text, masks.hidden, progress=wrap)
            self.rescaled[width] = rescale_norms(config, params, gains)
        return self.rescaled[width]
