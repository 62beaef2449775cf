"""The kernel bench: what it asks to be timed, and what a row says. No time is measured here."""

import json
import sys

import jax
import pytest

from jaxopt_models import cli
from jaxopt_models.bench import kernels
from jaxopt_models.bench.kernels import bench_kernels
from jaxopt_models.errors import UserError
from kernels_pallas.w4a16_decode import default_tiling


class H100:
    platform, compute_capability, core_count, device_kind = "gpu", "9.0", 132, "an H100"


@pytest.fixture
def timed(monkeypatch):
    """What would be run on a GPU: the sizes of each product and of what rotates."""
    seen = []

    def microseconds(run, x, weights):
        jax.eval_shape(run, x, weights[0])  # it can be called
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        seen.append((x.shape, weights[0].shape, size))
        return 10.0 + len(seen)

    monkeypatch.setattr(kernels, "microseconds", microseconds)
    monkeypatch.setattr(kernels, "_read_bandwidth", lambda: 3e12)
    monkeypatch.setattr(kernels, "_L2", 2**14)
    monkeypatch.setattr(jax, "devices", lambda: [H100()])
    return seen


def test_a_row_for_each_product(timed, tmp_path):
    out = tmp_path / "out.json"
    result = bench_kernels([(64, 1024)], [1, 16], ["int4", "mxfp4"], out=out)
    assert json.loads(out.read_text()) == result and result["device"] == "1 x an H100"
    assert [(row["kind"], row["m"]) for row in result["rows"]] == [
        ("int4", 1), ("int4", 16), ("mxfp4", 1), ("mxfp4", 16)
    ]  # fmt: skip
    first = result["rows"][0]
    assert first["limit_us"] == pytest.approx(64 * 1024 * 4.125 / 8 / 3e12 * 1e6)
    assert first["share_of_limit"] == first["limit_us"] / first["us"]
    assert first["xla_bf16_us"] == 11 and first["speedup_over_xla_bf16"] == 11 / first["us"]
    assert first["tiling"] == vars(default_tiling(8, 4, 1024, 132))
    assert all(size >= 4 * 2**14 for *_, size in timed)


def test_tuning_keeps_the_fastest(timed):
    result = bench_kernels([(64, 1024)], [8], ["nvfp4"], tune=True)
    assert len(timed) > 5 and result["rows"][0]["us"] == 12  # the first after the baseline


def test_without_a_gpu():
    with pytest.raises(UserError, match="needs a Hopper GPU; the default device is .*cpu"):
        bench_kernels()


def test_the_command_names_what_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxopt-models", "bench", "kernels", "--kind", "int3"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "no kernel for int3; choose int4, nvfp4, mxfp4" in capsys.readouterr().err
