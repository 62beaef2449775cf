"""The embedded demonstration: a real model, formats and algorithms, what each costs, a sentence, a
checkpoint."""

import sys
from pathlib import Path
from typing import Any

from jaxopt_models import data, report
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.native import save
from jaxopt_models.documents import templated
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import Metrics, evaluate, reference
from jaxopt_models.generate import generate
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe

_MODEL = "smollm2-135m"
_RECIPES = (
    "fp8",
    "int8",
    "mxfp8",
    "int4",
    "int4_awq",
    "int4_gptq",
    "nvfp4",
    "nvfp4_awq_gptq",
    "mxfp4",
    "mxfp4_rotated",
    "nvfp4_kv",
)
_KEPT = "nvfp4_awq_gptq"
_WINDOWS, _LENGTH, _BATCH = 8, 256, 4
_PROMPT = "What is the capital of France?"


def run_demo(out: Path) -> dict[str, Any]:
    """Prints the table and returns its figures; one model is saved below `out`.

    Raises:
      UserError: if the model's wheel is not installed, or the saved model does not give back the
        figures that were printed.
    """
    with report.working(f"loading {_MODEL}"):
        model = load(_MODEL)
    calibration = _batches(model, "calibration")
    evaluation = _batches(model, "evaluation")
    original = reference(model.config, model.params, evaluation, report.progress)
    rows: list[tuple[str, Metrics, float | None]] = [
        ("original (bf16)", evaluate(model.config, model.params, evaluation, original), None)
    ]
    kept: Any = None
    for name in report.progress(_RECIPES, "quantizing and evaluating"):
        recipe = Recipe.load(name)
        params, result = quantize(model, recipe, calibration)
        metrics = evaluate(model.config, params, evaluation, original)
        seconds = result.calibration_seconds + result.quantization_seconds
        rows.append((name, metrics, seconds))
        if name == _KEPT:
            kept = (recipe, params, result, metrics)
    recipe, params, result, metrics = kept
    _print_table(rows)
    _print_sentence(model, params)

    directory = out / f"{_MODEL}-{_KEPT}"
    with report.working(f"saving {directory}"):
        save(
            directory,
            model.config,
            params,
            model.tokenizer,
            recipe=recipe.model_dump(),
            report=result.as_dict(),
            provenance={"source": model.source, "calibration": "builtin"},
            overwrite=True,
        )
        restored = load(directory)
    if evaluate(restored.config, restored.params, evaluation, original) != metrics:
        raise UserError(f"{directory} does not give back the figures it was saved with")
    report.out.print(f"Saved {directory}; reloaded, it gives the same figures. So does\n")
    report.out.print(
        f"  jaxopt-models eval {directory} --reference {_MODEL} "
        f"--windows {_WINDOWS} --length {_LENGTH}\n",
        soft_wrap=True,
    )
    return {name: values.as_dict() | {"seconds": seconds} for name, values, seconds in rows}


def _batches(model: Any, split: data.Split) -> list:
    text = data.load_text("builtin", split)
    return data.token_batches(model, text, _WINDOWS, _LENGTH, _BATCH)


def _print_table(rows: list[tuple[str, Metrics, float | None]]) -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    title = (
        "SmolLM2-135M-Instruct (weights published as 4-bit Q4_1, dequantized to bf16), "
        f"{_WINDOWS} x {_LENGTH} tokens of the documentation of Python {python}"
    )
    report.out.print(report.metrics_table(title, rows))
    report.out.print(
        "KL in nats a token to the original, top-1: share of equal most likely tokens, "
        "seconds: calibration and quantization.\n"
    )


def _print_sentence(model: Any, params: Any) -> None:
    turn = [{"role": "user", "content": _PROMPT}]
    tokenizer = model.tokenizer
    ids = templated(tokenizer, turn, add_generation_prompt=True).tolist()
    with report.working("generating"):
        answer = generate(model.config, params, [ids], max_new_tokens=24).tokens[0]
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    report.out.print(f"{_KEPT} model: {_PROMPT} -> {text}\n")
