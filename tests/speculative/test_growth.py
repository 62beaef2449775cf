"""Trees of an EAGLE-3 head: what grows, beside a search by hand, and that nothing is lost."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_by_one import behind
from small_models import LLAMA, PROMPTS

from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.cache import empty_cache
from jaxopt_models.models.cached import prefill_with_features
from jaxopt_models.models.transformer import init
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import Eagle3, Seen, Target, TreeDrafter, begin, init_eagle3


@functools.cache
def target() -> Target:
    return Target(LLAMA, init(LLAMA, jax.random.key(0)))


@functools.cache
def head() -> Eagle3:
    vocabulary = jnp.arange(1, 64, 3, dtype=jnp.int32)
    return init_eagle3(target(), jax.random.key(3), vocabulary=vocabulary)


@jax.jit
def log_p(tokens: jax.Array, features: jax.Array, known: int, count: int) -> jax.Array:
    """Of the tokens of the head's vocabulary behind the first `count` tokens of int32 [T], of whose
    first `known` the model's features [T, F] are known; what the head says itself stands for the
    others."""
    own, one = target(), head()
    x = behind(one, own, tokens[None], features[None], known - 1, len(tokens))[None]
    return jax.nn.log_softmax(one.logits(own, x)[0, count - 2])


def searched(text: list[int], features: jax.Array, width: int, depth: int, count: int):
    """The ways to the most likely nodes, as tuples of tokens: a beam search, one text at a time.
    Features [T, F] are the model's of the text and of what is behind it, which is not read."""
    vocabulary = np.asarray(head().params["vocabulary"])
    beam: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    seen: dict[tuple[int, ...], float] = {}
    for _ in range(depth):
        more = {}
        for way, score in beam:
            tokens = np.zeros(len(features), np.int32)
            tokens[: len(text) + len(way)] = [*text, *way]
            found = np.asarray(log_p(tokens, features, len(text) - 1, len(text) + len(way)))
            for best in np.argsort(-found)[:width]:
                more[*way, int(vocabulary[best])] = score + float(found[best])
        seen |= more
        beam = sorted(more.items(), key=lambda item: -item[1])[:width]
    return set(sorted(seen, key=lambda way: -seen[way])[:count])


def test_the_most_likely_nodes_grow():
    width, depth, count = 3, 4, 9
    drafter, own = TreeDrafter(head(), width, depth, count), target()
    sampler = make_sampler(3)
    state = begin(own.config, own.params, PROMPTS, 8, sampler, (), drafter)
    decode = state.decode
    seen = Seen(decode.tokens, decode.length, state.features, state.count)
    guess, _ = jax.jit(TreeDrafter.propose)(drafter, own, state.draft, seen, sampler)
    assert guess.topology is not None and guess.tokens.shape == (3, count)
    model, (tokens, length) = (own.config, own.params), (decode.tokens, decode.length)
    blank = empty_cache(*model, 3, tokens.shape[1])
    _, _, features = prefill_with_features(*model, tokens, length, blank, head().layers)
    for row in range(3):
        end = int(length[row])
        ways = {
            tuple(int(guess.tokens[row, i - 1]) for i in np.flatnonzero(seen_by) if i)
            for seen_by in guess.topology.ancestors[row, 1:]
        }
        text = tokens[row, :end].tolist()
        assert ways == searched(text, features[row], width, depth, count)
        assert len({len(way) for way in ways}) > 1


@pytest.mark.parametrize("shape", [(2, 3, 6), (4, 2, 12)])
def test_tokens_are_those_of_plain_generation(shape):
    own = target()
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": [0.0, 1.0, 0.7]}
    options["top_p"] = [1.0, 0.9, 1.0]
    draft = TreeDrafter(head(), *shape)
    found = generate(own.config, own.params, PROMPTS, draft=draft, **options)
    assert found.tokens == generate(own.config, own.params, PROMPTS, **options).tokens
    assert found.acceptance_length is not None and max(found.acceptance_length) > 1.0


@pytest.mark.parametrize(
    "shape, problem",
    [
        ((2, 3, 3), "3 levels, 2 wide, has 4 to 10 nodes, and not 3; choose a count in between"),
        ((2, 3, 11), "has 4 to 10 nodes, and not 11"),
        ((0, 3, 4), "0 wide"),
        ((30, 1, 22), "a tree is 30 wide, and the head has 21 tokens"),
    ],
)
def test_trees_that_cannot_be(shape, problem):
    with pytest.raises(UserError, match=problem):
        TreeDrafter(head(), *shape).check(LLAMA)
