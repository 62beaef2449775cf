"""EAGLE-3: what is trained is what guesses, and what guesses loses nothing."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_by_one import guesses, one_by_one
from small_models import GEMMA, LLAMA, PROMPTS, SIZES

from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import hidden_states_with_layers, init
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import Eagle3, Target, begin, init_eagle3, speculate
from jaxopt_models.speculative.eagle3_params import default_layers
from jaxopt_models.speculative.unrolled import unrolled

# The tokens that a head of half the vocabulary may say.
HALF = jnp.asarray(np.arange(1, 64, 2), jnp.int32)

every_place = jax.jit(unrolled, static_argnames=("steps", "remat"))


@functools.cache
def target(config: ModelConfig = LLAMA) -> Target:
    return Target(config, init(config, jax.random.key(0)))


@functools.cache
def head(config: ModelConfig = LLAMA, half: bool = False, count: int = 4) -> Eagle3:
    vocabulary = HALF if half else None
    return init_eagle3(target(config), jax.random.key(3), vocabulary=vocabulary, count=count)


@functools.partial(jax.jit, static_argnames=("layers",))
def features_of(own: Target, tokens: Any, layers: Any, starts: Any = None) -> jax.Array:
    _, behind = hidden_states_with_layers(own.config, own.params, tokens, layers, starts)
    return jnp.concatenate([behind[i] for i in layers], axis=-1)


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_what_is_trained_is_what_guesses(config, norm_before_residual):
    """Every step from every place of a text, beside one token after the other with a cache; also
    where the text is the second document of a row."""
    steps, own = 4, target(config)
    one = replace(head(config), norm_before_residual=norm_before_residual)
    documents = [jax.random.randint(jax.random.key(n), (1, n), 0, 64) for n in (5, 11)]
    starts = jnp.asarray([[0] * 5 + [5] * 11], jnp.int32)
    packed = jnp.concatenate(documents, axis=1)
    features = features_of(own, packed, one.layers, starts)
    together = every_place(one, own, packed, features, steps, starts, remat=True)
    alone = features_of(own, documents[1], one.layers)
    for t in range(11 - steps):
        expected = one_by_one(one, own, documents[1], alone, t, steps)
        found = jnp.stack([x[0, 5 + t] for x in together])
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guess_is_that_of_the_whole_text_at_once(temperature, half):
    """However many of the guesses before were right: what stood for features is replaced."""
    own, one = target(), head(half=half)
    sampler = make_sampler(3, temperature=temperature)
    model = own.config, own.params
    state, counts = begin(*model, PROMPTS, 40, sampler, (), one), set()
    for _ in range(6):
        guess, expected = guesses(one, own, state, sampler)
        assert guess.tolist() == expected.tolist()
        assert not half or np.isin(guess, HALF).all()
        counts |= set(state.count.tolist())
        state = speculate(*model, state, one, sampler, (), 1)
    assert temperature == 0 or half or len(counts) > 1


@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
def test_tokens_are_those_of_plain_generation(half):
    own, options = target(), {"max_new_tokens": 30, "temperature": [0.0, 1.0, 0.7]}
    found = generate(own.config, own.params, PROMPTS, draft=head(half=half), **options)
    assert found.tokens == generate(own.config, own.params, PROMPTS, **options).tokens


def test_layers_that_are_read():
    assert default_layers(32) == (1, 15, 28)
    assert default_layers(30) == (1, 14, 26)
    assert default_layers(2) == (1, 0, 0)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"num_hidden_layers": 1}, "reads layers .* and the model has 1; it was made for another"),
        ({"hidden_size": 64}, "reads 96 features, and 3 layers of the model have 192"),
    ],
)
def test_heads_of_other_models_are_refused(changes, problem):
    config = ModelConfig.from_hf({"model_type": "llama"} | SIZES | changes)
    with pytest.raises(UserError, match=problem):
        generate(config, init(config, jax.random.key(0)), [[1]], draft=head())
    with pytest.raises(UserError, match="count must be at least 1"):
        replace(head(), count=0)
