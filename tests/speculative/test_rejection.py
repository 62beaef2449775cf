"""Verification by rejection: the distribution is the model's, by enumeration and by many draws.

Frequencies are judged as in test_sampling: by Pearson's statistic, at bounds that a right sampler
exceeds with one seed in a million, and the same counts have to refute what is broken.
"""

import functools
from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_models import LLAMA, PROMPTS, SIZES

from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward, init
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import (
    Adaptive,
    DraftModel,
    Guess,
    NGram,
    Target,
    TreeDrafter,
    begin,
    init_eagle3,
    init_medusa,
    speculate,
    verify,
)
from jaxopt_models.speculative.tree import chain
from jaxopt_models.speculative.verify import COUPLED, Rejection, kept, remainder

RISK = 1e-6


def refuted(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether draws have another distribution; the rarest cells are counted as one."""
    counts, mean = counts.ravel(), expected.ravel() * counts.sum()
    order = np.argsort(mean)
    rare = order[np.cumsum(mean[order]) <= 5]
    cells, means = (
        np.append(np.delete(x, rare), x[rare].sum()) for x in (counts.astype(float), mean)
    )
    if means[-1] == 0:
        if cells[-1] > 0:
            return True  # what cannot be was seen
        cells, means = cells[:-1], means[:-1]
    statistic = float(((cells - means) ** 2 / means).sum())
    return statistic > float(stats.chi2.isf(RISK, len(means) - 1))


# By enumeration

# Of 12 parts. Those of a guess divide 12, so that p / q is a number of twelfths.
_MODEL = [(5, 4, 3), (1, 11, 0), (0, 2, 10), (7, 0, 5), (4, 4, 4), (12, 0, 0), (2, 9, 1)]
_DRAFT = [(4, 4, 4), (6, 4, 2), (12, 0, 0), (3, 6, 3), (0, 6, 6), (2, 4, 6), (6, 0, 6)]


def table(rows: list[tuple[int, ...]], seed: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Distribution behind each way of at most two tokens."""
    rng = np.random.default_rng(seed)
    ways = [way for length in range(3) for way in product(range(3), repeat=length)]
    picked = {way: np.asarray(rows[rng.integers(len(rows))]) / 12 for way in ways}
    return picked.__getitem__


def law(p: Any, q: Any, keep: Any = kept, rest: Any = remainder) -> np.ndarray:
    """Of three tokens: two guesses, all of their values and twelve of each uniform number, and then
    the model's own tokens. [3, 3, 3]."""
    found = np.zeros((3, 3, 3))
    grid = [(u, v) for u in range(12) for v in range(12)]
    uniform = jnp.asarray([[(u + 0.5) / 12, (v + 0.5) / 12] for u, v in grid], jnp.float32)
    for first, second in product(range(3), repeat=2):
        weight = q(())[first] * q((first,))[second]
        ways = [(), (first,), (first, second)]
        own = np.stack([p(way) for way in ways]).astype(np.float32)
        its = np.stack([q(ways[0]), q(ways[1]), np.zeros(3)]).astype(np.float32)
        wide = [jnp.broadcast_to(x[:2], (len(grid), 2, 3)) for x in (own, its)]
        tokens = jnp.broadcast_to(jnp.asarray([first, second], jnp.int32), (len(grid), 2))
        behind = np.asarray(rest(jnp.asarray(own), jnp.asarray(its)))
        often = np.bincount(np.asarray(keep(*wide, tokens, uniform)), minlength=3)
        for right, times in enumerate(often):
            share, way = weight * times / len(grid), ways[right]
            for token in range(3):
                said = (*way, token)
                found[said] += share * behind[right, token] * model_law(p, said)
    return found


def model_law(p: Any, way: tuple[int, ...]) -> np.ndarray:
    """What the model says behind a way, up to three tokens in all."""
    if len(way) == 3:
        return np.ones(())
    more = [p(way)[token] * model_law(p, (*way, token)) for token in range(3)]
    return np.stack(more)


@pytest.mark.parametrize("seed", range(4))
def test_the_law_is_the_model_s(seed):
    p, q = table(_MODEL, seed), table(_DRAFT, 100 + seed)
    np.testing.assert_allclose(law(p, q), model_law(p, ()), atol=1e-6)


BROKEN: dict[str, dict[str, Any]] = {
    "the draft's own in place of what remains": {"rest": lambda p, q: jnp.where(q > 0, q, p)},
    "the model's own in place of what remains": {"rest": lambda p, q: p},
    "a guess is always kept": {"keep": lambda p, q, tokens, u: jnp.full(len(u), 2)},
    "no guess behind the first": {
        "keep": lambda p, q, tokens, u: jnp.minimum(kept(p, q, tokens, u), 1)
    },
    "behind a guess that was not kept": {
        "keep": lambda p, q, tokens, u: sum(
            kept(p[:, i : i + 1], q[:, i : i + 1], tokens[:, i : i + 1], u[:, i : i + 1])
            for i in range(2)
        )
    },
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_has_another_law(what):
    worst = 0.0
    for seed in range(4):
        p, q = table(_MODEL, seed), table(_DRAFT, 100 + seed)
        worst = max(worst, np.abs(law(p, q, **BROKEN[what]) - model_law(p, ())).sum())
    assert worst > 0.05


def test_nothing_remains_but_by_rounding():
    p = jnp.asarray([[0.25, 0.75]])
    assert remainder(p, p).tolist() == p.tolist()
    tokens, zero = jnp.asarray([[0, 1]], jnp.int32), jnp.zeros((1, 2))
    never = jnp.asarray([[[0.0, 1.0], [1.0, 0.0]]])  # neither is ever said by the model
    assert kept(never, never, tokens, zero).tolist() == [0]  # though 0 >= 0 · 0
    assert kept(1 - never, never, tokens, zero + 0.99).tolist() == [
        2
    ]  # and nor by the draft: q = 0


# By many draws, of given distributions

DRAWS = 30_000
P = np.array([[2.0, 1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.3, 1.0, -2.0]], np.float32)
LOWEST = -np.inf
Q = {
    "some": np.array([[0.0, 2.0, 1.0, -1.0, 0.0], [1.0, 0.0, 0.0, 2.0, 1.0]], np.float32),
    "same": P,
    "elsewhere": np.array([[LOWEST, LOWEST, 0, 0, LOWEST], [0, LOWEST, LOWEST, LOWEST, 1]]),
    "far": np.array([[-30.0, -30.0, -30.0, 30.0, -30.0], [0.0, -40.0, 0.0, 0.0, 60.0]]),
}
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.5},
    "filtered": {"temperature": 1.3, "top_k": 4, "top_p": 0.9},
}


