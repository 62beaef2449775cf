"""Quantized parameters made trainable, and back."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import CONFIG

import jaxopt_models as jom
from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.formats import resolve
from jaxopt_models.hadamard import hadamard
from jaxopt_models.qtensor import InputQuantizer, QTensor, quantize_array
from jaxopt_models.train.leaves import fake_quantized, fold

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def params():
    return jom.init(CONFIG, jax.random.key(0))


def _logits(params):
    return jax.jit(jom.forward, static_argnums=0)(CONFIG, params, TOKENS)


@pytest.mark.parametrize("scales", ["dynamic", "static", "learned", "learned_untied"])
def test_training_begins_at_the_quantized_model_and_ends_at_one(params, scales):
    quantized = tiny.quantized(params)
    fakes = fake_quantized(params, quantized, scales)
    np.testing.assert_allclose(_logits(fakes), _logits(quantized), atol=2e-2)
    moved = jax.tree.map(lambda x: x * 1.01 if x.dtype == jnp.float32 else x, fakes)
    folded = fold(moved)
    assert _logits(folded).tobytes() == _logits(moved).tobytes()
    kinds = {type(leaf) for _, leaf in tree.leaves_with_paths(folded)}
    assert QTensor in kinds and FakeTensor not in kinds
    assert jom.evaluate(CONFIG, moved, [TOKENS]) == jom.evaluate(CONFIG, folded, [TOKENS])
    assert folded["norm"]["weight"] is moved["norm"]["weight"]


def test_what_shares_a_second_level_still_does(params):
    amax = jnp.max(jnp.abs(params["layers"][0]["self_attn"]["q_proj"]["weight"])) * 2

    def leaf(path, weight):
        return (
            quantize_array(weight, "nvfp4", amax=amax) if path.endswith("_proj/weight") else weight
        )

    fakes = fake_quantized(params, tree.map_with_path(leaf, params))
    folded = fold(jax.tree.map(lambda x: x * 0.5, fakes))
    of = {p: q.global_scale for p, q in tree.leaves_with_paths(folded) if isinstance(q, QTensor)}
    own = quantize_array(jnp.ones((1, 16)), "nvfp4", amax=amax / 2).global_scale
    assert len(of) == 14 and all(scale == own for scale in of.values())


def test_input_steps_are_kept(params):
    weight = params["layers"][0]["mlp"]["down_proj"]["weight"]
    scale = 1 + jnp.arange(64) / 64
    quantizer = InputQuantizer(None, resolve("fp8", granularity="token"))
    q = quantize_array(hadamard(weight / scale[None], 16), "int4")
    q = replace(q, pre_scale=scale, rotate=16, input=quantizer)
    quantized = tree.replace(params, {"layers/0/mlp/down_proj/weight": q})
    fakes = fake_quantized(params, quantized, "static")
    fake = fakes["layers"][0]["mlp"]["down_proj"]["weight"]
    assert fake.rotate == 16 and fake.input is quantizer and fake.pre_scale is scale
    np.testing.assert_allclose(fake.weight, hadamard(weight / scale[None], 16), rtol=1e-5)
    assert _logits(fold(fakes)).tobytes() == _logits(fakes).tobytes()


def test_masters_are_float32(params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    fakes = fake_quantized(half, tiny.quantized(half))
    assert fakes["layers"][1]["mlp"]["up_proj"]["weight"].weight.dtype == jnp.float32
    assert fold(fakes)["layers"][1]["mlp"]["up_proj"]["weight"].dtype == "bfloat16"


def test_a_checkpoint_holds_them(params, tmp_path):
    fakes = fake_quantized(params, tiny.quantized(params), "learned_untied", "clip")
    jom.save(tmp_path / "fakes", CONFIG, fakes)
    loaded = jom.load(tmp_path / "fakes").params
    assert jax.tree.structure(loaded) == jax.tree.structure(fakes)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(fakes), strict=True):
        assert a.tobytes() == b.tobytes()


def test_what_is_refused(params):
    with pytest.raises(UserError, match="no tensor is quantized"):
        fake_quantized(params, params)
    with pytest.raises(UserError, match="scales 'fixed' are unknown; choose dynamic, static"):
        fake_quantized(params, tiny.quantized(params), "fixed")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"'layers/0/mlp/down_proj/weight': the scales of 'mxfp4'"):
        fake_quantized(params, tiny.quantized(params, "mxfp4"), "learned")
    other = jom.init(CONFIG, jax.random.key(1))
    with pytest.raises(UserError, match=r"down_proj/weight' is not what was quantized: they are 1"):
        fake_quantized(other, tiny.quantized(params))
    # As if factors had moved into the norm before.
    factors = jnp.exp(0.2 * jax.random.normal(jax.random.key(2), (32,)))
    path = "layers/0/mlp/up_proj/weight"
    scaled = {path: params["layers"][0]["mlp"]["up_proj"]["weight"] * factors[None]}
    quantized = tiny.quantized(tree.replace(params, scaled))
    with pytest.raises(UserError, match=r"up_proj/weight' is not .* columns scaled by 1"):
        fake_quantized(params, quantized)
    begun = fake_quantized(None, quantized, "static")
    assert _logits(begun).tobytes() == _logits(quantized).tobytes()
    with pytest.raises(UserError, match="needed is the float array"):
        fake_quantized(tiny.quantized(params), tiny.quantized(params))
    smaller = {**params, "layers": params["layers"][:1]}
    with pytest.raises(UserError, match="no tensor 'layers/1/mlp/down_proj/weight'"):
        fake_quantized(smaller, tiny.quantized(params))
