"""Speculative decoding loses nothing: token for token what plain generation says, whatever guesses.

Equality says nothing of a drafter, whose mistakes only cost time. Those show in how many tokens a
pass gives: a model that guesses for itself is always right.
"""

import functools
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from small_models import LLAMA, MIXTRAL, PROMPTS, SLIDING

from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.cache import cache_bytes
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import abstract_params, init
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import DraftModel, NGram, begin, loop, speculate, verify
from jaxopt_models.speculative import tree as tree_module
from jaxopt_models.speculative.draft import Guess
from jaxopt_models.speculative.ngram import copied

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "mixed": {
        "temperature": [0.0, 1.0, 1.0, 0.7],
        "top_p": [1.0, 0.9, 1.0, 1.0],
        "top_k": [0, 0, 20, 0],
    },
}
ROWS = [*PROMPTS, PROMPTS[1]]


@functools.cache
def params(config: ModelConfig, seed: int = 0) -> Any:
    return init(config, jax.random.key(seed))


@functools.cache
def near() -> Any:
    """The model with a little noise."""
    keys = iter(jax.random.split(jax.random.key(5), 100))
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.std(x) * jax.random.normal(next(keys), x.shape), params(LLAMA)
    )


@struct.dataclass
class Noise:
    """Guesses without sense, others each time."""

    count: int = struct.field(pytree_node=False)
    layers: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def depth(self) -> int:
        return self.count

    def check(self, config: ModelConfig) -> None:
        pass

    def begin(self, target: Any, prompts: Any, capacity: int) -> Any:
        return jnp.zeros((), jnp.int32)

    def propose(self, target: Any, state: Any, seen: Any, sampler: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(3), state)
        tokens = jax.random.randint(key, (len(seen.length), self.count), 0, 64)
        return Guess(tokens), state + 1


DRAFTERS = {
    "noise": Noise,
    "ngram": lambda count: NGram(count=count),
    "bad": lambda count: DraftModel(LLAMA, params(LLAMA, 1), count),
    "near": lambda count: DraftModel(LLAMA, near(), count),
    "self": lambda count: DraftModel(LLAMA, params(LLAMA), count),
}


@functools.cache
def plain(sampling: str, stops: tuple[int, ...] = (), most: int = 40) -> list[list[int]]:
    options = SAMPLING[sampling] | {"max_new_tokens": most, "eos_token_ids": stops}
    return generate(LLAMA, params(LLAMA), ROWS, **options).tokens


# The law


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_tokens_are_those_of_plain_generation(drafter, count, sampling):
    options = SAMPLING[sampling] | {"max_new_tokens": 40, "draft": DRAFTERS[drafter](count)}
    found = generate(LLAMA, params(LLAMA), ROWS, **options)
    assert found.tokens == plain(sampling)
    assert found.acceptance_length is not None
    assert all(1.0 <= length <= count + 1 for length in found.acceptance_length)


@pytest.mark.parametrize("drafter", ["noise", "ngram", "near", "self"])
def test_rows_stop_inside_of_what_was_accepted(drafter):
    """At a stop that one row meets early, and at limits that a pass would run over."""
    free = plain("mixed")
    stops = (next(t for t in free[1][2:8] if t not in free[2]), free[2][9])
    for most in (1, 2, 7, 40):
        options = SAMPLING["mixed"] | {"max_new_tokens": most, "eos_token_ids": stops}
        found = generate(LLAMA, params(LLAMA), ROWS, draft=DRAFTERS[drafter](5), **options)
        assert found.tokens == plain("mixed", stops, most)
    assert len(plain("mixed", stops)[1]) < 40


@pytest.mark.parametrize("drafter", ["ngram", "self"])
def test_the_cache_may_be_nearly_full(drafter):
    """Guesses that would be written past its end are dropped, and nothing else is touched."""
    prompt = [[int(t) for t in np.arange(64) * 7 % 64]]  # of 128 positions, the last 64 are filled
    options = {"max_new_tokens": 64, "temperature": 0.7}
    found = generate(LLAMA, params(LLAMA), prompt, draft=DRAFTERS[drafter](5), **options)
    assert found.tokens == generate(LLAMA, params(LLAMA), prompt, **options).tokens
    assert len(found.tokens[0]) == 64


