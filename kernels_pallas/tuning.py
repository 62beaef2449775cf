"""Tilings that were fastest where somebody timed them: the user's own, then those shipped.

A tiling is looked up by device, operation, format, N, K and the bucket of M; up to 8 rows the entry
for the next larger bucket will do, if there is one. The user's file,
`tilings_<device>.json` in `$JAXOPT_MODELS_CACHE`, `$XDG_CACHE_HOME/jaxopt-models` or
`~/.cache/jaxopt-models`, comes before `tilings/<device>.json` beside this module. Without an entry
in either, a kernel's default estimate has to do. One entry is one line:

{"operation": "w4a16_decode", "kind": "int4", "m": 8, "n": 4096, "k": 4096, "tiling": {"wn": 2}}
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

_SHIPPED = Path(__file__).with_name("tilings")
_MOST = 16384
_FEW = (2, 4, 8)  # buckets whose entries will do for fewer rows


@dataclass(frozen=True, order=True)
class Problem:
    """What a tiling is for.

    Attributes:
      operation: name of the kernel.
      kind: format of the weight.
      m: rows of activations, a value of `bucket`.
      n: rows of the weight.
      k: columns of the weight.
    """

    operation: str
    kind: str
    m: int
    n: int
    k: int


def bucket(m: int) -> int:
    """The power of two to 16384 that stands for `m` rows: the next one, or the last."""
    return min(1 << (m - 1).bit_length(), _MOST)


def find[T](
    make: Callable[..., T],
    operation: str,
    kind: str,
    m: int,
    n: int,
    k: int,
    device: str,
    fits: Callable[[T], bool] = lambda tiling: True,
) -> T | None:
    """The tiling that was fastest for a product.

    Args:
      make: takes the entry's fields by name; it raises TypeError or ValueError for those that it
        cannot use, as a dataclass does.
      operation: name of the kernel.
      kind: format of the weight.
      m: rows of activations.
      n: rows of the weight.
      k: columns of the weight.
      device: as JAX names it, e.g. "NVIDIA H100 80GB HBM3".
      fits: whether the kernel can use it.

    Returns:
      What `make` gives; None if neither file has an entry.

    Raises:
      ValueError: for a file that cannot be read, or an entry that the kernel no longer takes.
    """
    first = bucket(m)
    buckets = [first, *(larger for larger in _FEW if larger > first)]
    problems = [Problem(operation, kind, one, n, k) for one in buckets]
    for path, problem in product((cache_file(device), shipped_file(device)), problems):
        fields = _load(path).get(problem)
        if fields is None:
            continue
        try:
            tiling = make(**fields)
            if not fits(tiling):
                raise ValueError("it does not fit")
            return tiling
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} has a tiling {fields} for {operation} {kind}, M to {problem.m}, {n} x {k} "
                f"that this version does not take ({error}); remove that line and tune again"
            ) from error
    return None


def remember(tilings: Mapping[Problem, Mapping[str, int]], path: Path) -> None:
    """Adds entries to a file, in place of those for the same problems.

    The file appears whole or not at all, and writers wait for one another.

    Raises:
      ValueError: if the file is there and cannot be read as one of tilings.
      OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        merged = _read(path) | {problem: dict(fields) for problem, fields in tilings.items()}
        lines = [
            json.dumps(asdict(problem) | {"tiling": merged[problem]}) for problem in sorted(merged)
        ]
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        os.replace(temporary, path)
    _load.cache_clear()


def cache_file(device: str) -> Path:
    """The user's file for a device."""
    own, shared = os.environ.get("JAXOPT_MODELS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        folder = Path(own)
    else:
        folder = (Path(shared) if shared else Path.home() / ".cache") / "jaxopt-models"
    return folder / f"tilings_{slug(device)}.json"


def shipped_file(device: str) -> Path:
    """The file for a device that comes with this package, if there is one."""
    return _SHIPPED / f"{slug(device)}.json"


def slug(device: str) -> str:
    """A device's name for file names: "NVIDIA H100 80GB HBM3" is nvidia_h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


@lru_cache
def _load(path: Path) -> dict[Problem, dict[str, int]]:
    return _read(path)


def _read(path: Path) -> dict[Problem, dict[str, int]]:
    try:
        return dict(map(_entry, json.loads(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no file of tilings ({type(error).__name__}: {error}); remove it and tune "
            "again"
        ) from error


def _entry(line: dict[str, Any]) -> tuple[Problem, dict[str, int]]:
    fields = line["tiling"]
    problem = Problem(**{name: value for name, value in line.items() if name != "tiling"})
    numbers = [problem.m, problem.n, problem.k, *fields.values()]
    if any(type(number) not in (int, bool) for number in numbers):
        raise ValueError(f"{line} has a size that is no integer")
    if problem.m != bucket(problem.m):
        raise ValueError(f"{line} has an m that is no power of two to {_MOST}")
    return problem, fields


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process is in here for the same file."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        yield
