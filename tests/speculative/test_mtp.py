"""MTP heads: the formula, what is trained is what guesses, nothing is lost, and their files."""

import functools
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_by_one import guesses, one_by_one
from small_models import GEMMA, LLAMA, PROMPTS

from jaxopt_models.checkpoint.safetensors import open_index
from jaxopt_models.checkpoint.safetensors_writer import write_sharded
from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.block import block
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import embed_tokens, hidden_states, init, logits
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative import (
    Mtp,
    Target,
    TreeDrafter,
    begin,
    init_mtp,
    speculate,
)
from jaxopt_models.speculative.mtp_files import export_mtp, is_mtp, read_mtp
from jaxopt_models.speculative.unrolled import unrolled

every_place = jax.jit(unrolled, static_argnames=("steps", "remat"))
states_of = jax.jit(hidden_states, static_argnames=("config",))

# Norms before and behind each half of a layer, with an offset; a soft cap on scores.
CAPPED = replace(GEMMA, attention_softcap=3.0)


@functools.cache
def target(config: ModelConfig = LLAMA) -> Target:
    return Target(config, init(config, jax.random.key(0)))


@functools.cache
def head(config: ModelConfig = LLAMA) -> Mtp:
    """With norms that do something."""
    fresh = init_mtp(target(config), jax.random.key(3))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh)


def normed(config: ModelConfig, module: Any, x: np.ndarray) -> np.ndarray:
    gain = np.asarray(module["weight"], np.float64) + (1.0 if config.unit_offset_norm else 0.0)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * gain


@pytest.mark.parametrize("config", [LLAMA, CAPPED], ids=["llama", "gemma"])
def test_a_head_is_the_formula(config):
    """Beside the model's own kind of layer, between the two halves of the formula in numpy."""
    own, one = target(config), head(config)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 64)
    hidden = states_of(config, own.params, tokens)
    (found,) = every_place(one, own, tokens, hidden, 1)
    e = np.asarray(embed_tokens(config, own.params, jnp.roll(tokens, -1, axis=1)), np.float64)
    parts = (
        normed(config, one.params["pre_fc_norm_embedding"], e),
        normed(config, one.params["pre_fc_norm_hidden"], np.asarray(hidden, np.float64)),
    )
    u = np.concatenate(parts, axis=-1) @ np.asarray(one.params["fc"]["weight"], np.float64).T
    (layer,), places = one.params["layers"], jnp.broadcast_to(jnp.arange(9), (2, 9))
    x, _, _ = block(one.config, layer, jnp.asarray(u, jnp.float32), places, kind="full")
    expected = normed(config, one.params["norm"], np.asarray(x, np.float64))
    np.testing.assert_allclose(found[:, :-1], expected[:, :-1], atol=1e-4)
    said = logits(config, own.params, jnp.asarray(expected, jnp.float32))
    np.testing.assert_allclose(one.logits(own, found)[:, :-1], said[:, :-1], atol=1e-3)


@pytest.mark.parametrize("config", [LLAMA, CAPPED], ids=["llama", "gemma"])
def test_what_is_trained_is_what_guesses(config):
    """Every step from every place of a text, beside one token after the other with a cache; also
    where the text is the second document of a row."""
    steps, own, one = 4, target(config), head(config)
    documents = [jax.random.randint(jax.random.key(n), (1, n), 0, 64) for n in (5, 11)]
    starts = jnp.asarray([[0] * 5 + [5] * 11], jnp.int32)
    packed = jnp.concatenate(documents, axis=1)
    hidden = states_of(config, own.params, packed, starts)
    together = every_place(one, own, packed, hidden, steps, starts, remat=True)
    alone = states_of(config, own.params, documents[1])
    for t in range(11 - steps):
        expected = one_by_one(one, own, documents[1], alone, t, steps)
        found = jnp.stack([x[0, 5 + t] for x in together])
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_guess_is_that_of_the_whole_text_at_once():
    """However many of the guesses before were right: what stood for the model's states is
    replaced."""
    own, one = target(), head()
    sampler, model = make_sampler(3, temperature=1.0), (own.config, own.params)
    state, counts = begin(*model, PROMPTS, 40, sampler, (), one), set()
    for _ in range(6):
        guess, expected = guesses(one, own, state, sampler)
        assert guess.tolist() == expected.tolist()
        counts |= set(state.count.tolist())
        state = speculate(*model, state, one, sampler, (), 1)
    assert len(counts) > 1