def test_a_row_gets_the_same_tokens_alone_and_in_any_batch():
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.8, "draft": NGram(count=3)}
    together = generate(LLAMA, params(LLAMA), PROMPTS, request_ids=[4, 9, 2], **options).tokens
    backwards = generate(LLAMA, params(LLAMA), PROMPTS[::-1], request_ids=[2, 9, 4], **options)
    assert backwards.tokens == together[::-1]
    for prompt, request, tokens in zip(PROMPTS, [4, 9, 2], together, strict=True):
        alone = generate(LLAMA, params(LLAMA), [prompt], request_ids=[request], **options)
        assert alone.tokens == [tokens]


@pytest.mark.parametrize("config", [SLIDING, MIXTRAL], ids=["sliding", "mixtral"])
def test_of_windows_and_experts_too(config):
    options: dict[str, Any] = {"max_new_tokens": 24} | SAMPLING["mixed"]
    expected = generate(config, params(config), ROWS, **options).tokens
    for draft in (NGram(), DraftModel(config, params(config), 3)):
        found = generate(config, params(config), ROWS, draft=draft, **options)
        assert found.tokens == expected


@pytest.mark.parametrize("recipe", ["nvfp4", "int4", "int8", "nvfp4_kv"])
def test_of_quantized_models_with_quantized_drafts_too(recipe):
    """Of a layer, since quantization makes large programs of small models."""
    one = ModelConfig.from_hf(LLAMA.to_hf() | {"num_hidden_layers": 1})
    calibration = [jnp.asarray([PROMPTS[2]], jnp.int32)]
    model, _ = quantize(Model(one, params(one)), Recipe.load(recipe), calibration)
    options: dict[str, Any] = {"max_new_tokens": 24} | SAMPLING["mixed"]
    expected = generate(one, model, ROWS, **options).tokens
    # A draft of other leaves than the model's makes no other program of the model.
    unlike = [DraftModel(one, params(one), 3)] if recipe == "int4" else []
    for draft in ("ngram", DraftModel(one, model, 3), *unlike):
        assert generate(one, model, ROWS, draft=draft, **options).tokens == expected


# How good a guess is


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("count", [1, 3])
def test_a_model_guesses_for_itself_without_a_mistake(count, sampling):
    """Also where it samples: both take the noise of the place."""
    options = SAMPLING[sampling] | {"max_new_tokens": 1 + 6 * (count + 1)}
    draft = DraftModel(LLAMA, params(LLAMA), count)
    found = generate(LLAMA, params(LLAMA), ROWS, draft=draft, **options)
    assert found.acceptance_length == [count + 1.0] * 4


def test_the_better_the_guess_the_longer_it_is_right():
    def length(drafter: str) -> float:
        options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.7}
        draft = DRAFTERS[drafter](4)
        found = generate(LLAMA, params(LLAMA), PROMPTS, draft=draft, **options)
        assert found.acceptance_length is not None
        return float(np.mean(found.acceptance_length))

    assert length("bad") < length("near") < length("self")


def test_what_was_accepted_is_counted_by_place():
    sampler = make_sampler(3)
    draft = DraftModel(LLAMA, near(), 4)
    state = begin(LLAMA, params(LLAMA), PROMPTS, 40, sampler, (), draft)
    found = speculate(LLAMA, params(LLAMA), state, draft, sampler, ())
    accepted = np.asarray(found.accepted)
    assert np.all(np.diff(accepted, axis=1) <= 0)  # none is right behind a wrong one
    assert np.all(accepted[:, 0] <= found.passes)
    given = np.asarray(found.passes) + accepted.sum(axis=1)  # one more than was right, each time
    last = given - (np.asarray(found.decode.length) - [len(p) + 1 for p in PROMPTS])
    assert np.all((last >= 0) & (last <= 4))  # cut from the last pass


def looked_up(tokens: list[int], count: int, longest: int) -> list[int]:
    """`copied` of one row, one match at a time."""
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                after = tokens[place:]
                return [after[i % len(after)] for i in range(count)]
    return [tokens[-1]] * count


@pytest.mark.parametrize("longest", [1, 2, 3, 7])
def test_what_is_copied(longest):
    rng = np.random.default_rng(longest)
    rows = [rng.integers(0, 3, n).tolist() for n in (1, 2, 3, 5, 8, 13, 21, 30)] + [[1, 2, 3, 4]]
    buffer = rng.integers(0, 3, (len(rows), 32))  # what is behind a row is not of it
    for place, row in zip(buffer, rows, strict=True):
        place[: len(row)] = row
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    found = copied(jnp.asarray(buffer, jnp.int32), lengths, 6, longest)
    assert found.tolist() == [looked_up(row, 6, longest) for row in rows]


# Broken on purpose


