"""Commands of `jaxopt-models bench` about training: how fast it is, and what it brings back."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jaxopt_models import report
from jaxopt_models.cli_options import (
    EvaluationTextOption,
    EveryOption,
    JsonOption,
    LengthOption,
    LimitOption,
    PackingOption,
    RateOption,
    RowsOption,
    SeedsOption,
    ShapeOption,
    StepsOption,
    TrainingDtypeOption,
    TrainingTextOption,
    WindowsOption,
    named_values,
)


def bench_training(
    model: ShapeOption = "llama-1b",
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--modes",
            help="bf16, qat_nvfp4, qat_int4, qad_nvfp4, distill; may be repeated; else all.",
        ),
    ] = None,
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, help="The first of them; may be repeated; else 1.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a part on each device.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 2048,
    parts: Annotated[int, typer.Option(min=1, help="Of a step, accumulated.")] = 4,
    remat: Annotated[
        Literal["none", "products", "layers"],
        typer.Option(help="What is computed again for gradients."),
    ] = "products",
    steps: Annotated[int, typer.Option(min=1, help="That are timed.")] = 10,
    scan_layers: Annotated[
        bool, typer.Option(help="Run layers in a loop, or compile each.")
    ] = True,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which nothing more is begun.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=".json file, or directory for training_<device>.json.")
    ] = None,
) -> None:
    """Time training on random weights, beside bfloat16 and the devices' peak rate.

    Rows are printed and saved one by one. A file that is there is gone on with.
    """
    from jaxopt_models.bench import training

    training.bench_training(
        training.Setting(model, batch, length, parts, remat, steps, scan_layers),
        modes or training.MODES,
        gpus or (1,),
        limit=limit,
        out=out,
        say=report.say,
    )


def bench_qad(
    text: TrainingTextOption,
    evaluation: EvaluationTextOption,
    model: Annotated[str, typer.Option(help="As in eval.")] = "smollm2-135m",
    format: Annotated[
        list[str] | None,
        typer.Option("--format", help="Preset or YAML; may be repeated; else nvfp4 and int4."),
    ] = None,
    seed: SeedsOption = None,
    steps: StepsOption = 400,
    batch: RowsOption = 16,
    length: LengthOption = 512,
    dtype: TrainingDtypeOption = "bfloat16",
    learning_rate: RateOption = 1e-4,
    qat_learning_rate: Annotated[
        float | None, typer.Option(min=0, help="The highest of QAT, if it is another.")
    ] = None,
    end: Annotated[
        float, typer.Option(min=0, max=1, help="The rate at the end, as a share of the highest.")
    ] = 0.0,
    cross_entropy: Annotated[
        float, typer.Option(min=0, help="Weight of next tokens in QAD, beside the divergence's 1.")
    ] = 0.0,
    hidden: Annotated[
        float,
        typer.Option(min=0, help="Weight of the residual streams' squared distance, likewise."),
    ] = 0.0,
    begin: Annotated[
        list[str] | None,
        typer.Option(
            help="FORMAT=PRESET: what training of a format begins with, if not with its own PTQ; "
            "may be repeated."
        ),
    ] = None,
    scales: Annotated[
        Literal["dynamic", "static", "learned", "learned_untied"], typer.Option(help="Of weights.")
    ] = "dynamic",
    packing: PackingOption = "stream",
    calib: Annotated[
        str, typer.Option(help="Calibration text: a file, builtin, or hf:NAME.")
    ] = "builtin",
    windows: WindowsOption = 64,
    every: EveryOption = None,
    limit: LimitOption = None,
    json: JsonOption = None,
) -> None:
    """Train under quantization for the text and for what the unquantized model says, and compare.

    Rows are saved one by one. A JSON file that is there is gone on with.
    """
    from jaxopt_models.bench import qad
    from jaxopt_models.bench.qad_results import qad_table
    from jaxopt_models.train.settings import RunSettings

    measured = {"text": evaluation, "windows": windows, "length": length, "every": every}
    settings = RunSettings.of(
        {
            "model": model,
            "text": text,
            "packing": packing,
            "length": length,
            "batch": batch,
            "steps": steps,
            "dtype": dtype,
            "scales": scales,
            "optimizer": {"learning_rate": learning_rate, "end": end},
            "losses": _qad_losses(cross_entropy, hidden),
            "calibration": {"text": calib, "length": length},
            "evaluation": measured,
        }
    )
    result = qad.bench_qad(
        settings,
        format or qad.RECIPES,
        seed or qad.SEEDS,
        begins=named_values(begin, "--begin", "FORMAT=PRESET, as nvfp4=nvfp4_awq"),
        qat_learning_rate=qat_learning_rate,
        limit=limit,
        out=json,
        say=report.say,
        progress=report.progress,
    )
    report.out.print(qad_table(result["rows"]))


def _qad_losses(cross_entropy: float, hidden: float) -> list[dict[str, Any]]:
    """The divergence, and what else has a weight."""
    weights = {"cross_entropy": cross_entropy, "hidden_mean_square": hidden}
    more = [{"kind": kind, "weight": weight} for kind, weight in weights.items() if weight]
    return [{"kind": "forward_kl"}, *more]
