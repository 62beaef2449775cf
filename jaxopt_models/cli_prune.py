"""The command that cuts a model."""

from pathlib import Path
from typing import Annotated

import typer

from jaxopt_models import report
from jaxopt_models.cli_options import JsonOption, ModelArg, OutOption, SetOption, refuse_existing
from jaxopt_models.files import write_json


def prune(
    model: ModelArg,
    config: Annotated[Path, typer.Option(help="YAML file of what to remove; see configs/runs.")],
    out: OutOption,
    overrides: SetOption = None,
    json: JsonOption = None,
    files: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Directory to create: report.json, candidates.csv, candidates.png."
        ),
    ] = None,
) -> None:
    """Remove layers, channels, neurons, heads or experts of a model, or weights, and save it.

    OUT.partial keeps what is finished until then; the same command goes on with it.
    """
    import jaxopt_models as jom
    from jaxopt_models import report_pruning
    from jaxopt_models.prune.checkpoint import prune_checkpoint
    from jaxopt_models.prune.settings import PruneSettings

    settings = PruneSettings.load(config, tuple(overrides or ()))
    refuse_existing({"--out": out, "--report": files})
    with report.working(f"loading {model}"):
        loaded = jom.load(model)
    result = prune_checkpoint(loaded, settings, out, report.progress)
    if json:
        write_json(json, result.as_dict())
    if files:
        report_pruning.save_report(files, result)
    if result.candidates:
        report.out.print(report_pruning.candidates_table(result))
    report.out.print(report_pruning.evaluation_table(result))
    report.say(f"{report_pruning.totals_line(result)} -> {out}")
