"""`jaxopt-models bench`: measurements beside a peer and a limit."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxopt_models import report
from jaxopt_models.cli_bench_pruning import bench_compression, bench_pruning
from jaxopt_models.cli_bench_speculative import bench_pass_cost, bench_speculative
from jaxopt_models.cli_bench_training import bench_qad, bench_training
from jaxopt_models.cli_options import BatchOption, JsonOption, LengthOption, ShapeOption
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json

bench = typer.Typer(no_args_is_help=True, help="Measure beside a peer and a limit.")
bench.command("training")(bench_training)
bench.command("qad")(bench_qad)
bench.command("pruning")(bench_pruning)
bench.command("compression")(bench_compression)
bench.command("speculative")(bench_speculative)
bench.command("pass-cost")(bench_pass_cost)


@bench.command("evaluation")
def bench_evaluation(
    peer_python: Annotated[
        str, typer.Option(help="Python of an environment with torch and transformers.")
    ],
    model: Annotated[str, typer.Option(help="As in eval.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="As in eval.")] = "builtin",
    windows: Annotated[int, typer.Option(help="Evaluation windows.")] = 64,
    length: LengthOption = 512,
    batch: BatchOption = 4,
    json: JsonOption = None,
) -> None:
    """Time evaluation here and with transformers + torch on the same windows."""
    from jaxopt_models.bench.evaluation import bench_evaluation as run

    with report.working("timing"):
        figures = run(model, text, windows, length, batch, peer_python)
    if json:
        write_json(json, figures)
    report.out.print(
        f"{model}, {windows} x {length} tokens: {figures['seconds']:.1f} s, compilation included; "
        f"transformers + torch {figures['peer_seconds']:.1f} s; "
        f"ratio {figures['ratio_to_peer']:.2f}; "
        f"perplexity {figures['perplexity']:.4f} and {figures['peer_perplexity']:.4f}"
    )


@bench.command("calibration")
def bench_calibration(
    peer_python: Annotated[
        str, typer.Option(help="Python of an environment with nvidia-modelopt.")
    ],
    model: Annotated[str, typer.Option(help="As in eval.")] = "smollm2-135m",
    calib: Annotated[
        str, typer.Option(help="Calibration text: a file, builtin, or hf:NAME.")
    ] = "builtin",
    recipe: Annotated[
        list[str] | None, typer.Option(help="int4_awq or int4_gptq; may be repeated; else both.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Instead of the protocol's for the recipe.")
    ] = None,
    length: LengthOption = 512,
    batch: BatchOption = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 2,
    json: JsonOption = None,
) -> None:
    """Time calibration and quantization here and with ModelOpt on the same windows."""
    from jaxopt_models.bench import calibration

    result = calibration.bench_calibration(
        model,
        calib,
        peer_python,
        recipes=recipe or tuple(calibration.ALGORITHMS),
        windows=windows,
        length=length,
        batch=batch,
        rounds=rounds,
        out=json,
        progress=report.progress,
    )
    for row in result["rows"]:
        report.out.print(
            f"{row['recipe']}, {row['windows']} x {length} tokens: {row['seconds']:.1f} s, "
            f"compilation included; {row['peer']} {row['peer_seconds']:.1f} s; "
            f"ratio {row['ratio_to_peer']:.2f}"
        )


@bench.command("kernels")
def bench_kernels(
    shapes: Annotated[
        Literal["8b", "70b", "all"], typer.Option(help="Weights of which Llama 3.1.")
    ] = "8b",
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="M; may be repeated; else 1 4 8 16 64 2048, as kernels allow."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Format of weights; may be repeated; else all.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try several tilings and remember the fastest.")
    ] = False,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="With --tune: try every tiling.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(help="With --tune: file to remember in, not the user's cache.")
    ] = None,
    peer_python: Annotated[
        str | None, typer.Option(help="Python of an environment with torch; else this one.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help='A peer, or "none"; may be repeated; else all.')
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which nothing more is begun.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that compile; they take turns on the GPU.")
    ] = 1,
    json: JsonOption = None,
) -> None:
    """Time products of low-precision weights, beside peers and what the device can do at all.

    Rows are printed and saved one by one. A JSON file that is there is gone on with.
    """
    from jaxopt_models.bench import kernels
    from jaxopt_models.bench.kernel_products import Tuning
    from jaxopt_models.bench.kernel_results import kernel_table

    if (exhaustive or table) and not tune:
        raise UserError("--exhaustive and --table say how to tune; add --tune")
    names = kernels.SHAPES if shapes == "all" else [shapes]
    result = kernels.bench_kernels(
        [shape for name in names for shape in kernels.SHAPES[name]],
        rows,
        kind or kernels.FORMATS,
        tune=Tuning(exhaustive, table) if tune else None,
        peer_python=peer_python,
        peers=peer or (),
        limit=limit,
        jobs=jobs,
        out=json,
        say=report.say,
    )
    report.out.print(kernel_table(result["rows"]))


@bench.command("decode")
def bench_decode(
    model: ShapeOption = "llama-8b",
    format: Annotated[
        list[str] | None,
        typer.Option(help="bf16, int4, nvfp4, mxfp4, fp8, int8; may be repeated; else all."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows; may be repeated; else 1 8.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Positions of the cache.")] = 2048,
    steps: Annotated[int, typer.Option(help="Of the timed loop, more than 8.")] = 136,
    head: Annotated[
        str, typer.Option(help="bf16, or same: the output head in the weights' format.")
    ] = "bf16",
    kv_format: Annotated[str, typer.Option(help="Of the cache: bf16 or fp8.")] = "bf16",
    out: Annotated[
        Path | None, typer.Option(help=".json file, or directory for decode_<device>.json.")
    ] = None,
) -> None:
    """Time the decode loop on random weights, beside bfloat16 and the memory limit."""
    from jaxopt_models.bench import decode

    result = decode.bench_decode(
        model,
        format or decode.FORMATS,
        batch or (1, 8),
        context=context,
        steps=steps,
        head=head,
        kv_format=kv_format,
        out=out,
        progress=report.progress,
    )
    report.out.print(f"memory is read at {result['read_bytes_per_second'] / 1e12:.2f} TB/s")
    for row in result["rows"]:
        baseline = row["bf16_ms_per_step"]
        report.out.print(
            f"{model} {row['format']}, batch {row['batch']}: {row['ms_per_step']:.3f} ms a step, "
            f"{row['tokens_per_s']:.0f} tokens/s, {row['byte_limit_fraction']:.0%} of the limit"
            + (f", {baseline / row['ms_per_step']:.2f} x bfloat16" if baseline else "")
        )


@bench.command("greedy")
def bench_greedy(
    model: Annotated[str, typer.Option(help="As in eval.")] = "smollm2-135m",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Preset or YAML; may be repeated; else five with kernels."),
    ] = None,
    text: Annotated[str, typer.Option(help="As in eval.")] = "builtin",
    prompts: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Ids of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Ids generated for each.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help=".json file, or directory for greedy_<device>.json.")
    ] = None,
) -> None:
    """Compare greedy tokens of kernels with those of the reference path, near-ties listed."""
    from jaxopt_models.bench import greedy

    result = greedy.bench_greedy(
        model,
        recipe or greedy.RECIPES,
        prompts=prompts,
        length=length,
        new_tokens=new_tokens,
        text=text,
        out=out,
        progress=report.progress,
    )
    for row in result["rows"]:
        report.out.print(f"{row['recipe']}: {row['equal']} of {row['prompts']} prompts equal")
        for one in row["differences"]:
            report.out.print(
                f"  prompt {one['row']}, token {one['position']}: {one['found']} for "
                f"{one['expected']}, {one['margin']:.4f} less; noise {one['noise']:.4f}"
                + ("" if one["near_tie"] else ", no near-tie")
            )


@bench.command("quality")
def bench_quality(
    calib: Annotated[str, typer.Option(help="Calibration text: a file, builtin, or hf:NAME.")],
    text: Annotated[str, typer.Option(help="Evaluation text: a file, builtin, or hf:NAME.")],
    out: Annotated[Path, typer.Option(help="Directory, or .json file for one model.")],
    model: Annotated[
        list[str] | None, typer.Option(help="As in eval; may be repeated; else the built-in ones.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Preset or YAML; may be repeated; else all presets.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Evaluation windows, instead of the protocol's.")
    ] = None,
    length: LengthOption = 512,
    calibration_windows: Annotated[
        int | None, typer.Option(min=1, help="Instead of the protocol's for the recipe.")
    ] = None,
    batch: BatchOption = 4,
) -> None:
    """Measure what recipes cost on models, beside the reference implementation's figures.

    `python -m jaxopt_models.bench.texts DIR` makes the texts of the protocol. Rows are saved one by
    one and replace those of an earlier run.
    """
    from jaxopt_models.bench import quality
    from jaxopt_models.bench.quality_results import quality_table
    from jaxopt_models.quantize.recipe import presets

    rows = quality.bench_quality(
        model or quality.MODELS,
        recipe or presets(),
        calibration_text=calib,
        evaluation_text=text,
        out=out,
        windows=windows,
        length=length,
        calibration_windows=calibration_windows,
        batch=batch,
        progress=report.progress,
    )
    report.out.print(quality_table(rows))
