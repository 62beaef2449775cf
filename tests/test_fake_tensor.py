"""Trainable leaves: they compute as what they fold into, and what their gradients are."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor, LearnedAmax, learned_amax
from jaxopt_models.formats import FORMATS, resolve
from jaxopt_models.numerics import find_scales, real_scale, tile_expand
from jaxopt_models.ops import embed, linear
from jaxopt_models.qtensor import InputQuantizer, LowRank, fake_quant, quantize_array
from jaxopt_models.sharding import make_mesh, shard, shardings

MODES = ("dynamic", "fixed", "learned", "untied")
SPECS = {
    **{name: resolve(name) for name in FORMATS},
    "fp8 rows": resolve("fp8", granularity="channel"),
    "fp8 tiles": resolve("fp8", granularity="block2d", block_size=16),
    "int4 zero points": resolve("int4", block_size=32, symmetric=False),
    "int4 bf16": resolve("int4", block_size=32, scale_dtype="bfloat16"),
    "nf4 double": resolve("nf4", scale_dtype="float8_e4m3fn"),
}
LEARNABLE = {name: spec for name, spec in SPECS.items() if spec.symmetric and not spec.power_of_two}


def _weight(seed: int = 0, n: int = 32, k: int = 192) -> jax.Array:
    """Normal numbers, and rows of zeros, ties and tiny ones."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n, k)).astype(np.float32)
    weight[3] = 0
    weight[5] = rng.integers(-24, 25, size=k) / 4
    weight[7] *= 1e-30
    return jnp.asarray(weight)


def _fake(weight: jax.Array, spec, mode: str, **options) -> FakeTensor:
    scales = find_scales(weight, spec)
    if mode == "dynamic":
        return FakeTensor(weight, spec=spec, **options)
    if mode == "fixed":
        return FakeTensor(weight, scales, spec=spec, **options)
    return FakeTensor(weight, learned_amax(scales, spec, mode == "untied"), spec=spec, **options)


def _moved(fake: FakeTensor) -> FakeTensor:
    """After some training: weights, and scales that are learnt, are others."""
    step = 0.3 * jax.random.normal(jax.random.key(1), fake.weight.shape)
    scales = fake.scales
    if isinstance(scales, LearnedAmax):
        rounding = None if scales.rounding is None else scales.rounding * 0.8
        scales = replace(scales, amax=scales.amax * 0.9, rounding=rounding)
    return replace(fake, weight=fake.weight + step, scales=scales)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SPECS)
def test_folding_changes_no_bit(name, mode):
    spec = SPECS[name]
    if mode in ("learned", "untied") and name not in LEARNABLE:
        with pytest.raises(UserError, match="cannot be learnt; choose 'static'"):
            _fake(_weight(), spec, mode)
        return
    fold, values = jax.jit(FakeTensor.fold), jax.jit(lambda one: one.dequantize())
    for fake in (_fake(_weight(), spec, mode), _moved(_fake(_weight(), spec, mode))):
        folded = fold(fake)
        assert values(fake).tobytes() == values(folded).tobytes()
        assert fake.weight_bits == folded.weight_bits and fake.shape == folded.shape


@pytest.mark.parametrize("name", SPECS)
def test_scales_of_the_weight_are_those_of_fake_quant(name):
    weight, spec = _weight(), SPECS[name]
    found = _fake(weight, spec, "dynamic").dequantize()
    assert found.tobytes() == fake_quant(weight, spec).tobytes()
    if name in LEARNABLE:
        near = _fake(weight, spec, "learned").dequantize()
        np.testing.assert_allclose(near, found, rtol=1e-5)  # but for ties


