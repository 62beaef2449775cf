"""What is measured of finalists alone, each cut out: their times whole, and what they can learn."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, replace
from typing import Any, Protocol

import jax

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.progress import Progress
from jaxopt_models.prune.candidates import Candidate
from jaxopt_models.prune.damage import Damage
from jaxopt_models.prune.latency import Clock
from jaxopt_models.prune.search import Scored, measured_most
from jaxopt_models.prune.stages import Remember
from jaxopt_models.prune.teaching import School

# A candidate as a model of its own.
type Slice = Callable[[Candidate], tuple[ModelConfig, Any]]
# Models by the names of their candidates.
type Models = dict[str, tuple[ModelConfig, Any]]
type _Made = tuple[ModelConfig, Any, Any]


class Keep(Protocol):
    """Name of a model and what makes it, with JSON values -> these, kept or new."""

    def __call__(self, name: str, make: Callable[[], _Made]) -> _Made: ...


def timed(
    scored: Sequence[Scored],
    limit: int,
    cut: Slice,
    clock: Clock,
    remember: Remember,
    progress: Progress,
) -> tuple[Scored, ...]:
    """All of them, the finalists with their times, each run whole; equal shapes once. Those that
    take longer than `limit`, which their parts did not say, come behind the others."""
    times: dict[Any, int] = {}

    def with_time(one: Scored) -> Scored:
        config, params = cut(one.candidate)
        shape = config, tuple(array.shape for array in jax.tree.leaves(params))
        if shape not in times:
            name = f"time {one.candidate.name}"
            times[shape] = remember(name, lambda: round(clock(config, params) * 1e9))
        return replace(one, measured=times[shape], over=times[shape] > limit)

    finalists = measured_most(scored)
    found = [with_time(one) for one in progress(finalists, "timing finalists")]
    return (*sorted(found, key=lambda one: one.over), *scored[len(found) :])


def taught(
    scored: Sequence[Scored],
    cut: Slice,
    school: Callable[[], School],
    keep: Keep,
    always: Collection[str],
) -> tuple[tuple[Scored, ...], Models]:
    """All of them, finalists with what they lose behind a lesson, the best of these first, of those
    within the budget if there are any.

    Args:
      scored: all candidates, those of most windows first.
      cut: makes a model of one.
      school: where it learns; asked for if there is one to teach.
      keep: what has been taught.
      always: names of candidates whose models are wanted whether or not they are the best.

    Returns:
      (candidates; models of the best and of those that are always wanted, as they were taught).
    """
    found: list[Scored] = []
    models: Models = {}
    for one in measured_most(scored):

        def make(one=one) -> _Made:
            config, params = cut(one.candidate)
            params = school().teach(config, params)
            return config, params, astuple(school().examine(config, params))

        name = one.candidate.name
        config, params, figures = keep(f"taught {name}", make)
        found = sorted([*found, replace(one, taught=Damage(*figures))], key=_taught_order)
        models[name] = config, params
        wanted = {found[0].candidate.name, *always}
        models = {name: model for name, model in models.items() if name in wanted}
    return (*found, *scored[len(found) :]), models


def _taught_order(scored: Scored) -> tuple[bool, float]:
    assert scored.taught is not None  # in `taught`
    return scored.over, scored.taught.kl
