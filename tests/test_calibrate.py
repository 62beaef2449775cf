"""Calibration: the statistics are those of the taps, however the text is cut into batches."""

import functools
from collections import Counter
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.calibrate import input_amax
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward_with_taps, init

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
DENSE = ModelConfig.from_hf({"model_type": "llama"} | _SIZES)
MOE = ModelConfig.from_hf(
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | _SIZES
)
# Alternates sliding and full attention, scales embeddings, has norms behind each half of a layer.
GEMMA = ModelConfig.from_hf(
    {"model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 2, "head_dim": 16}
    | _SIZES
)


@functools.cache
def params(config: ModelConfig) -> Any:
    return init(config, jax.random.key(0))


def text(rows: int, length: int, seed: int = 0) -> jax.Array:
    ids = np.random.default_rng(seed).integers(0, _SIZES["vocab_size"], (rows, length))
    return jnp.asarray(ids, jnp.int32)


def linears(config: ModelConfig) -> list[str]:
    found = tree.leaves_with_paths(params(config))
    return [path for path, leaf in found if tree.is_decoder_matrix(path, leaf)]


def taps_amax(config: ModelConfig, batches: list[jax.Array], paths: list[str]) -> dict[str, float]:
    """The same statistic from whole forward passes, all activations at once."""
    names = {path: path.removesuffix("weight") + "input" for path in paths}
    names |= {path: "norm/output" for path in paths if path == "lm_head/weight"}
    largest: dict[str, float] = dict.fromkeys(paths, 0.0)
    for batch in batches:
        _, taps = forward_with_taps(config, params(config), batch, names.values())
        for path, name in names.items():
            largest[path] = max(largest[path], float(jnp.max(jnp.abs(taps[name]))))
    return largest


def assert_close(found: dict[str, jax.Array], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for path, amax in found.items():
        assert amax.shape == () and amax.dtype == jnp.float32
        assert float(amax) == pytest.approx(float(expected[path]), rel=1e-5), path


@pytest.mark.parametrize("config", [DENSE, MOE, GEMMA], ids=lambda config: config.model_type)
def test_the_amax_is_that_of_what_reaches_each_linear(config):
    batches = [text(3, 20, seed=1), text(2, 11, seed=2)]
    paths = linears(config)
    assert_close(
        input_amax(config, params(config), batches, paths), taps_amax(config, batches, paths)
    )


def test_router_and_output_head_have_inputs_too():
    batches, paths = [text(2, 11)], ["layers/1/mlp/router/weight", "lm_head/weight"]
    assert_close(input_amax(MOE, params(MOE), batches, paths), taps_amax(MOE, batches, paths))


def test_only_what_was_asked_for_is_returned():
    paths = ["layers/1/self_attn/o_proj/weight", "lm_head/weight"]
    some = input_amax(DENSE, params(DENSE), [text(2, 11)], iter(paths))
    everything = input_amax(
        DENSE, params(DENSE), [text(2, 11)], [*linears(DENSE), "lm_head/weight"]
    )
    assert_close(some, {path: everything[path] for path in paths})


@pytest.mark.parametrize("config", [DENSE, MOE], ids=lambda config: config.model_type)
def test_the_cut_into_batches_does_not_matter(config):
    rows, paths = text(5, 16, seed=4), linears(config)
    whole = input_amax(config, params(config), [rows], paths)
    assert_close(input_amax(config, params(config), [rows[:2], rows[2:]], paths), whole)
    assert_close(input_amax(config, params(config), [rows[::-1]], paths), whole)


def test_batches_may_come_from_a_generator_and_as_numpy():
    rows, paths = text(3, 16), linears(DENSE)
    generated = (np.asarray(rows[i : i + 1], np.int64) for i in range(3))
    found = input_amax(DENSE, params(DENSE), generated, paths)
    assert_close(found, input_amax(DENSE, params(DENSE), [rows], paths))


def test_more_text_never_lowers_a_maximum():
    paths, some = linears(DENSE), text(2, 16, seed=1)
    less = input_amax(DENSE, params(DENSE), [some], paths)
    more = input_amax(DENSE, params(DENSE), [some, text(4, 16, seed=2)], paths)
    assert all(more[path] >= less[path] for path in paths)
    assert any(more[path] > less[path] for path in paths)


def test_it_streams_layer_by_layer_and_compiles_once_for_each_kind_of_layer(monkeypatch):
    calibrate, order = import_module("jaxopt_models.calibrate"), []
    traced: Counter[Any] = Counter()
    observe, block = calibrate._observe, calibrate.block

    def observing(config, layer, *rest):
        order.append(id(layer["mlp"]["gate_proj"]["weight"]))
        return observe(config, layer, *rest)

    def tracing(*args, kind, **options):
        traced[kind] += 1
        return block(*args, kind=kind, **options)

    monkeypatch.setattr(calibrate, "_observe", observing)
    monkeypatch.setattr(calibrate, "block", tracing)
    layers = 4
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    config = ModelConfig.from_hf(
        GEMMA.to_hf() | {"num_hidden_layers": layers, "layer_types": kinds}
    )
    model = init(config, jax.random.key(0))
    paths = [f"layers/{i}/mlp/gate_proj/weight" for i in range(layers)]
    input_amax(config, model, [text(1, 9), text(1, 9, seed=1)], paths)
    ids = [id(layer["mlp"]["gate_proj"]["weight"]) for layer in model["layers"]]
    assert order == [layer for layer in ids for _ in range(2)]  # both batches, then the next layer
    assert traced == {"full": 1, "sliding": 1}


def test_progress_wraps_the_layers():
    seen = []

    def progress(items, description):
        for item in items:
            yield item
            seen.append(description)

    input_amax(DENSE, params(DENSE), [text(2, 11)], linears(DENSE), progress)
    assert seen == ["calibrating"] * DENSE.num_layers


# What it refuses


def test_there_must_be_text():
    with pytest.raises(UserError, match="no batches were given"):
        input_amax(DENSE, params(DENSE), [], linears(DENSE))


@pytest.mark.parametrize(
    "batch, problem",
    [
        (np.array([[1, 64]]), "outside the vocabulary of 64"),
        (np.array([[-1, 3]]), "outside the vocabulary of 64"),
        (np.array([1, 2, 3]), "shape"),
        (np.zeros((0, 4), np.int32), "shape"),
        (np.zeros((2, 0), np.int32), "shape"),
        (np.array([[0.5, 1.5]]), "integer token ids"),
    ],
)
def test_a_batch_must_hold_ids_of_the_vocabulary(batch, problem):
    with pytest.raises(UserError, match=problem):
        input_amax(DENSE, params(DENSE), [text(2, 11), batch], linears(DENSE))


@pytest.mark.parametrize(
    "path", ["layers/9/mlp/up_proj/weight", "layers/0/mlp/up/weight", "embed_tokens/weight"]
)
def test_a_weight_that_nothing_reaches_is_named(path):
    with pytest.raises(UserError, match=f"no activation reaches {path}"):
        input_amax(DENSE, params(DENSE), [text(2, 11)], [*linears(DENSE), path])


@pytest.mark.parametrize("value, problem", [(np.nan, "not finite"), (0.0, "zero on all")])
def test_an_input_without_a_usable_maximum_is_named(value, problem):
    norm = jnp.full_like(params(DENSE)["layers"][1]["post_attention_layernorm"]["weight"], value)
    broken = tree.replace(params(DENSE), {"layers/1/post_attention_layernorm/weight": norm})
    with pytest.raises(UserError, match=f"layers/1/mlp/up_proj/weight is {problem}"):
        input_amax(DENSE, broken, [text(2, 11)], ["layers/1/mlp/up_proj/weight"])
    earlier = ["layers/0/mlp/up_proj/weight", "layers/1/self_attn/o_proj/weight"]
    assert len(input_amax(DENSE, broken, [text(2, 11)], earlier)) == 2
