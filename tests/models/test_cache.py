"""Quantized keys and values: the cache stores what the forward pass computes with."""

import dataclasses
import functools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import kv_quantizer as kv
from jaxopt_models import numerics
from jaxopt_models.checkpoint import native
from jaxopt_models.checkpoint.export import export_hf
from jaxopt_models.decoding import DecodeState, decode_loop
from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.kv_quantizer import KVQuantizer, with_kv_cache
from jaxopt_models.models.cache import LayerCache, cache_bytes, empty_cache
from jaxopt_models.models.cached import decode_step, prefill
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward, forward_with_taps, init
from jaxopt_models.quantize.kv import KVChoice, kv_measure, kv_quantizer
from jaxopt_models.sampling import make_sampler
from jaxopt_models.sharding import make_mesh, shard

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
LLAMA = ModelConfig.from_hf({"model_type": "llama"} | _SIZES)
# Sliding windows, norms of queries and keys, and a soft cap, under which a bias does not cancel.
GEMMA = dataclasses.replace(
    ModelConfig.from_hf(
        {"model_type": "gemma3_text", "sliding_window": 6, "sliding_window_pattern": 2}
        | _SIZES
        | {"num_hidden_layers": 2}
    ),
    attention_softcap=2.0,
)
HALF = dataclasses.replace(LLAMA, dtype="float16")

CHOICES = {
    "fp8": KVChoice(format="fp8"),
    "fp8 affine": KVChoice(format="fp8", granularity="head", bias="both"),
    "fp8 token": KVChoice(format="fp8", granularity="token", rotate=True),
    "int8": KVChoice(format="int8"),
    "int8 affine": KVChoice(format="int8", bias="key", rotate=True),
    "nvfp4": KVChoice(format="nvfp4"),
    "nvfp4 best": KVChoice(
        format="nvfp4", granularity="head", rotate=True, bias="key", search="mse"
    ),
    "nvfp4 six or four": KVChoice(format="nvfp4", bias="both", search="four_over_six"),
}
every_choice = pytest.mark.parametrize("name", CHOICES)
PROMPTS = [[7], [int(t) for t in np.arange(11) * 5 % 64], [int(t) for t in np.arange(70) * 7 % 64]]
_TAPS = ("self_attn/key", "self_attn/value")
_forward = jax.jit(forward, static_argnums=0)


def tokens(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(3, 96, shape), jnp.int32)


@functools.cache
def plain(config: ModelConfig) -> Any:
    """Random weights, with biases that give keys and values means."""
    params = init(config, jax.random.key(0), jnp.dtype(config.dtype))
    bias = jnp.linspace(-2, 3, 2 * config.head_dim, dtype=config.dtype)

    def layer(weights: Any) -> Any:
        attention = weights["self_attn"]
        biased = {name: attention[name] | {"bias": bias} for name in ("k_proj", "v_proj")}
        return weights | {"self_attn": attention | biased}

    return params | {"layers": tuple(layer(weights) for weights in params["layers"])}


@functools.cache
def taps(config: ModelConfig) -> dict[str, jax.Array]:
    wanted = [f"layers/*/{tap}" for tap in _TAPS]
    return forward_with_taps(config, plain(config), tokens(50, 4, 24), wanted)[1]


@functools.cache
def quantized(config: ModelConfig, name: str) -> Any:
    return with_choice(config, CHOICES[name])


def with_choice(config: ModelConfig, choice: KVChoice) -> Any:
    def layer(i: int) -> KVQuantizer:
        seen = {tap: taps(config)[f"layers/{i}/{tap}"] for tap in _TAPS}
        return kv_quantizer(config, choice, kv_measure(choice.rotate)(seen))

    return with_kv_cache(plain(config), [layer(i) for i in range(config.num_layers)])


# Stored is what is computed with

_LENGTHS = (9, 4, 7)
_STEPS = 5


@partial(jax.jit, static_argnums=0)
def _with_cache(config, params, tokens):
    """Ragged prompts, then single steps; and one long step over what a rollback left behind."""
    rows, width = len(_LENGTHS), max(_LENGTHS)
    lengths = jnp.asarray(_LENGTHS, jnp.int32)
    ahead = lengths[:, None] + jnp.arange(_STEPS, dtype=jnp.int32)[None]
    following = jnp.take_along_axis(tokens, ahead, axis=1)
    padding = jnp.arange(width)[None] >= lengths[:, None]
    prompts = jnp.where(padding, 95 - tokens[:, :width], tokens[:, :width])
    blank = empty_cache(config, params, rows, tokens.shape[1])
    first, cache = prefill(config, params, prompts, lengths, blank)

    def step(cache, column):
        token, position = column
        logits, cache = decode_step(config, params, token[:, None], position[:, None], cache)
        return cache, logits[:, 0]

    _, single = jax.lax.scan(step, cache, (following.T, ahead.T))
    _, spoiled = decode_step(config, params, 95 - following, ahead, cache)
    together, _ = decode_step(config, params, following, ahead, spoiled)
    return first, jnp.swapaxes(single, 0, 1), together


