"""As many guesses as pay: which number that is, and that the tokens do not depend on it."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import LLAMA, PROMPTS

from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate, stream
from jaxopt_models.models.cache import cache_bytes, empty_cache
from jaxopt_models.models.cached import prefill_with_features
from jaxopt_models.models.transformer import abstract_params, init
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import (
    Adaptive,
    DraftModel,
    NGram,
    Prompted,
    Seen,
    Target,
    TreeDrafter,
    begin,
    init_eagle3,
    init_medusa,
    speculate,
)
from jaxopt_models.speculative.named import as_adaptive

PARAMS = init(LLAMA, jax.random.key(0))
LEVELS = (0, 1, 3)


def model_of(seed: int) -> DraftModel:
    return DraftModel(LLAMA, init(LLAMA, jax.random.key(seed)))


def run(draft: Adaptive, prompts: Any, most: int, passes: int = 10_000) -> Any:
    sampler = make_sampler(len(prompts))
    state = begin(LLAMA, PARAMS, prompts, most, sampler, (), draft)
    return speculate(LLAMA, PARAMS, state, draft, sampler, (), passes)


# Which number


def test_the_level_is_the_one_that_promises_most():
    """Beside sums one row and one level at a time, at costs that favour each."""
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(200):
        costs = tuple((1 + rng.exponential(0.3, 4).cumsum()).tolist())
        draft = Adaptive(NGram(), (0, 1, 3, 7), costs)
        tried = rng.exponential(20, 5)
        right = tried * rng.beta(0.5, 0.5, 5)
        active = rng.random(5) < 0.7
        promised = []
        for level, cost in zip(draft.levels, costs, strict=True):
            alphas = [
                (0.7 + r) / (1 + t) for r, t, a in zip(right, tried, active, strict=True) if a
            ]
            promised.append(sum(sum(a**i for i in range(level + 1)) for a in alphas) / cost)
        arrays = jnp.asarray(right, jnp.float32), jnp.asarray(tried, jnp.float32)
        found = int(draft.best(*arrays, jnp.asarray(active)))
        assert promised[found] == pytest.approx(max(promised), rel=1e-5)
        chosen.add(found)
    assert chosen == {0, 1, 2, 3}


def test_what_is_guessed_follows_what_comes_true():
    """A model that guesses for itself is always right; another one nearly never, and is left alone
    but for trials."""
    found = run(Adaptive(model_of(0), LEVELS), PROMPTS[:2], 81)
    assert found.draft.used.tolist() == [0, 0, 20]
    assert found.passes.tolist() == [20, 20]
    rates = run(Adaptive(model_of(1), LEVELS), PROMPTS[:2], 81).draft
    assert rates.used[0] > 3 * sum(rates.used[1:])
    assert rates.used[0] >= 32 + rates.silent  # there was a trial between


def test_rates_are_of_each_row_and_fade():
    draft = Adaptive(model_of(0), LEVELS)
    before = run(draft, PROMPTS[:2], 81, passes=2).draft
    np.testing.assert_allclose(before.right, 3 * (1 + 31 / 32))
    right, active = jnp.asarray([2, 0], jnp.int32), jnp.ones(2, bool)
    after = draft.seen(before, None, right, active)  # of 3, the third was wrong; or the first
    np.testing.assert_allclose(after.right, np.asarray(before.right) * 31 / 32 + np.asarray(right))
    np.testing.assert_allclose(after.tried, np.asarray(before.tried) * 31 / 32 + np.asarray([3, 1]))
    assert (after.used - before.used).tolist() == [0, 0, 1]
    silent = replace(before, level=jnp.zeros((), jnp.int32))
    kept = draft.seen(silent, None, jnp.zeros(2, jnp.int32), active)  # nothing was learnt
    assert kept.right.tolist() == before.right.tolist() and kept.silent == 1


def test_rows_that_are_done_do_not_count():
    draft = Adaptive(NGram(), LEVELS)
    right, tried = jnp.asarray([50.0, 0.0]), jnp.asarray([50.0, 50.0])
    levels = [
        int(draft.best(right, tried, jnp.asarray(active)))
        for active in ([True, False], [False, True])
    ]
    assert levels == [2, 0]


# The tokens


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_tokens_are_those_of_plain_generation(drafter):
    """Whatever the levels, in one run or in pieces, also where guessing stops and begins again."""
    own = {"model": model_of(1), "ngram": NGram()}[drafter]
    draft = Adaptive(own, LEVELS)
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": [0.0, 1.0, 0.7]}
    expected = generate(LLAMA, PARAMS, PROMPTS, **options).tokens
    found = generate(LLAMA, PARAMS, PROMPTS, draft=draft, **options)
    assert found.tokens == expected
    rows = [[] for _ in PROMPTS]
    for pieces in stream(LLAMA, PARAMS, PROMPTS, passes=7, draft=draft, **options):
        rows = [row + new for row, new in zip(rows, pieces, strict=True)]
    assert rows == expected


def test_a_drafter_that_was_left_alone_has_kept_up():
    """It is right as soon as it is asked again: nothing is missing from its cache."""
    draft = Adaptive(model_of(0), (0, 3), (1.0, 1e9))
    sampler = make_sampler(2)
    state = begin(LLAMA, PARAMS, PROMPTS[:2], 40, sampler, (), draft)
    state = speculate(LLAMA, PARAMS, state, draft, sampler, (), 9)
    assert state.draft.used.tolist() == [9, 0]
    cheap = Adaptive(model_of(0), (0, 3), (1.0, 1e-9))
    level = cheap.best(state.draft.right, state.draft.tried, ~state.decode.done)
    state = state.replace(draft=state.draft.replace(level=level))
    state = speculate(LLAMA, PARAMS, state, cheap, sampler, (), 5)
    assert state.draft.used.tolist() == [9, 5] and state.accepted.tolist() == [[5] * 3] * 2


def test_a_head_that_was_left_alone_has_kept_up():
    """It guesses as one that has seen the whole text at once."""
    own, sampler = Target(LLAMA, PARAMS), make_sampler(2)
    head = init_eagle3(own, jax.random.key(3), count=3)
    draft = Adaptive(head, (0, 3), (1.0, 1e9))
    state = begin(LLAMA, PARAMS, PROMPTS[:2], 40, sampler, (), draft)
    state = speculate(LLAMA, PARAMS, state, draft, sampler, (), 5)
    assert state.draft.used.tolist() == [5, 0]
    tokens, length = state.decode.tokens, state.decode.length
    seen = Seen(tokens, length, state.features, state.count)
    guess, _ = head.propose(own, state.draft.draft, seen, sampler)
    blank = empty_cache(LLAMA, PARAMS, 2, tokens.shape[1])
    _, _, features = prefill_with_features(LLAMA, PARAMS, tokens, length - 1, blank, head.layers)
    fresh = head.begin(own, Prompted(tokens, length - 1, features), tokens.shape[1])
    last = jnp.take_along_axis(features, (length - 2)[:, None, None], axis=1)
    anew = Seen(tokens, length, last, jnp.ones(2, jnp.int32))
    assert guess.tokens.tolist() == head.propose(own, fresh, anew, sampler)[0].tokens.tolist()


# Memory, and what is refused


def test_caches_are_updated_in_place():
    """Of the compiled loop, which is not run: the model's and the drafter's, at every level."""
    model = abstract_params(LLAMA, jnp.float32)
    draft = Adaptive(DraftModel(LLAMA, model), LEVELS)
    sampler = make_sampler(2)

    def fresh() -> Any:
        blank = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), (model, draft))
        return begin(LLAMA, blank[0], [[1]] * 2, 4095, sampler, (), blank[1])

    state = jax.eval_shape(fresh)
    compiled: Any = speculate
    program = compiled.lower(LLAMA, model, state, draft, sampler, (5,)).compile()
    cache = state.decode.cache
    assert program.memory_analysis().temp_size_in_bytes < cache_bytes(cache[:1])
    shape = ",".join(map(str, cache[0].keys.shape))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", program.as_text())


def test_levels_as_text():
    assert as_adaptive(NGram(), "0,1,3") == Adaptive(NGram(), (0, 1, 3))
    assert as_adaptive(NGram(), "1:1.1,4:1.5") == Adaptive(NGram(), (1, 4), (1.1, 1.5))


@pytest.mark.parametrize(
    "levels, problem",
    [
        ("0,one", "'0,one' are no levels; say numbers of guesses such as 0,1,3,7"),
        ("3,1", r"levels \[3, 1\] are not rising numbers of guesses"),
        ("0", r"levels \[0\] are not rising numbers"),
        ("0:1,3", r"costs \[1.0\] are not 2 positive numbers, one for each of the levels \[0, 3\]"),
    ],
)
def test_levels_that_cannot_be(levels, problem):
    with pytest.raises(UserError, match=problem):
        as_adaptive(NGram(), levels)


def test_drafters_that_have_no_levels():
    heads = init_medusa(Target(LLAMA, PARAMS), 2)
    with pytest.raises(UserError, match="levels are of a chain, and this drafter guesses trees"):
        generate(LLAMA, PARAMS, [[1]], draft=Adaptive(TreeDrafter(heads, 2, 2, 4)))
    with pytest.raises(UserError, match="count is 7, and there are 2 Medusa heads"):
        generate(LLAMA, PARAMS, [[1]], draft=Adaptive(heads))
