"""The peers of the kernel bench, timed in a process of their own that may fail at any moment."""

import contextlib
import importlib.util
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxopt_models.errors import UserError

# A peer may compile for long, but not for ever.
SILENCE = 240.0
_SCRIPT = Path(__file__).with_name("peer_kernels.py")

# M -> peer -> `{us, clock, error}` or `{reason}`.
Figures = dict[int, dict[str, dict[str, Any]]]


class Peers:
    """What `peer_kernels` answers, whatever becomes of its process.

    A peer that brings the process down, or keeps silent for too long, is left out of that problem,
    with the reason; the process starts anew for the others.

    Attributes:
      skipped: why nothing is timed; None if something is.
      about: `{versions, device}` of the peers' environment.
    """

    def __init__(
        self,
        python: str | None,
        only: Sequence[str] = (),
        until: float | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Starts nothing yet.

        Args:
          python: interpreter of an environment with torch; None takes this one.
          only: names of peers; all if empty.
          until: by `time.monotonic`, when to give up waiting.
          say: is told whatever goes wrong.
        """
        self.skipped: str | None = None
        self.about: dict[str, Any] = {}
        self._python = python or sys.executable
        self._only, self._until, self._say = list(only), until, say
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        if python is None and importlib.util.find_spec("torch") is None:
            self._skip(f"{sys.executable} has no torch; name another interpreter by --peer-python")

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def time(self, form: str, n: int, k: int, ms: Sequence[int]) -> Figures:
        """Times every peer that has a format, on a weight [N, K] and each number of rows."""
        figures: Figures = defaultdict(dict)
        finished: list[str] = []
        while self.skipped is None:
            problem = {"format": form, "n": n, "k": k, "ms": list(ms), "only": self._only}
            guilty, reason = self._ask(problem | {"without": finished}, figures, ms, finished)
            if reason is None:
                break
            if guilty is None:
                self._skip(reason)
                break
            _fill(figures, guilty, ms, reason)
            self._say(f"{guilty} on {_name(problem)}: {reason}")
        return figures

    def ceilings(self) -> dict[str, float]:
        """Rates of large products by the peers' libraries, those that could be measured."""
        found: Figures = defaultdict(dict)
        if self.skipped is None:
            guilty, reason = self._ask({"ceilings": True}, found, [], [])
            if guilty is None and reason is not None:
                self._skip(reason)
            elif reason is not None:
                self._say(f"the peers' ceilings were not measured: {reason}")
        return found.pop(0, {}).get("ceilings", {})

    def _ask(
        self, problem: dict[str, Any], figures: Figures, ms: Sequence[int], finished: list[str]
    ) -> tuple[str | None, str | None]:
        """Sends a problem and takes in what comes: (who failed the process, why), if it failed."""
        current = None
        if self._left() <= 0:
            return None, "the time is over"
        try:
            if self._process is None:
                self._start()
            self._send(problem)
            while "done" not in (line := self._next()):
                if "start" in line:
                    current = line["start"]
                    finished.append(current)
                elif "ceilings" in line:
                    figures[0]["ceilings"] = line["ceilings"]
                elif "peer" in line:
                    self._take(line, figures, ms, _name(problem))
        except _Broken as broken:
            self._stop()
            return current, str(broken)
        return None, None

    def _take(self, line: dict[str, Any], figures: Figures, ms: Sequence[int], what: str) -> None:
        name, m = line.pop("peer"), line.pop("m")
        found = line["reason"] if "reason" in line else f"{line['us']:.1f} us by {line['clock']}"
        self._say(f"{name} on {what}{'' if m is None else f', M = {m}'}: {found}")
        if m is None:
            _fill(figures, name, ms, line["reason"])
        elif ms:
            figures[m][name] = line

    def _start(self) -> None:
        environment = dict(os.environ)
        if self._python != sys.executable:  # what helps this one to import would mislead it
            environment.pop("PYTHONPATH", None)
        self._errors = tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                [self._python, str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
            )
        except OSError as error:
            self._errors.close()
            raise UserError(
                f"cannot run the peers' Python {self._python}: {error.strerror}"
            ) from error
        self._lines = queue.SimpleQueue()
        threading.Thread(
            target=_read, args=(self._process.stdout, self._lines), daemon=True
        ).start()
        line = self._next()
        if "unusable" in line:
            raise _Broken(f"{self._python}: {line['unusable']}")
        self.about = line

    def _send(self, problem: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(problem) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise _Broken(self._last_words()) from None

    def _next(self) -> dict[str, Any]:
        left = min(SILENCE, self._left())
        try:
            line = self._lines.get(timeout=max(left, 0))
        except queue.Empty:
            over = "" if left >= SILENCE else ", when the time was over"
            raise _Broken(f"gave no answer for {max(left, 0):.0f} s{over}") from None
        if line is None:
            raise _Broken(self._last_words())
        return json.loads(line)

    def _left(self) -> float:
        return math.inf if self._until is None else self._until - time.monotonic()

    def _last_words(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no output"]
        return f"its process ended with code {code}: {lines[-1]}"

    def _skip(self, reason: str) -> None:
        self.skipped = reason
        self._say(f"peers are skipped: {reason}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # unsent bytes of a dead process
                        pipe.close()
            self._errors.close()
            self._process = None


class _Broken(Exception):
    """The process can no longer be talked to."""


def _read(stdout: Any, lines: "queue.SimpleQueue[str | None]") -> None:
    with contextlib.suppress(ValueError):  # closed by `_stop`
        for line in stdout:
            lines.put(line)
    lines.put(None)


def _name(problem: dict[str, Any]) -> str:
    if "ceilings" in problem:
        return "a ceiling"
    return f"{problem['format']} {problem['n']} x {problem['k']}"


def _fill(figures: Figures, name: str, ms: Sequence[int], reason: str) -> None:
    for m in ms:
        figures[m].setdefault(name, {"reason": reason})