@pytest.mark.parametrize("tree", [None, (3, 2, 7)], ids=["chain", "tree"])
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_tokens_are_those_of_plain_generation(config, tree):
    own, one = target(config), head(config)
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": [0.0, 1.0, 0.7]}
    draft = one if tree is None else TreeDrafter(one, *tree)
    found = generate(config, own.params, PROMPTS, draft=draft, **options)
    assert found.tokens == generate(config, own.params, PROMPTS, **options).tokens


# Files

_IN_LAYER = (
    "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
).split()
NAMES = {f"mtp.layers.0.{name}.weight" for name in _IN_LAYER} | {
    f"mtp.{name}.weight" for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
}


def tensors_of(directory: Any) -> dict[str, np.ndarray]:
    index = open_index(directory)
    return {name: index.read(name) for name in index.names()}


def test_a_head_in_files(tmp_path):
    one = head()
    export_mtp(tmp_path / "head", one, LLAMA, dtype=jnp.float32, verifier="its")
    assert is_mtp(tmp_path / "head") and not is_mtp(tmp_path)
    fields = json.loads((tmp_path / "head" / "config.json").read_text())
    assert fields["mtp_num_hidden_layers"] == 1 and not fields["mtp_use_dedicated_embeddings"]
    tensors = tensors_of(tmp_path / "head")
    assert set(tensors) == NAMES and tensors["mtp.fc.weight"].shape == (32, 64)
    found = read_mtp(tmp_path / "head", LLAMA)
    assert jax.tree.structure(found) == jax.tree.structure(one)
    for own, its in zip(*map(jax.tree.leaves, (found, one)), strict=True):
        np.testing.assert_array_equal(own, its)
    with pytest.raises(UserError, match="already exists"):
        export_mtp(tmp_path / "head", one, LLAMA)


def test_a_head_beside_its_model(tmp_path):
    """What is not mtp.* is the model's, and is let be; a head may have an embedding of its own."""
    table = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    export_mtp(tmp_path / "head", head(), LLAMA, dtype=jnp.float32)
    both = tensors_of(tmp_path / "head") | {"model.norm.weight": np.ones(32, np.float32)}
    (tmp_path / "head" / "model.safetensors").unlink()
    write_sharded(tmp_path / "head", both | {"mtp.embed_tokens.weight": table})
    found = read_mtp(tmp_path / "head", LLAMA, count=2, dtype="bfloat16")
    np.testing.assert_array_equal(found.params["embed_tokens"]["weight"], table)
    assert found.count == 2 and found.config.dtype == "bfloat16"


@pytest.mark.parametrize(
    "fields, tensors, problem",
    [
        ({}, {"mtp.fc.weight": None}, "tensor 'mtp.fc.weight' of an MTP head is missing"),
        ({}, {"mtp.norm.weight": np.ones(3, np.float32)}, "tensor 'mtp.norm.weight' has shape"),
        ({}, {"mtp.layers.1.x": np.ones(3, np.float32)}, "'mtp.layers.1.x' has no place in an MTP"),
        ({"mtp_num_hidden_layers": 2}, {}, "is 2, and heads of 1 layer are supported"),
    ],
)
def test_what_is_no_head_of_the_model_is_refused(tmp_path, fields, tensors, problem):
    export_mtp(tmp_path / "head", head(), LLAMA, dtype=jnp.float32)
    file = tmp_path / "head" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    changed = tensors_of(tmp_path / "head") | tensors
    (tmp_path / "head" / "model.safetensors").unlink()
    write_sharded(tmp_path / "head", {name: t for name, t in changed.items() if t is not None})
    with pytest.raises(UserError, match=problem):
        read_mtp(tmp_path / "head", LLAMA)


def test_heads_of_other_models_are_refused():
    other = replace(LLAMA, num_layers=3)
    with pytest.raises(UserError, match="model of 2 layers of width 32, and this one has 3"):
        head().check(other)
    with pytest.raises(UserError, match="count must be at least 1"):
        replace(head(), count=0)
