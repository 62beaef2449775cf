"""Saves checkpoints in child processes that kill themselves at given moments.

    python killed_save.py DIRECTORY MOMENT ...

writes, or rather does not, DIRECTORY/<moment>/model for each moment. A moment is a name in
`MOMENTS`, or seconds after which a timer kills.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from unittest import mock

import jax.numpy as jnp

from jaxopt_models.checkpoint import native
from jaxopt_models.models.config import ModelConfig

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 0,
        "num_attention_heads": 1,
    }
)


def kill(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class HalfTokenizer:
    """Dies after its first file."""

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "tokenizer.json").write_text("{")
        kill()


def after(function):
    def run(*args, **kwargs):
        function(*args, **kwargs)
        kill()

    return run


def half(path: Path, text: str) -> None:
    path.write_bytes(text.encode()[: len(text) // 2])
    kill()


def at_second(function):
    calls = []

    def run(*args):
        calls.append(args)
        return function(*args) if len(calls) < 2 else kill()

    return run


MOMENTS = {
    "before the arrays": mock.patch.object(native.ocp, "save", kill),
    "after the arrays": mock.patch.object(native.ocp, "save", after(native.ocp.save)),
    "in the marker": mock.patch.object(Path, "write_text", half),
    "before the rename": mock.patch.object(Path, "rename", kill),
    "between the renames": mock.patch.object(Path, "rename", at_second(Path.rename)),
    "before the old one is gone": mock.patch("shutil.rmtree", kill),
}


def save(target: Path, moment: str) -> None:
    params = {"w": jnp.ones((512, 1024)), "v": [jnp.ones((3, 5), jnp.bfloat16)][0]}
    if moment.startswith(("between", "before the old")):
        native.save(target, CONFIG, {"w": jnp.zeros(3)})
    tokenizer = HalfTokenizer() if moment == "in the tokenizer" else None
    if moment in MOMENTS:
        MOMENTS[moment].start()
    elif tokenizer is None:
        threading.Timer(float(moment), kill).start()
    native.save(target, CONFIG, params, tokenizer, overwrite=True)
    kill()


if __name__ == "__main__":
    for moment in sys.argv[2:]:
        # Forked before JAX has started any thread, which saves an import each.
        child = os.fork()
        if child == 0:
            save(Path(sys.argv[1], moment, "model"), moment)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
