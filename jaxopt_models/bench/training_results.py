"""The result file of the training bench, and how a row reads.

A row is `{model, mode, gpus, batch, length, parts, remat, scan_layers, ms_per_step, tokens_per_s,
mfu, over_bf16, over_student, teacher_flops, scaling, bytes, compile_s, date}`. What a step takes
longer than in bf16, and a teacher's than the same without it, are shares of the shorter time, and
`teacher_flops` is what the latter would be if only operations counted; `scaling` is tokens a second
over those of one device. They are None without the other row, `mfu` where no peak rate is known.
"""

from pathlib import Path
from typing import Any

import jax

from jaxopt_models.bench.quality_results import today
from jaxopt_models.bench.result_file import read_results
from jaxopt_models.checkpoint.native import package_version
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json

_PACKAGES = ("jaxopt-models", "jax", "jaxlib")
_SETTING = ("model", "batch", "length", "parts", "remat", "scan_layers")
_WITHOUT_TEACHER = {"distill": "bf16", "qad_nvfp4": "qat_nvfp4"}


class TrainingResults:
    """Rows in one file, which is rewritten whole whenever one is added.

    A file that is there is gone on with: a row takes the place of an earlier one of the same mode,
    setting and number of devices.
    """

    def __init__(self, file: Path | None) -> None:
        """Goes on with what the file holds; None keeps everything in memory.

        Raises:
          UserError: if the file holds something else, or figures of another device.
        """
        self.file, self.rows = file, []
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        before = read_results(file, ("rows", "device"), "--out")
        self.rows, where = before["rows"], before["device"]
        if where != _device():
            raise UserError(f"{file} holds figures of {where}, not of {_device()}; choose another")

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Saves a row, beside what others make of it."""
        row = row | {"date": today()}
        self.rows = [kept for kept in self.rows if _identity(kept) != _identity(row)] + [row]
        for kept in self.rows:
            kept |= self._ratios(kept)
        self.save()
        return row

    def _ratios(self, row: dict[str, Any]) -> dict[str, float | None]:
        plain = self._beside(row, mode="bf16")
        student = self._beside(row, mode=_WITHOUT_TEACHER.get(row["mode"]))
        single = self._beside(row, gpus=1)
        return {
            "over_bf16": plain and row["ms_per_step"] / plain["ms_per_step"] - 1,
            "over_student": student and row["ms_per_step"] / student["ms_per_step"] - 1,
            "scaling": single and row["tokens_per_s"] / single["tokens_per_s"],
        }

    def _beside(self, row: dict[str, Any], **other: Any) -> Any:
        wanted = _identity(row | other)
        return next((kept for kept in self.rows if _identity(kept) == wanted), None)

    def save(self) -> None:
        """Writes the file, if there is to be one."""
        if self.file is not None:
            write_json(self.file, self.document())

    def document(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "rows": self.rows,
            "device": _device(),
            "versions": {name: package_version(name) for name in _PACKAGES},
            "date": today(),
        }


def row_line(row: dict[str, Any]) -> str:
    """A row as a sentence, for those who watch."""
    devices = "1 device" if row["gpus"] == 1 else f"{row['gpus']} devices"
    parts = [
        f"{row['model']} {row['mode']} on {devices}: {row['ms_per_step']:.1f} ms a step",
        f"{row['tokens_per_s']:,.0f} tokens/s",
    ]
    parts += [f"{row['mfu']:.1%} of the peak rate"] if row["mfu"] is not None else []
    if row["mode"].startswith("qat") and row["over_bf16"] is not None:
        parts.append(f"fake quantization costs {row['over_bf16']:.1%}")
    if row["over_student"] is not None:
        cost, least = row["over_student"], row["teacher_flops"]
        parts.append(f"the teacher costs {cost:.1%}, its operations {least:.1%}")
    if row["gpus"] > 1 and row["scaling"] is not None:
        parts.append(f"{row['scaling']:.2f} x one device")
    return ", ".join(parts)


def _device() -> str:
    return jax.devices()[0].device_kind


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in (*_SETTING, "mode", "gpus"))
