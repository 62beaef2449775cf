"""Texts and settings of runs that are trained in seconds."""

from pathlib import Path
from typing import Any

from jaxopt_models.train.settings import RunSettings


def write_texts(folder: Path) -> Path:
    """One to learn from and one to be measured on."""
    (folder / "train.txt").write_text("To learn is human, as they say. " * 40)
    (folder / "eval.txt").write_text("To evaluate, divine: let us see how it goes. " * 10)
    return folder


def short_run(folder: Path, **more: Any) -> RunSettings:
    """Six steps on the texts of a folder, measured after each three."""
    known = {
        "model": "tiny",
        "text": str(folder / "train.txt"),
        "length": 16,
        "batch": 4,
        "steps": 6,
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {
            "text": str(folder / "eval.txt"), "windows": 4, "length": 16, "every": 3,
        },
    }  # fmt: skip
    return RunSettings.of(known | more)
