"""How much of what quantization costs comes back by training, from the teacher and from the text.

Of each recipe and seed, the quantized model is trained twice from the same start on the same
batches: for next tokens of the text (QAT), and for what the unquantized model says and computes
(QAD), alone or with a share of next tokens. The start is the recipe's own, or what a better
algorithm finds for the same format. A seed changes the order of the text and nothing else.
Everything is measured of the folded model in float32, matrix products included, on windows of
another text, as `evaluate` does.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxopt_models.bench.qad_results import row_line
from jaxopt_models.bench.quality_peer import format_name
from jaxopt_models.bench.result_rows import ResultRows
from jaxopt_models.bench.trained import exact_measurement, trained, training_protocol
from jaxopt_models.checkpoint.load import load
from jaxopt_models.errors import UserError
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.train.loop import Evaluate, Step
from jaxopt_models.train.model_job import make_step
from jaxopt_models.train.rows import training_rows
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.student import student_of

Mode = Literal["qat", "qad"]
MODES: tuple[Mode, ...] = ("qat", "qad")
RECIPES = ("nvfp4", "int4")
SEEDS = (0, 1, 2)


def bench_qad(
    settings: RunSettings,
    recipes: Sequence[str | Path] = RECIPES,
    seeds: Sequence[int] = SEEDS,
    *,
    begins: Mapping[str, str] | None = None,
    qat_learning_rate: float | None = None,
    limit: float | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Trains a model by QAT and QAD under each recipe, with each seed.

    Args:
      settings: of every run, but for its recipe and seed. Losses are those of QAD.
      recipes: as `Recipe.load` takes them.
      seeds: of the order of the text.
      begins: of some of the recipes, the one of the same format whose quantized values training
        begins with; PTQ's figures stay the recipe's own. Others begin as the settings say.
      qat_learning_rate: the highest of QAT; None is that of the settings, which QAD has.
      limit: seconds; nothing is begun that would take longer, if it takes what the row before took.
      out: .json file that is rewritten after each row. One that is there is gone on with: recipes
        and seeds that it has are not measured again.
      say: takes a line for each row.
      progress: wraps loops.

    Returns:
      What `ResultRows.document` says: the protocol, and a row `{format, recipe, begin, seed,
      ppl_teacher, ppl_ptq, ppl_qat, ppl_qad, kl_ptq, kl_qat, kl_qad, kl_recovered, ppl_recovered,
      train_tokens, minutes, runs}` for each recipe and seed. Both modes see `train_tokens`; the
      minutes are those of the row. `runs` has for each mode `{learning_rate, tokens_per_second,
      skipped, curve}`, the curve being the measurements `{step, perplexity, kl, top1_agreement}`,
      from step 0, which is what training begins with.

    Raises:
      UserError: for a model, recipe or text that cannot be read, for a start of another format,
        for an `out` with rows of another protocol, or for a run that is lost.
    """
    begins = {} if begins is None else dict(begins)
    rates: dict[Mode, float] = {
        "qat": qat_learning_rate or settings.optimizer.learning_rate,
        "qad": settings.optimizer.learning_rate,
    }
    plans = [Recipe.load(recipe) for recipe in recipes]
    _check(begins)
    teacher = load(settings.model)
    rows = training_rows(teacher, settings)
    results = ResultRows(out, _protocol(settings, rates, begins, rows), ("recipe", "seed"))
    missing = {
        name: [seed for seed in seeds if not results.has(plan.name, seed)]
        for name, plan in zip(recipes, plans, strict=True)
    }
    measure = partial(exact_measurement(teacher, settings), teacher.config)
    bench = _Bench(settings, rates, begins, teacher, rows, measure, progress)
    start = time.perf_counter()
    for row in bench.rows_of({name: left for name, left in missing.items() if left}):
        results.add(row)
        say(row_line(row))
        if limit is not None and time.perf_counter() - start + 60 * row["minutes"] > limit:
            break
    return results.document()


