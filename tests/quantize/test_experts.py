"""Experts need tokens: what happens to one that the router leaves out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward, forward_with_taps, init
from jaxopt_models.quantize.experts import complete
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Experts, Recipe
from jaxopt_models.statistics import InputStatistics, Wanted

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "mixtral",
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
)
KIND = CONFIG.attention_kinds[0]
STARVED, RARE = 2, 7  # expert 2 gets the tokens with id 7 and no others
GATE, DOWN = "mlp/experts/gate_proj/input", "mlp/experts/down_proj/input"
WANTS = {tap: Wanted(second_moment=True, histogram=True, sample=8) for tap in (GATE, DOWN)}


@functools.cache
def params() -> Any:
    """Random, but channel 0 of a token's embedding says whether the starved expert gets it."""
    model = init(CONFIG, jax.random.key(0))
    table = 50 * model["embed_tokens"]["weight"]
    table = table.at[:, 0].set(jnp.where(jnp.arange(32) == RARE, 20.0, -20.0))
    router = model["layers"][0]["mlp"]["router"]["weight"]
    router = router.at[:, 0].set(0.0).at[STARVED].set(0.0).at[STARVED, 0].set(20.0)
    return tree.replace(model, {"embed_tokens/weight": table, "layers/0/mlp/router/weight": router})


def text(rows: int, length: int, rare: int = 0) -> np.ndarray:
    """Tokens, so many of which are the rare one."""
    ids = np.random.default_rng(rows).integers(8, 32, rows * length)
    ids[: 3 * rare : 3] = RARE
    return ids.reshape(rows, length)


BATCHES = [text(2, 16), text(2, 16, rare=1)]  # one token is less than the 8 that are asked for


def routed(wants: dict[str, Wanted] = WANTS) -> tuple[Stream, Any, dict[str, InputStatistics]]:
    """The stream at the layer, the layer and its statistics."""
    layer, stream = params()["layers"][0], Stream(CONFIG, params(), BATCHES)
    return stream, layer, stream.observe(layer, KIND, wants)


def completed(wants: dict[str, Wanted] = WANTS, **options: Any) -> dict[str, InputStatistics]:
    stream, layer, found = routed(wants)
    return complete(stream, layer, KIND, wants, found, Experts(**options), "layers/0/")


def on_all_tokens(expert: int) -> dict[str, np.ndarray]:
    """Inputs of one expert's linears if it runs on every token, float64 by batch."""
    weights = params()["layers"][0]["mlp"]["experts"]
    gate, up = (
        np.asarray(weights[n]["weight"][expert], np.float64) for n in ("gate_proj", "up_proj")
    )
    tap, rows = "layers/0/mlp/router/input", []
    for batch in BATCHES:
        _, taps = forward_with_taps(CONFIG, params(), jnp.asarray(batch, jnp.int32), [tap])
        rows.append(np.asarray(taps[tap], np.float64).reshape(-1, 32))
    x = np.stack(rows)
    opened = x @ gate.T
    return {GATE: x, DOWN: opened / (1 + np.exp(-opened)) * (x @ up.T)}


def of(statistics: InputStatistics, expert: int) -> dict[str, np.ndarray]:
    """Fields of one expert."""
    fields = dataclasses.asdict(dataclasses.replace(statistics, histogram=None))
    return {name: np.asarray(x)[expert] for name, x in fields.items() if x is not None}


