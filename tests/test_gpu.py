"""On a GPU: codes equal the CPU bit for bit, logits agree, decoding is in place."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import fake_quant, generate, init, quantize_array
from jaxopt_models.decoding import decode_loop, start
from jaxopt_models.formats import FORMATS, resolve
from jaxopt_models.inference import prepare
from jaxopt_models.models.cache import cache_bytes
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward
from jaxopt_models.ops import linear
from jaxopt_models.packed import pack_leaf
from jaxopt_models.qtensor import InputQuantizer, QTensor
from jaxopt_models.sampling import make_sampler
from jaxopt_models.tree import is_decoder_matrix, map_with_path
from kernels_pallas.hopper import hopper_processors

pytestmark = pytest.mark.gpu

VARIANTS = [
    *FORMATS,
    ("fp8", {"granularity": "channel"}),
    ("fp8", {"granularity": "block2d", "block_size": 16}),
    ("int8", {"granularity": "channel"}),
    ("int4", {"block_size": 32, "symmetric": False}),
    ("int4", {"scale_dtype": "bfloat16"}),
    ("nf4", {"scale_dtype": "float8_e4m3fn"}),
    ("mxfp4", {"mx_rule": "floor"}),
]


def _spec(variant):
    name, options = variant if isinstance(variant, tuple) else (variant, {})
    return resolve(name, **options)


def _inputs():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(48, 200)).astype(np.float32)
    spread = normal * 10.0 ** rng.uniform(-30, 30, size=(48, 1)).astype(np.float32)
    ties = rng.integers(-24, 25, size=(48, 200)).astype(np.float32) / 4
    tiny = normal * np.float32(1e-39)
    return {"normal": normal, "spread": spread, "ties": ties, "zeros": 0 * normal, "tiny": tiny}


def _on(device, function, *args):
    return jax.tree.map(np.asarray, jax.jit(function)(*jax.device_put(args, device)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: str(v))
def test_codes_and_values_equal_the_cpu_bit_for_bit(variant):
    spec = _spec(variant)

    def everything(x):
        leaf = quantize_array(x, spec)
        return leaf.codes, leaf.scale, leaf.global_scale, leaf.dequantize(), fake_quant(x, spec)

    for name, x in _inputs().items():
        gpu = _on(jax.devices("gpu")[0], everything, x)
        cpu = _on(jax.devices("cpu")[0], everything, x)
        for a, b in zip(jax.tree.leaves(gpu), jax.tree.leaves(cpu), strict=True):
            assert a.tobytes() == b.tobytes(), f"{spec} differs on {name}"
        assert gpu[3].tobytes() == gpu[4].tobytes(), f"{spec}: fake_quant differs on {name}"


def _config() -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
        }
    )


@pytest.mark.parametrize("name", ["bf16", "int4", "nvfp4", "fp8"])
def test_forward_agrees_with_the_cpu(name):
    config = _config()

    def leaf(path, weight):
        return quantize_array(weight, name) if "_proj" in path and name != "bf16" else weight

    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    with jax.default_device(jax.devices("cpu")[0]):
        params = map_with_path(leaf, init(config, jax.random.key(0)))
    run = lambda p, t: forward(config, p, t)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        gpu = _on(jax.devices("gpu")[0], run, params, tokens)
        cpu = _on(jax.devices("cpu")[0], run, params, tokens)
    np.testing.assert_allclose(gpu, cpu, atol=2e-4, rtol=1e-4)


def test_a_request_gets_the_same_tokens_alone_and_in_a_batch():
    config = _config()
    params = init(config, jax.random.key(0))
    prompts = [[5, 6, 7], [1, 2, 3, 4, 9, 9, 9], [8]]
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 50, "eos_token_ids": ()}
    together = generate(config, params, prompts, **options).tokens
    alone = [
        generate(config, params, [prompt], request_ids=[i], **options).tokens[0]
        for i, prompt in enumerate(prompts)
    ]
    assert together == alone


@pytest.mark.parametrize("batch", [1, 8])
def test_decoding_is_in_place(batch):
    config = _config()
    params = init(config, jax.random.key(0))
    sampler = make_sampler(batch)
    state, _ = start(config, params, [[1, 2, 3]] * batch, 32000 // batch, sampler, ())
    compiled = decode_loop.lower(config, params, state, sampler, ()).compile()
    layer = state.cache[0]
    shape = ",".join(map(str, layer.keys.shape))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", compiled.as_text() or "")
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < cache_bytes((layer,))


def _wide_config() -> ModelConfig:
    fields = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    fields |= {"num_key_value_heads": 2, "head_dim": 64}
    return replace(ModelConfig.from_hf(_config().to_hf() | fields), dtype="bfloat16")


def _on_hopper() -> bool:
    return hopper_processors() is not None


def _more_kernels(config: ModelConfig, prepared: Any, params: Any) -> bool:
    """Whether prepared parameters take kernels beside those that every model takes."""
    tokens = jnp.arange(4, dtype=jnp.int32)[None]
    lowered = (
        jax.jit(forward, static_argnums=0).lower(config, p, tokens) for p in (prepared, params)
    )
    ours, theirs = (one.as_text().count("mosaic_gpu") for one in lowered)
    assert (theirs > 0) == _on_hopper()  # norms
    return ours > theirs


@pytest.mark.parametrize("name", ["bf16", "int4", "nvfp4", "mxfp4"])
def test_a_prepared_model_takes_kernels_and_says_the_same(name):
    """Up to bfloat16's roundings, which the two layouts make at different places."""
    config = _wide_config()
    options: dict[str, Any] = {"scale_dtype": "bfloat16"} if name == "int4" else {}

    def leaf(path, weight):
        quantized = name != "bf16" and is_decoder_matrix(path, weight)
        return quantize_array(weight, name, **options) if quantized else weight

    params = map_with_path(leaf, init(config, jax.random.key(0), jnp.bfloat16))
    prepared, run = prepare(params), jax.jit(forward, static_argnums=0)
    for length in (1, 7, 16, 40):
        tokens = jnp.arange(length, dtype=jnp.int32)[None]
        found, expected = (np.asarray(run(config, p, tokens)) for p in (prepared, params))
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    assert _more_kernels(config, prepared, params) == (name != "bf16" and _on_hopper())


