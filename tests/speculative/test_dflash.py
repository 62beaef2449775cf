"""DFlash: what is trained is what guesses, and what guesses loses nothing."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GEMMA, LLAMA, PROMPTS, SIZES

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import hidden_states_with_layers, init
from jaxopt_models.qtensor import quantize_array
from jaxopt_models.sampling import make_sampler, position_noise
from jaxopt_models.speculative import DFlash, Prompted, Seen, Target, TreeDrafter, init_dflash
from jaxopt_models.speculative.blocks import blocks
from jaxopt_models.speculative.dflash import filled_in
from jaxopt_models.speculative.dflash_params import default_layers

MASK, BLOCK = 63, 5


@functools.cache
def target(config: ModelConfig = LLAMA) -> Target:
    return Target(config, init(config, jax.random.key(0)))


@functools.cache
def head(config: ModelConfig = LLAMA) -> DFlash:
    """Of two layers, as unlike new ones as trained ones would be."""
    options: dict[str, Any] = {"mask_token": MASK, "layers": (0, 1), "depth": 2, "block": BLOCK}
    fresh = init_dflash(target(config), jax.random.key(3), **options)
    keys = iter(jax.random.split(jax.random.key(4), 100))

    def moved(x: jax.Array) -> jax.Array:
        return x + 0.1 * jax.random.normal(next(keys), x.shape)

    return replace(fresh, params=jax.tree.map(moved, fresh.params))


def features_of(own: Target, tokens: Any, layers: Any, starts: Any = None) -> jax.Array:
    _, behind = hidden_states_with_layers(own.config, own.params, tokens, layers, starts)
    return jnp.concatenate([behind[i] for i in layers], axis=-1)


LENGTH = 16


@jax.jit
def alone(one: DFlash, own: Target, text: jax.Array, length: jax.Array) -> jax.Array:
    """Hidden states of the block that begins with the last token of a text int32 [16], by the
    cache; what stands behind the text does not matter."""
    tokens, lengths = text[None], length[None]
    features = features_of(own, tokens, one.layers)
    # Behind what is known, anything.
    known = (jnp.arange(LENGTH) < length - 1)[None, :, None]
    features = jnp.where(known, features, 100.0)
    state = one.begin(own, Prompted(tokens, lengths - 1, features), LENGTH)
    last = jnp.take_along_axis(features, (lengths - 2)[:, None, None], axis=1)
    seen = Seen(tokens, lengths, last, jnp.ones(1, jnp.int32))
    return filled_in(one, own, state, seen)[0][0]


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_what_is_trained_is_what_guesses(config, monkeypatch):
    """Blocks at many places of a row at once, beside each alone with a cache; also where the text
    is the second document of a row, and whatever of them is computed together."""
    own, one = target(config), head(config)
    documents = [jax.random.randint(jax.random.key(n), (n,), 0, 64) for n in (5, 11)]
    starts = jnp.asarray([[0] * 5 + [5] * 11], jnp.int32)
    packed = jnp.concatenate(documents)[None]
    features = features_of(own, packed, one.layers, starts)
    anchors = jnp.asarray([[9, 1, 15, 6, 4]], jnp.int32)
    arguments = one, own, packed, features, anchors, starts
    together = jax.jit(blocks)(*arguments)
    monkeypatch.setattr("jaxopt_models.speculative.blocks._SCORES", 2 * 2 * BLOCK * (16 + BLOCK))
    in_twos = jax.jit(functools.partial(blocks))(*arguments)  # which is traced anew
    np.testing.assert_allclose(in_twos, together, atol=1e-5)
    for number, place in enumerate(anchors[0].tolist()):
        document, end = (documents[1], place - 5) if place >= 5 else (documents[0], place)
        text = jnp.pad(document, (0, LENGTH - len(document)), constant_values=9)
        expected = alone(one, own, text, jnp.asarray(end + 1))
        np.testing.assert_allclose(together[0, number], expected, atol=1e-5)


def by_hand(one: DFlash, own: Target, text: Any) -> np.ndarray:
    """The block behind a text, in float64, one place at a time."""
    wide = functools.partial(np.asarray, dtype=np.float64)
    params, config = jax.tree.map(wide, one.params), one.config
    eps, dim = config.rms_norm_eps, config.head_dim

    def norm(module: Any, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * module["weight"]

    def turned(x: np.ndarray, place: int) -> np.ndarray:
        half = dim // 2
        angle = place * config.rope.theta ** (-np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    features = wide(features_of(own, text[None, :-1], one.layers)[0])
    context = norm(params["hidden_norm"], features @ params["fc"]["weight"].T)
    table = wide(own.params["embed_tokens"]["weight"])
    x, first = table[[int(text[-1]), *[MASK] * (BLOCK - 1)]], len(text) - 1
    for layer in params["layers"]:
        weights, inner = layer["self_attn"], norm(layer["input_layernorm"], x)

        def heads(name: str, row: np.ndarray, weights: Any = weights) -> np.ndarray:
            return (weights[f"{name}_proj"]["weight"] @ row).reshape(-1, dim)

        rows = [*context, *inner]
        keys = [turned(norm(weights["k_norm"], heads("k", row)), i) for i, row in enumerate(rows)]
        values, mixed = [heads("v", row) for row in rows], []
        for i, row in enumerate(inner):
            query = turned(norm(weights["q_norm"], heads("q", row)), first + i)
            out = []
            for head, q in enumerate(query):
                group = head * config.num_kv_heads // config.num_heads
                scores = np.exp([q @ key[group] / np.sqrt(dim) for key in keys])
                out.append(scores / scores.sum() @ np.asarray(values)[:, group])
            mixed.append(np.concatenate(out))
        x = x + np.asarray(mixed) @ weights["o_proj"]["weight"].T
        mlp, inner = layer["mlp"], norm(layer["post_attention_layernorm"], x)
        gate, up = (inner @ mlp[f"{name}_proj"]["weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down_proj"]["weight"].T
    return norm(params["norm"], x)


def test_a_block_is_the_formula():
    text = jax.random.randint(jax.random.key(5), (7,), 0, 64)
    own, one = target(), head()
    found = alone(one, own, jnp.pad(text, (0, LENGTH - 7)), jnp.asarray(7))
    np.testing.assert_allclose(found, by_hand(one, own, text), atol=1e-4)


def test_what_a_block_depends_on():
    """Of the text on all before the anchor and on the anchor, and on nothing else; and each place
    on how many come behind it, as in no chain."""
    own, one, anchor = target(), head(), 6
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 64)
    features, at = features_of(own, tokens, one.layers), jnp.full((1, 1), anchor, jnp.int32)
    said = jax.jit(lambda one, tokens, features: blocks(one, own, tokens, features, at)[0, 0])
    first = said(one, tokens, features)
    for place in range(12):
        other = said(one, tokens, features.at[0, place].add(1.0))
        assert (other == first).all() == (place >= anchor)
        other = said(one, tokens.at[0, place].add(-1), features)
        assert (other == first).all() == (place != anchor)
    shorter = said(replace(one, block=BLOCK - 1, count=1), tokens, features)
    assert jnp.abs(shorter[1] - first[1]).max() > 1e-3


def test_memory_does_not_grow_with_anchors(monkeypatch):
    """But by what is said: gradients of four times as many as fit together take little more."""
    monkeypatch.setattr("jaxopt_models.speculative.blocks._SCORES", 50 * 2 * 2 * 5 * 69)
    own, one = target(), head()
    tokens, features = jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64, 64))

    def taken(count: int) -> int:
        def total(params: Any) -> jax.Array:
            anchors = jnp.ones((2, count), jnp.int32)
            return blocks(replace(one, params=params), own, tokens, features, anchors).sum()

        analysis = jax.jit(jax.grad(total)).lower(one.params).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert taken(4 * 50 - 3) < 1.5 * taken(50)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guess_is_that_of_the_whole_text_at_once(temperature):
    """However many of the guesses before were right, in rows of different lengths: nothing is left
    of blocks that went before, nor of features of what was refused."""
    own, one, width = target(), head(), 32
    sampler = make_sampler(3, temperature=temperature)
    tokens = jax.random.randint(jax.random.key(0), (3, width), 0, 64)
    features = features_of(own, tokens, one.layers)
    propose = jax.jit(lambda state, seen: one.propose(own, state, seen, sampler))
    fresh = jax.jit(lambda length: one.begin(own, Prompted(tokens, length - 1, features), width))
    length, state = jnp.asarray([1, 4, 8]), None
    for count in ([1, 1, 1], [1, 3, 5], [5, 1, 2], [2, 5, 5], [4, 4, 1]):
        count = jnp.asarray(count)
        length = length + count
        before, columns = length - count - 1, jnp.arange(BLOCK)[None]
        state = fresh(length) if state is None else state
        places = jnp.where(columns < count[:, None], before[:, None] + columns, width - 1)
        new = jnp.take_along_axis(features, places[:, :, None], axis=1)
        guess, state = propose(state, Seen(tokens, length, new, count))
        last = jnp.take_along_axis(features, (length - 2)[:, None, None], axis=1)
        last = jnp.pad(last, ((0, 0), (0, BLOCK - 1), (0, 0)))
        anew = Seen(tokens, length, last, jnp.ones(3, jnp.int32))
        expected, _ = propose(fresh(length), anew)
        assert guess.tokens.tolist() == expected.tokens.tolist()
        if temperature:  # the noise is that of the model's tokens at these positions
            said = one.logits(own, filled_in(one, own, fresh(length), anew)[0][:, 1:])
            at = length[:, None] + jnp.arange(BLOCK - 1)[None]
            noise = position_noise(sampler.key, sampler.request, at, 64)
            assert guess.tokens.tolist() == jnp.argmax(said + noise, axis=-1).tolist()


def test_a_tree_holds_the_chain():
    """What is likeliest at each place, among all ways of two tokens a place."""
    own, one, width = target(), head(), 12
    tokens = jax.random.randint(jax.random.key(0), (2, width), 0, 64)
    features, length = features_of(own, tokens, one.layers), jnp.asarray([4, 9])
    last = jnp.take_along_axis(features, (length - 2)[:, None, None], axis=1)
    seen, sampler = Seen(tokens, length, last, jnp.ones(2, jnp.int32)), make_sampler(2)

    @jax.jit
    def guessed(draft: Any) -> Any:
        state = draft.begin(own, Prompted(tokens, length - 1, features), width)
        return draft.propose(own, state, seen, sampler)[0]

    chain, branched = guessed(one).tokens, guessed(TreeDrafter(one, 2, 3, 10))
    for row in range(2):
        ways = [np.flatnonzero(seen)[1:] - 1 for seen in branched.topology.ancestors[row]]
        found = {tuple(branched.tokens[row, way].tolist()) for way in ways}
        assert tuple(chain[row, :3].tolist()) in found


def in_int8(params: Any) -> Any:
    def leaf(path: str, weight: Any) -> Any:
        decoder = tree.is_decoder_matrix(path, weight)
        return quantize_array(weight, "int8", granularity="channel") if decoder else weight

    return tree.map_with_path(leaf, params)


@pytest.mark.parametrize(
    "quantized, shape",
    [(False, None), (False, (3, 4, 7)), (True, None)],
    ids=["chain", "tree", "quantized"],
)
def test_tokens_are_those_of_plain_generation(quantized, shape):
    """Greedy, sampled and filtered rows, of prompts of 1 to 70 tokens."""
    own, one = target(), head()
    params = in_int8(own.params) if quantized else own.params
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": [0.0, 1.0, 0.7]}
    options["top_p"] = [1.0, 1.0, 0.8]
    draft = one if shape is None else TreeDrafter(one, *shape)
    found = generate(own.config, params, PROMPTS, draft=draft, **options)
    assert found.tokens == generate(own.config, params, PROMPTS, **options).tokens


def test_a_model_of_another_kind_loses_nothing_either():
    """Scaled embeddings, a window, and fewer guesses than the block has places."""
    own, one = target(GEMMA), replace(head(GEMMA), count=2)
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": [0.0, 1.0, 0.7]}
    found = generate(own.config, own.params, PROMPTS, draft=one, **options)
    assert found.tokens == generate(own.config, own.params, PROMPTS, **options).tokens


def test_layers_that_are_read():
    assert default_layers(36, 5) == (1, 9, 17, 25, 33)
    assert default_layers(64, 10) == (1, 8, 14, 21, 28, 34, 41, 48, 54, 61)
    assert default_layers(30, 1) == (15,)
    assert default_layers(2, 5) == (1,)
    assert default_layers(1, 5) == (0,)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"num_hidden_layers": 1}, "reads layers .* and the model has 1; it was made for another"),
        ({"hidden_size": 64}, r"embedding \[64, 32\] and reads 64 .* this model's .* \[64, 64\]"),
        ({"vocab_size": 80}, r"embedding \[64, 32\] .* this model's embedding is \[80, 32\]"),
    ],
)
def test_heads_of_other_models_are_refused(changes, problem):
    config = ModelConfig.from_hf({"model_type": "llama"} | SIZES | changes)
    with pytest.raises(UserError, match=problem):
        generate(config, init(config, jax.random.key(0)), [[1]], draft=head())


def test_heads_that_cannot_be():
    with pytest.raises(UserError, match="count is 5, and a block of 5 places says 4 tokens"):
        replace(head(), count=5)
    with pytest.raises(UserError, match="mask_token is 64, and the model has tokens 0 to 63"):
        replace(head(), mask_token=64)
    with pytest.raises(UserError, match="a tree has 5 levels, and the heads guess 4 tokens ahead"):
        TreeDrafter(head(), 2, 5, 8).check(LLAMA)
    own = target()
    table = own.params["embed_tokens"]["weight"].at[7].set(0.0)
    blank = Target(LLAMA, own.params | {"embed_tokens": {"weight": table}})
    with pytest.raises(UserError, match="mask_token 7 has an embedding of zeros"):
        init_dflash(blank, jax.random.key(0), mask_token=7)
