"""Medusa heads: what they say, in chains and trees, that nothing is lost, and their files."""

import functools
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GEMMA, LLAMA, PROMPTS

from jaxopt_models.checkpoint.safetensors import open_index
from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward, hidden_states, init
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import (
    Medusa,
    Seen,
    Target,
    TreeDrafter,
    begin,
    init_medusa,
    speculate,
)
from jaxopt_models.speculative.medusa_files import export_medusa, is_medusa, read_medusa


@functools.cache
def target(config: ModelConfig = LLAMA) -> Target:
    return Target(config, init(config, jax.random.key(0)))


@functools.cache
def heads(config: ModelConfig = LLAMA, count: int = 3) -> Medusa:
    """With blocks that do something."""
    fresh = init_medusa(target(config), count, blocks=2)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_new_heads_say_what_the_model_says(config):
    """Soft caps and norms included."""
    own, fresh = target(config), init_medusa(target(config), 2)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 64)
    hidden = hidden_states(config, own.params, tokens)
    expected = forward(config, own.params, tokens)
    for number in range(2):
        np.testing.assert_allclose(fresh.logits(hidden, number), expected, rtol=1e-5, atol=1e-5)


def test_a_head_is_the_formula():
    one = heads()
    hidden = jax.random.normal(jax.random.key(2), (1, 4, 32))
    x = np.asarray(hidden, np.float64)
    for block in one.params["heads"][1]["blocks"]:
        weight, bias = (
            np.asarray(block["linear"][name], np.float64) for name in ("weight", "bias")
        )
        inner = x @ weight.T + bias
        x = x + inner / (1 + np.exp(-inner))
    expected = x @ np.asarray(one.params["heads"][1]["lm_head"]["weight"], np.float64).T
    np.testing.assert_allclose(one.logits(hidden, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_are_read_off_the_last_state(temperature):
    """That of the last token but one, whatever was accepted before; head k says k tokens ahead."""
    own, one, sampler = target(), heads(), make_sampler(3, temperature=temperature)
    model = own.config, own.params
    state = begin(*model, PROMPTS, 40, sampler, (), one)
    for _ in range(4):
        tokens, length = state.decode.tokens, state.decode.length
        seen = Seen(tokens, length, state.features, state.count)
        guess, _ = one.propose(own, None, seen, sampler)
        hidden = hidden_states(*model, tokens)
        last = jnp.take_along_axis(hidden, (length - 2)[:, None, None], axis=1)
        for k in range(3):
            expected = sampler(one.logits(last, k), (length + k)[:, None])
            assert guess.tokens[:, k].tolist() == expected[:, 0].tolist()
        state = speculate(*model, state, one, sampler, (), 1)


def test_a_tree_has_the_likeliest_ways():
    """Of all tokens of each head, as if the others did not matter."""
    own, one, sampler = target(), heads(count=2), make_sampler(1)
    width, count = 4, 9
    state = begin(own.config, own.params, PROMPTS[1:2], 8, sampler, (), one)
    decode = state.decode
    seen = Seen(decode.tokens, decode.length, state.features, state.count)
    guess, _ = TreeDrafter(one, width, 2, count).propose(own, None, seen, sampler)
    hidden = state.features[:, :1]
    first, second = (
        np.sort(np.asarray(jax.nn.log_softmax(one.logits(hidden, k))[0, 0]))[::-1][:width]
        for k in range(2)
    )
    scores = sorted([*first, *(a + b for a in first for b in second)], reverse=True)[:count]
    assert guess.topology is not None
    depth = guess.topology.depth[0, 1:]
    own_scores = [jax.nn.log_softmax(one.logits(hidden, k))[0, 0] for k in range(2)]
    found = []
    for node in range(count):
        way = np.flatnonzero(guess.topology.ancestors[0, node + 1])[1:]
        assert len(way) == depth[node]
        found.append(sum(float(own_scores[k][guess.tokens[0, i - 1]]) for k, i in enumerate(way)))
    np.testing.assert_allclose(sorted(found, reverse=True), scores, atol=1e-5)


@pytest.mark.parametrize("tree", [None, (3, 2, 7)], ids=["chain", "tree"])
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_tokens_are_those_of_plain_generation(config, tree):
    own, one = target(config), heads(config)
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": [0.0, 1.0, 0.7]}
    options["top_k"] = [0, 0, 9]
    draft = one if tree is None else TreeDrafter(one, *tree)
    found = generate(config, own.params, PROMPTS, draft=draft, **options)
    assert found.tokens == generate(config, own.params, PROMPTS, **options).tokens


def test_heads_in_files(tmp_path):
    one = heads()
    export_medusa(tmp_path / "heads", one, dtype=jnp.float32, verifier="its")
    assert is_medusa(tmp_path / "heads") and not is_medusa(tmp_path)
    fields = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert (fields["medusa_num_heads"], fields["medusa_num_layers"]) == (3, 2)
    assert fields["base_model_name_or_path"] == "its"
    index = open_index(tmp_path / "heads" / "medusa_lm_head.safetensors")
    names = {
        f"{i}.{j}.linear.{field}"
        for i in range(3)
        for j in range(2)
        for field in ("weight", "bias")
    }
    assert set(index.names()) == names | {f"{i}.2.weight" for i in range(3)}
    assert index.shape("0.2.weight") == (64, 32)
    found = read_medusa(tmp_path / "heads", LLAMA)
    assert jax.tree.structure(found) == jax.tree.structure(one)
    for own, its in zip(*map(jax.tree.leaves, (found, one)), strict=True):
        np.testing.assert_array_equal(own, its)
    with pytest.raises(UserError, match="already exists"):
        export_medusa(tmp_path / "heads", one)
    wider = replace(LLAMA, hidden_size=64)
    with pytest.raises(UserError, match="'0.0.linear.weight' has shape"):
        read_medusa(tmp_path / "heads", wider)
    (tmp_path / "heads" / "config.json").write_text(json.dumps(fields | {"medusa_num_heads": 2}))
    with pytest.raises(UserError, match="tensor '2.0.linear.bias' has no place in 2 Medusa heads"):
        read_medusa(tmp_path / "heads", LLAMA)
    (tmp_path / "heads" / "config.json").write_text(json.dumps(fields | {"medusa_num_heads": 4}))
    with pytest.raises(UserError, match="tensor '3.0.linear.weight' of Medusa heads is missing"):
        read_medusa(tmp_path / "heads", LLAMA)


def test_heads_that_cannot_be():
    with pytest.raises(UserError, match="count is 4, and there are 3 Medusa heads"):
        replace(heads(), count=4)
    other = replace(LLAMA, num_layers=3)
    with pytest.raises(UserError, match="model of 2 layers .* and this one has 3"):
        heads().check(other)
    with pytest.raises(UserError, match="a tree has 4 levels, and the heads guess 3 tokens ahead"):
        TreeDrafter(heads(), 2, 4, 8).check(LLAMA)
