"""A run of two processes with two devices each: what it learns, writes and leaves behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tiny import ONE_LAYER

import jaxopt_models as jom
from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.train.checkpoints import Checkpoints
from jaxopt_models.train.leaves import fake_quantized
from jaxopt_models.train.run import train
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.step import start
from jaxopt_models.train.student import finished

TIMINGS = {"seconds", "tokens_per_second"}
RUN = {
    "recipe": "nvfp4_weight_only",
    "length": 16,
    "batch": 8,
    "parts": 2,
    "steps": 4,
    "log": 1,
    "save": 2,
    "mesh": {"data": 2, "fsdp": 2},
    "optimizer": {"learning_rate": 1e-3},
    # Of three windows, whose rows four devices cannot share.
    "evaluation": {"windows": 3, "length": 16, "every": 2},
}


def _in_processes(count: int, *command: str) -> list[str]:
    """Standard output of the command in each of so many processes, with two devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        where = f"localhost:{probe.getsockname()[1]}"
    options = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": options}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "jaxopt_models", *command]
            + ["--coordinator", where, "--processes", str(count), "--process", str(i)],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        found = [child.communicate(timeout=400) for child in children]
    finally:
        for child in children:
            child.kill()
    told = "\n".join(f"process {i}: {out}{errors}" for i, (out, errors) in enumerate(found))
    assert all(child.returncode == 0 for child in children), told
    return [out for out, _ in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory, byte_tokenizer):
    """(settings of a run, its directory, what its two processes printed)."""
    folder = tmp_path_factory.mktemp("processes")
    config = replace(ONE_LAYER, vocab_size=256)
    params = jom.init(config, jax.random.key(0))
    params |= {"embed_tokens": {"weight": 20 * params["embed_tokens"]["weight"]}}
    jom.save(folder / "teacher", config, params, byte_tokenizer)
    text = {"text": str(folder / "text.txt")}
    Path(text["text"]).write_text(
        "All that is gold does not glitter, not all who wander are lost. " * 99
    )
    settings = RUN | text | {"model": str(folder / "teacher")}
    settings["evaluation"] = RUN["evaluation"] | text
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    command = ["train", "qad", "--config", str(folder / "run.yaml"), "--out", str(folder / "out")]
    return RunSettings.model_validate(settings), folder / "out", _in_processes(2, *command)


def _assert_same(lines, expected):
    """All but the time it took."""
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in other.keys() - TIMINGS:
            np.testing.assert_allclose(line[name], other[name], rtol=1e-3, err_msg=name)


def _log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_one_process_with_as_many_devices_learns_the_same(run, tmp_path):
    settings, out, printed = run
    assert ["4 steps: perplexity" in text for text in printed] == [True, False]
    _assert_same(_log(out), train("qad", settings, tmp_path / "alone").log)


def test_one_process_goes_on_where_two_stopped(run, tmp_path):
    """After the last checkpoint and the model are lost."""
    settings, out, _ = run
    shutil.copytree(out, tmp_path / "copy")
    (last,) = (tmp_path / "copy" / "states").glob("*4")
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "copy" / "model")
    _assert_same(train("qad", settings, tmp_path / "copy", resume=True).log, _log(out))


def test_the_last_state_is_the_model(run):
    """Bit for bit, restored onto one device."""
    settings, out, _ = run
    teacher, model = jom.load(settings.model), jom.load(out / "model")
    described = json.loads((out / "run.json").read_text())
    del described["mesh"]  # a run may go on with another one
    quantized, _ = jom.quantize(teacher, jom.Recipe.load(settings.recipe))
    optimizer = settings.optimizer.transformation(settings.steps)
    like = start(fake_quantized(teacher.params, quantized), optimizer)
    with Checkpoints(out / "states", signature=described) as states:
        state = states.restore(like)
    assert int(state.step) == 4
    expected = dict(tree.arrays_with_paths(model.params))
    found = dict(tree.arrays_with_paths(finished(state.params, teacher.params, settings)))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        assert np.asarray(array).tobytes() == np.asarray(expected[path]).tobytes(), path


def test_a_run_of_several_processes_needs_all_of_their_devices(run, tmp_path, monkeypatch):
    settings, _, _ = run
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"2 processes with 8 devices need a mesh of as many, and"):
        train("qad", settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
