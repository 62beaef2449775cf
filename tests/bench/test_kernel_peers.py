"""The peers' process: what it is asked, and that its failures cost nothing but its own figures."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxopt_models.bench import kernel_peers
from jaxopt_models.bench.kernel_peers import Peers
from jaxopt_models.errors import UserError

SCRIPT = Path(kernel_peers.__file__).with_name("peer_kernels.py")


def test_a_crash_costs_one_peer_one_figure(peer_python):
    said = []
    with Peers(
        peer_python("print('an illegal access', file=sys.stderr); os._exit(3)"), say=said.append
    ) as peers:
        figures = peers.time("int4", 64, 512, [1, 4, 8])
        assert {m: set(found) for m, found in figures.items()} == {
            m: {"steady", "crashing", "late"} for m in (1, 4, 8)
        }
        assert figures[8]["late"] == {"us": 8.0, "clock": "CUPTI", "error": 0.1}
        assert figures[1]["crashing"]["us"] == 1
        reason = "its process ended with code 3: an illegal access"
        assert figures[4]["crashing"] == figures[8]["crashing"] == {"reason": reason}
        assert peers.about == {"versions": {"torch": "9"}, "device": "a card"}
        assert peers.skipped is None and f"crashing on int4 64 x 512: {reason}" in said
        assert said[0] == "steady on int4 64 x 512, M = 1: 1.0 us by CUPTI"


def test_a_silent_peer_is_left(peer_python, monkeypatch):
    monkeypatch.setattr(kernel_peers, "SILENCE", 2.0)
    with Peers(peer_python("time.sleep(1000)")) as peers:
        figures = peers.time("int4", 64, 512, [4])
    assert figures[4]["crashing"] == {"reason": "gave no answer for 2 s"}
    assert figures[4]["late"]["us"] == 4


def test_when_the_time_is_over(peer_python):
    with Peers(peer_python("time.sleep(1000)"), until=time.monotonic() + 3) as peers:
        figures = peers.time("int4", 64, 512, [4])
    assert figures[4]["steady"]["us"] == 4
    assert "when the time was over" in figures[4]["crashing"]["reason"]
    assert peers.skipped == "the time is over" and "late" not in figures[4]


def test_only_some_peers(peer_python):
    with Peers(peer_python("pass"), only=["late"]) as peers:
        assert peers.time("int4", 64, 512, [4]).keys() == {4}
        assert list(peers.time("int4", 64, 512, [4])[4]) == ["late"]


def test_ceilings(peer_python):
    said = []
    with Peers(peer_python("pass"), say=said.append) as peers:
        assert peers.ceilings() == {"bf16_tflops": 790.0}
        assert peers.time("int4", 64, 512, [1])[1]["steady"]["us"] == 1
    assert said[0] == "torch int8 on a ceiling, M = 8192: no kernel"


def test_an_interpreter_that_is_none():
    with Peers("/nowhere/python") as peers, pytest.raises(UserError, match="No such file"):
        peers.ceilings()


def test_a_process_that_ends_at_once(tmp_path):
    file = tmp_path / "python"
    file.write_text("#!/bin/sh\necho 'no such module' >&2; exit 1\n")
    file.chmod(0o755)
    with Peers(str(file)) as peers:
        assert peers.ceilings() == {} and peers.time("int4", 64, 512, [1]) == {}
    assert peers.skipped == "its process ended with code 1: no such module"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([1.0, 2.0] * 4 + [50.0, 60.0], (3.0, "CUPTI")),
        ([1.0] * 11, (2.2, "CUPTI, mean")),
        ([], (7.0, "CUDA graph")),
    ],
)
def test_by_which_clock(monkeypatch, times, expected):
    """Five rounds of what the profiler saw: their median, their mean, or another clock."""
    spec = importlib.util.spec_from_file_location("peer_kernels", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    torch = SimpleNamespace(cuda=SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(script, "_kernels", lambda once: times)
    monkeypatch.setattr(script, "_graph_microseconds", lambda once: 7.0)
    us, clock = script.microseconds(lambda: None)
    assert (pytest.approx(us), clock) == expected


def test_the_script_says_why_it_cannot(tmp_path):
    """On an interpreter without torch, or with one that sees no GPU."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not for this machine')\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={"PYTHONPATH": str(tmp_path)},
        input='{"ceilings": true}\n',
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"unusable": "torch is not for this machine"}
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_available = lambda: False\n__version__ = '9'\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with Peers(sys.executable) as peers:
            assert peers.ceilings() == {}
    assert peers.skipped == f"{sys.executable}: torch 9 sees no GPU"
