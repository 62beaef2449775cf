"""The times of our products with one weight, here or in processes that compile side by side."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.bench.alone import LOCK, alone
from jaxopt_models.bench.kernel_operations import OPERATIONS, Operation, nearest
from jaxopt_models.bench.kernel_timing import copies, measured
from jaxopt_models.errors import UserError
from kernels_pallas import tuning

_TOLERANCE = 0.01  # two roundings to bfloat16, with room
_CANDIDATES = 8  # tilings that are tried for a product, unless all are


@dataclass(frozen=True)
class Tuning:
    """Which tilings to try.

    Attributes:
      exhaustive: every candidate, instead of the few nearest to the one that is known.
      table: file that the fastest go to; None is the user's own for this device.
    """

    exhaustive: bool = False
    table: Path | None = None


@dataclass(frozen=True)
class Problem:
    """Products with a weight [n, k] in a format, of several numbers of rows."""

    format: str
    n: int
    k: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What all products of a run have in common.

    Attributes:
      processors: streaming multiprocessors of the device.
      name: of the device.
      tuning: None takes the known tilings.
      until: by `time.monotonic`, when nothing more is begun; None is never.
    """

    processors: int
    name: str
    tuning: Tuning | None
    until: float | None


# A row with its `us`, a product that failed with its `reason`, or a line for who watches.
Event = dict[str, Any] | str


def operations(form: str, m: int) -> Iterator[Operation]:
    """Those that take M rows with weights in a format."""
    return (op for op in OPERATIONS if form in op.formats and op.supports(m))


def products(setting: Setting, problem: Problem) -> Iterator[Event]:
    """Times every product of a problem, one after the other, until the time is over."""
    made: dict[Any, list[Any]] = {}
    longest = 0.0  # seconds that a product took
    shape = problem.n, problem.k
    for m in problem.rows:
        for operation in operations(problem.format, m):
            begun = time.monotonic()
            if setting.until is not None and begun + longest > setting.until:
                where = f"{operation.kernel} {problem.format} {shape[0]} x {shape[1]}, M = {m}"
                yield f"the limit is reached before {where}; finished rows are kept"
                return
            row: dict[str, Any] = {"op": operation.op, "kernel": operation.kernel}
            row |= {"format": problem.format, "M": m, "K": problem.k, "N": problem.n}
            try:
                if operation.weight not in made:
                    made[operation.weight] = _rotating(operation, problem.format, shape)
                weights = made[operation.weight]
                us, tiling, passed = _fastest(setting, operation, problem.format, m, weights)
                yield from passed
                row |= {"us": us, "weight_bytes": _bytes(weights[0]), "rate": operation.rate}
                yield row | {"tiling": asdict(tiling)}
            except Exception as error:  # a kernel's failure must not lose the others
                yield row | {"reason": _reason(error)}
            longest = max(longest, time.monotonic() - begun)


@contextmanager
def side_by_side(
    jobs: int, setting: Setting, problems: Sequence[Problem]
) -> Iterator[Callable[[Problem], Iterable[Event]]]:
    """`products` of all problems, begun at once in several processes.

    Compiling takes most of the time, and a process can compile one kernel at a time. What runs on
    the GPU does so `alone`. Device memory must have room for several processes; they take and
    return it piece by piece.

    Args:
      jobs: processes; with one of them everything is done in this process when it is asked for.
      setting: of all.
      problems: all that will be asked for, in that order.

    Yields:
      Problem -> its events.
    """
    if jobs == 1:
        yield partial(products, setting)
        return
    with tempfile.NamedTemporaryFile() as lock, _environment(lock.name):
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
        futures = {p: pool.submit(_all_products, setting, p) for p in problems}
        try:
            yield lambda problem: futures[problem].result()
        finally:  # what has begun would disturb what is timed next
            pool.shutdown(cancel_futures=True)


@contextmanager
def _environment(lock: str) -> Iterator[None]:
    """Variables for processes that share a GPU."""
    own = {LOCK: lock, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _all_products(setting: Setting, problem: Problem) -> list[Event]:
    return list(products(setting, problem))


def _fastest(
    setting: Setting, operation: Operation, form: str, m: int, weights: list[Any]
) -> tuple[float, Any, list[str]]:
    """Times the known tiling or, when tuning, several; what is fastest is remembered.

    Returns:
      (microseconds, tiling, a line for each tiling that could not be timed).
    """
    n, k = weights[0].shape
    known = operation.best_known(m, form, weights[0], setting.processors, setting.name)
    if known is None:
        raise UserError(f"no tiling of {operation.kernel} fits {n} x {k} with {m} rows")
    x = operation.activations(m, k)
    candidates = [known]
    if setting.tuning is not None:
        count = None if setting.tuning.exhaustive else _CANDIDATES
        candidates = nearest(known, operation.candidates(m, weights[0]), count)
    timed: list[tuple[float, Any, Any]] = []
    passed: list[str] = []
    begun = time.monotonic()
    for tried, tiling in enumerate(candidates):
        each = (time.monotonic() - begun) / max(tried, 1)
        if timed and setting.until is not None and time.monotonic() + each > setting.until:
            break
        product = operation.with_tiling(tiling, setting.processors)
        try:
            us, found = measured(product, x, weights)
            timed.append((us, tiling, found))
        except Exception as error:
            if len(candidates) == 1:
                raise
            passed.append(f"{tiling} is passed over: {_reason(error)}")
    if not timed:
        raise UserError(f"none of {len(candidates)} tilings of {operation.kernel} could be timed")
    us, tiling, found = min(timed, key=lambda one: one[0])
    error = _error(operation, found, x, weights[0])
    if not error <= _TOLERANCE:
        raise UserError(f"{tiling} has a relative error of {error:.2g}, tolerated {_TOLERANCE}")
    if setting.tuning is not None:
        problem = tuning.Problem(operation.kernel, form, tuning.bucket(m), n, k)
        file = setting.tuning.table or tuning.cache_file(setting.name)
        tuning.remember({problem: asdict(tiling)}, file)
    return us, tiling, passed


def _error(operation: Operation, found: jax.Array, x: Any, weight: Any) -> float:
    """Relative, of a product."""

    def error(found: jax.Array, x: Any, weight: Any) -> jax.Array:
        expected = operation.reference(x, weight).astype(jnp.float32)
        return jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)

    # A compiler that times its own kernels would disturb the others.
    options = {"xla_gpu_autotune_level": 0}
    compiled = jax.jit(error).lower(found, x, weight).compile(options)
    with alone():
        return float(compiled(found, x, weight))


def _rotating(operation: Operation, form: str, shape: tuple[int, int]) -> list[Any]:
    key = jax.random.key(0)
    make = jax.jit(lambda key: operation.weight(key, form, *shape)).lower(key).compile()
    with alone():
        one = make(key)
        keys = jax.random.split(jax.random.key(1), copies(_bytes(one)) - 1)
        return jax.block_until_ready([one, *map(make, keys)])


def _bytes(weight: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weight))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
