"""Guesses that branch: the walk among them, and generation, beside walks one node at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from small_models import GEMMA, LLAMA, MIXTRAL, PROMPTS, SLIDING

from jaxopt_models.generate import generate
from jaxopt_models.models.cache import empty_cache
from jaxopt_models.models.cached import decode_step_with_features, prefill
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init
from jaxopt_models.models.tree_attention import Branches
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.speculative import Guess, loop, speculate
from jaxopt_models.speculative.tree import chain, follow, topology

# Of nodes 1..8: two behind the root, two and one behind those, and so on, three deep.
PARENTS = (0, 0, 1, 1, 2, 3, 3, 5)
DEEPEST = 3


@functools.cache
def params(config: ModelConfig) -> Any:
    return init(config, jax.random.key(0))


def walked(tokens: Any, parents: Any, chosen: Any) -> list[int]:
    """The longest way, by trying every child."""

    def from_node(node: int) -> list[int]:
        right = [
            child
            for child, (parent, token) in enumerate(zip(parents, tokens, strict=True), 1)
            if parent == node and token == chosen[node]
        ]
        return [node, *max(map(from_node, right), key=len, default=[])]

    return from_node(0)


@pytest.mark.parametrize("shape", ["tree", "chain", "rows"])
def test_the_way_is_the_longest_on_which_all_is_right(shape):
    rng = np.random.default_rng(0)
    rows, count = 300, len(PARENTS)
    parents = np.tile({"chain": range(count)}.get(shape, PARENTS), (rows, 1))
    if shape == "rows":  # each row another tree
        parents = np.stack([[rng.integers(0, i + 1) for i in range(count)] for _ in range(rows)])
    deepest = DEEPEST if shape == "tree" else count
    tokens, chosen = rng.integers(0, 3, (rows, count)), rng.integers(0, 3, (rows, count + 1))
    own = parents if shape == "rows" else parents[:1]
    tree = chain(count) if shape == "chain" else topology(own.astype(np.int32), deepest)
    arrays = jnp.asarray(tokens, jnp.int32), tree, jnp.asarray(chosen, jnp.int32)
    path, right = map(np.asarray, follow(*arrays, deepest))
    lengths = set()
    for row in range(rows):
        expected = walked(tokens[row], parents[row], chosen[row])
        assert right[row] == len(expected) - 1
        lengths.add(len(expected))
        # Where two children are the same, either way may be as long.
        found = path[row, : right[row] + 1].tolist()
        assert found[0] == 0
        for above, node in zip(found[:-1], found[1:], strict=True):
            assert parents[row, node - 1] == above and tokens[row, node - 1] == chosen[row, above]
    assert len(lengths) > 3


def test_a_topology_has_depths_and_ancestors():
    tree = topology(np.asarray([PARENTS], np.int32), DEEPEST)
    assert tree.depth.tolist() == [[0, 1, 1, 2, 2, 2, 3, 3, 3]]
    seen = [set(np.flatnonzero(row).tolist()) for row in tree.ancestors[0]]
    assert seen[4] == {0, 1, 4} and seen[8] == {0, 2, 5, 8} and seen[7] == {0, 1, 3, 7}
    line = topology(np.arange(5, dtype=np.int32)[None], 5)
    for own, its in zip(jax.tree.leaves(line), jax.tree.leaves(chain(5)), strict=True):
        assert own.tolist() == its.tolist()


@pytest.mark.parametrize("config", [LLAMA, SLIDING, GEMMA], ids=["llama", "sliding", "gemma"])
def test_a_branch_is_run_as_if_it_were_the_text(config):
    model, capacity = params(config), 32
    step = jax.jit(decode_step_with_features, static_argnames=("config", "layers"))
    rows = [[int(t) for t in np.arange(n) * 5 % 64] for n in (3, 9)]
    prompts = jnp.asarray([row + [0] * (16 - len(row)) for row in rows], jnp.int32)
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    blank = empty_cache(config, model, 2, capacity)
    _, cache = jax.jit(prefill, static_argnames=("config",))(config, model, prompts, lengths, blank)
    nodes = jax.random.randint(jax.random.key(1), (2, len(PARENTS) + 1), 0, 64)
    tree = topology(np.asarray([PARENTS], np.int32), DEEPEST)
    depth, seen = (jnp.repeat(x, 2, axis=0) for x in (tree.depth, tree.ancestors))
    branches = Branches(lengths, depth, seen)
    layers = (0, config.num_layers)
    own, _, features = step(config, model, nodes, branches.positions, cache, layers, branches)
    for node in range(nodes.shape[1]):
        way = np.flatnonzero(tree.ancestors[0, node])
        at = lengths[:, None] + jnp.arange(len(way), dtype=jnp.int32)[None]
        alone, _, its = step(config, model, nodes[:, way], at, cache, layers)
        np.testing.assert_allclose(own[:, node], alone[:, -1], atol=2e-5)
        np.testing.assert_allclose(features[:, node], its[:, -1], atol=2e-5)
    assert features.shape[-1] == 2 * config.hidden_size
    logits, _, _ = step(config, model, nodes, branches.positions, cache, layers)
    assert np.abs(np.asarray(logits - own)).max() > 1e-2  # a chain is something else


@struct.dataclass
class Oracle:
    """Knows what will be said, and says it on one way of the tree, another one each time; the other
    nodes are wrong. The way is as long as `right` says, in turn."""

    text: jax.Array
    right: tuple[int, ...] = struct.field(pytree_node=False, default=(3, 0, 2, 1, 3))
    count: int = struct.field(pytree_node=False, default=len(PARENTS))
    depth: int = struct.field(pytree_node=False, default=DEEPEST)
    layers: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def check(self, config: ModelConfig) -> None:
        pass

    def begin(self, target: Any, prompts: Any, capacity: int) -> Any:
        return jnp.zeros((), jnp.int32)

    def propose(self, target: Any, state: Any, seen: Any, sampler: Any) -> Any:
        tree = topology(np.asarray([PARENTS], np.int32), DEEPEST)
        places = seen.length[:, None] + tree.depth[:, 1:] - 1
        truth = jnp.take_along_axis(self.text, places, axis=1, mode="clip")
        ends = jnp.asarray([6, 7, 8], jnp.int32)[state % 3]
        most = jnp.asarray(self.right, jnp.int32)[state % len(self.right)]
        on_way = tree.ancestors[0, ends, 1:] & (tree.depth[0, 1:] <= most)
        wrong = (truth + 1 + jnp.arange(self.count, dtype=jnp.int32)[None]) % 64
        return Guess(jnp.where(on_way[None], truth, wrong), tree), state + 1


def told(config: ModelConfig, model: Any, options: dict[str, Any]) -> tuple[Any, list[list[int]]]:
    """(an oracle, what plain generation says)."""
    plain = generate(config, model, PROMPTS, **options).tokens
    rows = [prompt + tokens + [0] * 256 for prompt, tokens in zip(PROMPTS, plain, strict=True)]
    return Oracle(jnp.asarray([row[:256] for row in rows], jnp.int32)), plain


MIXED: dict[str, Any] = {
    "max_new_tokens": 1 + 14,
    "temperature": [0.0, 1.0, 0.7],
    "top_p": [1.0, 0.9, 1.0],
    "eos_token_ids": (),
}


@pytest.mark.parametrize(
    "config", [LLAMA, SLIDING, MIXTRAL, GEMMA], ids=["llama", "sliding", "mixtral", "gemma"]
)
def test_tokens_are_those_of_plain_generation(config):
    """And the right way is taken each time: passes give 4, 1, 3, 2 and 4 tokens."""
    oracle, plain = told(config, params(config), MIXED)
    found = generate(config, params(config), PROMPTS, draft=oracle, **MIXED)
    assert found.tokens == plain
    assert found.acceptance_length == [14 / 5] * 3


def test_of_a_quantized_cache_too():
    one = ModelConfig.from_hf(LLAMA.to_hf() | {"num_hidden_layers": 1})
    calibration = [jnp.asarray([PROMPTS[2]], jnp.int32)]
    model, _ = quantize(Model(one, params(one)), Recipe.load("nvfp4_kv"), calibration)
    oracle, plain = told(one, model, MIXED)
    found = generate(one, model, PROMPTS, draft=oracle, **MIXED)
    assert found.tokens == plain and found.acceptance_length == [14 / 5] * 3


def test_rows_stop_inside_of_a_branch_and_at_the_end_of_the_cache():
    full = [[int(t) for t in np.arange(64) * 7 % 64]]
    options: dict[str, Any] = MIXED | {"max_new_tokens": 64, "temperature": 0.7, "top_p": 1.0}
    plain = generate(LLAMA, params(LLAMA), full, **options).tokens
    oracle = Oracle(jnp.asarray([full[0] + plain[0] + [0] * 64], jnp.int32), (3,))
    assert generate(LLAMA, params(LLAMA), full, draft=oracle, **options).tokens == plain
    options["eos_token_ids"] = (plain[0][6],)
    found = generate(LLAMA, params(LLAMA), full, draft=oracle, **options).tokens
    assert found == generate(LLAMA, params(LLAMA), full, **options).tokens
    assert len(found[0]) <= 7


@pytest.mark.parametrize("broken", ["nothing is moved", "siblings are seen"])
def test_mistakes_are_seen(monkeypatch, broken):
    if broken == "nothing is moved":
        monkeypatch.setattr(loop, "_compacted", lambda cache, *others: cache)
    else:
        branches = loop._branches

        def all_before(first: Any, tree: Any) -> Branches:
            right = branches(first, tree)
            seen = jnp.tril(jnp.ones(right.seen.shape, bool))
            return Branches(right.first, right.depth, seen)

        monkeypatch.setattr(loop, "_branches", all_before)
    compiled: Any = speculate
    compiled.clear_cache()
    options = {"max_new_tokens": 40, "eos_token_ids": ()}
    oracle, plain = told(LLAMA, params(LLAMA), options)
    assert generate(LLAMA, params(LLAMA), PROMPTS, draft=oracle, **options).tokens != plain
    monkeypatch.undo()
    compiled.clear_cache()
    assert generate(LLAMA, params(LLAMA), PROMPTS, draft=oracle, **options).tokens == plain
