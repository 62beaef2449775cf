"""Whether kernels say the same: greedy tokens of prepared parameters beside those of the reference.

Two ways to round the same numbers choose different tokens where the two most likely ones are close.
So each difference is listed with the margin between the tokens, and beside it the noise that
bfloat16 itself makes there: how far the reference's logits are from its own in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import data
from jaxopt_models.bench.quality_results import device, device_file, today
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import package_version
from jaxopt_models.files import write_json
from jaxopt_models.generate import generate
from jaxopt_models.inference import prepare
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward
from jaxopt_models.progress import Progress, silent
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe

RECIPES = ("int4", "nvfp4_weight_only", "mxfp4_weight_only", "fp8_dynamic", "int8")


@dataclass(frozen=True)
class Difference:
    """The first token of a row that is another one.

    Attributes:
      row: of the prompts.
      position: of the token, counted from the first new one.
      expected: what the reference says.
      found: what the kernels say.
      margin: logits of the reference, of its token less of the other.
      noise: standard deviation, over the vocabulary, of the change of logits between the reference
        in bfloat16 and in float32.
    """

    row: int
    position: int
    expected: int
    found: int
    margin: float
    noise: float

    @property
    def near_tie(self) -> bool:
        """Whether bfloat16 itself could have swapped the two: within three deviations of their
        difference, of which both logits have a part."""
        return self.margin <= 3 * math.sqrt(2) * self.noise


def bench_greedy(
    model: str = "smollm2-135m",
    recipes: Sequence[str] = RECIPES,
    *,
    prompts: int = 16,
    length: int = 32,
    new_tokens: int = 64,
    text: str = "builtin",
    out: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compares greedy tokens in bfloat16, a recipe at a time.

    Args:
      model: as `load` takes it.
      recipes: names or files; calibrated on the built-in text if they need it.
      prompts: windows of the evaluation text.
      length: ids of each.
      new_tokens: ids that are generated for each.
      text: evaluation text: a file, "builtin" or "hf:NAME".
      out: a .json file or a directory for `greedy_<device>.json`.
      progress: wraps the loop over recipes.

    Returns:
      `{rows, device, versions, date}`, a row `{model, recipe, prompts, new_tokens, equal,
      differences}` for each recipe: `equal` rows of the prompts, and every `Difference` with
      `near_tie`.

    Raises:
      UserError: for what cannot be found or read, or an `out` that cannot be written.
    """
    loaded = load(model, dtype="bfloat16")
    evaluation = data.load_text(text, "evaluation")
    (ids,) = data.token_batches(loaded, evaluation, prompts, length, prompts)
    packages = ("jaxopt-models", "jax", "jaxlib")
    result: dict[str, Any] = {
        "rows": [],
        "device": device(),
        "versions": {name: package_version(name) for name in packages},
        "date": today(),
    }
    file = out and device_file(out, "greedy")
    for name in progress(recipes, "recipes"):
        recipe = Recipe.load(name)
        calibration = None
        if recipe.needs_text:
            known = data.load_text("builtin", "calibration")
            calibration = data.token_batches(loaded, known, 16, 512, 4)
        params, _ = quantize(loaded, recipe, calibration)
        found = compare(loaded.config, params, ids.tolist(), new_tokens)
        result["rows"].append(
            {"model": model, "recipe": name, "prompts": prompts, "new_tokens": new_tokens}
            | {"equal": prompts - len(found)}
            | {"differences": [vars(one) | {"near_tie": one.near_tie} for one in found]}
        )
        if file:
            write_json(file, result)
    return result


def compare(
    config: ModelConfig, params: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Difference]:
    """First differences of `prepare(params)` from `params`, of the rows that have one.

    Args:
      config: of which the dtype is replaced by bfloat16.
      params: not prepared.
      prompts: token ids of each row.
      new_tokens: how many are generated; nothing ends a row earlier.
    """
    config = replace(config, dtype="bfloat16")
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_ids": ()}
    reference = generate(config, params, prompts, **options).tokens
    kernels = generate(config, prepare(params), prompts, **options).tokens
    return differences(config, params, prompts, reference, kernels)


def differences(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
) -> list[Difference]:
    """Where greedy tokens first differ, of the rows that do.

    Args:
      config, params: of the reference.
      prompts: token ids of each row.
      reference, others: new ids of each row.
    """
    first = []
    for row, (expected, found) in enumerate(zip(reference, others, strict=True)):
        pairs = enumerate(zip(expected, found, strict=False))
        first += [(row, at, *pair) for at, pair in pairs if pair[0] != pair[1]][:1]
    if not first:
        return []
    whole = [[*prompt, *tokens] for prompt, tokens in zip(prompts, reference, strict=True)]
    longest = max(map(len, whole))
    tokens = jnp.asarray([[*ids, *[0] * (longest - len(ids))] for ids in whole], jnp.int32)
    rows = np.array([row for row, *_ in first])
    before = np.array([len(prompts[row]) + at - 1 for row, at, *_ in first])
    rounded, exact = (
        np.asarray(_logits(replace(config, dtype=dtype), params, tokens, rows, before))
        for dtype in ("bfloat16", "float32")
    )
    noise = np.std(rounded - exact, axis=1)
    listed = []
    for (row, at, expected, found), logits, deviation in zip(first, rounded, noise, strict=True):
        margin = float(logits[expected] - logits[found])
        listed.append(Difference(row, at, expected, found, margin, float(deviation)))
    return listed


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, tokens: Any, rows: Any, before: Any) -> jax.Array:
    """After positions `before` of `rows`: float32 [N, V]."""
    return forward(config, params, tokens)[rows, before].astype(jnp.float32)
