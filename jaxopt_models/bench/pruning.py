"""How much of what pruning costs comes back by distillation, and whether the search was worth it.

Of each plan and seed, the model is pruned to the budget twice: as the search picks, and uniformly,
the baseline among its candidates. Both students are taught by the original on the same batches. A
seed changes what the search draws and the order of the text. Everything is measured in float32,
matrix products included, on windows of another text, as `evaluate` does.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_models.bench.pruning_results import row_line
from jaxopt_models.bench.result_rows import ResultRows
from jaxopt_models.bench.trained import (
    exact_measurement,
    told_by_name,
    trained,
    training_protocol,
)
from jaxopt_models.checkpoint.load import load
from jaxopt_models.data import load_text, token_batches
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.candidates import BASELINE, Candidate
from jaxopt_models.prune.cut import Cutter
from jaxopt_models.prune.settings import PruneSettings
from jaxopt_models.prune.sizes import cost_of
from jaxopt_models.prune.stages import Stages
from jaxopt_models.prune.teaching import lesson_rows
from jaxopt_models.train.loop import Step
from jaxopt_models.train.model_job import make_step
from jaxopt_models.train.rows import training_rows
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.student import with_masters

SEEDS = (0, 1, 2)
_KEYS = ("axis", "method", "seed")


def bench_pruning(
    settings: RunSettings,
    plans: Mapping[str, PruneSettings],
    seeds: Sequence[int] = SEEDS,
    *,
    limit: float | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prunes a model by each plan, with each seed, and teaches what is left.

    Args:
      settings: of every distillation, but for its student and seed.
      plans: how to prune, by name; each with a budget, and without zeros. Their evaluation is not
        read: all is measured on that of the settings.
      seeds: of draws of the search and of the order of the text.
      limit: seconds; nothing is begun that would take longer, if it takes what the pair of rows
        before took.
      out: .json file that is rewritten after each row. One that is there is gone on with: rows that
        it has are not measured again.
      say: takes a line for each row.
      progress: wraps loops.

    Returns:
      What `ResultRows.document` says: the protocol, and a row `{axis, method, seed, params,
      share, kept, ppl_teacher, ppl_pruned, ppl_distilled, kl_pruned, kl_distilled, ppl_recovered,
      train_tokens, minutes, search_minutes, run}` for each plan (axis), method ("search" or
      "uniform") and seed. `kept` is that of `Candidate.as_dict`, `minutes` of the distillation,
      `search_minutes` of pruning, and `run` as `trained` returns it. Where the search picks the
      uniform candidate there is no row of its own. A plan that teaches its finalists has figures
      behind that lesson.

    Raises:
      UserError: for a model or text that cannot be read, a plan without a budget or with zeros, an
        `out` with rows of another protocol, or a run that is lost.
    """
    for name, plan in plans.items():
        _check(name, plan)
    teacher = load(settings.model)
    rows = training_rows(teacher, settings)
    results = ResultRows(out, _protocol(settings, plans, rows), _KEYS)
    bench = _Bench(settings, teacher, rows, exact_measurement(teacher, settings), progress)
    start, last = time.perf_counter(), 0.0
    for name, plan in plans.items():
        for seed in seeds:
            if results.has(name, "search", seed):
                continue
            begun = time.perf_counter()
            if limit is not None and begun - start + last > limit:
                return results.document()
            for row in bench.rows_of(name, plan, seed):
                if not results.has(*(row[key] for key in _KEYS)):
                    results.add(row)
                    say(row_line(row))
            last = time.perf_counter() - begun
    return results.document()