def test_a_calibrated_second_level():
    weight, overall = _weight(), jnp.full((1, 1), 30.0)
    fake = FakeTensor(weight, None, overall, spec=SPECS["nvfp4"])
    expected = quantize_array(weight, "nvfp4", amax=30.0)
    assert fake.dequantize().tobytes() == expected.dequantize().tobytes()
    assert fake.fold().global_scale == expected.global_scale


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_weights_go_straight_through(mode):
    weight = _weight()
    cotangent = jax.random.normal(jax.random.key(3), weight.shape)
    spec = SPECS["int4 bf16"]
    fake = _fake(weight, spec, mode)
    if isinstance(fake.scales, LearnedAmax):
        half = fake.scales.amax / 2
        rounding = None if fake.scales.rounding is None else half
        fake = replace(fake, scales=LearnedAmax(half, rounding, fake.scales.overall))
    elif mode == "fixed":
        fake = replace(fake, weight=2 * weight)

    def loss(master, gradient):
        own = replace(fake, weight=master, gradient=gradient)
        return jnp.sum(own.dequantize() * cotangent)

    found = jax.grad(loss)(fake.weight, "identity")
    np.testing.assert_allclose(found, cotangent, rtol=1e-2 if mode == "untied" else 1e-7)
    clipped = jax.grad(loss)(fake.weight, "clip")
    scale = tile_expand(
        real_scale(fake.current_scales(), spec), spec.tile(weight.shape), weight.shape
    )
    beyond = (fake.weight < -8.1 * scale) | (fake.weight > 7.1 * scale)
    assert jnp.any(beyond) == (mode != "dynamic")
    assert jnp.all(jnp.where(beyond, clipped == 0.0, True))
    inside = (fake.weight > -7.9 * scale) & (fake.weight < 6.9 * scale)
    np.testing.assert_allclose(
        jnp.where(inside, clipped, 0), jnp.where(inside, found, 0), rtol=1e-6
    )


def _surrogate(weight, learned, spec):
    """Rounding as the identity, in plain operations that differentiate themselves."""
    element, tile = spec.element, spec.tile(weight.shape)

    def scale(amax):
        exact = amax / element.largest
        rounded = real_scale(LearnedAmax(amax, None, learned.overall).scales(spec), spec)
        return tile_expand(exact + lax.stop_gradient(rounded - exact), tile, weight.shape)

    multiplied = scale(learned.amax)
    if learned.rounding is None:
        divided = multiplied
    else:
        divided = tile_expand(learned.rounding / element.largest, tile, weight.shape)
    steps = jnp.clip(weight / divided, element.lowest, element.largest)
    rounded = steps + lax.stop_gradient(element.round(steps) - steps)
    return multiplied * rounded


@pytest.mark.parametrize("mode", ["learned", "untied"])
@pytest.mark.parametrize("name", ["nvfp4", "int4 bf16", "int8", "fp8 rows"])
def test_gradients_of_learnt_scales(name, mode):
    spec = SPECS[name]
    weight = jax.random.normal(jax.random.key(0), (16, 96))
    fake = replace(_moved(_fake(weight, spec, mode)), gradient="clip")
    cotangent = jax.random.normal(jax.random.key(3), weight.shape)

    def ours(master, learned):
        own = replace(fake, weight=master, scales=learned)
        return jnp.sum(own.dequantize() * cotangent)

    def plain(master, learned):
        return jnp.sum(_surrogate(master, learned, spec) * cotangent)

    arguments = fake.weight, fake.scales
    assert ours(*arguments) == pytest.approx(float(plain(*arguments)), rel=1e-4)
    found, expected = (jax.grad(f, argnums=(0, 1))(*arguments) for f in (ours, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1].amax, expected[1].amax, rtol=1e-4, atol=1e-4)
    if mode == "untied":
        np.testing.assert_allclose(found[1].rounding, expected[1].rounding, rtol=1e-4, atol=1e-4)
    if found[1].overall is not None:
        assert jnp.all(found[1].overall == 0.0)


