"""Layers in a loop compute and learn what layers one after the other do, from one copy of code."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import MIXTRAL
from tiny import CONFIG, quantized, sure_model

from jaxopt_models.distill.hidden import HiddenLoss
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.repeated import Repeated, repeated
from jaxopt_models.models.transformer import hidden_states_with_layers
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.sharding_rules import BATCH, TRAINING_RULES
from jaxopt_models.train.adapters import with_adapters
from jaxopt_models.train.leaves import computed, fake_quantized
from jaxopt_models.train.objectives import QAD, QAT, Term, next_token_loss
from jaxopt_models.train.step import make_train_step, start

FOUR = replace(CONFIG, num_layers=4, attention_kinds=("full",) * 4)
GEMMA = ModelConfig.from_hf(
    {
        "model_type": "gemma3_text",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2
        + ["sliding_attention"] * 2,
    }
)
SGD = optax.sgd(0.1)
HIDDEN = (*QAD, Term(HiddenLoss("hidden_mean_square", layers=((1, 1), (2, 2), (3, 3)))))


def _mixed(params):
    """The first layer left as it is, the others in INT8, of which the last one has a bias."""
    first, *others = params["layers"]
    layers = (first, *quantized({"layers": tuple(others)}, "int8")["layers"])
    last = layers[-1]
    mlp = last["mlp"] | {"down_proj": last["mlp"]["down_proj"] | {"bias": jnp.ones(32)}}
    return params | {"layers": (*layers[:-1], last | {"mlp": mlp})}


@pytest.mark.parametrize(
    ("config", "change", "place"),
    [
        (FOUR, lambda params: params, (0, 1, 4)),
        (FOUR, _mixed, (1, 1, 2)),
        (GEMMA, lambda params: params, (0, 3, 2)),
        (MIXTRAL, lambda params: quantized(params, "nvfp4"), (0, 1, 2)),
    ],
    ids=["alike", "ends differ", "kinds take turns", "experts"],
)
def test_layers_in_a_loop_compute_the_same(config, change, place, tokens):
    """Behind every layer, also of those beside the loop."""
    params = change(sure_model(config))
    looped = repeated(params, config.attention_kinds)
    own = looped["layers"]
    assert isinstance(own, Repeated) and (own.start, len(own.period), own.count) == place
    numbers = range(config.num_layers)
    expected, streams = hidden_states_with_layers(config, params, tokens, numbers)
    found, same = hidden_states_with_layers(config, looped, tokens, numbers)
    assert set(same) == set(streams) == set(numbers)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for i in numbers:
        np.testing.assert_allclose(same[i], streams[i], rtol=1e-4, atol=1e-4)
    _, last = hidden_states_with_layers(config, looped, tokens, numbers[-1:])
    assert set(last) == set(numbers[-1:])


def test_layers_that_differ_stay_as_they_are():
    layers = tuple({"a": jnp.ones(n)} for n in (1, 2, 3))
    params = {"layers": layers, "norm": jnp.ones(2)}
    assert repeated(params, ("full",) * 3) is params
    kinds = ("full", "sliding", "full")
    alike = {"layers": ({"a": jnp.ones(1)},) * 3}
    assert repeated(alike, kinds) is alike
    assert isinstance(repeated(alike, ("full",) * 3)["layers"], Repeated)


def _lora(params):
    return with_adapters(quantized(params, "nf4"), jax.random.key(1), 2, 4.0, ("*_proj/weight",))


@pytest.mark.parametrize(
    ("leaves", "freeze", "options"),
    [
        (lambda params: params, (), {}),
        (lambda params: fake_quantized(params, quantized(params, "nvfp4"), "learned"), (), {}),
        (
            lambda params: fake_quantized(params, quantized(params, "int8")),
            ("layers/2/mlp/*", "norm/*"),
            {"remat": "layers"},
        ),
        (_lora, ("embed_tokens/*", "*norm/*"), {"remat": "products"}),
    ],
    ids=["floats", "learned", "partly frozen", "adapters"],
)
def test_layers_in_a_loop_learn_the_same(leaves, freeze, options, tokens):
    params = sure_model(FOUR)
    student = leaves(params)
    loss, batch = next_token_loss(FOUR, HIDDEN, **options), {"tokens": tokens.reshape(2, 4, 16)}
    prepare = partial(computed, dtype=jnp.float32)
    loop = partial(repeated, kinds=FOUR.attention_kinds)
    found = []
    for teacher, way in ((params, prepare), (loop(params), partial(loop, prepare=prepare))):
        step = make_train_step(loss, SGD, parts=2, prepare=way)
        found.append(step(start(student, SGD, freeze=freeze), teacher, batch))
    (expected, known), (state, metrics) = found
    before = start(student, SGD, freeze=freeze).trained
    assert jax.tree.structure(expected) == jax.tree.structure(state)
    for name in known:
        np.testing.assert_allclose(metrics[name], known[name], rtol=1e-4)
    arrays = (expected.trained, state.trained, before)
    for a, b, old in zip(*map(jax.tree.leaves, arrays), strict=True):
        moved = np.abs(a - old).max()
        assert np.abs(a - b).max() <= 2e-3 * moved + 1e-7


def test_a_program_does_not_grow_with_layers(tokens):
    """Products in the compiled program of a step."""

    def products(count: int, loop: bool) -> int:
        config = replace(FOUR, num_layers=count, attention_kinds=("full",) * count)
        params, prepare = sure_model(config), partial(computed, dtype=jnp.float32)
        if loop:
            prepare = partial(repeated, kinds=config.attention_kinds, prepare=prepare)
        step: Any = make_train_step(next_token_loss(config, QAT), SGD, prepare=prepare)
        lowered = step.lower(start(params, SGD), None, {"tokens": tokens})
        return lowered.compile().as_text().count(" dot(")

    assert products(6, True) == products(3, True) < products(3, False) < products(6, False)


def test_layers_in_a_loop_learn_the_same_on_several_devices(tokens):
    """Stored in parts, from a teacher that is."""
    params, mesh = sure_model(FOUR), make_mesh({"data": 2, "fsdp": 2, "model": 2})
    adam = optax.adamw(1e-3)
    fakes = fake_quantized(params, quantized(params, "nvfp4"))
    loop, rows = partial(repeated, kinds=FOUR.attention_kinds), NamedSharding(mesh, P(BATCH))
    prepare = partial(loop, prepare=partial(computed, dtype=jnp.float32))
    alone = make_train_step(next_token_loss(FOUR, QAD), adam, prepare=prepare)
    _, expected = alone(start(fakes, adam), loop(params), {"tokens": tokens})
    state = start(shard(fakes, mesh, TRAINING_RULES), adam)
    places = jax.tree.map(lambda array: array.sharding, state)
    split = make_train_step(
        next_token_loss(FOUR, QAD, sharding=rows), adam, prepare=prepare, shardings=places
    )
    teacher = loop(shard(params, mesh, TRAINING_RULES))
    stored = teacher["layers"].period[0]["mlp"]["up_proj"]["weight"]
    assert stored.sharding.shard_shape(stored.shape)[1:] != stored.shape[1:]
    after, metrics = split(state, teacher, {"tokens": jax.device_put(tokens, rows)})
    assert jax.tree.map(lambda array: array.sharding, after) == places
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)