def assert_equal_but_for_a_code(found, expected):
    """To 1e-5; less so behind a value that a sum in another order carried to the code beside."""
    apart = np.abs(np.asarray(found) - expected)
    assert np.median(apart) < 1e-5 and apart.max() < 5e-4


@pytest.mark.parametrize(
    "config, name",
    [(LLAMA, name) for name in CHOICES] + [(GEMMA, "fp8 affine"), (GEMMA, "nvfp4 best")],
    ids=[*CHOICES, "gemma fp8 affine", "gemma nvfp4 best"],
)
def test_a_cache_gives_the_logits_of_the_forward_pass(config, name):
    params, ids = quantized(config, name), tokens(0, 3, 16)
    whole = np.asarray(_forward(config, params, ids))
    first, single, together = _with_cache(config, params, ids)
    for row, length in enumerate(_LENGTHS):
        after = whole[row, length : length + _STEPS]
        np.testing.assert_allclose(first[row], whole[row, length - 1], atol=1e-5)
        assert_equal_but_for_a_code(single[row], after)
        assert_equal_but_for_a_code(together[row], after)
    assert np.abs(whole - _forward(config, plain(config), ids)).max() > 1e-3  # it does quantize


def teacher_forced(config: ModelConfig, params: Any, prompts: Any, new: Any) -> list[list[int]]:
    """The most likely token after each prefix of prompt and continuation, in one forward pass."""
    ids = np.zeros((len(prompts), 96), np.int32)
    for buffer, prompt, continuation in zip(ids, prompts, new, strict=True):
        buffer[: len(prompt) + len(continuation)] = prompt + continuation
    best = np.asarray(jnp.argmax(_forward(config, params, jnp.asarray(ids)), axis=-1))
    return [
        best[i, len(prompt) - 1 : len(prompt) + len(continuation) - 1].tolist()
        for i, (prompt, continuation) in enumerate(zip(prompts, new, strict=True))
    ]


@pytest.mark.parametrize(
    "config, name",
    [(LLAMA, "fp8"), (LLAMA, "int8 affine"), (LLAMA, "nvfp4 best"), (GEMMA, "nvfp4 six or four")],
    ids=["fp8", "int8", "nvfp4", "gemma nvfp4"],
)
def test_generated_tokens_are_those_of_the_forward_pass(config, name):
    params = quantized(config, name)
    together = generate(config, params, PROMPTS, max_new_tokens=12, eos_token_ids=()).tokens
    assert together == teacher_forced(config, params, PROMPTS, together)
    for prompt, row in zip(PROMPTS[1:], together[1:], strict=True):
        (alone,) = generate(config, params, [prompt], max_new_tokens=12, eos_token_ids=()).tokens
        assert alone == row


def test_generation_in_half_precision():
    params = quantized(HALF, "nvfp4 best")
    new = generate(HALF, params, PROMPTS, max_new_tokens=12, eos_token_ids=())
    assert [len(row) for row in new.tokens] == [12] * 3


# What each option does alone