@jax.jit
def judged(sampler: Any, p: jax.Array, q: jax.Array | None) -> Any:
    """Of one guess for each request, at the second position: (guesses, verdicts)."""
    places = jnp.broadcast_to(jnp.asarray([[1, 2]], jnp.int32), (DRAWS, 2))
    logits = jnp.broadcast_to(p[None], (DRAWS, *p.shape))
    rule = Rejection()
    if q is None:  # whatever it is that chose this
        guess = Guess(jnp.arange(DRAWS, dtype=jnp.int32)[:, None] % 2)
    else:
        drawn_by = jnp.broadcast_to(q[None, :1], (DRAWS, 1, q.shape[1]))
        guess = Guess(rule.drawing(sampler)(drawn_by, places[:, 1:]), logits=drawn_by)
    return guess.tokens, rule(guess, chain(1), logits, places, sampler, 1)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("draft", [*Q, "chosen"])
def test_many_verdicts_have_the_distribution(draft, sampling):
    sampler = make_sampler(DRAWS, **SAMPLING[sampling], key=jax.random.key(4))
    q = None if draft == "chosen" else jnp.asarray(Q[draft], jnp.float32)
    guesses, (tokens, _, right) = jax.tree.map(np.asarray, judged(sampler, jnp.asarray(P), q))
    one = make_sampler(1, **SAMPLING[sampling])
    expected = np.asarray(one.probabilities(jnp.asarray(P)[None])[0], np.float64)
    first = np.bincount(tokens[:, 0], minlength=5)
    assert not refuted(first, expected[0])
    assert refuted(np.bincount(guesses[:, 0], minlength=5), expected[0]) == (draft != "same")
    behind = tokens[right == 1, 1]  # by the token before, of which it is independent
    for token in np.flatnonzero(np.bincount(tokens[right == 1, 0], minlength=5) > 500):
        own = behind[tokens[right == 1, 0] == token]
        assert not refuted(np.bincount(own, minlength=5), expected[1])
    if q is not None:
        its = np.asarray(one.probabilities(q[None, :1])[0, 0], np.float64)
        overlap = np.minimum(expected[0], its).sum()
        assert abs(right.mean() - overlap) < 5 * (0.25 / DRAWS) ** 0.5
        assert overlap < 1 - 1e-6 or right.all()