@dataclass(frozen=True)
class _Bench:
    """What all rows share; a step for each architecture, so that it is compiled once."""

    settings: RunSettings
    teacher: Model
    rows: Mapping[str, np.ndarray]
    measure: Callable[[ModelConfig, Any], Mapping[str, float]]
    progress: Progress
    steps: dict[ModelConfig, Step] = field(default_factory=dict)

    @cached_property
    def ppl_teacher(self) -> float:
        return self.measure(self.teacher.config, self.teacher.params)["perplexity"]

    def rows_of(self, name: str, plan: PruneSettings, seed: int) -> Iterator[dict[str, Any]]:
        """The row of the uniform candidate, then that of the search, which is the last: with it
        both are complete."""
        plan = plan.model_copy(update={"seed": seed})
        assert plan.budget is not None  # `_check`
        begun = time.perf_counter()
        cutter = self._cutter(plan)
        scores = cutter.importance()
        cut = cutter.to_budget(plan.budget, scores)
        named = {"axis": name, "seed": seed, "search_minutes": (time.perf_counter() - begun) / 60}
        assert cut.chosen is not None  # by a budget
        compared = (one.candidate for one in cut.scored)
        uniform = next((one for one in compared if one.name == BASELINE), None)
        if uniform is not None and cut.chosen.name != BASELINE:
            student = self._student(*cutter.slice(uniform, scores))
            yield named | {"method": BASELINE} | self._taught(student, uniform, name, seed)
        student = self._student(cut.config, cut.params)
        yield named | {"method": "search"} | self._taught(student, cut.chosen, name, seed)

    def _cutter(self, plan: PruneSettings) -> Cutter:
        def batches(text: str, count: int) -> Sequence[Any]:
            return token_batches(self.teacher, text, count, plan.length, plan.batch)

        other = self.settings.evaluation.text
        return Cutter(
            self.teacher,
            plan,
            batches(load_text(plan.text, "calibration"), plan.windows),
            batches(load_text(other, "evaluation"), plan.evaluation.windows),
            self.progress,
            Stages(),
            lesson_rows(self.teacher, plan),
        )

    def _student(self, config: ModelConfig, params: Any) -> Model:
        trained = self.settings.trained, self.settings.freeze
        return replace(self.teacher, config=config, params=with_masters(params, *trained))

    def _taught(self, student: Model, kept: Candidate, name: str, seed: int) -> dict[str, Any]:
        """Figures before and after distillation, and the run."""
        settings = self.settings.model_copy(update={"seed": seed})
        terms = settings.terms("distill")
        if student.config not in self.steps:
            own = self.teacher.config, student.config
            self.steps[student.config] = make_step(settings, terms, *own)
        measure = partial(self.measure, student.config)
        before = measure(student.params)
        begun = time.perf_counter()
        run = trained(
            "distill",
            self.steps[student.config],
            settings,
            student,
            self.teacher,
            self.rows,
            measure,
            before,
            f"{name}, {kept.name}, seed {seed}",
            self.progress,
        )
        minutes = (time.perf_counter() - begun) / 60
        sizes = [cost_of(one.params, "parameters") for one in (student, self.teacher)]
        return {
            "params": sizes[0],
            "share": sizes[0] / sizes[1],
            "kept": kept.as_dict(),
            **figures(self.ppl_teacher, run["curve"]),
            "train_tokens": settings.steps * settings.batch * settings.length,
            "minutes": minutes,
            "run": run,
        }


def figures(ppl_teacher: float, curve: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The ends of a curve, and what share of the way back distillation goes:

        ppl_recovered = (ppl_pruned - ppl_distilled) / (ppl_pruned - ppl_teacher)

    Args:
      ppl_teacher: perplexity of the original, which has no divergence from itself.
      curve: measurements of the pruned model, the first before and the last after distillation.
    """
    before, after = curve[0], curve[-1]
    lost, left = (one["perplexity"] - ppl_teacher for one in (before, after))
    return {
        "ppl_teacher": ppl_teacher,
        "ppl_pruned": before["perplexity"],
        "ppl_distilled": after["perplexity"],
        "kl_pruned": before["kl"],
        "kl_distilled": after["kl"],
        "ppl_recovered": 1.0 - left / lost,
    }


def _check(name: str, plan: PruneSettings) -> None:
    if plan.budget is None or plan.sparsity is not None:
        raise UserError(
            f"plan {name!r}: the search is compared with uniform pruning within a budget; give a "
            "'budget', and no 'sparsity'"
        )


def _protocol(
    settings: RunSettings, plans: Mapping[str, PruneSettings], rows: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    told = {
        name: told_by_name(plan.model_dump(mode="json", exclude={"seed", "evaluation"}))
        for name, plan in plans.items()
    }
    return training_protocol(settings, rows) | {"plans": told}
