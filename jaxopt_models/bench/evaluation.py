"""How long evaluating takes here and with transformers + torch, on the same windows in one run."""

from typing import Any

from jaxopt_models import data
from jaxopt_models.bench.peer import alternately, circumstances, exchanged, run_peer
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
    with exchanged(loaded, batches) as (directory, tokens):
        arguments, needs = (directory, tokens, str(batch)), "torch and transformers"
        metrics, best, times = alternately(
            lambda: evaluate(loaded.config, loaded.params, batches),
            lambda: run_peer(peer_python, "peer_evaluation.py", arguments, needs),
            range(rounds),
        )
    return {
        "model": model,
        "protocol": {"text": text, "windows": windows, "length": length, "batch": batch},
        "perplexity": metrics.perplexity,
        "peer_perplexity": best["perplexity"],
        **times,
    } | circumstances(best["versions"])
