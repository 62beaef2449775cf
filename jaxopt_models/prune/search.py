"""Which of many candidates loses least: few windows for all of them, more for those that do well.

Each round measures KL(original || candidate) on new windows and keeps the better half, in one
compiled program, since candidates are masks. Figures are means over all windows so far. Reference:
Jamieson & Talwalkar 2016, arXiv:1502.07943.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.candidates import Candidate
from jaxopt_models.prune.damage import Damage, damage
from jaxopt_models.prune.masks import Masks
from jaxopt_models.prune.stages import Remember, at_once


@dataclass(frozen=True)
class Scored:
    """A candidate and what it was measured at, on its first so many windows.

    Attributes:
      measured: its cost where that is measured, too, and not computed alone; else None.
      over: whether that is more than the budget.
      taught: what it was measured at, on all windows, after a short distillation; else None.
    """

    candidate: Candidate
    damage: Damage
    windows: int
    measured: int | None = None
    over: bool = False
    taught: Damage | None = None


def measured_most(scored: Sequence[Scored]) -> list[Scored]:
    """Those that were measured the most, in their order."""
    most = max(one.windows for one in scored)
    return [one for one in scored if one.windows == most]


def rounds(candidates: int, batches: int, first: int, finalists: int) -> list[tuple[int, int]]:
    """(candidates, batches so far) of each round: half as many on twice as much text, until there
    are as few as `finalists`, which are measured on all of it."""
    plan, seen = [], min(first, batches)
    while seen < batches:
        plan.append((candidates, seen))
        if candidates <= finalists:
            break
        candidates, seen = max(finalists, -(-candidates // 2)), min(2 * seen, batches)
    return [*plan, (candidates, batches)]


def halve(
    config: ModelConfig,
    params: Any,
    batches: Sequence[Any],
    candidates: Sequence[Candidate],
    masks: Callable[[Candidate], Masks],
    *,
    first: int = 1,
    finalists: int = 4,
    always: Collection[str] = (),
    changed: Callable[[Masks], Any] | None = None,
    remember: Remember = at_once,
    progress: Progress = silent,
) -> list[Scored]:
    """Successive halving by KL.

    Args:
      config: the architecture.
      params: the original model, in plain arrays.
      batches: int32 [B, T] token arrays of one T.
      candidates: to choose from, at least one.
      masks: of a candidate.
      first: batches of the first round.
      finalists: how many are measured on all batches.
      always: names of candidates that stay beside the others to the end.
      changed: parameters that go with some masks, as `rescale_norms` makes them; what it returns
        for equal hidden channels has to be equal. None takes the original's.
      remember: keeps the figures of each round, so that they need not be measured again.
      progress: wraps the loops over candidates, as `tqdm` would.

    Returns:
      All candidates: those of most windows first, of equally many those of least KL.

    Raises:
      UserError: for what `damage` refuses.
    """
    found: dict[str, Scored] = {}
    running, done = list(candidates), 0
    plan = rounds(len(candidates), len(batches), first, finalists)
    for number, (count, seen) in enumerate(plan):
        running = _better(running, found, count, always)
        text = batches[done:seen]

        def measured(running=running, text=text) -> dict[str, Any]:
            new: dict[str, Any] = {}
            for some, these in _groups(running, masks, changed, params):
                given = [masks(candidate) for candidate in some]
                sums = damage(config, these, text, given, params, progress)
                new |= {one.name: astuple(own) for one, own in zip(some, sums, strict=True)}
            return new

        new = remember(f"round {number}", measured)
        windows = sum(len(batch) for batch in text)
        for candidate in running:
            own = Damage(*new[candidate.name])
            found[candidate.name] = _mean(found.get(candidate.name), candidate, own, windows)
        done = seen
    return sorted(found.values(), key=lambda scored: (-scored.windows, scored.damage.kl))


def _better(
    running: Sequence[Candidate], found: dict[str, Scored], count: int, always: Collection[str]
) -> list[Candidate]:
    if not found:
        return list(running)
    order = sorted(running, key=lambda candidate: found[candidate.name].damage.kl)
    return order[:count] + [one for one in order[count:] if one.name in always]


def _groups(
    running: Sequence[Candidate],
    masks: Callable[[Candidate], Masks],
    changed: Callable[[Masks], Any] | None,
    params: Any,
) -> Iterator[tuple[list[Candidate], Any]]:
    """Candidates with the parameters that go with them, those of one hidden width together."""
    if changed is None:
        yield list(running), params
        return
    by_width: dict[int | None, list[Candidate]] = {}
    for candidate in running:
        by_width.setdefault(candidate.target.hidden, []).append(candidate)
    for width, some in by_width.items():
        yield some, params if width is None else changed(masks(some[0]))


def _mean(before: Scored | None, candidate: Candidate, new: Damage, windows: int) -> Scored:
    """With the new windows, each of which counts equally."""
    if before is None:
        return Scored(candidate, new, windows)
    total = before.windows + windows
    old = np.asarray(astuple(before.damage)) * (before.windows / total)
    mean = old + np.asarray(astuple(new)) * (windows / total)
    return Scored(candidate, Damage(*mean.tolist()), total)


def frontier(scored: Sequence[Scored]) -> list[Scored]:
    """Those that no other beats in cost and KL together, by cost; of those measured the most."""
    kept: list[Scored] = []
    for one in sorted(measured_most(scored), key=lambda one: (one.candidate.cost, one.damage.kl)):
        if one.damage.kl < min((k.damage.kl for k in kept), default=math.inf):
            kept.append(one)
    return kept
