"""The command that trains, in one process or in one of several."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxopt_models import report
from jaxopt_models.cli_options import (
    CoordinatorOption,
    DevicesOption,
    DistributedOption,
    OutOption,
    ProcessesOption,
    ProcessOption,
    SetOption,
)
from jaxopt_models.distributed import initialize_distributed
from jaxopt_models.errors import UserError
from jaxopt_models.progress import silent


def train(
    technique: Annotated[
        Literal["qat", "qad", "distill", "draft"],
        typer.Argument(help="What is trained, and what for."),
    ],
    config: Annotated[Path, typer.Option(help="YAML file of the run; see configs/runs.")],
    out: OutOption,
    overrides: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run of the same settings stopped.")
    ] = False,
    distributed: DistributedOption = False,
    coordinator: CoordinatorOption = None,
    processes: ProcessesOption = None,
    process: ProcessOption = None,
    devices: DevicesOption = None,
) -> None:
    """Train a model under quantization, a student for what a model says, or a head that guesses for
    it."""
    import jax

    from jaxopt_models.train import run
    from jaxopt_models.train.settings import RunSettings

    settings = RunSettings.load(config, tuple(overrides or ()))
    if distributed or any(x is not None for x in (coordinator, processes, process, devices)):
        initialize_distributed(coordinator, processes, process, _device_ids(devices))
    first = jax.process_index() == 0
    progress = report.progress if first else silent
    result = run.train(technique, settings, out, resume=resume, progress=progress)
    if not first:
        return
    last = result.log[-1]
    found = (
        f"{last['acceptance_length']:.2f} tokens a pass of {settings.model}"
        if technique == "draft"
        else f"perplexity {last['perplexity']:.4f}, KL {last['kl']:.4f} to {settings.model}"
    )
    report.out.print(f"{settings.steps} steps: {found} -> {out / 'model'}", soft_wrap=True)


def _device_ids(devices: str | None) -> list[int] | None:
    try:
        return None if devices is None else [int(number) for number in devices.split(",")]
    except ValueError:
        raise UserError(f"--devices {devices!r} is no list of numbers such as 0,1") from None
