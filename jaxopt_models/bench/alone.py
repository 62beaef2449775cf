"""A GPU that several processes measure on, one at a time. Imports nothing, for peers' processes."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOCK = "JAXOPT_MODELS_GPU_LOCK"
_held: set[str] = set()  # by this process


@contextmanager
def alone() -> Iterator[None]:
    """Waits until no other process is in here that has the same file in the variable `LOCK`.

    Without that variable nothing is waited for.
    """
    path = os.environ.get(LOCK)
    if path is None or path in _held:
        yield
        return
    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)
