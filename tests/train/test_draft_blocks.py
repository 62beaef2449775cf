"""Training DFlash heads: what is learnt of a text, and runs that end with one."""

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
from jaxopt_models.models.transformer import forward, hidden_states_with_layers
from jaxopt_models.speculative import init_dflash
from jaxopt_models.speculative.blocks import blocks
from jaxopt_models.speculative.dflash_files import read_dflash
from jaxopt_models.train.block_objective import _chosen, block_loss
from jaxopt_models.train.draft_job import least_frequent
from jaxopt_models.train.leaves import computed
from jaxopt_models.train.objectives import Term
from jaxopt_models.train.run import train
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.step import make_train_step, start

BLOCK, MASK = 4, 63
NOW = jnp.zeros((), jnp.int32)


def new_head(target):
    options: dict[str, Any] = {"mask_token": MASK, "layers": (0, 1), "depth": 1, "block": BLOCK}
    return init_dflash(target, jax.random.key(0), **options)


@pytest.mark.parametrize("kind", ["forward_kl", "cross_entropy"])
def test_the_loss_is_what_it_says(target, text, kind):
    """Beside one place of one block at a time, from all anchors; of two documents in a row, blocks
    know the text of their own, and only what is said within it counts."""
    head, tokens, length, cut = new_head(target), text[:2], text.shape[1], 9
    starts = jnp.asarray([[0] * length, [0] * cut + [cut] * (length - cut)], jnp.int32)
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, tokens.shape), jnp.float32)
    loss = block_loss(CONFIG, head, [Term(LogitLoss(kind), 2.0)], anchors=length, decay=0.5)
    batch = {"tokens": tokens, "mask": mask, "starts": starts}
    found = jax.jit(loss)(head.params, target.params, batch, NOW)

    @jax.jit
    def alone(own: jax.Array, anchors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the model says of a document, and the head at each place of its blocks."""
        _, behind = hidden_states_with_layers(CONFIG, target.params, own, head.layers)
        features = jnp.concatenate([behind[i] for i in head.layers], axis=-1)
        states = blocks(head, target, own, features, anchors)[0]
        said = forward(CONFIG, target.params, own)[0], head.logits(target, states)
        return jax.nn.softmax(said[0]), jax.nn.softmax(said[1])

    total, refused, count = 0.0, np.zeros(BLOCK - 1), 0.0
    for row, first, end in ((0, 0, length), (1, 0, cut), (1, cut, length)):
        own = tokens[row, first:end][None]
        anchors = jnp.arange(1, end - first, dtype=jnp.int32)[None]
        p, q = (np.asarray(each, np.float64) for each in alone(own, anchors))
        for t in anchors[0].tolist():
            if first + t > length - BLOCK:  # no room for a block
                continue
            for k in range(1, min(BLOCK, end - first - t)):
                weight, its, said = float(mask[row, first + t + k]), p[t + k - 1], q[t - 1, k]
                each = {
                    "forward_kl": np.sum(its * np.log(its / said)),
                    "cross_entropy": -np.log(said[int(own[0, t + k])]),
                }
                total += weight * 2.0 * 0.5 ** (k - 1) / 1.75 * each[kind]
                refused[k - 1] += weight * 0.5 * np.abs(its - said).sum()
                count += weight if k == 1 else 0.0
    np.testing.assert_allclose(found.total, total, rtol=1e-4)
    np.testing.assert_allclose(found.count, count)
    names = [f"refused_{k}" for k in range(1, BLOCK)]
    np.testing.assert_allclose([found.others[name] for name in names], refused, rtol=1e-4)


def test_anchors_are_others_each_step_and_where_there_is_something_to_learn():
    everywhere = jnp.ones((2, 40), bool)
    found = _chosen(everywhere, 8, 0, NOW)
    assert (found[0] == found[1]).all()  # so that rows may be split however
    assert len(set(found[0].tolist())) == 8
    assert (_chosen(everywhere, 8, 0, NOW) == found).all()
    assert (_chosen(everywhere, 8, 0, NOW + 1) != found).any()
    assert (_chosen(everywhere, 8, 1, NOW) != found).any()
    few = jnp.zeros((2, 40), bool).at[1, jnp.asarray([3, 17, 30])].set(True)
    assert set(_chosen(few, 8, 0, NOW)[1, :3].tolist()) == {3, 17, 30}
    assert set(_chosen(everywhere, 99, 0, NOW)[0].tolist()) == set(range(40))


def test_a_trained_head_is_right_more_often(target, text):
    """Of a model as it is served: what quantizes it is in what the head reads and learns."""
    target = replace(target, params=quantized(target.params))
    head = new_head(target)
    loss = block_loss(CONFIG, head, anchors=8)
    optimizer = optax.adam(3e-3)
    prepare = partial(computed, dtype="float32")
    step = make_train_step(loss, optimizer, prepare=prepare, max_norm=1.0)
    state, losses = start(head.params, optimizer), []
    for _ in range(80):
        state, metrics = step(state, target.params, {"tokens": text})
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])
    prompts = [[3, 9], [60], [17, 4, 44]]
    options: dict[str, Any] = {"max_new_tokens": 41}
    plain, lengths = jom.generate(CONFIG, target.params, prompts, **options).tokens, []
    for one in (head, replace(head, params=state.params)):
        found = jom.generate(CONFIG, target.params, prompts, draft=one, **options)
        assert found.tokens == plain
        lengths.append(np.mean(found.acceptance_length or []))
    assert lengths[1] > lengths[0] + 0.3


def test_the_mask_is_what_the_text_has_least_of():
    tokens = np.asarray([[1, 1, 2, 3, 3], [0, 0, 4, 4, 4]])
    assert least_frequent({"tokens": tokens}, 5) == 2
    assert least_frequent({"tokens": tokens}, 9) == 8  # of equals, the last


# Whole runs

SMALL = {
    "length": 16,
    "batch": 4,
    "steps": 4,
    "log": 2,
    "save": 2,
    "evaluation": {"windows": 4, "length": 16},
    "optimizer": {"learning_rate": 1e-3},
    "head": {"kind": "dflash", "depth": 1, "layers": [0, 1], "block": 4, "anchors": 6},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, byte_tokenizer):
    config = replace(CONFIG, vocab_size=256)
    folder = tmp_path_factory.mktemp("models") / "bytes"
    jom.save(folder, config, sure_model(config), byte_tokenizer)
    return str(folder)


def test_a_run_ends_with_a_head_that_the_commands_take(model, tmp_path, run):
    config, out = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(json.dumps({"model": model} | SMALL))
    code, said, _ = run("train", "draft", "--config", config, "--out", out)
    assert code == 0
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert f"{last['acceptance_length']:.2f} tokens a pass" in said
    used = np.cumprod([1 - last[f"refused_{k}"] for k in (1, 2, 3)]).sum()
    assert last["acceptance_length"] == pytest.approx(1 + used)
    head = read_dflash(out / "model", jom.load(model).config)
    assert (head.block, head.count, head.layers) == (4, 3, (0, 1))
    arguments = "generate", model, "--prompt", "So it goes", "--max-new-tokens", 12
    code, plain, _ = run(*arguments)
    assert code == 0
    for more in (("--draft-tokens", 2), ("--draft-tree", "2,3,5")):
        code, drafted, shown = run(*arguments, "--draft", out / "model", *more)
        assert code == 0 and drafted == plain and "tokens a pass of the model" in shown
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("So it goes\n")
    bench = "bench", "speculative", model, "--prompts", prompts, "--draft", out / "model"
    code, _, _ = run(*bench, "--new-tokens", 8, "--out", tmp_path / "figures.json")
    assert code == 0
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["K"] == 3 and row["mismatches"] == 0


def test_a_mesh_trains_the_same(model, tmp_path):
    def measured(name: str, changes: dict[str, Any]) -> dict[str, float]:
        settings = RunSettings.of({"model": model} | SMALL | changes)
        lines = train("draft", settings, tmp_path / name).log
        return next(one for one in reversed(lines) if "loss" in one) | lines[-1]

    alone = measured("alone", {})
    for name, mesh in (("data", {"data": 2}), ("fsdp", {"fsdp": 2, "model": 2})):
        found = measured(name, {"mesh": mesh})
        for metric in ("loss", "refused_1", "refused_3"):
            assert found[metric] == pytest.approx(alone[metric], rel=2e-3)


@pytest.mark.parametrize(
    "head, problem",
    [
        ({"layers": [0, 5]}, r"head.layers are \[0, 5\], and the model's layers 0 to 1"),
        ({"block": 16}, "length is 16, and a block of 16 places needs a text before it"),
        ({"block": 1}, "head.block"),
        ({"mask_token": 256}, "mask_token is 256, and the model has tokens 0 to 255"),
        ({"steps": 3}, "'steps' does not go with dflash; remove it"),
        ({"kind": "eagle3", "anchors": 3}, "'block' does not go with eagle3; remove it"),
    ],
)
def test_settings_that_do_not_go_together(model, tmp_path, head, problem):
    with pytest.raises(UserError, match=problem):
        settings = RunSettings.of(
            {"model": model} | SMALL | {"head": {"kind": "dflash", "block": 4} | head}
        )
        train("draft", settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_losses_that_cannot_be(target, text):
    head = new_head(target)
    with pytest.raises(UserError, match="a row has 0 anchors, where blocks begin; choose 1"):
        block_loss(CONFIG, head, anchors=0)
    with pytest.raises(UserError, match="a draft head is trained for next tokens"):
        block_loss(CONFIG, head, [])
    batch = {"tokens": text[:, :BLOCK]}
    with pytest.raises(UserError, match="rows have 4 tokens, and a block of 4 places needs a text"):
        block_loss(CONFIG, head)(head.params, target.params, batch, NOW)


def test_the_configuration_that_is_shipped():
    file = Path(__file__).parents[2] / "configs" / "runs" / "draft_dflash.yaml"
    RunSettings.load(file).check("draft")
