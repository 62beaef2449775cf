"""How fast kernels are, beside their peers and beside what the device can do at all."""

import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import jax

from jaxopt_models.bench import kernel_timing
from jaxopt_models.bench.alone import alone
from jaxopt_models.bench.kernel_operations import OPERATIONS
from jaxopt_models.bench.kernel_peers import Figures, Peers
from jaxopt_models.bench.kernel_products import (
    Event,
    Problem,
    Setting,
    Tuning,
    operations,
    side_by_side,
)
from jaxopt_models.bench.kernel_results import KernelResults, row_line
from jaxopt_models.bench.kernel_timing import Dense
from jaxopt_models.bench.quality_results import device
from jaxopt_models.errors import UserError
from kernels_pallas.hopper import hopper_processors

# (N, K) of Llama 3.1's products: q/k/v together, output, gate/up together, down.
SHAPES = {
    "8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
ROWS = (1, 4, 8, 16, 64, 2048)
FORMATS = tuple(dict.fromkeys(form for op in OPERATIONS for form in op.formats))


@dataclass
class _Run:
    """What one call of `bench_kernels` carries along."""

    results: KernelResults
    say: Callable[[str], None]
    until: float | None
    longest: float = 0.0  # seconds that a step took
    failed: list[str] = field(default_factory=list)

    def stepped(self, start: float) -> None:
        self.longest = max(self.longest, time.monotonic() - start)

    def over(self) -> bool:
        """Whether another step might not end in time."""
        return self.until is not None and time.monotonic() + self.longest > self.until


def bench_kernels(
    shapes: Sequence[tuple[int, int]] = SHAPES["8b"],
    rows: Sequence[int] | None = None,
    formats: Sequence[str] = FORMATS,
    *,
    tune: Tuning | None = None,
    peer_python: str | None = None,
    peers: Sequence[str] = (),
    limit: float | None = None,
    jobs: int = 1,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times products of low-precision weights [N, K], ours and the peers' on the same sizes.

    A tiling comes from the tables of tilings, else it is the kernel's default.

    Args:
      shapes: of weights.
      rows: M, numbers of rows; None takes those of `ROWS` that some kernel supports.
      formats: of weights.
      tune: tries several tilings and keeps the fastest.
      peer_python: interpreter of an environment with torch; None takes this one if it has torch.
      peers: names of those to time; all if empty, none for ["none"].
      limit: seconds after which no further product is begun that might not end in time.
      jobs: processes that compile kernels; on the GPU they take turns.
      out: a .json file, gone on with if it is there, rewritten after each row.
      say: is told each row and whatever goes wrong.

    Returns:
      `{ceilings, least_us, rows, failures, device, versions, peers, date}`, a row `{op, kernel,
      format, M, K, N, us, read_fraction, flop_fraction, bf16_us, best_peer, best_peer_us,
      weight_bytes, rate, tiling, peers}` for each product. `bf16_us` is XLA's; peers are those with
      the row's format, and torch in bfloat16.

    Raises:
      UserError: without a Hopper GPU, for a format or M that no kernel takes, or, once everything
        else is done, if products could not be timed.
    """
    start = time.monotonic()
    rows = _checked(rows, formats, say)
    processors = hopper_processors()
    if processors is None:
        raise UserError(f"bench kernels needs a Hopper GPU; the default device is {device()}")
    until = None if limit is None else start + limit
    setting = Setting(processors, jax.devices()[0].device_kind, tune, until)
    run = _Run(KernelResults(out), say, until)
    problems = _problems(shapes, rows, formats)
    with side_by_side(jobs, setting, problems) as timed, ExitStack() as stack:
        theirs: list[Peers] = []
        if list(peers) == ["none"]:
            run.results.peers = {"skipped": "not asked for"}
        else:
            theirs = _started(stack, jobs, peer_python, peers, until, say)
        _measure_ceilings(run, processors, theirs)
        _ours(run, timed, problems, _baselines(run, problems))
        _beside(run, theirs, problems)
    run.results.save()
    if run.failed:
        raise UserError(f"{len(run.failed)} products could not be timed, first {run.failed[0]}")
    return run.results.document()


def _checked(
    rows: Sequence[int] | None, formats: Sequence[str], say: Callable[[str], None]
) -> Sequence[int]:
    unknown = [form for form in formats if form not in FORMATS]
    if unknown:
        raise UserError(f"no kernel for {unknown[0]}; choose {', '.join(FORMATS)}")
    missing = [(form, m) for form in formats for m in rows or ROWS if not list(operations(form, m))]
    if missing and rows is not None:
        form, m = missing[0]
        raise UserError(f"no kernel takes {m} rows with {form} weights; choose another --rows")
    for form, m in missing:
        say(f"no kernel takes {m} rows with {form} weights: left out")
    return rows or ROWS


def _problems(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], formats: Sequence[str]
) -> list[Problem]:
    found = []
    for (n, k), form in product(shapes, formats):
        taken = tuple(m for m in rows if any(operations(form, m)))
        found += [Problem(form, n, k, taken)] if taken else []
    return found


def _started(stack: ExitStack, count: int, *options: Any) -> list[Peers]:
    """As many processes of peers, of which each begins with its first problem."""
    first = stack.enter_context(Peers(*options))
    more = count - 1 if first.skipped is None else 0
    return [first, *(stack.enter_context(Peers(*options)) for _ in range(more))]


def _measure_ceilings(run: _Run, processors: int, theirs: Sequence[Peers]) -> None:
    with alone():
        run.results.raise_ceilings(kernel_timing.ceilings(run.say))
        run.results.lower_least(kernel_timing.least_microseconds(processors))
        for one in theirs[:1]:
            run.results.raise_ceilings(one.ceilings())
    run.results.save()
    ceilings = ", ".join(f"{name} {value:.4g}" for name, value in run.results.ceilings.items())
    run.say(f"ceilings: {ceilings}; no kernel takes less than {run.results.least_us:.2f} us")


def _baselines(run: _Run, problems: Sequence[Problem]) -> dict[tuple[int, int, int], float]:
    """Microseconds of XLA's bfloat16 by (N, K, M), as far as the time allows."""
    found = {}
    for (n, k), rows in _rows_of_shapes(problems).items():
        if run.over():
            run.say(f"the limit is reached before {n} x {k} in bfloat16; finished rows are kept")
            break
        begun = time.monotonic()
        with alone():  # the compiler times kernels as well
            dense = Dense(n, k)
            found |= {(n, k, m): dense.microseconds(m) for m in rows}
        run.stepped(begun)
    return found


def _rows_of_shapes(problems: Sequence[Problem]) -> dict[tuple[int, int], list[int]]:
    rows: dict[tuple[int, int], set[int]] = {}
    for problem in problems:
        rows.setdefault((problem.n, problem.k), set()).update(problem.rows)
    return {shape: sorted(ms) for shape, ms in rows.items()}


def _ours(
    run: _Run,
    timed: Callable[[Problem], Iterable[Event]],
    problems: Sequence[Problem],
    bf16: dict[tuple[int, int, int], float],
) -> None:
    """Takes in what is found of those that have a baseline."""
    for problem in problems:
        if any((problem.n, problem.k, m) not in bf16 for m in problem.rows):
            return
        if run.over():
            what = f"{problem.format} {problem.n} x {problem.k}"
            run.say(f"the limit is reached before {what}; finished rows are kept")
            return
        begun = time.monotonic()
        for event in timed(problem):
            run.stepped(begun)
            if isinstance(event, str):
                run.say(event)
            elif "reason" in event:
                _failed(run, event)
            else:
                row = event | {"bf16_us": bf16[problem.n, problem.k, event["M"]]}
                run.say(row_line(run.results.add(row), run.results.ceilings))
            begun = time.monotonic()


def _beside(run: _Run, theirs: Sequence[Peers], problems: Sequence[Problem]) -> None:
    """Has peers time the same products, several at work on different ones."""
    if not theirs:
        return
    shapes = _rows_of_shapes(problems).items()
    bf16 = [Problem("bf16", *shape, tuple(rows)) for shape, rows in shapes]
    idle: queue.SimpleQueue[Peers] = queue.SimpleQueue()
    for one in theirs:
        idle.put(one)

    def figures(problem: Problem) -> Figures:
        one = idle.get()
        try:
            return one.time(problem.format, problem.n, problem.k, problem.rows)
        finally:
            idle.put(one)

    with ThreadPoolExecutor(len(theirs)) as threads:
        futures = {threads.submit(figures, one): one for one in [*bf16, *problems]}
        for future in as_completed(futures):
            problem = futures[future]
            run.results.set_beside(problem.format, problem.n, problem.k, future.result())
    about = [one.about for one in theirs if one.about]
    run.results.peers = {**(about[0] if about else {}), "skipped": theirs[0].skipped}


def _failed(run: _Run, event: dict[str, Any]) -> None:
    where = "{kernel} {format} {N} x {K}, M = {M}: {reason}".format_map(event)
    run.failed.append(where)
    run.say(where)
    run.results.fail(event)
