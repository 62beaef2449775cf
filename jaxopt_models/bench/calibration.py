"""How long calibrating and quantizing takes here and with ModelOpt, on the same windows in one run.

CPUs differ from one another and from hour to hour, so seconds compare only within a run.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxopt_models import data
from jaxopt_models.bench.peer import alternately, circumstances, exchanged, run_peer
from jaxopt_models.bench.quality import compiling_anew
from jaxopt_models.checkpoint.load import load
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe

# Our preset -> (the peer's algorithm, windows of its protocol).
ALGORITHMS = {"int4_awq": ("awq", 16), "int4_gptq": ("gptq", 32)}


def bench_calibration(
    model: str,
    text: str,
    peer_python: str,
    *,
    recipes: Sequence[str] = tuple(ALGORITHMS),
    windows: int | None = None,
    length: int = 512,
    batch: int = 4,
    rounds: int = 2,
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Times presets and their counterparts in ModelOpt, alternating, and keeps each one's best.

    Both begin with a loaded model and end with quantized weights; ours includes compilation.

    Args:
      model, text: as in `jaxopt-models quantize`.
      peer_python: interpreter of an environment with nvidia-modelopt, torch and transformers.
      recipes: of `ALGORITHMS`.
      windows: of calibration; None takes the protocol's number for each recipe.
      length, batch: ids in a window, windows run at a time.
      rounds: how often each is timed.
      out: a .json file that is rewritten after each recipe.
      progress: wraps loops that take long.

    Returns:
      `{model, protocol, rows, device, versions, date}`, a row `{recipe, peer, windows, seconds,
      peer_seconds, ratio_to_peer, all_seconds}` for each recipe.

    Raises:
      UserError: if the peer cannot run, a recipe has no counterpart, or the text is too short.
    """
    unknown = [name for name in recipes if name not in ALGORITHMS]
    if unknown:
        raise UserError(
            f"{unknown[0]} has no counterpart to time; choose {' or '.join(ALGORITHMS)}"
        )
    loaded = load(model)
    corpus = data.load_text(text, "calibration")
    result: dict[str, Any] = {
        "model": model,
        "protocol": {"text": text, "length": length, "batch": batch, "rounds": rounds},
        "rows": [],
    }
    for name in recipes:
        count = windows or ALGORITHMS[name][1]
        batches = data.token_batches(loaded, corpus, count, length, batch)
        times, versions = _time(name, loaded, batches, peer_python, progress(range(rounds), name))
        row = {"recipe": name, "peer": f"ModelOpt {ALGORITHMS[name][0]}", "windows": count} | times
        result = result | {"rows": [*result["rows"], row]} | circumstances(versions)
        if out:
            write_json(out, result)
    return result


def _time(
    name: str,
    model: Model,
    batches: Sequence[np.ndarray],
    peer_python: str,
    rounds: Iterable[Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """(times of one recipe, see `alternately`; the peer's versions)."""
    with exchanged(model, batches) as (directory, tokens), compiling_anew():
        arguments = (directory, tokens, str(len(batches[0])), ALGORITHMS[name][0])
        _, best, times = alternately(
            lambda: jax.block_until_ready(quantize(model, Recipe.load(name), batches)[0]),
            lambda: run_peer(peer_python, "peer_calibration.py", arguments, "nvidia-modelopt"),
            rounds,
        )
    return times, best["versions"]
