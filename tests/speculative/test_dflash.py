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
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import DFlash, Seen, Target, TreeDrafter, init_dflash
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
    state = one.begin(own, tokens, lengths - 1, features, LENGTH)
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
    jax.clear_caches()  # of what was traced with the other number
    in_twos = jax.jit(blocks)(*arguments)
    np.testing.assert_allclose(in_twos, together, atol=1e-5)
    for number, place in enumerate(anchors[0].tolist()):
        document, end = (documents[1], place - 5) if place >= 5 else (documents[0], place)
        text = jnp.pad(document, (0, LENGTH - len(document)), constant_values=9)
        expected = alone(one, own, text, jnp.asarray(end + 1))
        np.testing.assert_allclose(together[0, number], expected, atol=1e-5)


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guess_is_that_of_the_whole_text_at_once(temperature):
    """However many of the guesses before were right, in rows of different lengths: nothing is left
    of blocks that went before, nor of features of what was refused."""
    own, one, width = target(), head(), 32
    sampler = make_sampler(3, temperature=temperature)
    tokens = jax.random.randint(jax.random.key(0), (3, width), 0, 64)
    features = features_of(own, tokens, one.layers)
    propose = jax.jit(lambda state, seen: one.propose(own, state, seen, sampler))
    fresh = jax.jit(lambda length: one.begin(own, tokens, length - 1, features, width))
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
        expected, _ = propose(fresh(length), Seen(tokens, length, last, jnp.ones(3, jnp.int32)))
        assert guess.tokens.tolist() == expected.tokens.tolist()


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
