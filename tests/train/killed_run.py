"""A run that kills itself at a step: python killed_run.py DIR STEP_TO_DIE"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

import jaxopt_models as jom
from jaxopt_models.data import PackedBatches
from jaxopt_models.train.checkpoints import Checkpoints
from jaxopt_models.train.leaves import fake_quantized
from jaxopt_models.train.loop import Log, Pace, fit
from jaxopt_models.train.objectives import next_token_loss
from jaxopt_models.train.step import make_train_step, start

CONFIG = replace(tiny.CONFIG, vocab_size=32)
STEPS = 10


def run(directory: Path, dies_at: int | None = None) -> tuple[list[dict], object]:
    """Goes on with what is there; (lines of the log, trained arrays)."""
    params = jom.init(CONFIG, jax.random.key(0))

    optimizer = optax.adamw(1e-3)
    state = start(fake_quantized(params, tiny.quantized(params)), optimizer)
    rows = np.random.default_rng(0).integers(0, 32, (7, 12)).astype(np.int32)
    batches = PackedBatches(rows, batch_size=3, seed=5)

    def batch(number: int) -> dict[str, jax.Array]:
        if number == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"tokens": jnp.asarray(batches.batch(number))}

    with Checkpoints(directory / "states", signature={"seed": 5}) as checkpoints:
        if checkpoints.steps:
            state = checkpoints.restore(state)
        log = Log(directory / "log.jsonl", int(state.step))
        step = make_train_step(next_token_loss(CONFIG), optimizer)
        state = fit(
            step,
            state,
            batch,
            params,
            Pace(STEPS, log=1, save=3),
            checkpoints=checkpoints,
            log=log,
        )
    return log.lines, state.trained


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
