"""Directories that get their name only once they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextmanager
def new_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `target`, which is renamed to it when the block succeeds.

    Whenever the process is killed, `target` is either what it was, or absent, or complete: absent
    though it existed only between the two renames of an overwrite, when the old and the new one
    both lie beside it, complete, as `.<name>.old-<pid>` and `.<name>.tmp-<pid>`. What a killed
    process left is removed by the next one that writes the same target.

    Every process of a distributed run must enter; the first one makes and moves the directory.

    Args:
      target: an absolute path; its parents are created.
      overwrite: whether a directory may be there already.
    """
    writer = jax.process_index() == 0
    pid = _of_first_process(os.getpid())
    scratch = target.with_name(f".{target.name}.tmp-{pid}")
    if writer:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(target)
        scratch.mkdir()
    _wait("made")
    try:
        yield scratch
        _wait("written")
        if writer and overwrite and target.exists():
            target.rename(target.with_name(f".{target.name}.old-{pid}"))
        if writer:
            scratch.rename(target)
            _remove(_siblings(target, "old"))
    finally:
        if writer:
            _remove([scratch])
    _wait("moved")


def _remove_unfinished(target: Path) -> None:
    """Removes what processes that are gone were writing when they ended."""
    stale = [path for path in _siblings(target, "tmp") if not _runs(path.name.rpartition("-")[2])]
    _remove(stale)


def _siblings(target: Path, kind: str) -> list[Path]:
    prefix = f".{target.name}.{kind}-"
    return [path for path in target.parent.iterdir() if path.name.startswith(prefix)]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            shutil.rmtree(path)


def _runs(pid: str) -> bool:
    """Whether another process of that id is alive."""
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and another user's
        return True
    return True


def _of_first_process(number: int) -> int:
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _wait(moment: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"new_directory {moment}")
