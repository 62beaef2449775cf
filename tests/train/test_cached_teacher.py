"""Runs that read what the teacher says from disk: those that ask it, to the rounding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.train.run import train
from jaxopt_models.train.settings import RunSettings

SMALL = {
    "recipe": "nvfp4_weight_only",
    "length": 32,
    "batch": 4,
    "steps": 5,
    "log": 1,
    "save": 3,
    "evaluation": {"windows": 2, "length": 16},
    "optimizer": {"learning_rate": 1e-3},
    "losses": [{"kind": "forward_kl", "top_k": 6, "temperature": 2.0}, {"kind": "cross_entropy"}],
    "packing": "documents",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    """A model, and documents."""
    target = tmp_path_factory.mktemp("teacher")
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        }
    )
    params = jom.init(config, jax.random.key(0))
    params |= {"embed_tokens": {"weight": 40 * params["embed_tokens"]["weight"]}}
    jom.save(target / "model", config, params, byte_tokenizer)
    lines = [json.dumps({"text": "one two three four five six"[:n]}) for n in range(5, 27)]
    (target / "text.jsonl").write_text("\n".join(lines))
    return target


def _settings(folder, cache=None, **more):
    files = {"model": str(folder / "model"), "text": str(folder / "text.jsonl")}
    chosen = {"teacher_cache": {"directory": str(cache), "top_k": 8}} if cache else {}
    return RunSettings.model_validate(SMALL | files | chosen | more)


class Descriptions(list):
    """Of loops that were run."""

    def __call__(self, items, description):
        self.append(description() if callable(description) else description)
        return items


def test_a_run_with_a_cache_is_the_run_without_it(folder, tmp_path):
    """To 2^-9 of its losses or 1e-5, in parts and on a mesh; the next run does not ask again."""
    cache, seen = tmp_path / "cache", Descriptions()
    more = {"parts": 2, "mesh": {"fsdp": 2, "model": 2}, "steps": 3}
    online = train("qad", _settings(folder, **more), tmp_path / "online")
    cached = train("qad", _settings(folder, cache, **more), tmp_path / "cached", progress=seen)
    for found, expected in zip(cached.log, online.log, strict=True):
        assert found.keys() == expected.keys()
        for metric in {"forward_kl_t2_top6", "cross_entropy", "loss"} & found.keys():
            assert found[metric] == pytest.approx(expected[metric], rel=2**-9, abs=1e-5)
    assert cached.log[-1]["kl"] == pytest.approx(online.log[-1]["kl"], rel=0.02)
    train("qad", _settings(folder, cache, seed=1, steps=1), tmp_path / "next", progress=seen)
    assert seen.count("asking the teacher") == 1 and seen.count("training") == 2
    files = {"indices.npy", "log_probs.npy", "tail.npy", "teacher.json"}
    assert {path.name for path in cache.iterdir()} == files


def test_steps_see_the_rows_that_they_would_see(folder, tmp_path, monkeypatch):
    """In the same order, each with what is said of it, so that a resumed run goes on, too; and the
    teacher is no part of the step."""
    seen = []

    def fit(step, state, batch, context, *_, **__):
        seen.append((context, [batch(number) for number in range(5)]))
        raise UserError("seen")

    monkeypatch.setattr("jaxopt_models.train.run.fit", fit)
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(UserError, match="seen"):
            train("qad", _settings(folder, cache, parts=2), tmp_path / f"out-{cache is None}")
    (context, online), (nothing, cached) = seen
    assert context is not None and nothing is None
    said: dict[bytes, bytes] = {}
    for one, other in zip(online, cached, strict=True):
        teacher = other.pop("teacher")
        assert teacher.indices.shape == (2, 2, 32, 8)
        assert (teacher.indices.dtype, teacher.log_probs.dtype) == (jnp.uint16, jnp.float16)
        jax.tree.map(np.testing.assert_array_equal, one, other)
        rows, tails = other["tokens"].reshape(-1, 32), teacher.tail.reshape(-1, 32)
        for row, tail in zip(rows, tails, strict=True):
            assert said.setdefault(row.tobytes(), tail.tobytes()) == tail.tobytes()
    assert len(set(said.values())) == len(said) > 8


def test_a_cache_of_another_run_is_refused_before_anything_else(folder, tmp_path):
    cache = tmp_path / "cache"
    distilled = {"recipe": None, "student": str(folder / "model"), "steps": 1}
    train("distill", _settings(folder, cache, **distilled), tmp_path / "first")
    one = [{"kind": "forward_kl", "top_k": 6}]
    more = {"directory": str(cache), "top_k": 9}
    wrong = {
        "temperature 2.0, and this run 1.0": {"losses": one},
        "dtype 'float32', and this run 'bfloat16'": {"dtype": "bfloat16"},
        "length 32, and this run 30": {"length": 30},
        "the 8 most likely tokens, and this run needs 9": {"teacher_cache": more},
    }
    for message, changed in wrong.items():
        with pytest.raises(UserError, match=message):
            train("qad", _settings(folder, cache, **changed), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("technique", "losses", "message"),
    [
        ("qad", [{"kind": "reverse_kl"}], "reverse_kl needs more of the teacher than"),
        ("qad", [{"kind": "forward_kl"}], "forward_kl with a top_k of at most 8"),
        ("qad", [{"kind": "forward_kl", "top_k": 9}], "forward_kl of top_k 9 needs more"),
        ("qat", [], "has one temperature, and the losses that read the teacher have none"),
        (
            "qad",
            [{"kind": "forward_kl", "top_k": 8, "temperature": t} for t in (1.0, 3.0)],
            "has one temperature, and .* have 1, 3",
        ),
    ],
)
def test_losses_that_need_another_teacher(folder, tmp_path, technique, losses, message):
    with pytest.raises(UserError, match=message):
        train(technique, _settings(folder, tmp_path / "cache", losses=losses), tmp_path / "out")
    assert not any(tmp_path.iterdir())
