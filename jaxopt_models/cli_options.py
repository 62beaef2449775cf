"""Arguments and options that several commands share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxopt_models.errors import UserError

ModelArg = Annotated[
    str, typer.Argument(help="Checkpoint directory, .gguf file, hub id or built-in name.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Directory to create.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures to this file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value override of a recipe, e.g. rules.0.weight.block_size=64"),
]
DistributedOption = Annotated[
    bool, typer.Option("--distributed", help="One of several processes of Slurm or Open MPI.")
]
CoordinatorOption = Annotated[
    str | None, typer.Option("--coordinator", help="HOST:PORT of process 0, where none tells it.")
]
ProcessesOption = Annotated[
    int | None, typer.Option("--processes", min=1, help="How many there are, likewise.")
]
ProcessOption = Annotated[
    int | None, typer.Option("--process", min=0, help="Which of them this is, from 0.")
]
DevicesOption = Annotated[
    str | None, typer.Option("--devices", help="This process's devices of its host, e.g. 0,1.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Of activations; else the checkpoint's. Kernels: bfloat16."),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Windows run at a time.")]
LengthOption = Annotated[int, typer.Option("--length", help="Tokens in a window.")]

# Of benches on random weights.
ShapeOption = Annotated[str, typer.Option("--model", help="Shape: llama-8b, llama-1b or tiny.")]

# Of benches that train.
TrainingTextOption = Annotated[
    str,
    typer.Option("--text", help="Training text: a file, also of documents, builtin, or hf:NAME."),
]
EvaluationTextOption = Annotated[
    str, typer.Option("--evaluation", help="Evaluation text, not trained on.")
]
SeedsOption = Annotated[
    list[int] | None, typer.Option("--seed", min=0, help="May be repeated; else 0 1 2.")
]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Of each run.")]
RowsOption = Annotated[int, typer.Option("--batch", min=1, help="Rows of a step.")]
TrainingDtypeOption = Annotated[
    Literal["float32", "bfloat16"], typer.Option("--dtype", help="That training computes in.")
]
RateOption = Annotated[float, typer.Option("--learning-rate", min=0, help="The highest.")]
PackingOption = Annotated[
    Literal["stream", "documents"], typer.Option("--packing", help="Of rows of training.")
]
WindowsOption = Annotated[int, typer.Option("--windows", min=1, help="Evaluation windows.")]
EveryOption = Annotated[
    int | None,
    typer.Option("--every", min=1, help="Steps between evaluations; else at the end only."),
]
LimitOption = Annotated[
    float | None,
    typer.Option("--limit", min=0, help="Seconds; nothing is begun that would take longer."),
]


def refuse_existing(paths: Mapping[str, Path | None]) -> None:
    """Raises UserError for the first path that is there already, by its option."""
    for option, path in paths.items():
        if path and path.exists():
            raise UserError(f"{path} exists already; choose another {option} or remove it")


def named_values(pairs: Sequence[str] | None, option: str, form: str) -> dict[str, str]:
    """Of an option that is given as NAME=VALUE, any number of times.

    Args:
      form: what pairs look like, for people.

    Raises:
      UserError: for one that does not.
    """
    for pair in pairs or ():
        if not all(pair.partition("=")):
            raise UserError(f"{option} {pair!r} is not of the form {form}")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs or ())}