@pytest.mark.parametrize("drawn", [False, True])
def test_without_guesses_tokens_are_those_of_plain_generation(drawn):
    """Where an adaptive drafter is silent."""
    sampler = make_sampler(3, temperature=[0.0, 1.0, 0.5], top_k=3)
    logits = jax.random.normal(jax.random.key(0), (3, 1, 7))
    places = jnp.full((3, 1), 4, jnp.int32)
    none = Guess(jnp.zeros((3, 0), jnp.int32), logits=jnp.zeros((3, 0, 7)) if drawn else None)
    found = Rejection()(none, chain(0), logits, places, sampler, 0)
    assert found.tokens.tolist() == sampler(logits, places + 1).tolist()
    assert found.right.tolist() == [0, 0, 0]


# By many draws of a model

SMALL = ModelConfig.from_hf({"model_type": "llama"} | SIZES | {"vocab_size": 8})


@functools.cache
def small(seed: int) -> Any:
    """As sure of what it says as a trained one."""
    params = init(SMALL, jax.random.key(seed))
    table = {"weight": 12 * params["embed_tokens"]["weight"]}
    return params | {"embed_tokens": table, "lm_head": table}


def drafters() -> dict[str, Any]:
    target, key = Target(SMALL, small(0)), jax.random.key(7)
    noise = jax.random.normal(key, (8, 32))
    heads = jax.tree.map(
        lambda x: x + (0.5 * noise if x.shape == (8, 32) else 0), init_medusa(target, 2)
    )
    half = init_eagle3(target, key, vocabulary=jnp.asarray([0, 2, 3, 5]), count=2)
    return {
        "model": DraftModel(SMALL, small(1), 2),
        "half": half,
        "medusa": heads,
        "ngram": NGram(2),
    }


def counted(draft: Any, options: dict[str, Any]) -> tuple[np.ndarray, float]:
    """How often each three tokens follow a prompt, [8, 8, 8], and the tokens of a pass."""
    rows, counts, lengths = 3000, np.zeros((8, 8, 8)), []
    for seed in range(2):
        found = generate(
            SMALL,
            small(0),
            [[3, 1]] * rows,
            max_new_tokens=3,
            eos_token_ids=(),
            key=jax.random.key(seed),
            draft=draft,
            verification="rejection",
            **options,
        )
        np.add.at(counts, tuple(np.asarray(found.tokens).T), 1)
        lengths += found.acceptance_length or []
    return counts, float(np.mean(lengths))


