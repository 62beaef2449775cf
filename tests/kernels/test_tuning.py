"""The tables of tilings: who is asked first, what a file may hold, what two writers leave."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import pack_int4, tuning
from kernels_pallas.decode_tiling import Tiling, sizes_of
from kernels_pallas.tuning import Problem, bucket, cache_file, find, remember, shipped_file

DEVICE = "NVIDIA H100 80GB HBM3"
SIZES = ("op", "int4", 5, 4096, 1024, DEVICE)
PROBLEM = Problem("op", "int4", 8, 4096, 1024)


@dataclass(frozen=True)
class Cut:
    wide: int
    deep: int = 1


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """A cache and a shipped table of the test's own, both empty."""
    monkeypatch.setenv("JAXOPT_MODELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path / "shipped")
    tuning._load.cache_clear()
    yield
    tuning._load.cache_clear()


@pytest.mark.parametrize(
    ("m", "expected"),
    [(1, 1), (3, 4), (8, 8), (9, 16), (17, 32), (2048, 2048), (2049, 4096), (10**6, 16384)],
)
def test_buckets(m, expected):
    assert bucket(m) == expected


def test_the_users_entry_comes_before_the_shipped_one():
    assert find(Cut, *SIZES) is None
    remember({PROBLEM: {"wide": 2, "deep": 3}}, shipped_file(DEVICE))
    assert find(Cut, *SIZES) == Cut(2, 3)
    remember({PROBLEM: {"wide": 4}}, cache_file(DEVICE))
    assert find(Cut, *SIZES) == Cut(4)


def test_only_the_same_problem_is_found():
    remember({PROBLEM: {"wide": 2}}, cache_file(DEVICE))
    assert find(Cut, "op", "int4", 8, 4096, 1024, DEVICE) == Cut(2)  # of the same bucket
    assert find(Cut, "op", "int4", 9, 4096, 1024, DEVICE) is None
    assert find(Cut, "op", "nvfp4", 5, 4096, 1024, DEVICE) is None
    assert find(Cut, "other", "int4", 5, 4096, 1024, DEVICE) is None
    assert find(Cut, "op", "int4", 5, 1024, 4096, DEVICE) is None
    assert find(Cut, "op", "int4", 5, 4096, 1024, "NVIDIA H200") is None


def test_few_rows_take_the_next_larger_entry():
    remember({PROBLEM: {"wide": 2}}, cache_file(DEVICE))
    remember({Problem("op", "int4", 2, 4096, 1024): {"wide": 3}}, cache_file(DEVICE))
    found = {m: find(Cut, "op", "int4", m, 4096, 1024, DEVICE) for m in (1, 2, 3, 8)}
    assert found == {1: Cut(3), 2: Cut(3), 3: Cut(2), 8: Cut(2)}
    remember({Problem("op", "int4", 16, 64, 512): {"wide": 3}}, cache_file(DEVICE))
    assert find(Cut, "op", "int4", 8, 64, 512, DEVICE) is None


def test_where_the_cache_is(monkeypatch, tmp_path):
    name = "tilings_nvidia_h100_80gb_hbm3.json"
    assert cache_file(DEVICE) == tmp_path / "cache" / name
    monkeypatch.delenv("JAXOPT_MODELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_file(DEVICE) == Path("/elsewhere/jaxopt-models") / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file(DEVICE) == Path.home() / ".cache/jaxopt-models" / name


def test_a_file_has_one_entry_a_line_in_a_stable_order(tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    second = Problem("op", "nvfp4", 8, 64, 512)
    remember({PROBLEM: {"wide": 1}, second: {"wide": 2}}, one)
    remember({second: {"wide": 2}}, two)
    remember({PROBLEM: {"wide": 7}}, two)
    remember({PROBLEM: {"wide": 1}}, two)
    assert one.read_text() == two.read_text()
    lines = one.read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[1].rstrip(","))["kind"] == "int4"
    assert [path.name for path in tmp_path.glob("*.tmp*")] == []


WRITER = """
import sys
from pathlib import Path
from kernels_pallas.tuning import Problem, remember
for k in range(40):
    remember({Problem(sys.argv[2], "int4", 8, 64, k): {"wide": k}}, Path(sys.argv[1]))
"""


def test_two_processes_lose_nothing_of_one_another(tmp_path):
    file = tmp_path / "both.json"
    command = [sys.executable, "-c", WRITER, str(file)]
    writers = [subprocess.Popen([*command, name]) for name in ("first", "second")]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = tuning._read(file)
    assert len(found) == 80 and found[Problem("second", "int4", 8, 64, 39)] == {"wide": 39}


ENTRY = {"operation": "op", "kind": "int4", "m": 8, "n": 4096, "k": 1024, "tiling": {"wide": 2}}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "{}x",
        json.dumps([ENTRY | {"tiling": {"wide": "2"}}]),
        json.dumps([ENTRY | {"m": 9}]),
        json.dumps([ENTRY | {"more": 1}]),
        json.dumps([{"operation": "op"}]),
    ],
)
def test_a_file_that_is_none_is_named(text):
    file = cache_file(DEVICE)
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=r"tilings_nvidia_h100_80gb_hbm3.json is no file of til"):
        find(Cut, *SIZES)
    with pytest.raises(ValueError, match="is no file of tilings .*; remove it and tune again"):
        remember({PROBLEM: {"wide": 1}}, file)
    assert file.read_text() == text


def test_an_entry_that_the_kernel_no_longer_takes_is_named():
    remember({PROBLEM: {"wide": 2, "high": 3}}, cache_file(DEVICE))
    message = r"hbm3.json has a tiling .*'high': 3.* for op int4, M to 8, 4096 x 1024 .*; remove"
    with pytest.raises(ValueError, match=message):
        find(Cut, *SIZES)


@pytest.mark.parametrize("file", list(tuning._SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_what_is_shipped_fits(file):
    """Every entry makes a tiling, and the kernel takes it for its sizes."""
    decode = {p: f for p, f in tuning._read(file).items() if p.operation == "w4a16_decode"}
    assert decode and tuning.slug(file.stem) == file.stem
    for problem, fields in decode.items():
        codes = jax.ShapeDtypeStruct((problem.n, problem.k), jnp.int8)
        weight = jax.eval_shape(lambda codes: pack_int4(codes, codes[:, ::128]), codes)
        assert Tiling(**fields).fits(sizes_of(problem.m, weight)), problem
