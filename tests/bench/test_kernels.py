"""The kernel bench: what it asks to be timed, and what a row says. No time is measured here."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import jax
import pytest

from jaxopt_models import cli
from jaxopt_models.bench import kernel_operations, kernel_products, kernel_timing, kernels
from jaxopt_models.bench.alone import LOCK, alone
from jaxopt_models.bench.kernel_operations import OPERATIONS, nearest
from jaxopt_models.bench.kernel_products import Tuning, operations, side_by_side
from jaxopt_models.bench.kernel_results import best_peer, kernel_table
from jaxopt_models.bench.kernels import bench_kernels
from jaxopt_models.errors import UserError
from kernels_pallas import reference, tuning
from kernels_pallas.decode_tiling import Sizes, Tiling, default_tiling, tilings

CEILINGS = {"read_tb_s": 3.0, "bf16_tflops": 700.0}
SHAPE = (64, 1024)


class H100:
    platform, compute_capability, core_count, device_kind = "gpu", "9.0", 132, "an H100"


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """What would be run on a GPU: the sizes of each product and of what rotates."""
    seen = []

    def measured(run, x, weights):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        seen.append((x.shape, weights[0].shape, size))
        return 10.0 + len(seen), run(x, weights[0])

    def product(kernel):
        def run(x, weight, tiling, processors):
            jax.eval_shape(partial(kernel, tiling=tiling, processors=processors), x, weight)
            return reference.w4a16(x, weight)  # no GPU is here

        return run

    for name in ("w4a16_decode", "w4a16_wide"):
        kernel = getattr(kernel_operations, name)
        monkeypatch.setattr(kernel_operations, name, product(kernel))
    for module in (kernel_timing, kernel_products):
        monkeypatch.setattr(module, "measured", measured)
    monkeypatch.setattr(kernel_timing, "ceilings", lambda say: dict(CEILINGS))
    monkeypatch.setattr(kernel_timing, "least_microseconds", lambda processors: 1.5)
    monkeypatch.setattr(kernel_timing, "L2", 2**14)
    monkeypatch.setattr(jax, "devices", lambda: [H100()])
    monkeypatch.setenv("JAXOPT_MODELS_CACHE", str(tmp_path / "cache"))
    tuning._load.cache_clear()
    yield seen
    tuning._load.cache_clear()


def broken(monkeypatch, should_fail) -> None:
    """Makes products fail for which `should_fail(x, tiling)`."""
    (decode,) = (op for op in OPERATIONS if op.kernel == "w4a16_decode")

    def run(x, weight, tiling, processors):
        if should_fail(x, tiling):
            raise RuntimeError("no such instruction")
        return decode.run(x, weight, tiling, processors)

    monkeypatch.setattr(kernel_products, "OPERATIONS", (replace(decode, run=run),))


def test_a_row_for_each_product(timed, tmp_path):
    out = tmp_path / "out.json"
    result = bench_kernels([SHAPE], [1, 16], ["int4", "mxfp4"], out=out)
    assert json.loads(out.read_text()) == result and result["device"] == "1 x an H100"
    assert result["ceilings"] == CEILINGS and result["least_us"] == 1.5
    assert [(row["format"], row["M"]) for row in result["rows"]] == [
        ("int4", 1), ("int4", 16), ("mxfp4", 1), ("mxfp4", 16)
    ]  # fmt: skip
    first = result["rows"][0]
    assert (first["op"], first["kernel"]) == ("w4a16", "w4a16_decode")
    assert (first["N"], first["K"]) == SHAPE and first["us"] == 13 and first["bf16_us"] == 11
    limit = (64 * 1024 * 4.125 / 8 + 16) / 3e12 * 1e6  # codes, scales and the tiles' factors
    assert first["read_fraction"] == pytest.approx(limit / 13)
    assert first["flop_fraction"] == pytest.approx(2 * 64 * 1024 / 700e12 * 1e6 / 13)
    assert first["tiling"] == vars(default_tiling(Sizes(1, 4, 1024, folds=2), 132))
    assert first["best_peer"] is None and first["best_peer_us"] is None
    assert all(size >= 4 * 2**14 for *_, size in timed)


def test_peers_that_cannot_run_are_said_to_be_skipped(timed):
    said = []
    result = bench_kernels([SHAPE], [1], ["int4"], say=said.append)
    assert any("peers are skipped" in line and "no torch" in line for line in said)
    assert "no torch" in result["peers"]["skipped"]
    result = bench_kernels([SHAPE], [1], ["int4"], peers=["none"])
    assert result["peers"]["skipped"] == "not asked for"


def test_every_number_of_rows_has_a_kernel(timed):
    result = bench_kernels([SHAPE], None, ["int4"])
    assert [row["M"] for row in result["rows"]] == list(kernels.ROWS)
    assert {row["kernel"] for row in result["rows"]} == {"w4a16_decode", "w4a16_wide"}


def test_a_wrong_product_is_no_figure(timed, monkeypatch):
    def wrong(x, weight, tiling, processors):
        return reference.w4a16(x, weight) * 1.1

    monkeypatch.setattr(kernel_operations, "w4a16_wide", wrong)
    with pytest.raises(UserError, match="1 products could not be timed, .* relative error of 0.1"):
        bench_kernels([SHAPE], [1, 64], ["int4"])


def test_rows_that_no_kernel_takes(timed, monkeypatch):
    few = tuple(op for op in OPERATIONS if op.kernel == "w4a16_decode")
    monkeypatch.setattr(kernel_products, "OPERATIONS", few)
    said = []
    result = bench_kernels([SHAPE], None, ["int4"], say=said.append)
    taken = {m for m in kernels.ROWS if any(operations("int4", m))}
    assert {row["M"] for row in result["rows"]} == taken
    assert len([line for line in said if "left out" in line]) == len(kernels.ROWS) - len(taken)
    with pytest.raises(UserError, match="no kernel takes 17 rows with int4 weights"):
        bench_kernels([SHAPE], [1, 17], ["int4"])


def test_tuning_keeps_and_remembers_the_fastest(timed, tmp_path):
    table = tmp_path / "table.json"
    result = bench_kernels([SHAPE], [3], ["nvfp4"], tune=Tuning(table=table))
    assert result["rows"][0]["us"] == 12  # the first after the baseline
    assert len(timed) == 1 + 8
    (line,) = json.loads(table.read_text())
    assert line["tiling"] == result["rows"][0]["tiling"] and line["m"] == 4
    bench_kernels([SHAPE], [3], ["nvfp4"], tune=Tuning(exhaustive=True))
    assert len(timed) > 2 * (1 + 8)


def test_a_remembered_tiling_is_what_is_timed(timed):
    own = Tiling(1, 2, depth=1)
    assert own != default_tiling(Sizes(3, 4, 1024, folds=2), 132)
    problem = tuning.Problem("w4a16_decode", "int4", 8, *SHAPE)
    tuning.remember({problem: asdict(own)}, tuning.cache_file("an H100"))
    found = bench_kernels([SHAPE], [2, 16], ["int4"])["rows"]
    assert found[0]["tiling"] == asdict(own)
    assert found[1]["tiling"] == vars(default_tiling(Sizes(16, 4, 1024), 132))


def test_the_nearest_tilings_come_first():
    default = Tiling(2, 2)
    sizes = Sizes(8, 256, 4096)
    found = nearest(default, tilings(sizes), 4)
    assert found[0] == default and default not in found[1:]
    near = [abs(t.wn - 2) + abs(t.wk - 2) + abs(t.split - 1) for t in found[1:]]
    assert near == [1, 1, 1]
    assert len(nearest(default, tilings(sizes), None)) == len(set(tilings(sizes)))


def test_a_product_that_fails_does_not_lose_the_others(timed, monkeypatch, tmp_path):
    broken(monkeypatch, lambda x, tiling: len(x) == 4)
    out = tmp_path / "out.json"
    with pytest.raises(UserError, match=r"1 products could not be timed, first w4a16_decode int4"):
        bench_kernels([SHAPE], [1, 4, 8], ["int4"], out=out)
    document = json.loads(out.read_text())
    assert [row["M"] for row in document["rows"]] == [1, 8]
    (failure,) = document["failures"]
    assert failure["M"] == 4 and failure["reason"] == "RuntimeError: no such instruction"


def test_a_tiling_that_fails_is_passed_over(timed, monkeypatch):
    broken(monkeypatch, lambda x, tiling: tiling.depth != 2)
    said = []
    result = bench_kernels([SHAPE], [1], ["int4"], tune=Tuning(), say=said.append)
    assert result["rows"][0]["tiling"]["depth"] == 2
    assert any("is passed over: RuntimeError: no such instruction" in line for line in said)


def test_the_limit_ends_it_with_what_is_finished(timed, monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    fast = kernel_products.measured

    def slow(run, x, weights):
        clock[0] += 10
        return fast(run, x, weights)

    monkeypatch.setattr(kernel_products, "measured", slow)
    said, out = [], tmp_path / "out.json"
    bench_kernels([SHAPE], [1, 4, 8], ["int4"], limit=25, out=out, say=said.append)
    assert [row["M"] for row in json.loads(out.read_text())["rows"]] == [1, 4]
    assert "the limit is reached before w4a16_decode int4 64 x 1024, M = 8" in said[-1]
    assert clock[0] <= 25


@pytest.mark.parametrize("jobs", [1, 3])
def test_peers_are_beside(timed, peer_python, tmp_path, monkeypatch, jobs):
    monkeypatch.setattr(kernels, "side_by_side", lambda _, *rest: side_by_side(1, *rest))
    options = {"peer_python": peer_python("os._exit(3)"), "jobs": jobs, "out": tmp_path / "a.json"}
    result = bench_kernels([SHAPE, (128, 512)], [1, 4], ["int4", "nvfp4"], **options)
    assert [(row["N"], row["format"], row["M"]) for row in result["rows"]] == [
        (n, form, m) for form in ("int4", "nvfp4") for n in (64, 128) for m in (1, 4)
    ]
    for row in result["rows"]:
        assert set(row["peers"]) == {"steady", "crashing", "late"}
        assert "reason" in row["peers"]["crashing"] or row["M"] == 1
        assert row["best_peer_us"] == row["M"]
    assert result["peers"] == {"versions": {"torch": "9"}, "device": "a card", "skipped": None}
    assert result["ceilings"]["bf16_tflops"] == 790
    (again, _) = bench_kernels([SHAPE], [1, 4], ["int4"], peers=["none"], out=options["out"])[
        "rows"
    ][:2]
    assert again["best_peer_us"] == 1 and again["us"] != result["rows"][0]["us"]


def test_a_file_is_gone_on_with(timed, monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    first = bench_kernels([SHAPE], [1, 4], ["int4"], out=out)["rows"][0]
    monkeypatch.setattr(kernel_timing, "ceilings", lambda say: CEILINGS | {"read_tb_s": 6.0})
    monkeypatch.setattr(kernel_timing, "least_microseconds", lambda processors: 1.25)
    rows = bench_kernels([SHAPE], [4], ["int4"], out=out)["rows"]
    assert [(row["M"], row["us"]) for row in rows] == [(1, 13), (4, 16)]
    limit = first["weight_bytes"] / 6e12 * 1e6
    assert [row["read_fraction"] for row in rows] == pytest.approx([limit / 13, limit / 16])
    assert json.loads(out.read_text())["least_us"] == 1.25
    other = json.loads(out.read_text()) | {"device": "1 x an abacus"}
    out.write_text(json.dumps(other))
    with pytest.raises(UserError, match="figures of 1 x an abacus, and this is 1 x an H100"):
        bench_kernels([SHAPE], [4], ["int4"], out=out)
    out.write_text("[]")
    with pytest.raises(UserError, match="holds no results of this bench; choose another --json"):
        bench_kernels([SHAPE], [4], ["int4"], out=out)


def products_of_few_weights(setting, problem):
    """In a process of its own, which knows nothing of what is patched in this one."""
    kernel_timing.L2 = 2**14
    return list(kernel_products.products(setting, problem))


def test_processes_side_by_side_give_what_they_find(timed, monkeypatch):
    """Each product fails there, since those processes see no GPU."""
    monkeypatch.setattr(kernel_products, "_all_products", products_of_few_weights)
    said = []
    with pytest.raises(UserError, match="4 products could not be timed, first w4a16_decode int4"):
        bench_kernels([SHAPE], [1, 16], ["int4", "fp8"], jobs=2, say=said.append)
    failed = [line for line in said if " x 1024, M = " in line]
    assert [line.split(":")[0] for line in failed] == [
        "w4a16_decode int4 64 x 1024, M = 1",
        "w4a16_decode int4 64 x 1024, M = 16",
        "w8a8 fp8 64 x 1024, M = 1",
        "w8a8 fp8 64 x 1024, M = 16",
    ]


def test_one_process_at_a_time_is_alone(monkeypatch, tmp_path):
    file = tmp_path / "lock"
    monkeypatch.setenv(LOCK, str(file))
    code = (
        "import sys; from jaxopt_models.bench.alone import alone\n"
        "with alone(): sys.stdout.write('in'); sys.stdout.flush()"
    )
    with alone():
        with alone():  # again in the same process
            pass
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(2)
    assert other.communicate(timeout=30)[0] == b"in"


def test_the_best_peer_is_one_that_was_timed():
    figures = {"a": {"us": 3.0}, "b": {"reason": "gone"}, "c": {"us": 2.0}}
    assert best_peer(figures) == {"best_peer": "c", "best_peer_us": 2.0}
    assert best_peer({"b": {"reason": "gone"}})["best_peer"] is None


def test_the_table_has_what_there_is(timed, monkeypatch):
    (row,) = bench_kernels([SHAPE], [1], ["int4"])["rows"]
    row |= {"best_peer": "another", "best_peer_us": row["us"] / 2, "flop_fraction": None}
    table = kernel_table([row])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[:4] == ["w4a16 int4", "64 x 1024", "1", "12.0"]
    assert cells[5:] == ["-", "11.0", "6.0", "2.00", "another"]


def test_without_a_gpu():
    with pytest.raises(UserError, match="needs a Hopper GPU; the default device is .*cpu"):
        bench_kernels()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "int3"], "no kernel for int3; choose int4, nvfp4, mxfp4"),
        (["--exhaustive"], "--exhaustive and --table say how to tune; add --tune"),
    ],
)
def test_the_command_names_what_is_wrong(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", "bench", "kernels", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert message in capsys.readouterr().err


def test_the_command_prints_and_saves(timed, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--kind", "int4", "--rows", "1", "--peer", "none", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", "bench", "kernels", *arguments])
    monkeypatch.setattr(kernels, "SHAPES", {"8b": (SHAPE,), "70b": (SHAPE,)})
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = capsys.readouterr().out
    assert "ceilings: read_tb_s 3, bf16_tflops 700" in printed
    assert "w4a16 int4 64 x 1024, M = 1: 12.0 us" in printed and "microseconds" in printed
    assert len(json.loads(out.read_text())["rows"]) == 1
