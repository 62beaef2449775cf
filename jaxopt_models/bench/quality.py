"""What recipes cost in quality, bits, seconds and memory, beside the reference implementation.

The protocol: the text is tokenized once; evenly spaced windows of `length` ids, BOS first where the
model expects one; perplexity, KL(original || quantized) over the whole vocabulary and the share of
equal most likely tokens are means over the `length - 1` predicted positions, from float32 logits.
Calibration and evaluation read different texts. Matrix products are float32 on every device.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxopt_models import data
from jaxopt_models.bench import texts
from jaxopt_models.bench.memory import HOW, peak_memory
from jaxopt_models.bench.quality_peer import PeerFigures, format_name
from jaxopt_models.bench.quality_results import Results, device, results_file, today
from jaxopt_models.checkpoint.load import load
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import Reference, evaluate, reference
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Description, Progress, silent
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe

MODELS = ("smollm2-135m", "gemma3-270m")


@dataclass(frozen=True)
class Windows:
    """How many windows a model is measured on, and calibrated on by what a recipe does."""

    evaluation: int = 64
    awq: int = 16
    gptq: int = 32
    other: int = 128

    def calibration(self, recipe: Recipe) -> int:
        """AWQ's or GPTQ's number where a rule does that alone, as the reference was measured.

        Whatever combines them has no counterpart there, and takes the number of all others.
        """
        awq = any(rule.smooth and rule.smooth.method == "awq" for rule in recipe.rules)
        nearest = all(rule.rounding.method == "nearest" for rule in recipe.rules)
        gptq = any(rule.rounding.method == "gptq" for rule in recipe.rules)
        if awq:
            return self.awq if nearest else self.other
        return self.gptq if gptq else self.other


# By model type: Gemma's vocabulary is five times as large.
_WINDOWS = {"gemma3_text": Windows(evaluation=16, awq=8, gptq=32, other=32)}


@dataclass(frozen=True)
class Setting:
    """What stays the same over a run; see `bench_quality`."""

    calibration_text: str
    evaluation_text: str
    windows: int | None = None
    length: int = 512
    calibration_windows: int | None = None
    batch: int = 4

    def counts(self, model: Model) -> Windows:
        """The protocol's numbers of windows for a model, but those that were asked for."""
        counts = _WINDOWS.get(model.config.model_type, Windows())
        if self.windows:
            counts = replace(counts, evaluation=self.windows)
        if self.calibration_windows:
            counts = replace(
                counts, **dict.fromkeys(("awq", "gptq", "other"), self.calibration_windows)
            )
        return counts

    def batches(self, model: Model, split: data.Split, count: int) -> list[np.ndarray]:
        source = self.calibration_text if split == "calibration" else self.evaluation_text
        text = data.load_text(source, split)
        return data.token_batches(model, text, count, self.length, self.batch)

    def protocol(self, counts: Windows, peer: PeerFigures | None) -> dict[str, Any]:
        """What the figures depend on, and in what this is not how the reference was measured."""
        decisive = {
            "calibration_text": checksum(self.calibration_text, "calibration"),
            "evaluation_text": checksum(self.evaluation_text, "evaluation"),
            "windows": asdict(counts),
            "length": self.length,
        }
        theirs = peer and {
            "calibration_text": texts.CALIBRATION.sha256,
            "evaluation_text": texts.EVALUATION.sha256,
            "windows": peer.windows,
            "length": peer.length,
        }
        differing = [key for key, ours in decisive.items() if theirs and theirs[key] != ours]
        return decisive | {
            "batch": self.batch,
            "matmul_precision": "float32",
            "calib_seconds": "wall time of calibration and quantization, compilation included",
            "peak_bytes_how": HOW,
            "differs_from_reference": differing,
        }