@pytest.fixture
def broken(monkeypatch):
    """Replaces a function of a module for a test, which compiles anew."""
    compiled: Any = speculate

    def replace_by(module: Any, name: str, function: Any) -> None:
        monkeypatch.setattr(module, name, function)
        compiled.clear_cache()

    yield replace_by
    monkeypatch.undo()
    compiled.clear_cache()


def said(draft: Any) -> list[list[int]]:
    return generate(LLAMA, params(LLAMA), ROWS, max_new_tokens=40, draft=draft).tokens


def test_accepting_one_guess_too_many_is_seen(broken):
    def generous(tokens: Any, tree: Any, chosen: Any, deepest: int) -> Any:
        path, right = tree_module.follow(tokens, tree, chosen, deepest)
        return path, jnp.minimum(right + 1, deepest)

    broken(verify, "follow", generous)
    assert said(DRAFTERS["bad"](3)) != plain("greedy")


def test_accepting_behind_a_wrong_guess_is_seen(broken):
    def blind(tokens: Any, tree: Any, chosen: Any, deepest: int) -> Any:
        path, _ = tree_module.follow(tokens, tree, chosen, deepest)
        return path, jnp.sum(tokens == chosen[:, :-1], axis=1, dtype=jnp.int32)

    broken(verify, "follow", blind)
    assert said(DRAFTERS["near"](4)) != plain("greedy")


def test_a_place_too_far_is_seen(broken):
    step = loop.decode_step_with_features

    def far(config: Any, params: Any, fed: Any, places: Any, *others: Any) -> Any:
        return step(config, params, fed, places + 1, *others)

    broken(loop, "decode_step_with_features", far)
    assert said(NGram(count=3)) != plain("greedy")


@struct.dataclass
class Holed(DraftModel):
    """Loses the token before the last, as one that feeds the last alone after a right guess."""

    def propose(self, target: Any, state: Any, seen: Any, sampler: Any) -> Any:
        def without(keys: jax.Array) -> jax.Array:
            rows = jnp.arange(len(seen.length))
            return keys.at[rows, :, seen.length - 2].set(0.0)

        guess, cache = super().propose(target, state, seen, sampler)
        holed = tuple(replace(one, keys=without(one.keys)) for one in cache)
        return guess, holed


def test_a_hole_in_a_draft_s_cache_is_seen():
    options: dict[str, Any] = {"max_new_tokens": 60}
    found = generate(LLAMA, params(LLAMA), PROMPTS, draft=Holed(LLAMA, params(LLAMA), 3), **options)
    assert found.tokens == generate(LLAMA, params(LLAMA), PROMPTS, **options).tokens
    assert found.acceptance_length is not None and min(found.acceptance_length) < 59 / 15


# Memory, and what is refused


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_caches_are_updated_in_place(draft):
    """Of the compiled loop, which is not run."""
    model, batch = abstract_params(LLAMA, jnp.float32), 2
    drafter = NGram(count=3) if draft == "ngram" else DraftModel(LLAMA, model, 3)
    sampler, prompts = make_sampler(batch), [[1]] * batch
    state = jax.eval_shape(
        lambda: begin(LLAMA, zeros(model), prompts, 4095, sampler, (), zeros(drafter))
    )
    cache = state.decode.cache
    compiled: Any = speculate
    program = compiled.lower(LLAMA, model, state, drafter, sampler, (5,)).compile()
    memory, kept = program.memory_analysis(), cache_bytes((*cache, *(state.draft or ())))
    assert memory.alias_size_in_bytes >= kept  # donated, and used
    assert memory.temp_size_in_bytes < cache_bytes(cache[:1])
    shape = ",".join(map(str, cache[0].keys.shape))
    assert " while(" in program.as_text()
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", program.as_text())


def zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)


@pytest.mark.parametrize(
    "draft, problem",
    [
        (lambda: "medusa", "draft 'medusa' is unknown; choose 'ngram'"),
        (lambda: NGram(count=0), "count must be at least 1; it is 0"),
        (lambda: NGram(longest=0), "longest must be at least 1"),
        (lambda: DraftModel(LLAMA, params(LLAMA), 0), "count must be at least 1"),
        (
            lambda: DraftModel(ModelConfig.from_hf(LLAMA.to_hf() | {"vocab_size": 32}), {}),
            "32 tokens in its vocabulary and the model 64",
        ),
    ],
)
def test_drafts_that_cannot_be(draft, problem):
    with pytest.raises(UserError, match=problem):
        generate(LLAMA, params(LLAMA), [[1]], draft=draft())
