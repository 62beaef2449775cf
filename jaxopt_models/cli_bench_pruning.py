"""The command of `jaxopt-models bench` about pruning: what distillation brings back."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxopt_models import report
from jaxopt_models.cli_options import JsonOption, LengthOption, named_values

_RUNS = Path(__file__).parent / "configs" / "runs"
_PLANS = {name: str(_RUNS / f"prune_{name}.yaml") for name in ("depth", "width")}


def bench_pruning(
    text: Annotated[
        str, typer.Option(help="Training text: a file, also of documents, builtin, or hf:NAME.")
    ],
    evaluation: Annotated[str, typer.Option(help="Evaluation text, not trained on.")],
    model: Annotated[str, typer.Option(help="As in eval.")] = "smollm2-135m",
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE, settings of `prune` with a budget; may be repeated; else depth and "
            "width, of configs/runs."
        ),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="May be repeated; else 0 1 2.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each distillation.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of a step.")] = 32,
    length: LengthOption = 512,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="That training computes in.")
    ] = "bfloat16",
    learning_rate: Annotated[float, typer.Option(min=0, help="The highest.")] = 3e-4,
    packing: Annotated[
        Literal["stream", "documents"], typer.Option(help="Of rows of training.")
    ] = "stream",
    windows: Annotated[int, typer.Option(min=1, help="Evaluation windows.")] = 64,
    every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations; else at the end only.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds; nothing is begun that would take longer.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Prune by a search and uniformly, teach what is left by the original, and compare.

    Rows are saved one by one. A JSON file that is there is gone on with.
    """
    from jaxopt_models.bench import pruning
    from jaxopt_models.bench.pruning_results import pruning_table
    from jaxopt_models.prune.settings import PruneSettings
    from jaxopt_models.train.settings import RunSettings

    files = named_values(plan, "--plan", "NAME=FILE, as depth=prune.yaml") or _PLANS
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
            "optimizer": {"learning_rate": learning_rate},
            "evaluation": measured,
        }
    )
    result = pruning.bench_pruning(
        settings,
        {name: PruneSettings.load(file) for name, file in files.items()},
        seed or pruning.SEEDS,
        limit=limit,
        out=json,
        say=report.say,
        progress=report.progress,
    )
    report.out.print(pruning_table(result["rows"]))
