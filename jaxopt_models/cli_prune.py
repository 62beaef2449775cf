"""The command that cuts a model."""

from pathlib import Path
from typing import Annotated

import typer

from jaxopt_models import data, report
from jaxopt_models.cli_options import JsonOption, ModelArg, OutOption, SetOption, refuse_existing
from jaxopt_models.errors import UserError
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
    from jaxopt_models.prune import run, stages, teaching
    from jaxopt_models.prune.settings import PruneSettings

    settings = PruneSettings.load(config, tuple(overrides or ()))
    refuse_existing({"--out": out, "--report": files})
    with report.working(f"loading {model}"):
        loaded = jom.load(model)
    with report.working("tokenizing"):
        texts = _texts(loaded, settings)
        training = teaching.lesson_rows(loaded, settings)
    partial = out.with_name(f"{out.name}.partial")
    small, params, result = run.prune(
        loaded, settings, *texts, report.progress, training=training, resume=partial
    )
    with report.working(f"saving {out}"):
        jom.save(
            out,
            small,
            params,
            loaded.tokenizer,
            recipe=settings.model_dump(mode="json"),
            report=result.as_dict(),
            provenance={"source": loaded.source, "calibration": settings.text},
        )
    stages.remove(partial)
    if json:
        write_json(json, result.as_dict())
    if files:
        report_pruning.save_report(files, result)
    if result.candidates:
        report.out.print(report_pruning.candidates_table(result))
    report.out.print(report_pruning.evaluation_table(result))
    report.say(f"{report_pruning.totals_line(result)} -> {out}")


def _texts(model, settings) -> tuple[list, list]:
    """(calibration, evaluation) batches.

    Raises:
      UserError: if both are the same text.
    """
    own, other = settings.text, settings.evaluation.text
    texts = data.load_text(own, "calibration"), data.load_text(other, "evaluation")
    if texts[0] == texts[1]:
        raise UserError(
            f"evaluation.text {other!r} is the text that is pruned by, on which everything looks "
            "better than it is; name another"
        )
    counts = settings.windows, settings.evaluation.windows
    calibration, evaluation = (
        data.token_batches(model, text, count, settings.length, settings.batch)
        for text, count in zip(texts, counts, strict=True)
    )
    return calibration, evaluation
