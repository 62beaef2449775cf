"""The decode bench: what it runs and what a row says. No time is measured here."""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import cli, decode_time, tree
from jaxopt_models.bench import bandwidth, decode
from jaxopt_models.bench.decode import MODELS, bench_decode, bytes_per_step, random_params
from jaxopt_models.errors import UserError
from jaxopt_models.formats import resolve
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params, forward
from jaxopt_models.packed import PackedTensor
from jaxopt_models.qtensor import InputQuantizer

TINY = replace(ModelConfig.from_hf(MODELS["tiny"]), dtype="bfloat16")


@pytest.fixture
def loops(monkeypatch):
    """The final states of the loops that were to be timed."""
    states = []

    def seconds_per_turn(start, turns):
        states.extend(start(count)() for count in turns)
        return 0.5 * len(states)  # 1 s, 2 s, …

    monkeypatch.setattr(decode_time, "seconds_per_turn", seconds_per_turn)
    monkeypatch.setattr(decode, "read_bandwidth", lambda: 1e6)
    return states


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_a_row_for_each_format_and_batch(loops, tmp_path, kv_format):
    result = bench_decode(
        "tiny", ["bf16", "nvfp4"], [1, 3], context=32, steps=12, kv_format=kv_format, out=tmp_path
    )
    assert json.loads((tmp_path / "decode_cpu.json").read_text()) == result
    rows = result["rows"]
    assert [(row["format"], row["batch"]) for row in rows] == [
        ("bf16", 1), ("bf16", 3), ("nvfp4", 1), ("nvfp4", 3)
    ]  # fmt: skip
    assert [row["ms_per_step"] for row in rows] == [1e3, 2e3, 3e3, 4e3]
    assert [row["bf16_ms_per_step"] for row in rows] == [1e3, 2e3, 1e3, 2e3]
    assert [row["tokens_per_s"] for row in rows] == [1, 1.5, 1 / 3, 0.75]
    for row in rows:
        assert row["kv_format"] == kv_format and row["head"] == "bf16" and row["context"] == 32
        limit = row["bytes_per_step"] / 1e6 / (row["ms_per_step"] / 1e3)
        assert row["byte_limit_fraction"] == pytest.approx(limit)
    ends = [(state.length - 20).tolist() for state in loops]  # steps that were run
    assert ends == [[8], [12], [8] * 3, [12] * 3] * 2
    for state in loops:
        assert bool(jnp.all(state.done)) and jnp.all(state.tokens < 512)


def test_bytes_of_a_step():
    """Written out for the tiny shape: 2 layers, 128 wide, 256 inside, 4 + 2 · 2 heads of 32."""
    matrices = 2 * (256 * 128 + 128 * 128 + 3 * 256 * 128)
    norms, head, row = 5 * 128 * 2, 512 * 128 * 2, 128 * 2
    cache = 2 * 2 * 2 * 32 * 2 * 64  # of one row: layers, keys and values, heads, size, slots
    dense = random_params(TINY, "bf16", "bf16", "bf16")
    expected = 2 * matrices + norms + head
    assert bytes_per_step(TINY, dense, 3, 64) == expected + 3 * (row + cache)
    tied = {name: part for name, part in dense.items() if name != "lm_head"}
    assert bytes_per_step(TINY, tied, 3, 64) == expected + 3 * cache
    halved = random_params(TINY, "bf16", "bf16", "fp8")
    scales = 2 * 2 * 4  # two amax a layer
    assert bytes_per_step(TINY, halved, 1, 64) == expected + row + cache // 2 + scales


@pytest.mark.parametrize("format", ["int4", "nvfp4", "mxfp4", "fp8", "int8"])
def test_random_weights_are_packed_and_sane(format):
    params = random_params(TINY, format, "same", "bf16")
    leaves = tree.leaves_with_paths(params)
    packed = {path for path, leaf in leaves if isinstance(leaf, PackedTensor)}
    assert packed == {"lm_head/weight"} | {
        f"layers/{i}/{name}_proj/weight"
        for i in range(2)
        for name in ("self_attn/qkv", "self_attn/o", "mlp/gate_up", "mlp/down")
    }
    first, second = (layer["mlp"]["down_proj"]["weight"] for layer in params["layers"])
    assert jnp.any(first.weight.codes != second.weight.codes)
    assert float(jnp.std(first.dequantize(jnp.float32))) == pytest.approx(256**-0.5, rel=0.05)
    assert first.input == (  # dynamic, by token
        InputQuantizer(None, resolve(format, granularity="token")) if "8" in format else None
    )
    logits = jax.jit(forward, static_argnums=0)(TINY, params, jnp.arange(8)[None])
    assert np.all(np.isfinite(logits)) and 0.1 < float(jnp.std(logits)) < 10


def test_the_8b_shape_has_its_parameters():
    shapes = abstract_params(ModelConfig.from_hf(MODELS["llama-8b"]))
    assert sum(array.size for array in jax.tree.leaves(shapes)) == 8_030_261_248
    shapes = abstract_params(ModelConfig.from_hf(MODELS["llama-1b"]))
    assert sum(array.size for array in jax.tree.leaves(shapes)) == 1_235_814_400


def test_the_start_of_a_loop_cancels(monkeypatch):
    now, ran = [0.0], []

    def start(turns):
        def run():
            # Compiling takes 50 the first time, starting 3, and the second run of each is slow.
            now[0] += 3 + 0.25 * turns + {0: 50, 1: 50, 2: 7, 3: 7}.get(len(ran), 0)
            ran.append(turns)

        return run

    monkeypatch.setattr(decode_time.time, "perf_counter", lambda: now[0])
    assert decode_time.seconds_per_turn(start, (4, 12)) == 0.25
    assert ran == [4, 12] * 4


def test_memory_is_read():
    assert bandwidth.read_bandwidth(2**26) > 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"model": "gpt"}, "model 'gpt' is unknown; choose llama-8b, llama-1b, tiny"),
        (
            {"formats": ["int3"]},
            "format 'int3' is unknown; choose bf16, int4, .*, fp8, int8",
        ),
        ({"head": "int4"}, "head 'int4' is unknown; choose bf16, same"),
        ({"kv_format": "int4"}, "cache 'int4' is unknown; choose bf16, fp8"),
        ({"steps": 8}, "8 steps at the end of a context of 2048 cannot be timed"),
        ({"context": 100}, "136 steps at the end of a context of 100 cannot be timed"),
    ],
)
def test_what_it_refuses(arguments, problem):
    with pytest.raises(UserError, match=problem):
        bench_decode(**arguments)


def test_the_command(loops, monkeypatch, capsys, tmp_path):
    arguments = ["--model", "tiny", "--format", "bf16", "--format", "int4", "--batch", "2"]
    arguments += ["--context", "32", "--steps", "12", "--head", "same"]
    out = tmp_path / "new" / "figures.json"
    monkeypatch.setattr(sys, "argv", ["x", "bench", "decode", *arguments, "--out", str(out)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "tiny bf16, batch 2: 1000.000 ms a step, 2 tokens/s" in printed
    assert "tiny int4, batch 2: 2000.000 ms a step, 1 tokens/s" in printed
    assert "0.50 x bfloat16" in printed
    assert [row["head"] for row in json.loads(out.read_text())["rows"]] == ["same", "same"]