def _unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding off, all else left on."""
    monkeypatch.setattr(numerics, "to_grid", lambda x, scales, spec: x)
    monkeypatch.setattr(numerics, "from_grid", lambda grid, scales, spec: grid)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize(
    "options", [{"rotate": True}, {"bias": "key"}, {"bias": "both"}, {}], ids=str
)
def test_rotation_and_bias_change_nothing_of_themselves(config, options, monkeypatch):
    ids, params = tokens(1, 2, 8), with_choice(config, KVChoice(format="fp8", **options))
    _unrounded(monkeypatch)
    with jax.disable_jit():  # the layer may be compiled already, with rounding
        changed, same = forward(config, params, ids), forward(config, plain(config), ids)
    np.testing.assert_allclose(changed, same, atol=1e-5)


def test_options_help_where_channels_have_means():
    """Each loses less than the one before, in squared error of the logits."""
    ids = tokens(2, 8, 24)
    exact, errors = _forward(LLAMA, plain(LLAMA), ids), []
    for options in ({}, {"bias": "key"}, {"bias": "key", "search": "mse"}):
        choice = KVChoice.model_validate({"format": "nvfp4"} | options)
        logits = _forward(LLAMA, with_choice(LLAMA, choice), ids)
        errors.append(float(jnp.sum(jnp.square(logits - exact))))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["fp8", "nvfp4 best"])
def test_gradients_pass_through_rounding(name):
    def loss(params: Any) -> jax.Array:
        return jnp.sum(jax.nn.log_softmax(forward(LLAMA, params, tokens(3, 2, 8)))[..., 0])

    grad = jax.jit(jax.grad(loss))(quantized(LLAMA, name))
    assert jax.tree.all(jax.tree.map(lambda g: np.isfinite(g).all(), grad))
    attention = grad["layers"][0]["self_attn"]
    for module in ("q_proj", "k_proj", "v_proj"):
        assert np.abs(attention[module]["weight"]).max() > 0
    assert not any(np.any(g) for g in jax.tree.leaves(attention["kv_cache"]))


# The cache itself


def _slots(cache: LayerCache, row: int, slot: int) -> list[np.ndarray]:
    return [np.asarray(array[row, :, slot]) for array in jax.tree.leaves(cache)]


@every_choice
def test_appending_writes_each_row_at_its_slots_and_drops_what_is_past_the_end(name):
    q = quantized(LLAMA, name)["layers"][0]["self_attn"]["kv_cache"]
    (blank, *_) = empty_cache(LLAMA, quantized(LLAMA, name), 2, 4)
    keys, values = (jax.random.normal(jax.random.key(i), (2, 2, 2, 32)) for i in range(2))
    append = jax.jit(LayerCache.append)
    cache = append(blank, keys, values, jnp.asarray([[1, 2], [3, 4]]), q)  # 4 is past the end
    for row, slot, source in ((0, 1, (0, 0)), (0, 2, (0, 1)), (1, 3, (1, 0))):
        part = tuple(slice(i, i + 1) for i in source)
        alone = append(blank, keys[part], values[part], jnp.zeros((1, 1), jnp.int32), q)
        assert all(map(np.array_equal, _slots(cache, row, slot), _slots(alone, 0, 0)))
    for row, slot in ((0, 0), (0, 3), (1, 0), (1, 1), (1, 2)):
        assert not any(np.any(array) for array in _slots(cache, row, slot))


def test_a_step_past_the_capacity_leaves_the_cache_alone():
    params = quantized(LLAMA, "nvfp4 best")
    blank = empty_cache(LLAMA, params, 1, 6)
    _, full = prefill(LLAMA, params, tokens(4, 1, 6), jnp.asarray([6]), blank)
    past = jnp.asarray([[6, 7]], jnp.int32)
    _, after = decode_step(LLAMA, params, tokens(5, 1, 2), past, full)
    assert all(map(np.array_equal, jax.tree.leaves(full), jax.tree.leaves(after)))


@pytest.mark.parametrize(
    "name, bits", [("fp8", 8), ("fp8 token", 8 + 32 / 32), ("int8", 8 + 32 / 32), ("nvfp4", 4.5)]
)
def test_size(name, bits):
    dense = cache_bytes(empty_cache(HALF, plain(HALF), 2, 64))
    small = cache_bytes(empty_cache(HALF, quantized(HALF, name), 2, 64))
    assert small / dense == bits / 16


def test_a_cache_of_other_parameters_is_refused():
    params = quantized(LLAMA, "fp8")
    for made_for, used_with in ((params, plain(LLAMA)), (plain(LLAMA), params)):
        cache = empty_cache(LLAMA, made_for, 1, 4)
        with pytest.raises(UserError, match="make the cache with empty_cache"):
            decode_step(LLAMA, used_with, tokens(6, 1, 1), jnp.zeros((1, 1), jnp.int32), cache)


@pytest.mark.parametrize("name", ["fp8", "nvfp4 best"])
@pytest.mark.parametrize("batch", [1, 4])
def test_codes_are_updated_in_place(name, batch):
    """Properties of the compiled loop, which is not run: no copies, and no dense cache kept."""
    params, capacity = quantized(LLAMA, name), 4096
    cache = jax.eval_shape(lambda: empty_cache(LLAMA, params, batch, capacity))

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    state = DecodeState(
        array(batch, capacity), array(batch), array(batch), array(batch, dtype=jnp.bool_), cache
    )
    loop = decode_loop.lower(LLAMA, params, state, make_sampler(batch), (5,)).compile()
    program, memory = loop.as_text() or "", loop.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes >= cache_bytes(cache)
    for part in jax.tree.leaves(cache[0]):
        shape = ",".join(map(str, part.shape))
        assert not re.findall(rf"= u8\[{shape}\]\S* copy\(", program)
    dense = jax.eval_shape(lambda: empty_cache(LLAMA, plain(LLAMA), batch, capacity))
    (carried,) = (line for line in program.splitlines() if " while(" in line)
    assert f"f32[{','.join(map(str, dense[0].keys.shape))}]" not in carried
    # One layer's keys and values at a time, unpacked and real.
    assert memory.temp_size_in_bytes < cache_bytes(cache[:1]) + cache_bytes(dense[:1])


# Where parameters go


@every_choice
def test_it_is_saved_and_restored(name, tmp_path):
    params = quantized(LLAMA, name)
    native.save(tmp_path / "saved", LLAMA, params)
    found = native.restore(tmp_path / "saved").params
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))


def test_devices_change_nothing():
    params, ids = quantized(LLAMA, "nvfp4 best"), tokens(0, 3, 16)
    spread = shard(params, make_mesh({"model": 2}))
    quantizer = spread["layers"][0]["self_attn"]["kv_cache"]
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(quantizer))
    here, there = (_forward(LLAMA, p, ids) for p in (params, spread))
    np.testing.assert_allclose(there, here, atol=1e-5)


def test_a_directory_for_other_programs_has_no_place_for_it(tmp_path):
    model = Model(LLAMA, init(LLAMA, jax.random.key(0), jnp.bfloat16))
    q = quantized(LLAMA, "fp8 affine")["layers"][0]["self_attn"]["kv_cache"]
    export_hf(tmp_path / "with", model, kv.with_kv_cache(model.params, [q]))
    export_hf(tmp_path / "without", model)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]
