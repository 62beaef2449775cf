"""Running a peer in an environment of its own, on the same model and the same windows."""

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jaxopt_models.bench.quality_results import device, today
from jaxopt_models.checkpoint.export import export_hf
from jaxopt_models.checkpoint.native import package_version
from jaxopt_models.errors import UserError
from jaxopt_models.models.model import Model


@contextmanager
def exchanged(model: Model, batches: Sequence[np.ndarray]) -> Iterator[tuple[str, str]]:
    """Writes a model as a Hugging Face directory and windows as .npy, for as long as it lasts.

    Yields:
      (directory, file).
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory, windows = Path(scratch) / "model", Path(scratch) / "windows.npy"
        export_hf(directory, model)
        np.save(windows, np.concatenate(batches))
        yield str(directory), str(windows)


def run_peer(python: str, script: str, arguments: Sequence[str], packages: str) -> dict[str, Any]:
    """What a script beside this file prints as its last line, one JSON object.

    Args:
      python: interpreter of the peer's environment.
      script: file name; it imports nothing of this package.
      arguments: of the script.
      packages: what that environment must hold, for the error.

    Raises:
      UserError: if it cannot be run or fails.
    """
    command = [python, str(Path(__file__).with_name(script)), *arguments]
    # The peer's environment is its own: what helps ours to import would mislead it.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise UserError(f"cannot run the peer's Python {python}: {error.strerror}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the peer failed under {python}: {reason}; install {packages}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternately[T](
    ours: Callable[[], T], theirs: Callable[[], dict[str, Any]], rounds: Iterable[Any]
) -> tuple[T, dict[str, Any], dict[str, Any]]:
    """Times ours, compilation included, and runs the peer, one after the other in each round.

    Args:
      ours: what to time; it returns when it is done.
      theirs: runs the peer, which says its own seconds.
      rounds: iterated over once.

    Returns:
      (what ours gave last, the peer's fastest figures, `{seconds, peer_seconds, ratio_to_peer,
      all_seconds}` with the best of each).
    """
    seconds, figures, result = [], [], None
    for _ in rounds:
        jax.clear_caches()
        start = time.perf_counter()
        result = ours()
        seconds.append(time.perf_counter() - start)
        figures.append(theirs())
    best = min(figures, key=lambda run: run["seconds"])
    times = {
        "seconds": min(seconds),
        "peer_seconds": best["seconds"],
        "ratio_to_peer": min(seconds) / best["seconds"],
        "all_seconds": {"ours": seconds, "peer": [run["seconds"] for run in figures]},
    }
    return cast(T, result), best, times


def circumstances(peer_versions: dict[str, str]) -> dict[str, Any]:
    """Device, versions and date of a measurement."""
    names = ("jax", "jaxopt-models")
    versions = {"python": platform.python_version()} | {n: package_version(n) for n in names}
    return {"device": device(), "versions": versions | peer_versions, "date": today()}
