"""On a GPU: what guesses, in a chain or a tree, changes no token, and no pass copies the cache."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest
from small_models import LLAMA, PROMPTS

from jaxopt_models.generate import generate
from jaxopt_models.models.cache import cache_bytes
from jaxopt_models.models.transformer import init
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import (
    Adaptive,
    Drafter,
    DraftModel,
    NGram,
    Target,
    TreeDrafter,
    begin,
    init_dflash,
    init_eagle3,
    init_medusa,
    init_mtp,
    speculate,
)

pytestmark = pytest.mark.gpu

DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "n-gram": lambda target: NGram(count=4),
    "itself": lambda target: DraftModel(target.config, target.params, count=4),
    "as many as pay": lambda target: Adaptive(
        DraftModel(target.config, target.params, count=4), levels=(0, 1, 4)
    ),
    "EAGLE-3": lambda target: init_eagle3(target, jax.random.key(1)),
    "a tree of EAGLE-3": lambda target: TreeDrafter(
        init_eagle3(target, jax.random.key(1)), width=3, depth=3, count=8
    ),
    "a tree of Medusa": lambda target: TreeDrafter(
        init_medusa(target, 3), width=3, depth=3, count=8
    ),
    "MTP": lambda target: init_mtp(target, jax.random.key(2)),
    "DFlash": lambda target: init_dflash(target, jax.random.key(3), mask_token=3, depth=2, block=5),
}
SAMPLING: dict[str, Any] = {
    "max_new_tokens": 24,
    "temperature": [0.0, 1.0, 0.7],
    "top_p": [1.0, 0.9, 1.0],
}


@functools.cache
def target() -> Target:
    return Target(LLAMA, init(LLAMA, jax.random.key(0)))


@functools.cache
def plain() -> list[list[int]]:
    with jax.default_matmul_precision("highest"):
        return generate(LLAMA, target().params, PROMPTS, **SAMPLING).tokens


@pytest.mark.parametrize("name", DRAFTERS)
def test_tokens_are_those_of_plain_generation(name):
    """In float32, products included, where no two tokens are as near as roundings."""
    with jax.default_matmul_precision("highest"):
        draft = DRAFTERS[name](target())
        found = generate(LLAMA, target().params, PROMPTS, draft=draft, **SAMPLING)
    assert found.tokens == plain()
    least = {"itself": 4.0, "as many as pay": 1.5}.get(name, 1.0)
    assert found.acceptance_length is not None and min(found.acceptance_length) >= least


@pytest.mark.parametrize("name", ["EAGLE-3", "a tree of EAGLE-3", "MTP", "DFlash"])
def test_no_pass_copies_the_cache(name):
    drafter, sampler = DRAFTERS[name](target()), make_sampler(1)
    state = begin(LLAMA, target().params, [[1, 2, 3]], 32_000, sampler, (), drafter)
    compiled: Any = speculate
    program = compiled.lower(LLAMA, target().params, state, drafter, sampler, ()).compile()
    shape = ",".join(map(str, state.decode.cache[0].keys.shape))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", program.as_text())
    kept = min(cache_bytes(state.decode.cache[:1]), cache_bytes(state.draft[:1]))
    slots = state.decode.cache[0].keys.shape[2]
    scores = 4 * LLAMA.num_heads * (drafter.count + 1) * slots  # of attention, in float32
    assert program.memory_analysis().temp_size_in_bytes < kept + 2 * scores
