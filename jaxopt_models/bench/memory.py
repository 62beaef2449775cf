"""How much memory a piece of work adds at its worst."""

import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

HOW = {
    "cpu": "growth of the peak resident memory of the process (VmHWM), compiler included",
    "gpu": "growth of the peak of the allocator's bytes in use, over all local devices",
}
_SAMPLED_EVERY = 0.002  # seconds
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """What `peak_memory` found.

    Attributes:
      bytes: most that was held at one time, beyond what was held at the start; None where this
        cannot be measured (without Linux's /proc/self/clear_refs). `HOW` says what is held.
    """

    bytes: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures the block under it; the figure is there when the block has ended.

    On accelerators: the allocator's bytes in use, over all local devices. The allocator's own peak
    never falls, so it counts where the block raised it; where it did not, samples count.
    On CPU under Linux: the peak of the process's resident memory, which includes the compiler's.
    """
    gc.collect()
    measure = _resident if jax.default_backend() == "cpu" else _on_devices
    with measure() as peak:
        yield peak


@contextmanager
def _resident() -> Iterator[Peak]:
    peak = Peak()
    _return_freed_memory()
    try:
        _CLEAR.write_text("5")  # VmHWM starts anew
    except OSError:
        yield peak
        return
    before = _status("VmRSS")
    yield peak
    peak.bytes = _status("VmHWM") - before


@contextmanager
def _on_devices() -> Iterator[Peak]:
    peak = Peak()
    before, highest = _allocated("bytes_in_use"), _allocated("peak_bytes_in_use")
    seen, done = list(before), threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLED_EVERY):
            seen[:] = map(max, seen, _allocated("bytes_in_use"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
    after = _allocated("peak_bytes_in_use")
    exact = [new if new > old else None for new, old in zip(after, highest, strict=True)]
    worst = [s if e is None else e for s, e in zip(seen, exact, strict=True)]
    peak.bytes = sum(worst) - sum(before)


def _allocated(what: str) -> list[int]:
    return [device.memory_stats()[what] for device in jax.local_devices()]


def _status(field: str) -> int:
    """Bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _return_freed_memory() -> None:
    """What the C library keeps for reuse would hide growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return
