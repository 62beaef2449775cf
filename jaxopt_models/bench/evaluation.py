"""How long evaluating takes here and with transformers + torch, on the same windows in one run."""

import time
from typing import Any

import jax

from jaxopt_models import data
from jaxopt_models.bench.peer import circumstances, exchanged, run_peer
from jaxopt_models.checkpoint.load import load
from jaxopt_models.evaluate import evaluate


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
    with exchanged(loaded, batches) as (directory, tokens):
        arguments = (directory, tokens, str(batch))
        for _ in range(rounds):
            jax.clear_caches()
            start = time.perf_counter()
            metrics = evaluate(loaded.config, loaded.params, batches)
            ours.append(time.perf_counter() - start)
            theirs.append(
                run_peer(peer_python, "peer_evaluation.py", arguments, "torch and transformers")
            )
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
    } | circumstances(best["versions"])