@dataclass(frozen=True)
class _Bench:
    """What all rows share."""

    settings: RunSettings
    rates: Mapping[Mode, float]
    begins: Mapping[str, str]
    teacher: Model
    rows: dict[str, np.ndarray]
    measure: Evaluate
    progress: Progress

    def rows_of(self, wanted: Mapping[str | Path, Sequence[int]]) -> Iterator[dict[str, Any]]:
        """A row for each recipe and seed, when it is asked for."""
        if not wanted:
            return
        ppl_teacher = self.measure(self.teacher.params)["perplexity"]
        for recipe, seeds in wanted.items():
            begun = time.perf_counter()
            student = self._student(self._settings("qad", recipe, 0))
            ptq = dict(self.measure(student.params))
            start = ptq
            if recipe in self.begins:
                better = {"recipe": self.begins[str(recipe)], "begin": "quantized"}
                student = self._student(self._settings("qad", recipe, 0).model_copy(update=better))
                start = dict(self.measure(student.params))
            # One step of each mode for all seeds, so that it is compiled once.
            steps: dict[Mode, Step] = {mode: self._step(mode, recipe, student) for mode in MODES}
            for seed in seeds:
                runs: dict[Mode, Any] = {
                    mode: self._run(mode, step, self._settings(mode, recipe, seed), student, start)
                    for mode, step in steps.items()
                }
                found = figures(ppl_teacher, ptq, runs)
                minutes, begun = (time.perf_counter() - begun) / 60, time.perf_counter()
                yield self._named(recipe, seed) | found | {"minutes": minutes, "runs": runs}

    def _student(self, settings: RunSettings) -> Model:
        with jax.default_matmul_precision("highest"):
            return student_of("qad", settings, self.teacher)

    def _named(self, recipe: str | Path, seed: int) -> dict[str, Any]:
        plan, own = Recipe.load(recipe), self.settings
        tokens = own.steps * own.batch * own.length
        begin = self.begins.get(str(recipe), plan.name)
        name = {"format": format_name(plan), "recipe": plan.name, "begin": begin, "seed": seed}
        return name | {"train_tokens": tokens}

    def _settings(self, mode: Mode, recipe: str | Path, seed: int) -> RunSettings:
        losses = () if mode == "qat" else self.settings.losses
        own = {"recipe": str(recipe), "seed": seed, "losses": losses}
        rate = {"learning_rate": self.rates[mode]}
        optimizer = self.settings.optimizer.model_copy(update=rate)
        return self.settings.model_copy(update=own | {"optimizer": optimizer})

    def _step(self, mode: Mode, recipe: str | Path, student: Model) -> Step:
        settings = self._settings(mode, recipe, 0)
        return make_step(settings, settings.terms(mode), self.teacher.config, student.config)

    def _run(
        self, mode: Mode, step: Step, settings: RunSettings, student: Model, start: dict[str, Any]
    ) -> dict[str, Any]:
        title = f"{settings.recipe}, {mode}, seed {settings.seed}"
        own = step, settings, student, self.teacher, self.rows
        return trained(mode, *own, self.measure, start, title, self.progress)


def figures(
    ppl_teacher: float, ptq: Mapping[str, float], runs: Mapping[Mode, Mapping[str, Any]]
) -> dict[str, float]:
    """What PTQ gives, the ends of the curves, and what share of the way back QAD goes:

        kl_recovered = 1 - kl_qad / kl_ptq
        ppl_recovered = (ppl_ptq - ppl_qad) / (ppl_ptq - ppl_teacher)

    Args:
      ppl_teacher: perplexity of the unquantized model, which has no divergence from itself.
      ptq: measurement of the recipe's own quantized model.
      runs: the "curve" of each mode.
    """
    qat, qad = (runs[mode]["curve"][-1] for mode in MODES)
    lost, left = (found["perplexity"] - ppl_teacher for found in (ptq, qad))
    return {
        "ppl_teacher": ppl_teacher,
        "ppl_ptq": ptq["perplexity"],
        "ppl_qat": qat["perplexity"],
        "ppl_qad": qad["perplexity"],
        "kl_ptq": ptq["kl"],
        "kl_qat": qat["kl"],
        "kl_qad": qad["kl"],
        "kl_recovered": 1.0 - qad["kl"] / ptq["kl"],
        "ppl_recovered": 1.0 - left / lost,
    }


def _check(begins: Mapping[str, str]) -> None:
    for recipe, begin in begins.items():
        own, its = (format_name(Recipe.load(name)) for name in (recipe, begin))
        if own != its:
            raise UserError(
                f"training of {recipe!r} ({own}) cannot begin with {begin!r} ({its}); choose a "
                "recipe of the same format"
            )


def _protocol(
    settings: RunSettings,
    rates: Mapping[Mode, float],
    begins: Mapping[str, str],
    rows: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    told = training_protocol(settings, rows)
    del told["settings"]["optimizer"]["learning_rate"]
    return told | {"learning_rates": dict(rates), "begins": dict(begins)}
