"""The loop around a step: it logs, saves, evaluates, and stops a run that is lost.

The host never waits for a step that is running: it reads the metrics of the one before.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxopt_models.errors import UserError
from jaxopt_models.files import write_text
from jaxopt_models.progress import Progress, silent
from jaxopt_models.train.checkpoints import Checkpoints
from jaxopt_models.train.step import TrainState

Step = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]
Evaluate = Callable[[Any], Mapping[str, float]]  # of parameters


@dataclass(frozen=True)
class Pace:
    """How long a run is, and what happens how often, in steps.

    Attributes:
      steps: of the whole run, those before it was resumed included.
      log: a line of metrics, means since the line before.
      save: a checkpoint; one is saved at the end in any case.
      evaluate: before a checkpoint of the same step; None is at the end only.
      most_skipped: the run ends with an error when so many steps in a row were not finite.
    """

    steps: int
    log: int = 10
    save: int = 100
    evaluate: int | None = None
    most_skipped: int = 10


class Log:
    """Metrics as JSON lines, each with its "step".

    A file that is there is gone on with: lines of later steps, of a run that was killed after its
    last checkpoint, are dropped.
    """

    def __init__(
        self,
        file: Path | None,
        step: int = 0,
        also: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        """Begins a log, or goes on with one.

        Args:
          file: None keeps lines in memory alone.
          step: that the run is at.
          also: takes each line, too, in the first process.
        """
        self.lines: list[dict[str, Any]] = []
        self._file = file
        self._also = also
        if file is not None and file.exists():
            self.lines = list(_before(file, step))
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            if jax.process_index() == 0:
                write_text(file, text)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, **values}
        self.lines.append(line)
        if jax.process_index() != 0:
            return
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        if self._also is not None:
            self._also(step, values)


def _before(file: Path, step: int) -> Iterable[dict[str, Any]]:
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the line that was being written
            return
        if line["step"] > step:
            return
        yield line


def fit(
    step: Step,
    state: TrainState,
    batch: Callable[[int], Any],
    context: Any,
    pace: Pace,
    *,
    evaluate: Evaluate | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
    least_seconds: float | None = None,
    progress: Progress = silent,
) -> TrainState:
    """Trains from where a state is to the end of the run.

    Args:
      step: from `make_train_step`; takes the state's buffers over.
      batch: number of a step, from 0, -> its batch, on the devices or not. A function of the number
        alone makes a resumed run the same as one that was not interrupted.
      context: what the step reads besides, e.g. the teacher's parameters.
      pace: see there.
      evaluate: what to measure of parameters.
      checkpoints: where to save.
      log: takes lines: means of the step's metrics, weighted by "count", with "skipped" and "count"
        summed, "seconds", "tokens_per_second" of those counted, and "mfu", if the next argument is
        given; and what `evaluate` measures.
      least_seconds: of a step, if devices multiplied at their peak rate (`flops.least_seconds`).
      progress: wraps the loop.

    Returns:
      The state at the end.

    Raises:
      UserError: when too many steps in a row were skipped.
    """
    log = log or Log(None)
    window = _Window(least_seconds)
    begun = int(state.step)
    for number in progress(list(range(begun, pace.steps)), window.described):
        state, metrics = step(state, context, batch(number))
        skipped = window.add(metrics, state.skipped)
        if skipped >= pace.most_skipped:
            raise UserError(
                f"{skipped} steps in a row had a loss or a gradient that is not finite, the last "
                f"at step {number - 1}; lower the learning rate, or look at that batch"
            )
        done, last = number + 1, number + 1 == pace.steps
        if done % pace.log == 0 or last:
            log(done, window.means())
        measured = None
        if evaluate is not None and (last or (pace.evaluate and done % pace.evaluate == 0)):
            window.pause()
            measured = dict(evaluate(state.params))
            log(done, measured)
            window.restart()
        if checkpoints is not None and (last or done % pace.save == 0):
            checkpoints.save(state, measured)
    return state


class _Window:
    """Metrics since the last line. What is on the device is read one step late."""

    def __init__(self, least_seconds: float | None = None) -> None:
        self._least, self._steps = least_seconds, 0
        self._last: dict[str, float] = {}
        self._waiting: tuple[dict[str, jax.Array], jax.Array] | None = None
        self._sums: dict[str, float] = {}
        self._count = 0.0
        self._seconds, self._start = 0.0, time.perf_counter()

    def add(self, metrics: dict[str, jax.Array], skipped: jax.Array) -> int:
        """How many steps in a row were skipped before this one."""
        before, self._waiting = self._waiting, (metrics, skipped + 0)  # the next step takes it over
        self._steps += 1
        return self._take(before)

    def _take(self, waiting: tuple[dict[str, jax.Array], jax.Array] | None) -> int:
        if waiting is None:
            return 0
        metrics, skipped = jax.device_get(waiting)
        count, missed = float(metrics["count"]), float(metrics["skipped"])
        self._sums["skipped"] = self._sums.get("skipped", 0.0) + missed
        if not missed:
            self._count += count
            for name in metrics.keys() - {"count", "skipped"}:
                self._sums[name] = self._sums.get(name, 0.0) + count * float(metrics[name])
        return int(skipped)

    def means(self) -> dict[str, float]:
        """Those of the steps that were not skipped; begins anew."""
        self._take(self._waiting)
        self._waiting = None
        seconds = self._seconds + time.perf_counter() - self._start
        missed, count = self._sums.pop("skipped", 0.0), self._count
        means = {name: total / max(count, 1.0) for name, total in sorted(self._sums.items())}
        self._sums, self._count, self._seconds = {}, 0.0, 0.0
        self._start = time.perf_counter()
        rate = {"seconds": seconds, "tokens_per_second": count / seconds}
        if self._least is not None:
            rate["mfu"] = self._steps * self._least / seconds
        self._steps = 0
        self._last = means | {"count": count, "skipped": missed} | rate
        return dict(self._last)

    def described(self) -> str:
        """How it went up to the last line."""
        parts = ["training"]
        if "tokens_per_second" in self._last:
            parts.append(f"{self._last['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in self._last:
            parts.append(f"{self._last['mfu']:.0%} of the peak rate")
        return ", ".join(parts)

    def pause(self) -> None:
        """What comes now, until `restart`, is no training."""
        self._seconds += time.perf_counter() - self._start

    def restart(self) -> None:
        self._start = time.perf_counter()
