"""From a choice and calibration text to the quantizer of a layer's keys and values."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.quantize.kv import (
    KVChoice,
    KVStatistics,
    kv_measure,
    kv_merge,
    kv_quantizer,
    kv_statistics,
)

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
BATCH, LENGTH, GROUPS, DIM = 3, 7, 2, 16


def taps(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Channels with means and sizes of their own."""
    rng = np.random.default_rng(seed)

    def rows() -> jax.Array:
        channels = rng.normal(size=(2, GROUPS, DIM))
        x = rng.normal(size=(BATCH, LENGTH, GROUPS, DIM)) * channels[0] + 4 * channels[1]
        return jnp.asarray(x, dtype)

    return {"self_attn/key": rows(), "self_attn/value": rows()}


def seen(rotate: bool = False, seeds: tuple[int, ...] = (0,)) -> KVStatistics:
    statistics = None
    for seed in seeds:
        new = kv_measure(rotate)(taps(seed))
        statistics = new if statistics is None else kv_merge(statistics, new)
    assert statistics is not None
    return statistics


def test_statistics_of_batches_are_those_of_the_whole():
    merged = seen(seeds=(0, 1, 2))
    whole = [np.concatenate([np.asarray(taps(s)[tap]) for s in (0, 1, 2)]) for tap in taps(0)]
    for found, x in zip((merged.key, merged.value), whole, strict=True):
        assert found.count == 3 * BATCH * LENGTH
        np.testing.assert_allclose(found.mean, x.mean((0, 1)), rtol=1e-5, atol=1e-6)
        assert np.array_equal(found.low, x.min((0, 1)))
        assert np.array_equal(found.high, x.max((0, 1)))


def test_keys_are_measured_as_they_are_stored():
    key, value = taps(0).values()
    rotated, plain = seen(rotate=True), kv_statistics(hadamard(key, DIM), value, False)
    assert jax.tree.all(jax.tree.map(np.array_equal, rotated, plain))
    assert kv_measure(True) is kv_measure(True)  # or a layer would be compiled at each call


def test_statistics_are_float32_whatever_the_model_computes_in():
    key, value = taps(0, jnp.bfloat16).values()
    found = kv_statistics(key, value, True)
    assert {array.dtype.name for array in jax.tree.leaves(found)} == {"float32"}


def test_a_layer_has_one_magnitude_or_one_a_head():
    key, value = taps(0).values()
    whole = kv_quantizer(CONFIG, KVChoice(format="fp8"), seen())
    assert whole.key.amax == jnp.max(jnp.abs(key)) and whole.value.amax == jnp.max(jnp.abs(value))
    each = kv_quantizer(CONFIG, KVChoice(format="nvfp4", granularity="head"), seen())
    assert each.key.amax is not None
    assert np.array_equal(each.key.amax, jnp.max(jnp.abs(key), axis=(0, 1, 3)))


@pytest.mark.parametrize("bias", ["none", "key", "both"])
def test_the_magnitude_is_that_of_what_is_left_of_the_bias(bias):
    choice = KVChoice(format="fp8", granularity="head", bias=bias)
    q, statistics = kv_quantizer(CONFIG, choice, seen()), seen()
    for rows, found, biased, x in (
        (q.key, statistics.key, bias != "none", taps(0)["self_attn/key"]),
        (q.value, statistics.value, bias == "both", taps(0)["self_attn/value"]),
    ):
        assert (rows.bias is not None) == biased
        centre = found.mean if biased else jnp.zeros_like(found.mean)
        assert rows.amax is not None
        expected = jnp.max(jnp.abs(x - centre[None, None]), axis=(0, 1, 3))
        np.testing.assert_allclose(rows.amax, expected, rtol=1e-6)


def test_dynamic_scales_need_no_text():
    for choice in (KVChoice(format="int8"), KVChoice(format="fp8", granularity="token")):
        assert not choice.calibrated
        q = kv_quantizer(CONFIG, choice)
        assert q.key.amax is None and q.value.amax is None and q.key.spec.granularity == "channel"
    biased = KVChoice(format="int8", bias="key")
    q = kv_quantizer(CONFIG, biased, seen())
    assert biased.calibrated and q.key.amax is None and q.key.bias is not None


def test_the_choice_arrives_in_the_leaf():
    choice = KVChoice.model_validate({"format": "nvfp4", "search": "mse", "rotate": True})
    q = kv_quantizer(CONFIG, choice, seen(rotate=True))
    assert q.rotate and q.key.search == q.value.search == "mse"
    assert q.key.spec == choice.spec() and q.key.spec.format == "nvfp4"


def test_a_bare_format_is_a_choice():
    assert KVChoice.model_validate("fp8") == KVChoice(format="fp8")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"format": "int8", "granularity": "tensor"}, "int8 has no granularity 'tensor'"),
        ({"format": "nvfp4", "granularity": "token"}, "choose tensor or head"),
        ({"format": "fp8", "search": "mse"}, "search 'mse' is of 'nvfp4'"),
        ({"format": "int4"}, "format"),
        ({"format": "fp8", "rotate": 1}, "rotate"),
        ({"format": "fp8", "bias": "value"}, "bias"),
        ({"format": "fp8", "rotat": True}, "rotat"),
    ],
)
def test_choices_that_do_not_go_together(fields, message):
    with pytest.raises(ValidationError, match=message):
        KVChoice.model_validate(fields)


def test_heads_that_are_no_power_of_two_cannot_be_rotated():
    config = dataclasses.replace(CONFIG, head_dim=24)
    with pytest.raises(UserError, match="heads of 24 channels"):
        kv_quantizer(config, KVChoice(format="int8", rotate=True))


def test_static_scales_need_text():
    with pytest.raises(UserError, match="give calibration text"):
        kv_quantizer(CONFIG, KVChoice(format="fp8"))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_keys_that_cannot_be_scaled(value):
    key, other = taps(0).values()
    with pytest.raises(UserError, match="the keys of a layer are not finite, or zero"):
        kv_quantizer(
            CONFIG, KVChoice(format="fp8"), kv_statistics(jnp.full_like(key, value), other, False)
        )
