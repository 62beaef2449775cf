"""Whole runs, from a file of settings to a model on disk."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

import jaxopt_models as jom
from jaxopt_models import cli, data, tree
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import reference
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.qtensor import DenseTensor, QTensor
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.train.leaves import fake_quantized, fold
from jaxopt_models.train.rows import training_rows
from jaxopt_models.train.run import train
from jaxopt_models.train.settings import Optimizer, RunSettings
from jaxopt_models.train.student import with_masters

RUNS = Path(__file__).parents[2] / "configs" / "runs"
SMALL = {
    "length": 16,
    "batch": 4,
    "steps": 6,
    "log": 2,
    "save": 2,
    "evaluation": {"windows": 4, "length": 16},
    "calibration": {"windows": 4, "length": 16},
    "optimizer": {"learning_rate": 1e-3},
}


def _model(layers: int, dtype=jnp.bfloat16, width: int = 32):
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": width,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        }
    )
    params = jom.init(config, jax.random.key(0))
    params |= {"embed_tokens": {"weight": 20 * params["embed_tokens"]["weight"]}}
    return config, jax.tree.map(lambda x: x.astype(dtype), params)


@pytest.fixture(scope="module")
def models(tmp_path_factory, byte_tokenizer):
    """Directories of a model of two layers, one of the first of them, and one half as wide."""
    folder = tmp_path_factory.mktemp("models")
    for name, layers, width in (("two", 2, 32), ("one", 1, 32), ("narrow", 1, 16)):
        jom.save(folder / name, *_model(layers, width=width), byte_tokenizer)
    return folder


def _settings(models, **more):
    return RunSettings.model_validate(SMALL | {"model": str(models / "two")} | more)


def assert_same_bits(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.tobytes() == b.tobytes()


def test_qad_ends_with_the_model_that_was_measured(models, tmp_path):
    settings = _settings(models, recipe="nvfp4_weight_only", dtype="bfloat16", parts=2)
    result = train("qad", settings, tmp_path / "out")
    loaded = jom.load(tmp_path / "out" / "model")
    kinds = {path: type(leaf) for path, leaf in tree.leaves_with_paths(loaded.params)}
    assert kinds["layers/1/mlp/down_proj/weight"] is QTensor
    assert loaded.params["norm"]["weight"].dtype == jnp.bfloat16
    original = jom.load(models / "two")
    text = data.load_text("builtin", "evaluation")
    batches = data.token_batches(original, text, 4, 16, 4)
    found = jom.evaluate(loaded.config, loaded.params, batches, original.params)
    last = result.log[-1]
    assert (last["kl"], last["perplexity"]) == (found.kl, found.perplexity)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert lines == result.log and [line["step"] for line in lines] == [2, 4, 6, 6]
    assert {"loss", "forward_kl", "gradient_norm", "tokens_per_second"} <= lines[0].keys()
    assert json.loads((tmp_path / "out/run.json").read_text())["recipe"] == "nvfp4_weight_only"


def test_documents_and_what_the_assistant_says(models, tmp_path):
    talk = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two three"}]
    text = tmp_path / "talks.jsonl"
    text.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(4)))
    tokenizer = jom.load(models / "two").tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}!{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    jom.save(tmp_path / "chat", *_model(2), tokenizer)
    settings = {"recipe": "nvfp4_weight_only", "text": str(text), "packing": "documents"}
    settings |= {"model": str(tmp_path / "chat"), "length": 48, "learn": "assistant"}
    rows = training_rows(jom.load(tmp_path / "chat"), _settings(models, **settings))
    pairs = zip(rows["tokens"], rows["mask"], strict=True)
    assert [tokenizer.decode(own[mask]) for own, mask in pairs] == ["one two three!"] * 4
    for more in ({}, {"parts": 2, "mesh": {"data": 2}}):
        out = tmp_path / f"out{len(more)}"
        result = train("qad", _settings(models, **settings, **more), out)
        assert result.log[0]["forward_kl"] > 0
    with pytest.raises(UserError, match="learning what the assistant says needs packing"):
        train("qad", _settings(models, recipe="fp8", learn="assistant"), tmp_path / "other")


def test_qat_of_a_calibrated_recipe(models, tmp_path):
    """AWQ moves factors from one tensor to the next, so masters are what it rounded to."""
    settings = _settings(models, recipe="int4_awq", begin="quantized", scales="learned")
    result = train("qat", settings, tmp_path / "out")
    assert "cross_entropy" in result.log[0] and result.log[-1]["kl"] > 0
    with pytest.raises(UserError, match="is not what was quantized: .* or None to begin with"):
        train("qat", settings.model_copy(update={"begin": "original"}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_beside_codes(models, tmp_path, merge):
    """QLoRA: what is saved is what was measured, and codes are those of the recipe."""
    adapters = {"rank": 4, "alpha": 8, "match": "*/mlp/*", "merge": merge}
    result = train("qad", _settings(models, recipe="nf4", adapters=adapters), tmp_path / "out")
    original, loaded = jom.load(models / "two"), jom.load(tmp_path / "out" / "model")
    q, leaf = quantize(original, Recipe.load("nf4"))[0], loaded.params["layers"][1]
    before, after = q["layers"][1]["mlp"]["up_proj"]["weight"], leaf["mlp"]["up_proj"]["weight"]
    if merge:
        assert after.dtype == jnp.bfloat16 and not tree.is_leaf(after)
    else:
        assert after.codes.tobytes() == before.codes.tobytes() and jnp.any(after.low_rank.up != 0)
        assert after.low_rank.down.dtype == jnp.bfloat16
    assert leaf["self_attn"]["q_proj"]["weight"].low_rank is None
    table = loaded.params["embed_tokens"]["weight"]
    assert table.tobytes() == original.params["embed_tokens"]["weight"].tobytes()
    batches = data.token_batches(original, data.load_text("builtin", "evaluation"), 4, 16, 4)
    found = jom.evaluate(loaded.config, loaded.params, batches, original.params)
    assert result.log[-1]["kl"] == found.kl


def test_adapters_beside_floats_and_what_is_trained_besides(models, tmp_path):
    """LoRA, with norms."""
    more = {"adapters": {"rank": 4}, "train": "*norm/weight", "steps": 2, "mesh": {"data": 2}}
    settings = _settings(models, student=str(models / "one"), **more)
    params = train("distill", settings, tmp_path / "out").model.params
    leaf = params["layers"][0]["mlp"]["up_proj"]["weight"]
    start = jom.load(models / "one").params
    assert isinstance(leaf, DenseTensor) and leaf.low_rank and jnp.any(leaf.low_rank.up != 0)
    base = start["layers"][0]["mlp"]["up_proj"]["weight"]
    assert leaf.weight.tobytes() == base.tobytes()
    assert settings.trained == ("layers/*_proj/weight/low_rank/*", "*norm/weight")


def test_adapters_are_gone_on_with(models, tmp_path):
    """A run that stops at a checkpoint ends as one that did not; on another mesh nearly so."""
    adapters = {"rank": 4, "match": "*/self_attn/*"}
    settings = _settings(models, recipe="nf4", adapters=adapters, evaluation={"windows": 1})
    whole = train("qat", settings, tmp_path / "whole")
    train("qat", settings, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "model")
    shutil.rmtree(tmp_path / "parts" / "states" / "6")
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    resumed = train("qat", settings, tmp_path / "parts", resume=True)
    assert_same_bits(resumed.model.params, whole.model.params)
    elsewhere = settings.model_copy(update={"mesh": {"data": 2, "fsdp": 2}})
    moved = train("qat", elsewhere, tmp_path / "moved", resume=True).log[-1]["perplexity"]
    assert moved == pytest.approx(whole.log[-1]["perplexity"], rel=1e-3)


def test_what_is_widened_is_what_is_trained():
    """Scales are part of the format that the model will have."""
    params = _model(1)[1]
    q = jom.quantize_array(
        params["layers"][0]["mlp"]["up_proj"]["weight"],
        "int4",
        block_size=32,
        scale_dtype="bfloat16",
    )
    quantized = tree.replace(params, {"layers/0/mlp/up_proj/weight": q})
    wide = with_masters(fake_quantized(params, quantized, "static"))
    assert wide["norm"]["weight"].dtype == jnp.float32
    folded = fold(wide)["layers"][0]["mlp"]["up_proj"]["weight"]
    assert folded.scale.dtype == jnp.bfloat16 and folded.weight_bits == q.weight_bits


def test_a_student_learns_from_the_model(models, tmp_path):
    losses = [{"kind": "jensen_shannon"}, {"kind": "cross_entropy", "weight": 0.1}]
    settings = _settings(models, student=str(models / "one"), losses=losses, mesh={"data": 2})
    result = train("distill", settings, tmp_path / "out")
    assert result.model.config.num_layers == 1
    assert {"jensen_shannon", "cross_entropy"} <= result.log[0].keys()
    assert not any(isinstance(x, QTensor) for _, x in tree.leaves_with_paths(result.model.params))


def test_a_student_is_quantized_and_learns_from_the_model(models, tmp_path):
    """Training begins with the student's own codes, and what is measured is beside the model."""
    student, original = jom.load(models / "one"), jom.load(models / "two")
    settings = _settings(models, student=str(models / "one"), recipe="nvfp4_weight_only")
    still = {"optimizer": Optimizer(learning_rate=1e-30), "steps": 1, "scales": "static"}
    params = train("qad", settings.model_copy(update=still), tmp_path / "still").model.params
    expected = quantize(student, Recipe.load("nvfp4_weight_only"))[0]
    assert_same_bits(params, expected)
    result = train("qad", settings, tmp_path / "out")
    assert result.log[0]["forward_kl"] > result.log[-2]["forward_kl"] > 0
    batches = data.token_batches(original, data.load_text("builtin", "evaluation"), 4, 16, 4)
    loaded, teacher = jom.load(tmp_path / "out" / "model"), (original.config, original.params)
    found = jom.evaluate(loaded.config, loaded.params, batches, reference(*teacher, batches))
    assert loaded.config.num_layers == 1 and result.log[-1]["kl"] == found.kl


