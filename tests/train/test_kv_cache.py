"""Training under a quantized cache: what is trained computes as what is served."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import ONE_LAYER, quantized, sure_model

import jaxopt_models as jom
from jaxopt_models import data, tree
from jaxopt_models.errors import UserError
from jaxopt_models.kv_quantizer import KVQuantizer, with_kv_cache
from jaxopt_models.models.cache import empty_cache
from jaxopt_models.models.cached import decode_step
from jaxopt_models.models.transformer import forward, forward_with_taps
from jaxopt_models.quantize.kv import KVChoice, kv_measure, kv_quantizer
from jaxopt_models.train.leaves import fake_quantized, fold
from jaxopt_models.train.objectives import next_token_loss
from jaxopt_models.train.run import train
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.step import make_train_step, start
from jaxopt_models.train.trainable import partition

CHOICES = {
    "fp8": KVChoice(format="fp8"),
    "int8": KVChoice(format="int8"),
    "nvfp4": KVChoice(format="nvfp4", rotate=True, bias="key", search="mse"),
}
_RECIPE = """
rules: [{match: "*/mlp/*/weight", weight: nvfp4}]
kv_cache: {format: nvfp4, rotate: true, bias: key}
"""
_TAPS = ("self_attn/key", "self_attn/value")


@pytest.fixture(scope="module")
def tiny_params() -> Any:
    """Of a layer, since a cache is calibrated, trained under and read in each layer alike."""
    return sure_model(ONE_LAYER)


@pytest.fixture(scope="module")
def tiny_quantized(tiny_params) -> Any:
    return quantized(tiny_params)


@pytest.fixture(scope="module")
def caches(tiny_params, tokens) -> dict[str, list[KVQuantizer]]:
    """Calibrated on the tokens, for each layer."""
    wanted = [f"layers/*/{tap}" for tap in _TAPS]
    taps = jax.jit(forward_with_taps, static_argnums=(0, 3))(
        ONE_LAYER, tiny_params, tokens, tuple(wanted)
    )[1]

    def layer(choice: KVChoice, i: int) -> KVQuantizer:
        seen = {tap: taps[f"layers/{i}/{tap}"] for tap in _TAPS}
        return kv_quantizer(ONE_LAYER, choice, jax.jit(kv_measure(choice.rotate))(seen))

    return {
        name: [layer(choice, i) for i in range(ONE_LAYER.num_layers)]
        for name, choice in CHOICES.items()
    }


def cache_leaves(params: Any) -> list[Any]:
    return jax.tree.leaves([layer["self_attn"]["kv_cache"] for layer in params["layers"]])


@jax.jit
def decoded(params: Any, tokens: jax.Array) -> jax.Array:
    """Logits [B, T, V], a token at a time, what came before being read from the cache."""
    rows, length = tokens.shape

    def step(cache: Any, position: jax.Array) -> Any:
        at = jnp.full((rows, 1), position, jnp.int32)
        logits, cache = decode_step(ONE_LAYER, params, tokens[:, position][:, None], at, cache)
        return cache, logits[:, 0]

    blank = empty_cache(ONE_LAYER, params, rows, length)
    _, logits = jax.lax.scan(step, blank, jnp.arange(length, dtype=jnp.int32))
    return jnp.swapaxes(logits, 0, 1)


@pytest.mark.parametrize("name", CHOICES)
def test_training_and_decoding_see_the_same(name, caches, tiny_params, tiny_quantized, tokens):
    fakes = fake_quantized(tiny_params, with_kv_cache(tiny_quantized, caches[name]))
    run = jax.jit(forward, static_argnums=0)
    trained, folded = run(ONE_LAYER, fakes, tokens), fold(fakes)
    assert np.array_equal(trained, run(ONE_LAYER, folded, tokens))
    np.testing.assert_allclose(decoded(folded, tokens), trained, atol=1e-4)
    bare = run(ONE_LAYER, fake_quantized(tiny_params, tiny_quantized), tokens)
    assert np.abs(bare - trained).max() > 1e-3  # it does round


def test_a_step_moves_the_weights_and_leaves_the_cache(caches, tiny_params, tiny_quantized, tokens):
    fakes = fake_quantized(tiny_params, with_kv_cache(tiny_quantized, caches["nvfp4"]))
    trained, frozen = partition(fakes)
    assert not any("kv_cache" in path for path, _ in tree.arrays_with_paths(trained))
    with pytest.raises(UserError, match="nothing that can be trained"):
        partition(fakes, train=("*/kv_cache/*",))
    optimizer = optax.adamw(1e-3, weight_decay=0.1)  # which shrinks what has no gradient
    step = make_train_step(next_token_loss(ONE_LAYER), optimizer)
    state, metrics = step(start(fakes, optimizer), tiny_params, {"tokens": tokens})
    assert np.isfinite(metrics["gradient_norm"]) and metrics["skipped"] == 0
    assert all(map(np.array_equal, cache_leaves(state.params), cache_leaves(fakes)))
    for module in ("q_proj", "k_proj", "v_proj"):
        moved, before = (
            params["layers"][0]["self_attn"][module]["weight"].weight
            for params in (state.params, fakes)
        )
        assert np.abs(moved - before).max() > 1e-4


def test_a_cache_alone_may_be_trained_for(caches, tiny_params):
    params = with_kv_cache(tiny_params, caches["fp8"])
    same = fake_quantized(tiny_params, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, params))
    with pytest.raises(UserError, match="no tensor is quantized"):
        fake_quantized(tiny_params, tiny_params)


def test_a_run_keeps_the_cache(tmp_path, byte_tokenizer):
    """Its scales to the last bit, from calibration to the checkpoint, though weights are halves."""
    config = jom.ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        }
    )
    params = jom.init(config, jax.random.key(0), jnp.bfloat16)
    jom.save(tmp_path / "model", config, params, byte_tokenizer)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(_RECIPE)
    (tmp_path / "text.txt").write_text("Keys and values are read more often than written. " * 20)
    text = {"text": str(tmp_path / "text.txt"), "windows": 2, "length": 16}
    settings = RunSettings.of(
        {"model": str(tmp_path / "model"), "recipe": str(recipe), "text": text["text"]}
        | {"steps": 2, "batch": 2, "length": 16, "calibration": text, "evaluation": text}
    )
    result = train("qad", settings, tmp_path / "out")
    loaded = jom.load(tmp_path / "out" / "model")
    model = jom.load(tmp_path / "model")
    batches = data.token_batches(model, (tmp_path / "text.txt").read_text(), 2, 16, 2)
    calibrated, _ = jom.quantize(model, jom.Recipe.load(recipe), batches)
    assert isinstance(loaded.params["layers"][0]["self_attn"]["kv_cache"], KVQuantizer)
    same = map(np.array_equal, cache_leaves(loaded.params), cache_leaves(calibrated))
    assert cache_leaves(loaded.params)[0].dtype == jnp.float32 and all(same)
    found = jom.evaluate(loaded.config, loaded.params, batches, model.params)
    assert result.log[-1]["kl"] == found.kl
