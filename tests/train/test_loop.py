"""The loop: what is logged and kept, and that a run goes on as if nothing had happened."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import killed_run
import numpy as np
import optax
import pytest

from jaxopt_models.errors import UserError
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.train.checkpoints import Checkpoints
from jaxopt_models.train.loop import Log, Pace, fit
from jaxopt_models.train.objectives import QAT, next_token_loss
from jaxopt_models.train.step import Sums, make_train_step, start

SGD = optax.sgd(0.5)


def _square(params, context, batch, step):
    """A loss whose course can be told: `w` goes to the batch's number."""
    total = jnp.sum((params["w"] - batch) ** 2) * context
    return Sums(total, jnp.float32(2.0), {"double": 2 * total})


def _state(value: float = 0.0):
    return start({"w": jnp.full((2,), value), "fixed": jnp.arange(3)}, SGD)


STEP = make_train_step(_square, SGD)


def test_lines_are_means_of_the_steps_since_the_last(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    batches = [jnp.full((2,), float(i)) for i in range(5)]
    state = fit(STEP, _state(), batches.__getitem__, jnp.float32(1), Pace(5, log=2), log=log)
    w, losses = np.zeros(2), []
    for batch in map(np.asarray, batches):  # the gradient of the mean is w - batch
        losses.append(float(np.mean((w - batch) ** 2)))
        w = w - 0.5 * (w - batch)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == log.lines and [line["step"] for line in lines] == [2, 4, 5]
    expected = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [line["loss"] for line in lines] == pytest.approx(expected)
    assert [line["double"] for line in lines] == pytest.approx([2 * one for one in expected])
    assert [line["count"] for line in lines] == [4, 4, 2]
    assert all(line["tokens_per_second"] > 0 and line["skipped"] == 0 for line in lines)


def test_the_peak_rate_is_beside_the_time():
    """The part of it, over all steps of a line, is shown as well as logged."""
    log, shown = Log(None), []

    def progress(items, description):
        for item in items:
            yield item
            shown.append(description())

    batches = [jnp.full((2,), float(i)) for i in range(5)]
    options = {"log": log, "least_seconds": 3.0, "progress": progress}
    fit(STEP, _state(), batches.__getitem__, jnp.float32(1), Pace(5, log=2), **options)
    for line, steps in zip(log.lines, (2, 2, 1), strict=True):
        assert line["mfu"] == pytest.approx(3.0 * steps / line["seconds"])
    assert shown[0] == "training" and "tokens/s" in shown[-1] and "peak rate" in shown[-1]


def test_steps_that_are_skipped_are_not_in_the_mean_and_end_a_run():
    log, bad = Log(None), jnp.full((2,), jnp.nan)

    def batch(number):
        return bad if number in (1, 2) or number > 5 else jnp.ones(2)

    fit(STEP, _state(), batch, jnp.float32(1), Pace(4, log=4, most_skipped=3), log=log)
    assert log.lines[0]["skipped"] == 2 and np.isfinite(log.lines[0]["loss"])
    assert log.lines[0]["count"] == 4
    with pytest.raises(UserError, match="3 steps in a row had a loss .* the last at step 8; lower"):
        fit(STEP, _state(), batch, jnp.float32(1), Pace(20, most_skipped=3))


def test_what_is_measured_is_logged_and_the_best_is_kept(tmp_path):
    measured = iter([3.0, 1.0, 2.0, 4.0])
    log = Log(None)
    with Checkpoints(tmp_path, keep=1, best="kl") as checkpoints:
        state = fit(
            STEP,
            _state(),
            lambda number: jnp.full((2,), float(number)),
            jnp.float32(1),
            Pace(8, log=100, save=2, evaluate=2),
            evaluate=lambda params: {"kl": next(measured)},
            checkpoints=checkpoints,
            log=log,
        )
    assert [line["kl"] for line in log.lines if "kl" in line] == [3, 1, 2, 4]
    with Checkpoints(tmp_path, keep=1, best="kl") as checkpoints:
        assert checkpoints.steps == [4, 8]
        best = checkpoints.restore(_state(), 4)
        assert best.step == 4 and jnp.any(best.params["w"] != state.params["w"])
        last = checkpoints.restore(_state())
        assert last.params["w"].tobytes() == state.params["w"].tobytes()


def test_a_log_forgets_what_comes_after_the_checkpoint(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert [line["step"] for line in Log(file, 1).lines] == [1]
    assert file.read_text() == '{"step": 1, "loss": 3.0}\n'


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return killed_run.run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("dies_at", [2, 7])
def test_a_killed_run_goes_on_to_the_last_bit(uninterrupted, tmp_path, dies_at):
    """Whether it had a checkpoint or not, and whatever was half written."""
    script = Path(killed_run.__file__)
    done = subprocess.run([sys.executable, script, tmp_path, str(dies_at)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    text = (tmp_path / "log.jsonl").read_text()
    known = [json.loads(line)["step"] for line in text.splitlines()]
    assert known == list(range(1, dies_at + 1))
    lines, trained = killed_run.run(tmp_path)
    expected, arrays = uninterrupted
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(arrays), strict=True):
        assert a.tobytes() == b.tobytes()


def test_another_mesh(tiny_config, tiny_params, tokens, tmp_path):
    """Saved on one device, gone on with on eight."""
    optimizer = optax.adam(1e-3)
    step = make_train_step(next_token_loss(tiny_config, QAT), optimizer)

    def train(state, steps, directory):
        with Checkpoints(directory) as checkpoints:
            if checkpoints.steps:
                state = checkpoints.restore(state)
            run = Pace(steps, log=1)
            return fit(
                step, state, lambda i: {"tokens": tokens}, None, run, checkpoints=checkpoints
            )

    whole = train(start(tiny_params, optimizer), 4, tmp_path / "whole")
    train(start(tiny_params, optimizer), 2, tmp_path / "parts")
    spread = shard(tiny_params, make_mesh({"data": 2, "model": 4}))
    found = train(start(spread, optimizer), 4, tmp_path / "parts")
    for moment in (found.optimizer[0].mu, found.optimizer[0].nu):
        own = moment["layers"][0]["mlp"]["up_proj"]["weight"]
        assert own.sharding.shard_shape(own.shape) == (16, 32)
    for a, b in zip(jax.tree.leaves(found.trained), jax.tree.leaves(whole.trained), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_is_refused(tmp_path):
    with Checkpoints(tmp_path, best="kl", signature={"lr": 0.1}) as checkpoints:
        with pytest.raises(UserError, match="is empty; there is nothing to resume"):
            checkpoints.restore(_state())
        checkpoints.save(_state())
        with pytest.raises(UserError, match="chosen by 'kl', and measured were loss; choose one"):
            checkpoints.save(replace(_state(), step=jnp.int32(5)), {"loss": 1.0})
        with pytest.raises(UserError, match="has steps 0; there is nothing to resume at 3"):
            checkpoints.restore(_state(), 3)
        wider = start({"w": jnp.zeros(3), "fixed": jnp.arange(3)}, SGD)
        with pytest.raises(
            UserError, match=r"holds \['float32', \[2\]\] for 'trained/w', and this"
        ):
            checkpoints.restore(wider)
        more = start({"w": jnp.zeros(2), "new": jnp.zeros(1), "fixed": jnp.arange(3)}, SGD)
        with pytest.raises(UserError, match="holds None for 'trained/new'"):
            checkpoints.restore(more)
    with (
        Checkpoints(tmp_path, signature={"lr": 0.2}) as checkpoints,
        pytest.raises(UserError, match="a run whose lr is 0.1, and this one has 0.2; choose"),
    ):
        checkpoints.restore(_state())
