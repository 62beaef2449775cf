"""Training what guesses: a head learns what a model will say, and the run ends with a file."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, quantized, sure_model

import jaxopt_models as jom
from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import forward, forward_with_taps
from jaxopt_models.speculative import init_eagle3, init_medusa, init_mtp
from jaxopt_models.speculative.eagle3_files import read_eagle3
from jaxopt_models.speculative.medusa_files import read_medusa
from jaxopt_models.speculative.mtp_files import read_mtp
from jaxopt_models.speculative.unrolled import unrolled
from jaxopt_models.train.draft_job import most_frequent
from jaxopt_models.train.draft_objective import draft_loss
from jaxopt_models.train.leaves import computed
from jaxopt_models.train.objectives import Term
from jaxopt_models.train.run import train
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.step import make_train_step, start

STEPS = 3
forward_of = jax.jit(forward, static_argnames="config")
every_place = jax.jit(unrolled, static_argnames="steps")


@partial(jax.jit, static_argnames=("layers",))
def features_of(target, tokens, layers):
    names = [f"layers/{i}/output" for i in layers]
    _, taps = forward_with_taps(target.config, target.params, tokens, names)
    return jnp.concatenate([taps[name] for name in names], axis=-1)


@pytest.mark.parametrize("kind", ["forward_kl", "total_variation", "cross_entropy"])
def test_the_loss_is_what_it_says(target, text, kind):
    """Beside one place and one step at a time, in a vocabulary of half the tokens; of two documents
    in a row, only what is said within one of them counts."""
    vocabulary = jnp.arange(0, 64, 2, dtype=jnp.int32)
    head = init_eagle3(target, jax.random.key(0), vocabulary=vocabulary)
    tokens, length, cut = text[:2], text.shape[1], 9
    starts = jnp.asarray([[0] * length, [0] * cut + [cut] * (length - cut)], jnp.int32)
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, tokens.shape), jnp.float32)
    loss = draft_loss(CONFIG, head, [Term(LogitLoss(kind), 2.0)], steps=STEPS, decay=0.5)
    batch = {"tokens": tokens, "mask": mask, "starts": starts}
    found = jax.jit(loss)(head.params, target.params, batch, jnp.zeros((), jnp.int32))
    total, refused, count = 0.0, np.zeros(STEPS), 0.0
    for row, first, end in ((0, 0, length), (1, 0, cut), (1, cut, length)):
        own = tokens[row, first:end][None]
        said = forward_of(CONFIG, target.params, own)[0][:, vocabulary]
        p = np.asarray(jax.nn.softmax(said), np.float64)
        features = features_of(target, own, head.layers)
        for s, x in enumerate(every_place(head, target, own, features, STEPS)):
            q = np.asarray(jax.nn.softmax(head.logits(target, x)[0]), np.float64)
            for t in range(end - first - 2 - s):
                weight, its = float(mask[row, first + t + 2 + s]), p[t + 1 + s]
                token = int(own[0, t + 2 + s])
                each = {
                    "forward_kl": np.sum(its * np.log(its / q[t])),
                    "total_variation": 0.5 * np.abs(its - q[t]).sum(),
                    "cross_entropy": -np.log(q[t, token // 2]),
                }
                if token % 2:  # the head cannot say it, so that there is nothing to learn
                    each["cross_entropy"] = 0.0
                total += weight * 2.0 * 0.5**s / 1.75 * each[kind]
                refused[s] += weight * each["total_variation"]
                count += weight if s == 0 else 0.0
    np.testing.assert_allclose(found.total, total, rtol=1e-4)
    np.testing.assert_allclose(found.count, count)
    names = [f"refused_{s + 1}" for s in range(STEPS)]
    np.testing.assert_allclose([found.others[name] for name in names], refused, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "quantized", "mtp"])
def test_a_trained_head_is_right_more_often(target, text, kind):
    """Of a model as it is served: what quantizes it is in what the head reads and learns."""
    if kind == "quantized":
        target = replace(target, params=quantized(target.params))
    make = init_mtp if kind == "mtp" else init_eagle3
    head = make(target, jax.random.key(0), count=STEPS)
    loss = draft_loss(CONFIG, head, steps=STEPS)
    optimizer = optax.adam(3e-3)
    prepare = partial(computed, dtype="float32")
    step = make_train_step(loss, optimizer, prepare=prepare, max_norm=1.0)
    state, losses = start(head.params, optimizer), []
    for _ in range(60):
        state, metrics = step(state, target.params, {"tokens": text})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    prompts = [[3, 9], [60], [17, 4, 44]]
    options: dict[str, Any] = {"max_new_tokens": 41}
    lengths = []
    for one in (head, replace(head, params=state.params)):
        found = jom.generate(CONFIG, target.params, prompts, draft=one, **options)
        assert found.tokens == jom.generate(CONFIG, target.params, prompts, **options).tokens
        lengths.append(np.mean(found.acceptance_length or []))
    assert lengths[1] > lengths[0] + 0.3


def test_the_most_frequent_tokens_are_those_that_are_learnt():
    tokens = np.asarray([[1, 1, 1, 5, 5, 7], [7, 7, 7, 7, 5, 0]])
    assert most_frequent({"tokens": tokens}, 9, 1).tolist() == [7]
    mask = np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    rows = {"tokens": tokens, "mask": mask}
    assert most_frequent(rows, 9, 1).tolist() == [1]
    assert most_frequent(rows, 9, 3).tolist() == [0, 1, 5]  # of equals, the first
    assert most_frequent(rows, 9, None).tolist() == list(range(9))
    with pytest.raises(UserError, match="head.vocabulary is 10, and the model has 9 tokens"):
        most_frequent(rows, 9, 10)


def test_medusa_heads_learn_the_same_places(target, text):
    """Head s of token t + 2 + s, which the model says behind token t + 1 + s."""
    medusa = init_medusa(target, STEPS)
    loss = draft_loss(CONFIG, medusa, steps=STEPS, decay=0.5)
    batch, step = {"tokens": text[:3]}, jnp.zeros((), jnp.int32)
    found = jax.jit(loss)(medusa.params, target.params, batch, step)
    log_p = np.asarray(jax.nn.log_softmax(forward_of(CONFIG, target.params, text[:3])), np.float64)
    total = 0.0
    for s in range(STEPS):  # new heads say what the model does
        p, q = log_p[:, 1 + s : -1], log_p[:, : -2 - s]
        total += 0.5**s / 1.75 * (np.exp(p) * (p - q)).sum()
    np.testing.assert_allclose(found.total, total, rtol=1e-4)
    optimizer = optax.adam(3e-3)
    step_of = make_train_step(loss, optimizer, max_norm=1.0)
    state, losses = start(medusa.params, optimizer), []
    for _ in range(40):
        state, metrics = step_of(state, target.params, {"tokens": text})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


# Whole runs

SMALL = {
    "length": 16,
    "batch": 4,
    "steps": 4,
    "log": 2,
    "save": 2,
    "evaluation": {"windows": 4, "length": 16},
    "optimizer": {"learning_rate": 1e-3},
    "head": {"vocabulary": 100, "steps": 2, "count": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, byte_tokenizer):
    config = replace(CONFIG, vocab_size=256)
    folder = tmp_path_factory.mktemp("models") / "bytes"
    jom.save(folder, config, sure_model(config), byte_tokenizer)
    return str(folder)


def test_a_run_ends_with_a_head_that_generation_takes(model, tmp_path, run):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"model": model} | SMALL))
    out = tmp_path / "run"
    code, said, _ = run("train", "draft", "--config", config, "--out", out)
    assert code == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert f"{last['acceptance_length']:.2f} tokens a pass" in said
    used = np.cumprod([1 - last["refused_1"], 1 - last["refused_2"]]).sum()
    assert last["acceptance_length"] == pytest.approx(1 + used)
    loaded = jom.load(model)
    head = read_eagle3(out / "model", loaded.config, count=3)
    assert head.config.vocab_size == 100
    arguments = "generate", model, "--prompt", "So it goes", "--max-new-tokens", 12
    code, plain, _ = run(*arguments)
    assert code == 0
    code, drafted, shown = run(*arguments, "--draft", out / "model", "--draft-tokens", 2)
    assert code == 0 and drafted == plain and "tokens a pass of the model" in shown
    code, drafted, _ = run(*arguments, "--draft", out / "model", "--draft-tree", "2,2,4")
    assert code == 0 and drafted == plain


@pytest.mark.parametrize("kind, read", [("medusa", read_medusa), ("mtp", read_mtp)])
def test_a_run_of_other_heads(model, tmp_path, run, kind, read):
    settings = RunSettings.of({"model": model} | SMALL | {"head": {"kind": kind, "steps": 2}})
    made = train("draft", settings, tmp_path / "run").model
    found = read(tmp_path / "run" / "model", jom.load(model).config)
    for own, its in zip(*map(jax.tree.leaves, (found.params, made.params)), strict=True):
        assert (own == its).all()
    arguments = "generate", model, "--prompt", "So it goes", "--max-new-tokens", 8
    code, plain, _ = run(*arguments)
    assert code == 0
    code, drafted, _ = run(*arguments, "--draft", tmp_path / "run" / "model")
    assert code == 0 and drafted == plain


def test_a_run_that_is_resumed_is_the_same(model, tmp_path):
    settings = RunSettings.of({"model": model} | SMALL)
    whole = train("draft", settings, tmp_path / "whole")
    with pytest.raises(UserError, match="exists already"):
        train("draft", settings, tmp_path / "whole")
    states = tmp_path / "half" / "states"
    train("draft", settings, tmp_path / "half")
    (states / "4").rename(tmp_path / "gone")
    again = train("draft", settings, tmp_path / "half", resume=True)
    pairs = map(jax.tree.leaves, (whole.model.params, again.model.params))
    assert all((own == its).all() for own, its in zip(*pairs, strict=True))
    assert [one["step"] for one in again.log] == [one["step"] for one in whole.log]


def test_a_mesh_trains_the_same(model, tmp_path):
    settings = RunSettings.of({"model": model} | SMALL)

    def measured(settings, name):
        lines = train("draft", settings, tmp_path / name).log
        return next(one for one in reversed(lines) if "loss" in one) | lines[-1]

    alone = measured(settings, "alone")
    for name, mesh in (("data", {"data": 2}), ("fsdp", {"fsdp": 2, "model": 2})):
        split = RunSettings.of({"model": model, "mesh": mesh} | SMALL)
        found = measured(split, name)
        for metric in ("loss", "refused_1", "refused_2"):
            assert found[metric] == pytest.approx(alone[metric], rel=2e-3)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"recipe": "nvfp4"}, "draft trains a head for a model that stays; leave out 'recipe'"),
        ({"losses": [{"kind": "hidden_cosine"}]}, "draft is trained for next tokens"),
        ({"head": {"layers": [0, 5]}}, r"head.layers are \[0, 5\], and the model's layers 0 to 1"),
        ({"head": {"steps": 0}}, "head.steps"),
        ({"head": {"kind": "medusa", "layers": [1]}}, "'layers' does not go with medusa"),
        ({"head": {"kind": "mtp", "vocabulary": 9}}, "'vocabulary' does not go with mtp"),
    ],
)
def test_settings_that_do_not_go_together(model, tmp_path, changes, problem):
    with pytest.raises(UserError, match=problem):
        train("draft", RunSettings.of({"model": model} | SMALL | changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_goes_with_draft_alone(model):
    settings = RunSettings.of({"model": model, "recipe": "int4"} | SMALL)
    with pytest.raises(UserError, match="a 'head' guesses for a model and goes with draft"):
        settings.check("qad")


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_the_configuration_that_is_shipped(kind):
    settings = RunSettings.load(Path(__file__).parents[2] / "configs/runs" / f"draft_{kind}.yaml")
    settings.check("draft")
    assert settings.head is not None and settings.head.kind == kind
