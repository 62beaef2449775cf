"""A tiny teacher, rows for it to read, and writers that kill themselves on the way.

    python teachers.py DIRECTORY MOMENT ...

writes, or rather does not, DIRECTORY/<moment>/teacher for each moment, a name in `MOMENTS`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import jaxopt_models as jom
from jaxopt_models.distill import teacher_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model

N, T, V, K = 6, 12, 64, 5
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
)


def model(seed: int = 0) -> Model:
    """As sure of its predictions as a trained one."""
    params = jom.init(CONFIG, jax.random.key(seed))
    params["embed_tokens"] = {"weight": 40 * params["embed_tokens"]["weight"]}
    return Model(CONFIG, params, source="tiny")


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents a row."""
    tokens = np.random.default_rng(seed).integers(0, V, (N, T)).astype(np.int32)
    starts = np.tile(np.where(np.arange(T) < 7, 0, 7).astype(np.int32), (N, 1))
    return {"tokens": tokens, "starts": starts, "mask": np.ones((N, T), bool)}


def made_of(temperature: float = 2.0, **more: Any) -> teacher_cache.Signature:
    return teacher_cache.signature(
        more.get("model") or model(), more.get("rows") or rows(), temperature, "float32"
    )


def write(directory: Path, **more: Any) -> None:
    options: dict[str, Any] = {"model": model(), "rows": rows(), "k": K, "batch_size": 4} | more
    teacher_cache.write(directory, options.pop("made_of", made_of()), **options)


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_call(number: int, function: Any) -> Any:
    """The function, which does half of its work at a call and dies."""
    calls = []

    def run(file: Path, offset: int, content: bytes) -> None:
        calls.append(file)
        function(file, offset, content if len(calls) < number else content[: len(content) // 2])
        if len(calls) == number:
            kill()

    return run


def _half(path: Path, text: str, **_: Any) -> None:
    path.write_bytes(text.encode()[: len(text) // 2])
    kill()


_PUT = teacher_cache._put
MOMENTS = {
    "in the rows": mock.patch.object(teacher_cache, "_put", _at_call(6, _PUT)),
    "in the headers": mock.patch.object(teacher_cache, "_put", _at_call(8, _PUT)),
    "in the marker": mock.patch.object(Path, "write_text", _half),
    "before the rename": mock.patch.object(Path, "rename", kill),
}


if __name__ == "__main__":
    for moment in sys.argv[2:]:
        # Forked before JAX has started any thread, which saves an import each.
        child = os.fork()
        if child == 0:
            MOMENTS[moment].start()
            write(Path(sys.argv[1], moment, "teacher"))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
