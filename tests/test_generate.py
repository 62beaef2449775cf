"""Generation: the tokens of the forward pass, whatever the batch; and no copy of the cache.

A row is checked by feeding prompt and continuation to `forward` in one piece: since that is causal,
its logits at each position are those that a loop of forward passes would have chosen from.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import LLAMA, MIXTRAL, PROMPTS, SIZES, SLIDING

from jaxopt_models import tree
from jaxopt_models.decoding import DecodeState, decode_loop, start
from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.cache import cache_bytes, empty_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import abstract_params, forward, init
from jaxopt_models.qtensor import QTensor, quantize_array
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.sampling import make_sampler

MODELS = {
    "llama": LLAMA,
    "sliding": SLIDING,
    "gemma": ModelConfig.from_hf(
        {
            "model_type": "gemma3_text",
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "head_dim": 16,
            "final_logit_softcapping": 5.0,
        }
        | SIZES
    ),
    "mixtral": MIXTRAL,
}

GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
MIXED: dict[str, Any] = {
    "temperature": [0.0, 0.8, 1.3],
    "top_k": [0, 20, 0],
    "top_p": [1.0, 0.9, 0.95],
}


@functools.cache
def params(config: ModelConfig) -> Any:
    return init(config, jax.random.key(0))


def run(config: ModelConfig, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
    return generate(config, params(config), prompts, **options).tokens


def chosen_from_whole(
    config: ModelConfig, model: Any, prompts: list[list[int]], new: list[list[int]], **options
) -> list[list[int]]:
    """What the sampler takes at each generated position, from one forward pass over all of it."""
    rows = [prompt + continuation for prompt, continuation in zip(prompts, new, strict=True)]
    tokens = np.zeros((len(rows), 100), np.int32)
    for buffer, row in zip(tokens, rows, strict=True):
        buffer[: len(row)] = row
    logits = forward(config, model, jnp.asarray(tokens))
    own = jnp.broadcast_to(jnp.arange(1, 101), tokens.shape)  # position of the token chosen there
    chosen = np.asarray(make_sampler(len(rows), **options)(logits, own))
    return [
        chosen[i, len(prompt) - 1 : len(row) - 1].tolist()
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]


# Tokens


def test_greedy_tokens_are_those_of_repeated_forward_passes():
    tokens = np.zeros((len(PROMPTS), 80), np.int32)
    ends = [len(prompt) for prompt in PROMPTS]
    for buffer, prompt in zip(tokens, PROMPTS, strict=True):
        buffer[: len(prompt)] = prompt
    for _ in range(8):
        logits = np.asarray(forward(LLAMA, params(LLAMA), jnp.asarray(tokens)))
        for i in range(len(PROMPTS)):
            tokens[i, ends[i]] = logits[i, ends[i] - 1].argmax()
            ends[i] += 1
    expected = [tokens[i, len(p) : ends[i]].tolist() for i, p in enumerate(PROMPTS)]
    assert run(LLAMA, PROMPTS, max_new_tokens=8) == expected


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_tokens_are_those_of_the_forward_pass(config):
    """Greedy and sampled rows side by side; for experts and sliding windows too."""
    new = run(config, PROMPTS, max_new_tokens=20, **MIXED)
    assert [len(row) for row in new] == [20] * 3
    assert chosen_from_whole(config, params(config), PROMPTS, new, **MIXED) == new


def test_a_window_is_narrower_than_what_was_generated():
    """Or the test above would say nothing about it."""
    full = dataclasses.replace(MODELS["sliding"], attention_kinds=("full", "full"))
    new = run(MODELS["sliding"], PROMPTS, max_new_tokens=20, **MIXED)
    assert chosen_from_whole(full, params(MODELS["sliding"]), PROMPTS, new, **MIXED) != new


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_gets_the_same_tokens_alone_and_in_any_batch(options):
    together = run(LLAMA, PROMPTS, max_new_tokens=16, request_ids=[4, 9, 2], **options)
    for prompt, request, tokens in zip(PROMPTS, [4, 9, 2], together, strict=True):
        (alone,) = run(LLAMA, [prompt], max_new_tokens=16, request_ids=[request], **options)
        assert alone == tokens
    backwards = run(LLAMA, PROMPTS[::-1], max_new_tokens=16, request_ids=[2, 9, 4], **options)
    assert backwards == together[::-1]


def test_room_for_longer_prompts_changes_no_token_and_saves_compilations():
    options: dict[str, Any] = {"max_new_tokens": 16, "request_ids": [2], **SAMPLED}
    compilations = decode_loop._cache_size  # pyright: ignore[reportAttributeAccessIssue]
    before = compilations()
    roomy = [run(LLAMA, [prompt], max_prompt_tokens=150, **options) for prompt in PROMPTS]
    assert compilations() == before + 1
    assert roomy == [run(LLAMA, [prompt], **options) for prompt in PROMPTS]


def test_experts_treat_a_row_alike_alone_and_in_any_batch():
    config = MODELS["mixtral"]
    together = run(config, PROMPTS, max_new_tokens=16, **SAMPLED)
    (alone,) = run(config, PROMPTS[2:], max_new_tokens=16, request_ids=[2], **SAMPLED)
    assert together[2] == alone


def test_sampled_rows_depend_on_request_and_key():
    prompts = [PROMPTS[1]] * 3
    first, second, again = run(LLAMA, prompts, max_new_tokens=16, request_ids=[0, 1, 0], **SAMPLED)
    assert first == again != second
    default = run(LLAMA, prompts, max_new_tokens=16, **SAMPLED)
    same = run(
        LLAMA, prompts, max_new_tokens=16, key=jax.random.key(0), request_ids=[0, 1, 2], **SAMPLED
    )
    other = run(LLAMA, prompts, max_new_tokens=16, key=jax.random.key(1), **SAMPLED)
    assert default == same and all(a != b for a, b in zip(default, other, strict=True))


def test_prompts_may_be_arrays():
    arrays: list[Any] = [np.asarray(prompt, np.int64) for prompt in PROMPTS]
    assert run(LLAMA, arrays, max_new_tokens=8) == run(LLAMA, PROMPTS, max_new_tokens=8)


# Where rows stop


@pytest.mark.parametrize("limit", [1, 2, 63])
def test_fewer_tokens_are_the_beginning_of_more(limit):
    most = run(LLAMA, PROMPTS, max_new_tokens=64, **MIXED)
    assert [len(row) for row in most] == [64] * 3
    fewer = run(LLAMA, PROMPTS, max_new_tokens=limit, **MIXED)
    assert fewer == [row[:limit] for row in most]


def cut(tokens: list[int], stops: Sequence[int]) -> list[int]:
    """Up to the first stop, itself included."""
    ends = [i + 1 for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens


def test_a_row_ends_with_the_first_stop_and_others_go_on():
    free = run(LLAMA, PROMPTS, max_new_tokens=20, **MIXED)
    # A token that one row takes early and another does not take.
    stop = next(t for t in free[1][2:8] if t not in free[2])
    expected = [cut(row, [stop]) for row in free]
    assert len(expected[1]) < len(expected[2]) == 20 and expected[1][-1] == stop
    assert run(LLAMA, PROMPTS, max_new_tokens=20, eos_token_ids=[stop], **MIXED) == expected

    several = [stop, free[2][9]]
    expected = [cut(row, several) for row in free]
    assert run(LLAMA, PROMPTS, max_new_tokens=20, eos_token_ids=several, **MIXED) == expected


def test_the_first_token_may_be_the_last():
    first = [row[0] for row in run(LLAMA, PROMPTS, max_new_tokens=1)]
    tokens = run(LLAMA, PROMPTS, max_new_tokens=20, eos_token_ids=first)
    assert tokens == [[token] for token in first]


def test_stops_are_the_models_own_by_default():
    free = run(LLAMA, PROMPTS[1:2], max_new_tokens=20, **SAMPLED)[0]
    config = dataclasses.replace(LLAMA, eos_token_ids=(free[5],))
    model = params(LLAMA)
    own = generate(config, model, PROMPTS[1:2], max_new_tokens=20, **SAMPLED).tokens
    assert own == [cut(free, [free[5]])]
    none = generate(config, model, PROMPTS[1:2], max_new_tokens=20, eos_token_ids=(), **SAMPLED)
    assert none.tokens == [free]


def test_a_finished_row_is_frozen():
    free = run(LLAMA, PROMPTS, max_new_tokens=20)
    stops = (free[1][3],)
    sampler = make_sampler(3)
    state, _ = start(LLAMA, params(LLAMA), PROMPTS, 20, sampler, stops)
    state = decode_loop(LLAMA, params(LLAMA), state, sampler, stops)
    assert np.all(state.done)
    for row, prompt, length, tokens in zip(state.tokens, PROMPTS, state.length, free, strict=True):
        expected = prompt + cut(tokens, stops)
        assert row[:length].tolist() == expected
        assert not np.any(row[length:])


# Leaves of other kinds


@pytest.mark.parametrize(
    "config, name",
    [(LLAMA, "nvfp4_weight_only"), (MODELS["mixtral"], "nf4")],
    ids=["nvfp4", "mixtral-nf4"],
)
def test_a_quantized_model_says_what_its_dequantized_self_says(config, name):
    qparams, _ = quantize(Model(config, params(config)), Recipe.load(name))
    found = dict(tree.leaves_with_paths(qparams))
    plain = tree.replace(
        qparams, {p: leaf.dequantize() for p, leaf in found.items() if isinstance(leaf, QTensor)}
    )
    options = {"max_new_tokens": 16, **MIXED}
    tokens = generate(config, qparams, PROMPTS, **options).tokens
    assert tokens == generate(config, plain, PROMPTS, **options).tokens
    assert tokens != run(config, PROMPTS, **options)


def test_a_model_with_quantized_activations_says_what_its_forward_pass_says():
    calibration = [jnp.asarray([PROMPTS[2]], jnp.int32)]
    qparams, _ = quantize(Model(LLAMA, params(LLAMA)), Recipe.load("fp8"), calibration)
    new = generate(LLAMA, qparams, PROMPTS, max_new_tokens=16, **MIXED).tokens
    assert chosen_from_whole(LLAMA, qparams, PROMPTS, new, **MIXED) == new


# Memory: properties of the compiled loop, which is not run


def abstract_state(config: ModelConfig, batch: int, capacity: int) -> DecodeState:
    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    return DecodeState(
        tokens=array(batch, capacity),
        length=array(batch),
        limit=array(batch),
        done=array(batch, dtype=jnp.bool_),
        cache=jax.eval_shape(lambda: empty_cache(config, abstract_params(config), batch, capacity)),
    )


def compiled_loop(config: ModelConfig, model: Any, state: DecodeState, **options) -> Any:
    sampler = make_sampler(state.tokens.shape[0], **options)
    return decode_loop.lower(config, model, state, sampler, (5,)).compile()


def copies_of(array: Any, program: str) -> list[str]:
    shape = ",".join(map(str, array.shape))
    return re.findall(rf"= f32\[{shape}\]\S* copy\(", program)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_cache_is_updated_in_place(batch, options):
    state = abstract_state(LLAMA, batch, 4096)
    loop = compiled_loop(LLAMA, abstract_params(LLAMA, jnp.float32), state, **options)
    memory = loop.memory_analysis()
    assert not copies_of(state.cache[0].keys, loop.as_text())
    assert memory.alias_size_in_bytes >= cache_bytes(state.cache)  # donated, and used
    assert memory.temp_size_in_bytes < cache_bytes(state.cache[:1])


def test_more_layers_take_no_more_temporary_memory():
    """A bound of one layer would not notice the copy of a half of one; growth by the layer does."""
    sizes = []
    for layers in (2, 4):
        config = ModelConfig.from_hf(LLAMA.to_hf() | {"num_hidden_layers": layers})
        state = abstract_state(config, 4, 4096)
        loop = compiled_loop(config, abstract_params(config, jnp.float32), state)
        sizes.append(loop.memory_analysis().temp_size_in_bytes)
    assert sizes[1] - sizes[0] < cache_bytes(state.cache[:1]) / 100


@pytest.mark.parametrize("format", ["int8", "nvfp4"])
def test_the_loop_carries_codes_and_not_dequantized_weights(format):
    def leaf(path: str, weight: Any) -> Any:
        if not tree.is_decoder_matrix(path, weight):
            return weight
        return jax.eval_shape(lambda w: quantize_array(w, format), weight)

    qparams = tree.map_with_path(leaf, abstract_params(LLAMA, jnp.float32))
    program = compiled_loop(LLAMA, qparams, abstract_state(LLAMA, 4, 64)).as_text()
    (carried,) = (line for line in program.splitlines() if " while(" in line)
    width, inner = LLAMA.hidden_size, LLAMA.intermediate_size
    full = rf"(?:f32|bf16)\[(?:{width},{inner}|{inner},{width})\]"
    assert re.search(full, program)  # dequantized somewhere, hence inside the loop
    assert not re.search(full, carried)
    assert len(re.findall(r"[su]8\[", carried)) >= LLAMA.num_layers * 7


# What it refuses


@pytest.mark.parametrize(
    "prompts, options, problem",
    [
        ([], {}, "no prompts were given"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1], [2, 64]], {}, "prompt 1 holds ids outside the vocabulary of 64"),
        ([[-1]], {}, "prompt 0 holds ids outside"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1; it is 0"),
        ([[1]], {"max_new_tokens": -3}, "it is -3"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1], [2]], {"temperature": [0.5]}, "one for each of the 2 prompts"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1]], {"top_k": -2}, "top_k"),
        ([[1]], {"request_ids": [1, 2]}, "request_ids"),
    ],
)
def test_what_cannot_be_generated_from_is_named(prompts, options, problem):
    with pytest.raises(UserError, match=problem):
        run(LLAMA, prompts, **options)