@pytest.mark.parametrize("untied", [False, True])
def test_learnt_scales_find_their_size(untied):
    weight, spec = jax.random.normal(jax.random.key(0), (16, 128)), SPECS["int4 bf16"]
    learned = learned_amax(find_scales(2 * weight, spec), spec, untied)

    def error(learned):
        return jnp.sum((FakeTensor(weight, learned, spec=spec).dequantize() - weight) ** 2)

    optimizer = optax.adam(3e-2)
    state: Any = optimizer.init(learned)  # pyright: ignore[reportArgumentType]
    best = error(learned_amax(find_scales(weight, spec), spec))
    assert error(learned) > 4 * best
    with jax.numpy_dtype_promotion("standard"):  # as optax needs

        @jax.jit
        def step(learned: Any, state: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(jax.grad(error)(learned), state)
            return optax.apply_updates(learned, updates), state

        for _ in range(240):
            learned, state = step(learned, state)
    assert error(learned) < best  # than that of the largest value


def test_an_end_of_the_range_has_no_gradient():
    """A block scale that cannot shrink any more would be pulled further for ever."""
    weight, spec = jax.random.normal(jax.random.key(0), (2, 32)), SPECS["nvfp4"]
    learned = learned_amax(find_scales(weight, spec), spec)
    learned = replace(learned, amax=learned.amax.at[0, 0].set(1e-9))

    def total(learned):
        return jnp.sum(FakeTensor(weight, learned, spec=spec).dequantize() * weight)

    found = jax.grad(total)(learned).amax
    assert found[0, 0] == 0.0 and jnp.all(found[1] != 0.0)


def test_products_have_every_input_step():
    weight = _weight(n=12, k=64)
    quantizer = InputQuantizer(None, resolve("int8", granularity="token"))
    low_rank = LowRank(_weight(1, 8, 64)[:3], _weight(2, 12, 32)[:, :3])
    pre_scale = 1 + jnp.arange(64) / 64
    options = {"input": quantizer, "low_rank": low_rank, "pre_scale": pre_scale, "rotate": 4}
    fake = _fake(weight, SPECS["nvfp4"], "fixed", **options)
    x = jax.random.normal(jax.random.key(5), (7, 64))
    for dtype in (jnp.float32, jnp.bfloat16):
        found, expected = (jax.jit(linear)(x.astype(dtype), w) for w in (fake, fake.fold()))
        assert found.tobytes() == expected.tobytes()
    gradient = jax.grad(lambda one: jnp.sum(linear(x, one) ** 2))(fake)
    assert all(jnp.any(leaf != 0.0) for leaf in (gradient.weight, gradient.low_rank.up))


def test_a_table_of_embeddings():
    fake = _fake(_weight(), SPECS["int8"], "dynamic")
    tokens = jnp.array([[0, 5], [31, 3]])
    expected = embed(tokens, fake.fold(), jnp.float32)
    assert embed(tokens, fake, jnp.float32).tobytes() == expected.tobytes()


def test_stacks_of_experts():
    weight = jnp.stack([_weight(0), 3 * _weight(1)])
    scales = jax.vmap(lambda w: find_scales(w, SPECS["nvfp4"]))(weight)
    fake = FakeTensor(weight, scales, spec=SPECS["nvfp4"])
    for i, one in enumerate(weight):
        alone = FakeTensor(one, find_scales(one, SPECS["nvfp4"]), spec=SPECS["nvfp4"])
        assert fake.dequantize()[i].tobytes() == alone.dequantize().tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_on_several_devices(mode):
    fake = _fake(_weight(k=256), SPECS["nvfp4"], mode)
    mesh = make_mesh({"data": 2, "model": 4})
    params = {"layers": ({"mlp": {"down_proj": {"weight": fake}}},)}
    placed = shard(params, mesh)["layers"][0]["mlp"]["down_proj"]["weight"]
    assert placed.weight.sharding.shard_shape(placed.shape) == (32, 64)
    if isinstance(placed.scales, LearnedAmax):
        amax = placed.scales.amax
        assert amax.sharding.shard_shape(amax.shape) == (32, 4)
    assert jax.tree.structure(shardings(params, mesh)) == jax.tree.structure(params)
    found = jax.jit(lambda one: one.dequantize())(placed)
    assert found.tobytes() == fake.dequantize().tobytes()
