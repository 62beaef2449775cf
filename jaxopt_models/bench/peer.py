"""Running a peer in an environment of its own, on the same model and the same windows."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

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


def circumstances(peer_versions: dict[str, str]) -> dict[str, Any]:
    """Device, versions and date of a measurement."""
    return {
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].platform}",
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]}
        | {"jaxopt-models": package_version("jaxopt-models")}
        | peer_versions,
        "date": datetime.now(UTC).date().isoformat(),
    }
