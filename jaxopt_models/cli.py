"""The command line: thin commands over the public functions.

Exit code 0 means that everything asked for was done. A mistake of the user is one line on standard
error and exit code 2; whatever else goes wrong is a defect and shows its traceback.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

# Read when transformers is first imported, which prints that it found no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from typer.exceptions import Abort, Exit, TyperException

import jaxopt_models as jom
from jaxopt_models import data, report
from jaxopt_models.cli_bench import bench
from jaxopt_models.cli_corpus import corpus
from jaxopt_models.cli_generate import generate
from jaxopt_models.cli_options import (
    BatchOption,
    JsonOption,
    LengthOption,
    ModelArg,
    OutOption,
    SetOption,
    refuse_existing,
)
from jaxopt_models.cli_prune import prune
from jaxopt_models.cli_train import train
from jaxopt_models.demo import run_demo
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json, write_text

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")
app.command()(corpus)
app.command()(generate)
app.command()(prune)
app.command()(train)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version")] = False) -> None:
    """Take a pretrained LLM, make it cheaper to serve, and measure what that cost."""
    if version:
        print(jom.__version__)
        raise Exit


@app.command()
def quantize(
    model: ModelArg,
    recipe: Annotated[str, typer.Option(help="Preset name or YAML file.")],
    out: OutOption,
    calib: Annotated[
        str, typer.Option(help="Calibration text: a file, builtin, or hf:NAME.")
    ] = "builtin",
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    length: LengthOption = 512,
    batch: BatchOption = 4,
    resume: Annotated[
        Path | None,
        typer.Option(help="Directory that keeps finished layers; a killed run goes on there."),
    ] = None,
    host: Annotated[
        bool, typer.Option("--host", help="Keep weights on the host; a layer at a time is moved.")
    ] = False,
    overrides: SetOption = None,
    json: JsonOption = None,
    files: Annotated[
        Path | None,
        typer.Option("--report", help="Directory to create: report.json, tensors.csv, errors.png."),
    ] = None,
) -> None:
    """Quantize a model and save it as a checkpoint."""
    plan = jom.Recipe.load(recipe, tuple(overrides or ()))
    refuse_existing({"--out": out, "--report": files})
    loaded = _load(model, host)
    batches = None
    if plan.needs_text:
        batches = _batches(loaded, calib, "calibration", windows, length, batch)
    params, result = jom.quantize(loaded, plan, batches, report.progress, resume=resume)
    with report.working(f"saving {out}"):
        jom.save(
            out,
            loaded.config,
            params,
            loaded.tokenizer,
            recipe=plan.model_dump(),
            report=result.as_dict(),
            provenance={"source": loaded.source, "calibration": calib if batches else None},
        )
    if json:
        write_json(json, result.as_dict())
    if files:
        report.save_report(files, result)
    report.out.print(report.worst_tensors_table(result))
    report.out.print(f"{report.totals_line(result)} -> {out}", soft_wrap=True)


@app.command()
def auto(
    model: ModelArg,
    candidate: Annotated[
        list[str], typer.Option(help="Preset, YAML file or 'original'; give several.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Recipe to write, a .yaml file.")],
    bits: Annotated[float | None, typer.Option(help="Budget: bits a weight.")] = None,
    size: Annotated[int | None, typer.Option("--bytes", help="Budget: size of the model.")] = None,
    latency: Annotated[float | None, typer.Option(help="Budget: seconds of all products.")] = None,
    kv_cache: Annotated[
        list[str] | None, typer.Option("--kv-cache", help="Cache format or 'original'; repeat.")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens in the cache; with --bytes.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Tokens at a time; with --latency.")] = 1,
    method: Annotated[
        Literal["gradient", "kl"], typer.Option(help="How sensitivity is measured.")
    ] = "gradient",
    calib: Annotated[str, typer.Option(help="As in quantize.")] = "builtin",
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    scoring_windows: Annotated[int, typer.Option(help="Windows of it that are scored on.")] = 32,
    length: LengthOption = 512,
    batch: BatchOption = 4,
    scores: Annotated[
        Path | None, typer.Option(help="File of scores: read if it is there, else written.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the Pareto curve.")] = None,
) -> None:
    """Choose the best of several recipes for each part of a model, within a budget."""
    from jaxopt_models import plots
    from jaxopt_models.quantize import search
    from jaxopt_models.quantize.mixture import Scores, budget_of, to_yaml

    unit, budget = budget_of(bits=bits, bytes=size, latency=latency)
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out} is to be a recipe; give --out a name that ends in .yaml")
    loaded = _load(model)
    calibration = _batches(loaded, calib, "calibration", windows, length, batch)
    scored = _batches(loaded, calib, "calibration", scoring_windows, length, batch)
    inputs = (loaded, candidate, calibration, scored)
    options = {"method": method, "kv_cache": kv_cache or ()}
    if scores and scores.exists():
        with report.working(f"comparing {scores} with the model"):
            found = Scores.load(scores, search.signature(*inputs, **options))
        if unit == "latency" and found.rows != rows:
            raise UserError(f"{scores} has no latencies for {rows} rows; name another file")
    else:
        timed = rows if unit == "latency" else None
        found = search.score(*inputs, **options, rows=timed, progress=report.progress)
        if scores:
            write_json(scores, found.as_dict())
    choice = found.choose(budget, unit, context)
    write_text(out, to_yaml(found.recipe(choice)))
    if plot:
        points = found.pareto(40, unit, context)
        plots.save_figure(plots.pareto_plot(points, found.uniform(unit, context), unit), plot)
    report.out.print(report.mixture_table(found, choice))
    report.out.print(f"{report.mixture_line(choice)} -> {out}", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: ModelArg,
    reference: Annotated[
        str | None, typer.Option(help="The original model, for KL and agreement.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Evaluation text: a file, builtin, or hf:NAME.")
    ] = "builtin",
    windows: Annotated[int, typer.Option(help="Evaluation windows.")] = 64,
    length: LengthOption = 512,
    batch: BatchOption = 4,
    json: JsonOption = None,
) -> None:
    """Measure perplexity, and divergence from a reference model."""
    from jaxopt_models.evaluate import reference as run_reference

    loaded = _load(model)
    batches = _batches(loaded, text, "evaluation", windows, length, batch)
    teacher = None
    if reference:
        original = _load(reference)
        teacher = run_reference(original.config, original.params, batches, report.progress)
    metrics = jom.evaluate(loaded.config, loaded.params, batches, teacher, report.progress)
    if json:
        protocol = {"model": model, "reference": reference, "text": text}
        sizes = {"windows": windows, "length": length, "python": sys.version.split()[0]}
        write_json(json, metrics.as_dict() | protocol | sizes)
    title = f"{windows} x {length} tokens of {text}"
    report.out.print(report.metrics_table(title, [(model, metrics, None)]))


@app.command()
def export(
    model: ModelArg,
    out: OutOption,
    layout: Annotated[str, typer.Option(help="bf16")] = "bf16",
) -> None:
    """Write a Hugging Face directory."""
    loaded = _load(model)
    with report.working(f"writing {out}"):
        jom.export_hf(out, loaded, layout=layout)
    report.out.print(f"{layout} checkpoint -> {out}")


@app.command()
def demo(
    out: OutOption = Path("demo-output"),
    json: JsonOption = None,
) -> None:
    """Quantize a real small model in many ways, and show what each costs."""
    figures = run_demo(out)
    if json:
        write_json(json, figures)


def _load(name: str, host: bool = False) -> jom.Model:
    with report.working(f"loading {name}"):
        return jom.load(name, host=host)


def _batches(
    model: jom.Model, text: str, split: data.Split, windows: int, length: int, batch: int
) -> list:
    with report.working(f"tokenizing {text}"):
        return data.token_batches(model, data.load_text(text, split), windows, length, batch)


def main() -> None:
    """Runs the command and turns mistakes of the user into one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (UserError, TyperException) as error:
        message = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"jaxopt-models: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (Abort, KeyboardInterrupt):
        print("jaxopt-models: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