# 8-bit weights, and how their inputs are quantized: options and a static amax.
EIGHT: dict[str, tuple[str, dict[str, Any], dict[str, Any], float | None]] = {
    "fp8 by token": ("fp8", {"granularity": "channel"}, {"granularity": "token"}, None),
    "fp8 static": ("fp8", {}, {}, 4.0),
    "fp8 blocks": ("fp8", {"granularity": "block2d"}, {"block_size": 128}, None),
    "int8 by token": ("int8", {"granularity": "channel"}, {"granularity": "token"}, None),
    "int8 static": ("int8", {"granularity": "channel"}, {}, 4.0),
}


def _eight_bit(name: str, weight: jax.Array) -> QTensor:
    format, options, of_input, amax = EIGHT[name]
    static = None if amax is None else jnp.float32(amax)
    quantizer = InputQuantizer(static, resolve(format, **of_input))
    return replace(quantize_array(weight, format, **options), input=quantizer)


def _error(found: Any, exact: Any) -> float:
    exact = np.asarray(exact, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("name", EIGHT)
def test_products_of_8_bits_are_those_of_the_codes(name):
    """Of FP8 sums the hardware keeps about 14 bits."""
    for m, n, k in [(1, 512, 512), (5, 1040, 1152), (16, 4096, 4096), (300, 256, 1024)]:
        keys = jax.random.split(jax.random.key(m))
        x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
        q = _eight_bit(name, jax.random.normal(keys[1], (n, k)))
        assert q.input is not None
        exact = np.asarray(q.input(x.astype(jnp.float32)), np.float64)
        exact = exact @ np.asarray(q.dequantize(), np.float64).T
        assert _error(jax.jit(linear)(x, pack_leaf(q)), exact) < 4e-3, (m, n, k)


@pytest.mark.parametrize("name", EIGHT)
def test_a_prepared_model_of_8_bits_takes_kernels_and_says_the_same(name):
    """As near to what float32 computes as the model that it was made of.

    The two are no nearer to each other: an activation that bfloat16 rounds otherwise may get
    another code of 8 bits.
    """
    config, run = _wide_config(), jax.jit(forward, static_argnums=0)

    def leaf(path, weight):
        return _eight_bit(name, weight) if is_decoder_matrix(path, weight) else weight

    params = map_with_path(leaf, init(config, jax.random.key(0), jnp.bfloat16))
    prepared = prepare(params)
    for length in (1, 7, 16, 40):
        tokens = jnp.arange(length, dtype=jnp.int32)[None]
        with jax.default_matmul_precision("highest"):
            exact = run(replace(config, dtype="float32"), params, tokens)
        found, expected = (run(config, p, tokens) for p in (prepared, params))
        assert _error(found, exact) < 1.5 * _error(expected, exact) < 0.3
    assert _more_kernels(config, prepared, params) == _on_hopper()
