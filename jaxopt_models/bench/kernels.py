"""How fast kernels are, beside their peers and beside what the device can do at all."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.bench import kernel_timing
from jaxopt_models.bench.kernel_operations import OPERATIONS, Operation, nearest
from jaxopt_models.bench.kernel_peers import Figures, Peers
from jaxopt_models.bench.kernel_results import KernelResults, best_peer, row_line
from jaxopt_models.bench.kernel_timing import Dense, copies, microseconds
from jaxopt_models.bench.quality_results import device
from jaxopt_models.errors import UserError
from kernels_pallas import tuning
from kernels_pallas.hopper import hopper_processors

# (N, K) of Llama 3.1's products: q/k/v together, output, gate/up together, down.
SHAPES = {
    "8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
ROWS = (1, 4, 8, 16, 64, 2048)
FORMATS = tuple(dict.fromkeys(form for op in OPERATIONS for form in op.formats))
_TOLERANCE = 0.01  # two roundings to bfloat16, with room
_CANDIDATES = 8  # tilings that are tried for a product, unless all are


@dataclass
class Tuning:
    """Which tilings to try.

    Attributes:
      exhaustive: every candidate, instead of the few nearest to the one that is known.
      table: file that the fastest go to; None is the user's own for this device.
    """

    exhaustive: bool = False
    table: Path | None = None


@dataclass
class _Run:
    """What one call of `bench_kernels` carries along."""

    results: KernelResults
    processors: int
    name: str  # of the device
    tuning: Tuning | None
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
      out: a .json file, gone on with if it is there, rewritten after each row.
      say: is told each row and whatever goes wrong.

    Returns:
      `{ceilings, rows, failures, device, versions, peers, date}`, a row `{op, kernel, format, M, K,
      N, us, read_fraction, flop_fraction, bf16_us, best_peer, best_peer_us, weight_bytes, rate,
      tiling, peers}` for each product. `bf16_us` is XLA's; peers are those with the row's format,
      and torch in bfloat16.

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
    name = jax.devices()[0].device_kind
    run = _Run(KernelResults(out), processors, name, tune, say, until)
    none = list(peers) == ["none"]
    with Peers(peer_python, () if none else peers, until, say) as theirs:
        if none:
            theirs.skipped = "not asked for"
        _measure_ceilings(run, theirs)
        _all_products(run, theirs, shapes, rows, formats)
        run.results.peers = theirs.about | {"skipped": theirs.skipped}
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
    missing = [
        (form, m) for form in formats for m in rows or ROWS if not list(_operations(form, m))
    ]
    if missing and rows is not None:
        form, m = missing[0]
        raise UserError(f"no kernel takes {m} rows with {form} weights; choose another --rows")
    for form, m in missing:
        say(f"no kernel takes {m} rows with {form} weights: left out")
    return rows or ROWS


def _operations(form: str, m: int) -> Iterator[Operation]:
    return (op for op in OPERATIONS if form in op.formats and op.supports(m))


def _measure_ceilings(run: _Run, theirs: Peers) -> None:
    run.results.raise_ceilings(kernel_timing.ceilings(run.say))
    run.results.raise_ceilings(theirs.ceilings())
    run.results.save()
    ceilings = ", ".join(f"{name} {value:.4g}" for name, value in run.results.ceilings.items())
    run.say(f"ceilings: {ceilings}")


def _all_products(
    run: _Run,
    theirs: Peers,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    formats: Sequence[str],
) -> None:
    for n, k in shapes:
        wanted = {form: [m for m in rows if any(_operations(form, m))] for form in formats}
        ms = [m for m in rows if any(m in some for some in wanted.values())]
        if run.over():
            return run.say(f"the limit is reached before {n} x {k}; finished rows are kept")
        begun = time.monotonic()
        dense = Dense(n, k)
        bf16 = {m: dense.microseconds(m) for m in ms}
        del dense
        peers_bf16 = theirs.time("bf16", n, k, ms)
        run.stepped(begun)
        for form in formats:
            if not wanted[form]:
                continue
            if run.over():
                return run.say(f"the limit is reached at {form} {n} x {k}; finished rows are kept")
            begun = time.monotonic()
            figures = theirs.time(form, n, k, wanted[form])
            run.stepped(begun)
            run.results.peers = theirs.about | {"skipped": theirs.skipped}
            beside = {m: peers_bf16.get(m, {}) | figures.get(m, {}) for m in wanted[form]}
            if not _products(run, form, (n, k), bf16, beside):
                return None
    return None


def _products(
    run: _Run, form: str, shape: tuple[int, int], bf16: dict[int, float], beside: Figures
) -> bool:
    """Times one weight with several numbers of rows; False if the limit is reached."""
    made: dict[Any, list[Any]] = {}
    for m, figures in beside.items():
        for operation in _operations(form, m):
            where = f"{operation.kernel} {form} {shape[0]} x {shape[1]}, M = {m}"
            if run.over():
                run.say(f"the limit is reached before {where}; finished rows are kept")
                return False
            begun = time.monotonic()
            row: dict[str, Any] = {"op": operation.op, "kernel": operation.kernel, "format": form}
            row |= {"M": m, "K": shape[1], "N": shape[0]}
            try:
                if operation.weight not in made:
                    made[operation.weight] = _rotating(operation, form, shape)
                weights = made[operation.weight]
                us, tiling = _fastest(run, operation, form, m, weights)
                row |= {"us": us, "bf16_us": bf16[m]} | best_peer(figures)
                row |= {"weight_bytes": _bytes(weights[0]), "rate": operation.rate}
                run.results.add(row | {"tiling": asdict(tiling), "peers": figures})
                run.say(row_line(row, run.results.ceilings))
            except Exception as error:  # a kernel's failure must not lose the others
                run.failed.append(f"{where}: {_reason(error)}")
                run.say(run.failed[-1])
                run.results.fail(row | {"reason": _reason(error)})
            run.stepped(begun)
    return True


def _fastest(
    run: _Run, operation: Operation, form: str, m: int, weights: list[Any]
) -> tuple[float, Any]:
    """Times the known tiling or, when tuning, several; what is fastest is remembered."""
    n, k = weights[0].shape
    known = operation.best_known(m, form, weights[0], run.processors, run.name)
    if known is None:
        raise UserError(f"no tiling of {operation.kernel} fits {n} x {k} with {m} rows")
    x = operation.activations(m, k)
    candidates = [known]
    if run.tuning is not None:
        count = None if run.tuning.exhaustive else _CANDIDATES
        candidates = nearest(known, operation.candidates(m, weights[0]), count)
    timed: list[tuple[float, Any]] = []
    begun = time.monotonic()
    for tried, tiling in enumerate(candidates):
        each = (time.monotonic() - begun) / max(tried, 1)
        if timed and run.until is not None and time.monotonic() + each > run.until:
            break
        product = operation.with_tiling(tiling, run.processors)
        try:
            timed.append((microseconds(product, x, weights), tiling))
        except Exception as error:
            if len(candidates) == 1:
                raise
            run.say(f"{tiling} is passed over: {_reason(error)}")
    if not timed:
        raise UserError(f"none of {len(candidates)} tilings of {operation.kernel} could be timed")
    best = min(timed, key=lambda pair: pair[0])
    _check(operation, best[1], run.processors, x, weights[0])
    if run.tuning is not None:
        problem = tuning.Problem(operation.kernel, form, tuning.bucket(m), n, k)
        file = run.tuning.table or tuning.cache_file(run.name)
        tuning.remember({problem: asdict(best[1])}, file)
    return best


def _check(operation: Operation, tiling: Any, processors: int, x: Any, weight: Any) -> None:
    """Refuses figures of a wrong product."""
    found = operation.with_tiling(tiling, processors)(x, weight).astype(jnp.float32)
    expected = operation.reference(x, weight).astype(jnp.float32)
    error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    if not error <= _TOLERANCE:
        raise UserError(f"{tiling} has a relative error of {error:.2g}, tolerated {_TOLERANCE}")


def _rotating(operation: Operation, form: str, shape: tuple[int, int]) -> list[Any]:
    one = operation.weight(jax.random.key(0), form, *shape)
    keys = jax.random.split(jax.random.key(1), copies(_bytes(one)) - 1)
    return [one, *(operation.weight(key, form, *shape) for key in keys)]


def _bytes(weight: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weight))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