def test_hidden_states_of_a_narrower_student(models, tmp_path):
    """The projection is trained and goes on from a checkpoint, but is no part of the model."""
    losses = [
        {"kind": "forward_kl"},
        {"kind": "hidden_mean_square", "layers": {0: 1}, "weight": {"from": 1.0, "to": 0.0}},
        {"kind": "hidden_cosine", "weight": {"from": 0.0, "to": 2.0, "steps": 3}},
    ]
    more = {"parts": 2, "mesh": {"data": 2, "model": 2}, "train": "layers/*", "log": 1}
    settings = _settings(models, student=str(models / "narrow"), losses=losses, **more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train("distill", settings, whole)
    for line, own, other in zip(result.log, (1, 5 / 6, 4 / 6), (0, 2 / 3, 4 / 3), strict=False):
        expected = line["forward_kl"] + own * line["hidden_mean_square"]
        assert line["loss"] == pytest.approx(expected + other * line["hidden_cosine"], rel=1e-5)
    shutil.copytree(whole, parts)
    last = max((parts / "states").iterdir(), key=lambda one: int(one.name))
    shutil.rmtree(last)
    shutil.rmtree(parts / "model")
    again = train("distill", settings, parts, resume=True)
    assert [line.get("loss") for line in again.log] == [line.get("loss") for line in result.log]
    models_made = [jom.load(out / "model") for out in (whole, parts)]
    assert_same_bits(*(model.params for model in models_made))
    assert models_made[0].params.keys() == jom.load(models / "narrow").params.keys()
    assert models_made[0].config.hidden_size == 16
    with pytest.raises(UserError, match="names layer 2 of the teacher, which has 0 to 1"):
        losses = [{"kind": "hidden_cosine", "layers": {0: 2}}]
        train(
            "distill",
            _settings(models, student=str(models / "narrow"), losses=losses),
            tmp_path / "other",
        )
    assert not (tmp_path / "other").exists()


def test_the_command_trains_and_resumes(models, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    chosen = {"model": str(models / "two"), "recipe": "fp8", "tensorboard": True}
    file.write_text(yaml.safe_dump(SMALL | chosen))
    out = tmp_path / "out"
    command = ["train", "qad", "--config", str(file), "--out", str(out), "--set", "seed=3"]

    def run(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["jaxopt-models", *command, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    assert run("--set", "optimizer.learning_rate=0.002") == 0
    assert "6 steps: perplexity" in capsys.readouterr().out
    assert list((out / "board").iterdir())
    first = (out / "model" / "jaxopt_models.json").read_text()
    assert run() == 2 and "exists already; choose another" in capsys.readouterr().err
    assert run("--coordinator", "host") == 2
    assert "coordinator 'host' has no port; give it as HOST:PORT" in capsys.readouterr().err
    assert run("--devices", "all") == 2
    assert "--devices 'all' is no list of numbers such as 0,1" in capsys.readouterr().err
    assert run("--resume") == 2
    assert "is a run with optimizer" in capsys.readouterr().err
    assert run("--resume", "--set", "optimizer.learning_rate=0.002") == 0
    assert (
        json.loads(first)["report"]
        == json.loads((out / "model" / "jaxopt_models.json").read_text())["report"]
    )


@pytest.mark.parametrize(
    ("technique", "more", "message"),
    [
        ("qad", {}, "qad needs a 'recipe', what the model is quantized to"),
        ("qat", {"recipe": "fp8", "student": "x"}, "qat has no teacher to name a 'student'"),
        ("distill", {}, "distill needs a 'student'"),
        ("distill", {"student": "x", "recipe": "fp8"}, "for a 'recipe' choose qad"),
        ("qad", {"recipe": "fp8", "losses": [{"kind": "cross_entropy"}]}, "none of the losses"),
        ("qat", {"recipe": "fp8", "parts": 3}, "a batch of 4 rows has no 3 equal parts"),
        ("qat", {"recipe": "fp8", "mesh": {"data": 4, "fsdp": 2}}, "4 rows, .* by the 8 devices"),
        ("qat", {"recipe": "fp8", "parts": 2, "mesh": {"fsdp": 4}}, "2 rows, .* by the 4 devices"),
        ("qat", {"recipe": "fp8", "mesh": {"model": 9}}, "needs 9 devices and there are 8"),
        ("qat", {"recipe": "nf4", "adapters": {}, "scales": "static"}, "'scales' is of weights"),
        ("qat", {"recipe": "nf4", "adapters": {"match": "x"}}, "'x' matches no weight that can"),
        ("qat", {"recipe": "nvfp4", "adapters": {"merge": True}}, "quantizes its input, but not"),
    ],
)
def test_settings_that_do_not_go_together(models, tmp_path, technique, more, message):
    with pytest.raises(UserError, match=message):
        train(technique, _settings(models, **more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_in_files(tmp_path):
    file = tmp_path / "run.yaml"
    with pytest.raises(UserError, match=r"run .*run.yaml: cannot be read"):
        RunSettings.load(file)
    file.write_text("- model")
    with pytest.raises(UserError, match="expected keys such as 'model'"):
        RunSettings.load(file)
    file.write_text("model: x\nstep: 3\n")
    with pytest.raises(UserError, match="unknown key 'step'; remove it or correct its name"):
        RunSettings.load(file)
    file.write_text("model: x\n")
    with pytest.raises(UserError, match="optimizer.learning_rate: Input should be greater than 0"):
        RunSettings.load(file, ["optimizer.learning_rate=-1"])
    assert RunSettings.load(file, ["steps=7", "evaluation.every=2"]).evaluation.every == 2


@pytest.mark.parametrize(
    "file",
    sorted(file for file in RUNS.glob("*.yaml") if not file.stem.startswith("prune")),
    ids=lambda file: file.stem,
)
def test_presets_go_with_the_command_above_them(file):
    words = file.read_text().splitlines()[0].split()
    assert words[1:3] == ["jaxopt-models", "train"] and f"configs/runs/{file.name}" in words
    RunSettings.load(file).check(words[3])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layers": {0: 1}}, "losses.0: 'layers' does not go with forward_kl; remove it"),
        ({"kind": "hidden_cosine", "top_k": 3}, "losses.0: 'top_k' does not go with hidden_cosine"),
        ({"weight": -1.0}, "losses.0.weight.number: Input should be greater than or equal to 0"),
        ({"weight": {"from": 1.0}}, "losses.0.weight.schedule.to: Field required"),
        (
            {"weight": {"from": 1.0, "to": 0.0, "steps": 3, "share": 0.5}},
            "losses.0.weight.schedule: give 'steps' or a 'share' of them, not both",
        ),
    ],
)
def test_mistakes_in_losses(tmp_path, more, message):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": "x", "losses": [{"kind": "forward_kl"} | more]}))
    with pytest.raises(UserError, match=message):
        RunSettings.load(file)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_weights_go_from_one_value_to_another(tmp_path, kind):
    file, weight = tmp_path / "run.yaml", {"from": 0.25, "to": 2.0, "share": 0.5, "kind": kind}
    file.write_text(yaml.safe_dump({"model": "x", "losses": [{"kind": "forward_kl"}]}))
    settings = RunSettings.load(file, ["steps=40", f"losses.0.weight={weight}"])
    (term,) = settings.terms("qad")
    found = [float(term.weight_at(jnp.int32(step))) for step in range(40)]
    assert found[0] == 0.25 and found[10] == pytest.approx(1.125) and found[20:] == [2.0] * 20
    assert found[:21] == sorted(set(found))
    bend = found[1] - found[0] - (found[11] - found[10])
    assert bend == pytest.approx(0.0, abs=1e-6) if kind == "linear" else bend < -0.05
    again = RunSettings.model_validate(settings.model_dump(mode="json"))
    assert again == settings


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates(schedule):
    with jax.numpy_dtype_promotion("standard"):
        rate = Optimizer(learning_rate=1.0, schedule=schedule, warmup=0.1, end=0.2).rate(100)
        rates = [float(jnp.asarray(rate(step))) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(
        1.0 if schedule == "constant" else 0.2, abs=0.02
    )
