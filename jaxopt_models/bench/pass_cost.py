"""What guessing costs on a model of a published shape, in passes of plain generation.

Weights, prompts and an EAGLE-3 head are random, so that hardly a guess is accepted; shapes do not
depend on that, and neither do times. A pass checks K + 1 tokens a row. An n-gram is found in no
time that counts, so that its pass is the check alone, and what the head's pass takes longer is the
head:

    verify_cost = seconds of a pass with n-grams / seconds of a plain one
    draft_cost  = seconds of a pass with the head / seconds of a plain one - verify_cost
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.bench.decode import MODELS, check_names, random_params
from jaxopt_models.bench.peer import circumstances
from jaxopt_models.bench.quality_results import device_file
from jaxopt_models.bench.speculative import Setting, run_all
from jaxopt_models.files import write_json
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.speculative import NGram, Target, init_eagle3
from jaxopt_models.train.draft_job import as_saved

_VOCABULARY = 32768  # tokens that the head may say, at most; as published heads


def bench_pass_cost(
    model: str = "llama-8b",
    formats: Sequence[str] = ("bf16",),
    batches: Sequence[int] = (1,),
    counts: Sequence[int] = (7,),
    *,
    prompt_tokens: int = 1024,
    new_tokens: int = 65,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times passes with guesses beside plain ones.

    Args:
      model: a key of `decode.MODELS`.
      formats: of the decoder's matrices, as in `decode.bench_decode`.
      batches: rows at a time.
      counts: tokens of a guess.
      prompt_tokens: of each row.
      new_tokens: of each row; the prompt's pass gives the first.
      out: a .json file or a directory for `pass_cost_<device>.json`, rewritten after each row.
      say: takes a line for each row.

    Returns:
      `{rows, device, versions, date}`, a row `{model, format, batch, context, K, plain_ms,
      verify_cost, draft_cost}` each.

    Raises:
      UserError: for an unknown model or format.
    """
    check_names(model=[model], format=formats)
    config = replace(ModelConfig.from_hf(MODELS[model]), dtype="bfloat16")
    draws = np.random.default_rng(0).integers(config.vocab_size, size=(max(batches), prompt_tokens))
    settings = [Setting(batch, 0.0, new_tokens) for batch in batches]
    context = prompt_tokens + new_tokens
    result: dict[str, Any] = {"rows": []} | circumstances({})
    file = out and device_file(out, "pass_cost")
    for format in formats:
        params = random_params(config, format, "bf16", "bf16")
        vocabulary = jnp.arange(min(_VOCABULARY, config.vocab_size))
        head = init_eagle3(Target(config, params), jax.random.key(1), vocabulary=vocabulary)
        head = replace(head, params=as_saved(head.params))
        for setting in settings:
            run = partial(run_all, config, params, draws[: setting.batch].tolist(), setting=setting)
            plain = run(drafter=None).seconds_per_pass
            for count in counts:
                check, whole = (
                    run(drafter=drafter).seconds_per_pass
                    for drafter in (NGram(count), replace(head, count=count))
                )
                row = {"model": model, "format": format, "batch": setting.batch, "context": context}
                row |= {"K": count, "plain_ms": plain * 1e3}
                row |= {"verify_cost": check / plain, "draft_cost": (whole - check) / plain}
                result["rows"].append(row)
                say(row_line(row))
                if file:
                    write_json(file, result)
        del params, head  # before the next ones are made
        gc.collect()
    return result


def row_line(row: dict[str, Any]) -> str:
    """A row as a sentence, for those who watch."""
    return (
        f"{row['model']} {row['format']}, batch {row['batch']}: a plain pass takes "
        f"{row['plain_ms']:.3f} ms, one that checks {row['K'] + 1} tokens {row['verify_cost']:.2f} "
        f"of it, guesses of an EAGLE-3 head {row['draft_cost']:.2f} more"
    )