def assert_describes(found: dict[str, np.ndarray], batches: np.ndarray) -> None:
    x = batches.reshape(-1, batches.shape[-1])
    middles = [(2 * i + 1) * batches.shape[1] // 8 for i in range(4)]
    expected = {
        "count": len(x),
        "amax": np.abs(x).max(),
        "channel_amax": np.abs(x).max(0),
        "channel_abs": np.abs(x).mean(0),
        "second_moment": x.T @ x / len(x),
        "sample": batches[:, middles].reshape(8, -1),
    }
    assert found.keys() <= expected.keys()
    for name, value in found.items():
        tolerance = 1e-5 * np.max(np.abs(expected[name]))
        np.testing.assert_allclose(value, expected[name], atol=tolerance, err_msg=name)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_the_router_leaves_one_expert_out():
    counts = np.asarray(routed()[2][GATE].count)
    assert counts.sum() == 2 * 64 and counts[STARVED] == 1
    assert all(counts[expert] >= 8 for expert in (0, 1, 3))


def test_a_starved_expert_is_an_error_with_the_remedy():
    message = (
        "expert 2 of layers/0/mlp saw 1 calibration tokens, and 1 experts fewer than 8; use more "
        "text, or set experts.starved=all"
    )
    with pytest.raises(UserError, match=message):
        completed()


def test_enough_tokens_change_nothing():
    expected = routed()[2]
    found = completed(min_tokens=1)
    for tap in (GATE, DOWN):
        for a, b in zip(jax.tree.leaves(found[tap]), jax.tree.leaves(expected[tap]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_only_the_starved_expert_is_calibrated_on_all_tokens():
    expected, found, rows = routed()[2], completed(starved="all"), on_all_tokens(STARVED)
    for tap in (GATE, DOWN):
        assert_describes(of(found[tap], STARVED), rows[tap])
        np.testing.assert_array_equal(found[tap].histogram, expected[tap].histogram)
        for expert in (0, 1, 3):
            assert_same(of(found[tap], expert), of(expected[tap], expert))


def test_all_experts_may_be_calibrated_on_all_tokens():
    found = completed(tokens="all")
    for expert in range(4):
        for tap, rows in on_all_tokens(expert).items():
            assert_describes(of(found[tap], expert), rows)


def test_on_all_tokens_inputs_are_rotated_too():
    wants = {tap: Wanted(second_moment=True, sample=8, rotate=16) for tap in (GATE, DOWN)}
    found = completed(wants, tokens="all")
    for tap, rows in on_all_tokens(1).items():
        rotated = hadamard(jnp.asarray(rows, jnp.float32), 16)
        assert_describes(of(found[tap], 1), np.asarray(rotated, np.float64))


def test_layers_without_experts_are_left_alone():
    wants = {"self_attn/q_proj/input": Wanted()}
    stream, layer, found = routed(wants)
    assert complete(stream, layer, KIND, wants, found, Experts(), "layers/0/") == found


# The whole


def quantized(batches: list[np.ndarray], **experts: Any) -> Any:
    recipe = Recipe.model_validate(
        {
            "rules": [{"match": "*/experts/*", "weight": "fp8", "activation": "fp8"}],
            "experts": experts,
        }
    )
    return quantize(Model(CONFIG, params()), recipe, batches)[0]


def test_quantizing_with_a_starved_expert_is_an_error():
    with pytest.raises(UserError, match="expert 2 of layers/0/mlp saw 1 calibration tokens"):
        quantized(BATCHES)


@pytest.mark.parametrize(
    "batches, experts",
    [
        (BATCHES, {"starved": "all"}),
        (BATCHES, {"tokens": "all"}),
        ([*BATCHES, text(2, 16, rare=9)], {}),
    ],
    ids=["starved on all tokens", "all on all tokens", "more text"],
)
def test_quantizing_with_a_remedy(batches, experts):
    result = quantized(batches, **experts)
    tokens = jnp.asarray(text(3, 16, rare=4), jnp.int32)
    ours, theirs = forward(CONFIG, result, tokens), forward(CONFIG, params(), tokens)
    assert 0 < np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)
    down = result["layers"][0]["mlp"]["experts"]["down_proj"]["weight"]
    assert down.input.amax.shape == ()
    if experts == {"tokens": "all"}:
        largest = max(np.abs(on_all_tokens(expert)[DOWN]).max() for expert in range(4))
        np.testing.assert_allclose(down.input.amax, largest, rtol=1e-5)