@functools.cache
def expected(temperature: float, top_k: int = 0) -> np.ndarray:
    ways = [(3, 1, a, b) for a, b in product(range(8), repeat=2)]
    logits = forward(SMALL, small(0), jnp.asarray(ways, jnp.int32))
    sampler = make_sampler(64, temperature=temperature, top_k=top_k)
    p = np.asarray(sampler.probabilities(logits), np.float64)
    first, second, third = p[0, 1], p[::8, 2], p[:, 3].reshape(8, 8, 8)
    return first[:, None, None] * second[:, :, None] * third


@pytest.mark.parametrize("draft", ["model", "half", "medusa", "ngram"])
def test_generation_has_the_distribution_of_the_model(draft):
    options = {"temperature": 1.0, "top_k": 5} if draft == "half" else {"temperature": 1.0}
    counts, length = counted(drafters()[draft], options)
    assert not refuted(counts, expected(**options))
    assert 1.0 < length < 2.0  # guesses are kept, and are not


def test_a_loop_that_forgets_what_remains_is_seen(monkeypatch):
    compiled: Any = speculate
    monkeypatch.setattr(verify, "remainder", lambda p, q: p)
    compiled.clear_cache()
    counts, _ = counted(drafters()["model"], {"temperature": 1.0})
    monkeypatch.undo()
    compiled.clear_cache()
    assert refuted(counts, expected(1.0))


# Beside plain generation

PARAMS = init(LLAMA, jax.random.key(0))
MIXED: dict[str, Any] = {"temperature": [0.0, 1.0, 0.7], "top_p": [1.0, 0.9, 1.0]}


def said(draft: Any, prompts: Any = PROMPTS, **options: Any) -> Any:
    options = {"max_new_tokens": 30, "verification": "rejection"} | options
    return generate(LLAMA, PARAMS, prompts, draft=draft, **options)


def test_greedy_rows_are_those_of_plain_generation():
    bad = DraftModel(LLAMA, init(LLAMA, jax.random.key(1)), 3)
    plain = generate(LLAMA, PARAMS, PROMPTS, max_new_tokens=30).tokens
    assert said(bad).tokens == plain
    assert said(bad, **MIXED).tokens[0] == plain[0]


def test_a_model_guesses_for_itself_without_a_mistake():
    """q is p, whatever was drawn; and a row's tokens do not depend on the others."""
    draft = DraftModel(LLAMA, PARAMS, 3)
    found = said(draft, max_new_tokens=29, **MIXED)
    assert found.acceptance_length == [4.0] * 3
    turned = {name: values[::-1] for name, values in MIXED.items()}
    other = said(draft, PROMPTS[::-1], max_new_tokens=29, request_ids=[2, 1, 0], **turned)
    assert other.tokens == found.tokens[::-1]
    plain = generate(LLAMA, PARAMS, PROMPTS, max_new_tokens=29, **MIXED).tokens
    assert found.tokens[1:] != plain[1:]  # other tokens, of the same distribution


def test_logits_of_guesses_are_kept_only_if_they_are_read():
    draft = DraftModel(LLAMA, PARAMS, 6)
    sampler = make_sampler(3, temperature=1.0)
    state = begin(LLAMA, PARAMS, PROMPTS, 8, sampler, (), draft)
    compiled: Any = speculate

    def program(rule: Any) -> str:
        given = LLAMA, PARAMS, state, draft, sampler, (), 1, rule
        return compiled.lower(*given).compile().as_text()

    shape = "f32[5,3,64]"  # of the guesses behind the first
    assert shape in program(Rejection()) and shape not in program(COUPLED)


def test_what_cannot_be_verified_so():
    tree = TreeDrafter(init_medusa(Target(LLAMA, PARAMS), 2), 2, 2, 4)
    with pytest.raises(UserError, match="rejection is of a chain of guesses"):
        said(tree)
    with pytest.raises(UserError, match="verification 'typical' is unknown; choose coupled or rej"):
        said(NGram(), verification="typical")
    with pytest.raises(UserError, match="levels are of a chain"):
        said(Adaptive(tree))