def bench_quality(
    model_names: Sequence[str],
    recipes: Sequence[str | Path],
    *,
    calibration_text: str,
    evaluation_text: str,
    out: Path,
    windows: int | None = None,
    length: int = 512,
    calibration_windows: int | None = None,
    batch: int = 4,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Quantizes each model by each recipe, measures it, and merges the rows into result files.

    A row is saved as soon as it is measured, so a killed run loses only the one it was at.

    Args:
      model_names: as `load` takes them.
      recipes: as `Recipe.load` takes them.
      calibration_text, evaluation_text: as `data.load_text` takes them; `bench.texts` makes those
        that the reference was measured on.
      out: a .json file, for one model, or a directory that gets `quality_MODEL.json` for each. A
        row replaces an earlier one of the same model, recipe and device.
      windows: of the evaluation; by default the protocol's number for the model, see `Windows`.
      length: ids in a window.
      calibration_windows: by default the protocol's number for the model and the recipe.
      batch: windows run at a time.
      progress: wraps loops that take long.

    Returns:
      The rows measured: `{model, recipe, format, ppl, kl, top1, bits_per_weight, calib_seconds,
      peak_bytes, calibration_windows, device, date, reference, ratio_kl, ratio_seconds}`.
      `reference` is the reference's row, see `PeerFigures.counterpart`, or None. Ratios are ours
      over theirs; None where the protocol is not theirs, and `ratio_seconds` on anything but a
      CPU, which theirs ran on.

    Raises:
      UserError: for a recipe, text or model that cannot be read; for an `out` with rows of another
        protocol; and, when everything else is measured, for recipes that a model refused.
    """
    setting = Setting(
        calibration_text, evaluation_text, windows, length, calibration_windows, batch
    )
    plans = [Recipe.load(recipe) for recipe in recipes]
    files = [results_file(out, name, len(model_names)) for name in model_names]
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    with compiling_anew(), jax.default_matmul_precision("highest"):
        for name, file in zip(model_names, files, strict=True):
            for plan, row in _bench_model(name, plans, file, setting, progress):
                if isinstance(row, UserError):
                    refused.append(f"{plan.name} on {name} ({row})")
                else:
                    rows.append(row)
    if refused:
        raise UserError(f"{len(rows)} rows are measured, but not {'; '.join(refused)}")
    return rows


def _bench_model(
    name: str, plans: Sequence[Recipe], file: Path, setting: Setting, progress: Progress
) -> Iterator[tuple[Recipe, dict[str, Any] | UserError]]:
    """Each recipe's row, saved already, or why the model refused the recipe."""
    model = load(name)
    peer = PeerFigures.of(name)
    counts = setting.counts(model)
    results = Results(file, setting.protocol(counts, peer))
    evaluation = setting.batches(model, "evaluation", counts.evaluation)
    calibrations = {  # made first: a text that is too short is refused before hours of work
        count: setting.batches(model, "calibration", count)
        for count in {counts.calibration(plan) for plan in plans if plan.needs_text}
    }
    teacher = reference(model.config, model.params, evaluation, _titled(progress, name))
    _measure_teacher(name, teacher, results, peer, _titled(progress, name))
    for plan in plans:
        calibration = calibrations[counts.calibration(plan)] if plan.needs_text else None
        try:
            row = _measure(model, plan, calibration, teacher, _titled(progress, plan.name))
        except UserError as error:
            yield plan, error
            continue
        row = {"model": name} | row | _compare(row, plan, peer, results.protocol)
        results.add(row)
        yield plan, row


def _measure_teacher(
    name: str, teacher: Reference, results: Results, peer: PeerFigures | None, progress: Progress
) -> None:
    """The original's perplexity: where it is not the reference's, nothing else compares either."""
    if results.teachers.get(name, {}).get("device") == device():
        return
    metrics = evaluate(teacher.config, teacher.params, teacher.batches, progress=progress)
    theirs = peer.teacher_ppl if peer else None
    results.teachers[name] = {
        "ppl": metrics.perplexity,
        "reference_ppl": theirs,
        "device": device(),
    }


def _measure(
    model: Model,
    plan: Recipe,
    calibration: list[np.ndarray] | None,
    teacher: Reference,
    progress: Progress,
) -> dict[str, Any]:
    """Our part of a row."""
    jax.clear_caches()  # every recipe compiles for itself
    with peak_memory() as peak:
        start = time.perf_counter()
        params, result = quantize(model, plan, calibration, progress=progress)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - start
    metrics = evaluate(model.config, params, teacher.batches, teacher, progress)
    return {
        "recipe": plan.name,
        "format": format_name(plan),
        "ppl": metrics.perplexity,
        "kl": metrics.kl,
        "top1": metrics.top1_agreement,
        "bits_per_weight": result.bits_per_weight,
        "calib_seconds": seconds,
        "peak_bytes": peak.bytes,
        "calibration_windows": sum(map(len, calibration or ())),
        "device": device(),
        "date": today(),
    }


def _compare(
    ours: dict[str, Any], plan: Recipe, peer: PeerFigures | None, protocol: dict[str, Any]
) -> dict[str, Any]:
    """The reference's part of a row."""
    theirs = peer.counterpart(plan) if peer else None
    ratios: dict[str, float | None] = {"ratio_kl": None, "ratio_seconds": None}
    if theirs and not protocol["differs_from_reference"]:
        ratios["ratio_kl"] = ours["kl"] / theirs["kl"]
        if theirs["calib_seconds"] and jax.default_backend() == "cpu":
            ratios["ratio_seconds"] = ours["calib_seconds"] / theirs["calib_seconds"]
    return {"reference": theirs} | ratios


@contextmanager
def compiling_anew() -> Iterator[None]:
    """Without the cache of compiled programs on disk, if the user has one."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else the setting is read only once in a process
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _titled(progress: Progress, title: str) -> Progress:
    def titled(items: Iterable[Any], description: Description) -> Iterable[Any]:
        def now() -> str:
            return f"{title}: {description() if callable(description) else description}"

        return progress(items, now)

    return titled


def checksum(source: str, split: data.Split) -> str:
    """SHA-256 of a text, see `data.load_text`."""
    return hashlib.sha256(data.load_text(source, split).encode()).hexdigest()
