"""How long evaluating takes here and with transformers + torch, on the same windows in one run."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxopt_models import data
from jaxopt_models.checkpoint.export import export_hf
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import package_version
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate

_PEER = Path(__file__).with_name("peer_evaluation.py")


def bench_evaluation(
    model: str, text: str, windows: int, length: int, batch: int, peer_python: str, rounds: int = 2
) -> dict[str, Any]:
    """Times perplexity of a model by both libraries, alternating, and keeps each one's best.

    Ours includes compilation; the peer's excludes loading, as ours does.

    Args:
      model, text: as in `jaxopt-models eval`.
      windows, length, batch: the protocol's sizes.
      peer_python: interpreter of an environment with torch and transformers.
      rounds: how often each is timed.

    Returns:
      Both perplexities and seconds, their ratio, and what they ran on.

    Raises:
      UserError: if the peer cannot run.
    """
    loaded = load(model)
    batches = data.token_batches(loaded, data.load_text(text, "evaluation"), windows, length, batch)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        directory, tokens = Path(scratch) / "model", Path(scratch) / "windows.npy"
        export_hf(directory, loaded)
        np.save(tokens, np.concatenate(batches))
        for _ in range(rounds):
            jax.clear_caches()
            start = time.perf_counter()
            metrics = evaluate(loaded.config, loaded.params, batches)
            ours.append(time.perf_counter() - start)
            theirs.append(_run_peer(peer_python, directory, tokens, batch))
    best = min(theirs, key=lambda figures: figures["seconds"])
    return {
        "model": model,
        "protocol": {"text": text, "windows": windows, "length": length, "batch": batch},
        "perplexity": metrics.perplexity,
        "peer_perplexity": best["perplexity"],
        "seconds": min(ours),
        "peer_seconds": best["seconds"],
        "ratio_to_peer": min(ours) / best["seconds"],
        "all_seconds": {"ours": ours, "peer": [figures["seconds"] for figures in theirs]},
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].platform}",
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]}
        | {"jaxopt-models": package_version("jaxopt-models")}
        | best["versions"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def _run_peer(python: str, directory: Path, tokens: Path, batch: int) -> dict[str, Any]:
    command = [python, str(_PEER), str(directory), str(tokens), str(batch)]
    # The peer's environment is its own: what helps ours to import would mislead it.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise UserError(f"cannot run the peer's Python {python}: {error.strerror}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the peer failed under {python}: {reason}; install torch and transformers")
    return json.loads(done.stdout.strip().splitlines()[-1])
