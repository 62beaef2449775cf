"""The command line as a person meets it: what each command does, and one line for each mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import Model, QTensor, UserError, export_hf, init, load
from jaxopt_models.checkpoint.safetensors_writer import write_sharded
from jaxopt_models.models.config import ModelConfig

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
SIZES = ["--windows", "4", "--length", "16"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, byte_tokenizer) -> Path:
    """A tiny model with a byte-level tokenizer, as a Hugging Face directory."""
    config = ModelConfig.from_hf(CONFIG)
    params = init(config, jax.random.key(0), jnp.bfloat16)
    directory = tmp_path_factory.mktemp("cli") / "model"
    export_hf(directory, Model(config, params, byte_tokenizer))
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("All that is gold does not glitter, not all those who wander are lost. " * 4)
    return path


def test_quantize_eval_generate_export(run, model_dir, text, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    code, printed, _ = run(
        "quantize", model_dir, "--recipe", "nvfp4", "--out", out, "--calib", text, *SIZES,
        "--json", report, "--report", tmp_path / "files",
    )  # fmt: skip
    assert code == 0 and "14 tensors, 4.5" in printed and "largest output errors" in printed
    assert (tmp_path / "files" / "report.json").read_text() == report.read_text()
    rows = json.loads(report.read_text())["tensors"]
    assert len(rows) == 14 and {row["format"] for row in rows} == {"nvfp4"}
    assert isinstance(load(out).params["layers"][1]["mlp"]["down_proj"]["weight"], QTensor)

    figures = tmp_path / "figures.json"
    code, printed, _ = run(
        "eval", out, "--reference", model_dir, "--text", text, *SIZES, "--json", figures
    )
    metrics = json.loads(figures.read_text())
    assert code == 0 and f"{metrics['perplexity']:.3f}" in printed
    assert metrics["kl"] > 0 and 0 < metrics["top1_agreement"] <= 1
    assert 4.5 <= metrics["bits_per_weight"] < 4.6 and metrics["bytes"] > 0

    code, printed, _ = run("generate", out, "--prompt", "All that", "--max-new-tokens", 5)
    assert code == 0 and printed.endswith("\n")
    adaptive = ["ngram", "--draft-levels", "0,2", "--draft-verification", "rejection"]
    for draft in (["ngram"], [model_dir, "--draft-tokens", 2], adaptive):
        more = "--max-new-tokens", 5, "--draft", *draft
        code, same, said = run("generate", out, "--prompt", "All that", *more)
        assert code == 0 and same == printed and "tokens a pass of the model" in said
        code, streamed, _ = run("generate", out, "--prompt", "All that", *more, "--stream")
        assert code == 0 and streamed == printed

    code, _, _ = run("export", out, "--layout", "bf16", "--out", tmp_path / "hf")
    exported = load(tmp_path / "hf").params["layers"][0]["mlp"]["up_proj"]["weight"]
    quantized = load(out).params["layers"][0]["mlp"]["up_proj"]["weight"]
    assert code == 0
    np.testing.assert_array_equal(exported, quantized.dequantize(jnp.bfloat16))


def test_overrides_reach_the_recipe(run, model_dir, tmp_path):
    code, _, _ = run(
        "quantize", model_dir, "--recipe", "int4", "--out", tmp_path / "out",
        "--set", "rules.0.weight.block_size=32", "--set", "rules.0.weight.symmetric=false",
    )  # fmt: skip
    weight = load(tmp_path / "out").params["layers"][0]["mlp"]["up_proj"]["weight"]
    assert code == 0 and weight.spec.block_size == 32 and weight.zero_point is not None


def _broken(model_dir: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the model with one thing wrong."""
    target = tmp_path / name
    target.mkdir()
    for file in model_dir.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights, config = target / "model.safetensors", target / "config.json"
    if name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "corrupt":
        weights.write_bytes(b"\xff" * 64)
    elif name == "no_weights":
        weights.unlink()
    elif name == "architecture":
        config.write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    elif name == "option":
        config.write_text(json.dumps(CONFIG | {"rope_scaling": {"rope_type": "yarn"}}))
    elif name == "nan":
        params = load(model_dir).params
        tensors = {"model.norm.weight": np.full(32, np.nan, np.float32)}
        from jaxopt_models.checkpoint.hf_names import hf_names
        from jaxopt_models.tree import leaves_with_paths

        named = {
            hf_names(ModelConfig.from_hf(CONFIG), path)[0]: np.asarray(leaf)
            for path, leaf in leaves_with_paths(params)
        }
        weights.unlink()
        write_sharded(target, named | tensors)
    elif name == "integers":
        weights.unlink()
        write_sharded(target, {"model.embed_tokens.weight": np.zeros((256, 32), np.int32)})
    return target


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("truncated", "model.safetensors"),
        ("corrupt", "model.safetensors"),
        ("no_weights", "safetensors"),
        ("architecture", "mamba"),
        ("option", "yarn"),
        ("nan", "model.norm.weight"),
        ("integers", "model.embed_tokens.weight"),
    ],
)
def test_a_broken_model_is_one_line(run, model_dir, tmp_path, name, says):
    broken = _broken(model_dir, tmp_path, name)
    command = ("quantize", broken, "--recipe", "int8", "--out", tmp_path / "out")
    _assert_refused(run(*command), says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--recipe", "int5"), "int5"),
        (("--recipe", "missing.yaml"), "missing.yaml"),
        (("--recipe", "int4", "--set", "rules.0.weight.size=3"), "rules.0.weight.size"),
        (("--recipe", "int4", "--set", "rules.0.match=*conv*"), "*conv*"),
        (("--recipe", "int4", "--set", "rules.0.weight.block_size=fast"), "block_size"),
        (("--recipe", "nvfp4", "--calib", "missing.txt"), "missing.txt"),
        (("--recipe", "nvfp4", "--calib", "EMPTY"), "empty"),
        (("--recipe", "nvfp4", "--calib", "SHORT"), "tokens"),
        (("--recipe", "nvfp4", "--calib", "hf:no/such"), "no/such"),
        (("--unknown", "1"), "--unknown"),
        ((), "--recipe"),
    ],
)
def test_a_mistaken_option_is_one_line(run, model_dir, tmp_path, arguments, says):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("too short")
    files = {"EMPTY": tmp_path / "empty.txt", "SHORT": tmp_path / "short.txt"}
    given = [files.get(argument, argument) for argument in arguments]
    _assert_refused(run("quantize", model_dir, "--out", tmp_path / "out", *given), says)
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_one_line(run, model_dir, text, tmp_path):
    _assert_refused(run("eval", tmp_path / "nowhere"), "nowhere")
    _assert_refused(run("quantize", model_dir, "--recipe", "int4", "--out", tmp_path), "exists")
    _assert_refused(run("export", model_dir, "--layout", "gguf", "--out", tmp_path / "x"), "gguf")
    _assert_refused(run("generate", model_dir, "--prompt", ""), "no tokens")
    _assert_refused(run("generate", model_dir, "--prompt", "a", "--top-p", "0"), "top_p")
    _assert_refused(run("generate", model_dir, "--prompt", "a", "--chat"), "chat template")
    few = "--draft-tokens", 2
    _assert_refused(run("generate", model_dir, "--prompt", "a", *few), "with --draft")
    levels = *few, "--draft", "ngram", "--draft-levels", "0,2"
    _assert_refused(run("generate", model_dir, "--prompt", "a", *levels), "choose one of")
    rule = "--draft-verification", "rejection"
    _assert_refused(run("generate", model_dir, "--prompt", "a", *rule), "with --draft")
    gone = tmp_path / "no" / "figures.json"
    _assert_refused(run("eval", model_dir, "--text", text, *SIZES, "--json", gone), str(gone))
    _assert_refused(run("dance"), "dance")


def _assert_refused(result: tuple[int, str, str], says: str) -> None:
    code, _, error = result
    assert code == 2
    assert error.count("\n") == 1 and error.startswith("jaxopt-models: ")
    assert says in error and "Traceback" not in error


@pytest.mark.slow
def test_a_killed_quantize_leaves_nothing_that_loads(model_dir, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jaxopt_models", "quantize", str(model_dir)]
    command += ["--recipe", "fp8_dynamic", "--out", str(out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    began = time.monotonic()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    whole = time.monotonic() - began
    assert isinstance(load(out).params["layers"][0]["mlp"]["up_proj"]["weight"], QTensor)
    for i, share in enumerate((0.5, 0.7, 0.8, 0.9, 0.95)):
        target = tmp_path / f"out{i}"
        process = subprocess.Popen(
            [*command[:-1], str(target)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(whole * share)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():  # it was faster this time: then it must be whole
            load(target)
        else:
            with pytest.raises(UserError):
                load(target)
