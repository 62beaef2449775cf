"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

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
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Windows run at a time.")]
LengthOption = Annotated[int, typer.Option("--length", help="Tokens in a window.")]
