"""Commands of `jaxopt-models bench` about pruning: what distillation brings back, and all steps."""

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
    OutOption,
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
from jaxopt_models.errors import UserError

_RUNS = Path(__file__).parent / "configs" / "runs"
_PLANS = {name: str(_RUNS / f"prune_{name}.yaml") for name in ("depth", "width")}
_STEPS = {
    "plan": _RUNS / "prune_depth.yaml",
    "distill": _RUNS / "distill.yaml",
    "qad": _RUNS / "qad_nvfp4.yaml",
}


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


def bench_compression(
    out: OutOption,
    plan: Annotated[
        Path | None, typer.Option(help="YAML file of `prune`; else prune_depth of configs/runs.")
    ] = None,
    distill: Annotated[
        Path | None, typer.Option(help="YAML file of `train distill`; else distill, likewise.")
    ] = None,
    qad: Annotated[
        Path | None, typer.Option(help="YAML file of `train qad`; else qad_nvfp4, likewise.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="FILE.key=value override, as plan.windows=16, distill.steps=1000, qad.seed=1",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")] = 1,
    context: Annotated[int, typer.Option(help="Positions of the cache when it is timed.")] = 1024,
    steps: Annotated[int, typer.Option(help="Of the longer loop that is timed.")] = 136,
    json: JsonOption = None,
) -> None:
    """Prune, distill, quantize and train under quantization, and tell what each step is worth.

    The same command goes on with a run that was cut off.
    """
    from jaxopt_models.bench import compression
    from jaxopt_models.bench.compression_results import compression_table
    from jaxopt_models.prune.settings import PruneSettings
    from jaxopt_models.train.settings import RunSettings

    files = {"plan": plan, "distill": distill, "qad": qad}
    own = _by_file(overrides)
    chosen = {name: file or _STEPS[name] for name, file in files.items()}
    result = compression.bench_compression(
        PruneSettings.load(chosen["plan"], own["plan"]),
        RunSettings.load(chosen["distill"], own["distill"]),
        RunSettings.load(chosen["qad"], own["qad"]),
        out,
        batch=batch,
        context=context,
        steps=steps,
        out=json,
        say=report.say,
        progress=report.progress,
    )
    report.out.print(compression_table(result["rows"]))


def _by_file(overrides: list[str] | None) -> dict[str, list[str]]:
    """Overrides by the file that they are of.

    Raises:
      UserError: for one of none of them.
    """
    found: dict[str, list[str]] = {name: [] for name in _STEPS}
    for assignment in overrides or ():
        name, _, rest = assignment.partition(".")
        if name not in found:
            raise UserError(
                f"--set {assignment!r} is of none of {', '.join(found)}; begin with one of them, "
                "as distill.steps=1000"
            )
        found[name].append(rest)
    return found
