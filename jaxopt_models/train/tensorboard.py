"""Metrics of a run as TensorBoard reads them, beside the JSON lines."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxopt_models.errors import UserError

_SECONDS = 10  # after which a line is on disk


def summary_writer() -> Any:
    """The class that writes summaries, of a package that does not come along.

    Raises:
      UserError: if it is not there.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "metrics for TensorBoard are written by tensorboardX, which is not installed; run "
            "`pip install tensorboardX`, or leave out 'tensorboard'"
        ) from error
    return SummaryWriter


@contextmanager
def board(directory: Path, step: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """What writes scalars by step and name to a directory of event files; all are there at the end.

    Args:
      directory: created if it is missing.
      step: that the run is at; what is there of later steps is no longer shown.
    """
    writer = summary_writer()(str(directory), purge_step=step + 1, flush_secs=_SECONDS)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        writer.close()
