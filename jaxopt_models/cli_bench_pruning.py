"""The command of `jaxopt-models bench` about pruning: what distillation brings back."""

from pathlib import Path
from typing import Annotated

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
    StepsOption,
    TrainingDtypeOption,
    TrainingTextOption,
    WindowsOption,
    named_values,
)

_RUNS = Path(__file__).parent / "configs" / "runs"
_PLANS = {name: str(_RUNS / f"prune_{name}.yaml") for name in ("depth", "width")}


def bench_pruning(
    text: TrainingTextOption,
    evaluation: EvaluationTextOption,
    model: Annotated[str, typer.Option(help="As in eval.")] = "smollm2-135m",
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE, settings of `prune` with a budget; may be repeated; else depth and "
            "width, of configs/runs."
        ),
    ] = None,
    seed: SeedsOption = None,
    steps: StepsOption = 1000,
    batch: RowsOption = 32,
    length: LengthOption = 512,
    dtype: TrainingDtypeOption = "bfloat16",
    learning_rate: RateOption = 3e-4,
    packing: PackingOption = "stream",
    windows: WindowsOption = 64,
    every: EveryOption = None,
    limit: LimitOption = None,
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
