"""AutoRound: a smaller output error than rounding to nearest, by choices that the format allows."""

import functools
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec, resolve
from jaxopt_models.models.block import block
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import init
from jaxopt_models.numerics import Scales, find_scales, from_grid, real_scale, tile_expand, to_grid
from jaxopt_models.ops import linear
from jaxopt_models.qtensor import from_grid_values
from jaxopt_models.quantize import autoround as autoround_module
from jaxopt_models.quantize import tuned as tuning
from jaxopt_models.quantize.autoround import autoround

SPECS = {
    "int4_g32": resolve("int4", block_size=32),
    "int4_g128": resolve("int4"),
    "int4_asymmetric": resolve("int4", block_size=32, symmetric=False),
    "int4_bf16": resolve("int4", block_size=32, scale_dtype="bfloat16"),
    "int4_2d": resolve("int4", granularity="block2d", block_size=32),
    "int8_channel": resolve("int8", granularity="channel"),
    "fp8_tensor": resolve("fp8"),
    "nvfp4": resolve("nvfp4"),
    "mxfp4": resolve("mxfp4"),
    "nf4": resolve("nf4"),
}
every_format = pytest.mark.parametrize("name", SPECS)
main_formats = pytest.mark.parametrize("name", ["int4_g32", "int4_g128", "nvfp4", "mxfp4"])

WINDOWS, LENGTH, IN, OUT = 7, 24, 136, 24


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def correlated(windows: int, width: int) -> jax.Array:
    """Inputs [windows, LENGTH, width] that mostly lie in 12 directions, as a real layer's do."""
    shared = random(1, windows, LENGTH, 12) @ random(2, 12, width) / 12**0.5
    return shared + 0.1 * random(3, windows, LENGTH, width)


def linear_layer(context, dense, x):
    return linear(x, dense["w"], context)


def mlp(context, dense, x):
    return context + linear(jax.nn.silu(linear(x, dense["up"])), dense["down"])


def nearest(weights: dict[str, jax.Array], spec: QuantSpec) -> dict[str, Scales]:
    def scales(w: jax.Array) -> Scales:
        find = functools.partial(find_scales, spec=spec)
        return jax.vmap(find)(w) if w.ndim == 3 else find(w)

    return {path: scales(w) for path, w in weights.items()}


def restored(grids, scales, spec: QuantSpec) -> dict[str, jax.Array]:
    """What leaves made of the result stand for."""
    return {p: from_grid_values(grids[p], scales[p], spec, "float32").dequantize() for p in grids}


def loss(apply, context, dense, x, y) -> float:
    return float(jnp.mean(jnp.square(apply(context, dense, x) - y)))


def run(apply, context, weights, spec: QuantSpec, x, **options: Any):
    """Result on targets of the original weights, with the scales that it started from."""
    scales = nearest(weights, spec)
    y = options.pop("targets", None)
    y = apply(context, weights, x) if y is None else y
    options = {"steps": 40, "batch": 4} | options
    specs = dict.fromkeys(weights, spec)
    return scales, autoround(apply, context, weights, scales, specs, x, y, **options)


@functools.cache
def on_linear(name: str, tune_scales: bool = True, seed: int = 0):
    weights, x = {"w": random(0, OUT, IN)}, correlated(2 * WINDOWS, IN)
    options = {"tune_scales": tune_scales, "seed": seed}
    scales, result = run(linear_layer, None, weights, SPECS[name], x[:WINDOWS], **options)
    return weights, x, scales, result


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def ordinals(grid: jax.Array, spec: QuantSpec) -> np.ndarray:
    """Index of each value among all that the format has, zeros of both signs being one."""
    codes = jnp.arange(2**spec.element.bits).astype(jnp.uint8)
    if spec.element.bits == 8:
        codes = jax.lax.bitcast_convert_type(codes, jnp.dtype(spec.element.storage))
    elif spec.element.storage == "int8":
        codes = codes.astype(jnp.int32) - 8
    table = np.unique(np.asarray(spec.element.decode(codes)) + 0.0)
    table = table[np.isfinite(table)]
    found = np.searchsorted(table, np.asarray(grid) + 0.0)
    np.testing.assert_array_equal(table[found], np.asarray(grid) + 0.0)
    return found


# ---- the output error ---------------------------------------------------------------------------


@every_format
def test_output_error_of_a_linear_falls_and_is_what_the_leaf_has(name):
    weights, x, scales, (grids, tuned, losses) = on_linear(name)
    spec = SPECS[name]
    plain = {"w": from_grid(to_grid(weights["w"], scales["w"], spec), scales["w"], spec)}

    def of(dense, inputs) -> float:
        return loss(linear_layer, None, dense, inputs, linear_layer(None, weights, inputs))

    best = restored(grids, tuned, spec)
    np.testing.assert_allclose(losses.nearest, of(plain, x[:WINDOWS]), rtol=1e-4)
    np.testing.assert_allclose(losses.best, of(best, x[:WINDOWS]), rtol=1e-4)
    assert losses.best < 0.85 * losses.nearest
    assert of(best, x[WINDOWS:]) < 0.9 * of(plain, x[WINDOWS:])  # text it has not seen
    assert losses.batches.shape == (40,)


@main_formats
def test_output_error_of_two_linears_falls(name):
    weights = {"up": random(0, 64, IN), "down": random(5, IN, 64) / 8}
    _, (_, _, losses) = run(mlp, random(6, 1, 1, IN), weights, SPECS[name], correlated(WINDOWS, IN))
    assert losses.best < 0.7 * losses.nearest


_SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DENSE = ModelConfig.from_hf({"model_type": "llama"} | _SIZES)
MOE = ModelConfig.from_hf(
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | _SIZES
)


@functools.cache
def decoder_layer(config: ModelConfig):
    def apply(layer, dense, x):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return block(config, tree.replace(layer, dense), x, positions, kind="full")[0]

    return apply


@pytest.mark.parametrize("config, name", [(DENSE, "int4_g32"), (DENSE, "nvfp4"), (MOE, "mxfp4")])
def test_output_error_of_a_decoder_layer_falls(config, name):
    layer = init(config, jax.random.key(0))["layers"][0]
    weights = {
        path: w.astype(jnp.float32)
        for path, w in tree.leaves_with_paths(layer)
        if w.ndim > 1 and "router" not in path
    }
    layer = tree.replace(layer, {path: 8 * w for path, w in weights.items()})
    weights = {path: 8 * w for path, w in weights.items()}
    x = correlated(WINDOWS, 32)
    _, (grids, scales, losses) = run(decoder_layer(config), layer, weights, SPECS[name], x)
    assert losses.best < 0.8 * losses.nearest
    dense = restored(grids, scales, SPECS[name])
    y = decoder_layer(config)(layer, weights, x)
    np.testing.assert_allclose(
        loss(decoder_layer(config), layer, dense, x, y), losses.best, rtol=1e-3
    )


@every_format
def test_never_worse_even_with_a_senseless_learning_rate(name):
    weights, x = {"w": random(0, OUT, IN)}, correlated(WINDOWS, IN)
    _, (_, _, losses) = run(linear_layer, None, weights, SPECS[name], x, learning_rate=3.0)
    assert losses.best <= losses.nearest


@main_formats
def test_a_layer_that_nearest_rounding_reproduces_is_left_alone(name):
    spec, x = SPECS[name], correlated(WINDOWS, IN)
    weights = {"w": random(0, OUT, IN)}
    scales = nearest(weights, spec)
    grid = to_grid(weights["w"], scales["w"], spec)
    y = linear_layer(None, {"w": from_grid(grid, scales["w"], spec)}, x)
    _, (grids, tuned, losses) = run(linear_layer, None, weights, spec, x, targets=y)
    assert losses.best <= losses.nearest < 1e-9
    assert_same((grids, tuned), ({"w": grid}, scales))


# ---- what is returned ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4_g32", "int4_asymmetric", "nvfp4", "mxfp4"])
def test_no_steps_is_rounding_to_nearest_bit_for_bit(name):
    weights, spec = {"w": random(0, OUT, IN)}, SPECS[name]
    scales, result = run(linear_layer, None, weights, spec, correlated(WINDOWS, IN), steps=0)
    assert_same(result[:2], ({"w": to_grid(weights["w"], scales["w"], spec)}, scales))
    assert result[2].nearest == result[2].best and result[2].batches.shape == (0,)


@every_format
def test_under_the_given_scales_a_weight_moves_to_a_neighbour_at_most(name):
    weights, _, scales, (grids, kept, _) = on_linear(name, tune_scales=False)
    spec = SPECS[name]
    assert_same(kept, scales)
    moved = ordinals(grids["w"], spec) - ordinals(to_grid(weights["w"], scales["w"], spec), spec)
    assert np.abs(moved).max() == 1


@every_format
def test_grid_values_have_codes_and_scales_keep_their_kind(name):
    _, _, given, (grids, scales, _) = on_linear(name)
    spec = SPECS[name]
    ordinals(grids["w"], spec)  # each is a value of the format
    leaf = from_grid_values(grids["w"], scales["w"], spec, "float32")
    np.testing.assert_array_equal(leaf.spec.element.decode(leaf.unpack()), grids["w"])
    assert jax.tree.structure(scales) == jax.tree.structure(given)
    assert scales["w"].scale.dtype == given["w"].scale.dtype == jnp.dtype(spec.scale_dtype)
    assert_same(scales["w"].global_scale, given["w"].global_scale)
    assert_same(scales["w"].zero_point, given["w"].zero_point)
    ratio = real_scale(scales["w"], spec) / real_scale(given["w"], spec)
    assert bool(jnp.all((ratio <= 1) & (ratio >= 0.46)))  # a half, and half a step of E4M3
    assert bool(jnp.any(ratio < 1))
    if spec.power_of_two:
        assert set(np.unique(ratio)) == {0.5, 1.0}


def test_the_result_depends_on_the_seed_and_on_nothing_else():
    first = on_linear("int4_g32")[3]
    assert_same(on_linear.__wrapped__("int4_g32")[3], first)
    assert bool(jnp.any(on_linear("int4_g32", seed=1)[3][0]["w"] != first[0]["w"]))


def stacked(context, dense, x):
    """Sum of the experts' products, each with a gate."""
    return sum(g * linear(x, w) for g, w in zip(context, dense["w"], strict=True))


@main_formats
def test_experts_have_scales_of_their_own_and_an_unused_one_stays(name):
    weights = {"w": random(0, 3, OUT, IN) * jnp.asarray([1.0, 10.0, 0.1]).reshape(3, 1, 1)}
    gates = (jnp.float32(1), jnp.float32(0), jnp.float32(10))
    scales, (grids, tuned, losses) = run(
        stacked, gates, weights, SPECS[name], correlated(WINDOWS, IN)
    )
    assert losses.best < 0.8 * losses.nearest
    assert jax.tree.map(jnp.shape, tuned) == jax.tree.map(jnp.shape, scales)
    for e, is_used in enumerate((True, False, True)):
        grid, kept, given = jax.tree.map(itemgetter(e), (grids["w"], tuned["w"], scales["w"]))
        alone = to_grid(weights["w"][e], given, SPECS[name])
        if is_used:
            assert bool(jnp.any(grid != alone))
        else:
            assert_same((grid, kept), (alone, given))


# ---- the text -----------------------------------------------------------------------------------


def test_tokens_of_weight_zero_do_not_matter():
    weights, x = {"w": random(0, OUT, IN)}, correlated(WINDOWS, IN)
    y = linear_layer(None, weights, x)
    token_weights = jnp.ones(x.shape[:2]).at[:, ::3].set(0.0)
    spoiled = y.at[:, ::3].set(1e6)
    results = [
        run(
            linear_layer,
            None,
            weights,
            SPECS["int4_g32"],
            x,
            targets=t,
            token_weights=token_weights,
        )
        for t in (y, spoiled)
    ]
    assert_same(results[0][1], results[1][1])


def test_windows_are_shuffled_and_seen_equally_often():
    states, rows, rates, checks = autoround_module._schedule(
        10, 24, 4, jnp.float32(0.5), jax.random.key(0)
    )
    assert states.tolist() == list(range(25))
    assert np.bincount(np.asarray(rows).reshape(-1), minlength=10).tolist() == [10] * 10
    assert rows.reshape(-1)[:10].tolist() != list(range(10))
    np.testing.assert_allclose(rates, 0.5 * (1 - np.arange(25) / 24), rtol=1e-6)
    assert np.flatnonzero(checks).tolist() == [0, 6, 12, 18, 24]


# ---- the gradient -------------------------------------------------------------------------------


@every_format
def test_gradient_is_straight_through_within_the_range(name):
    """Against automatic differentiation of a product in which rounding is a constant."""
    spec = SPECS[name]
    weight, cotangent = random(0, OUT, IN), random(7, OUT, IN)
    scales = find_scales(weight, spec)
    matrix = tuning.Matrix(weight, scales, spec)
    shrink = jnp.full(scales.scale.shape, 0.75, jnp.float32)
    offset = jnp.clip(0.3 * random(8, OUT, IN), -0.5, 0.5)
    tuned = tuning.Tuned(offset, shrink)
    rounded = tuning.round_matrix(matrix, tuned)

    def expand(values):
        return tile_expand(values, spec.tile(weight.shape), weight.shape)

    zero = scales.zero_point
    zero = jnp.zeros((OUT, IN)) if zero is None else expand(zero.astype(jnp.float32))
    real = expand(real_scale(rounded.scales, spec))
    spacing = tuning._spacing(weight / real + zero, spec.element)

    def dense(offset, shrink):
        scale = expand(shrink * real_scale(scales, spec))
        scale = scale + jax.lax.stop_gradient(real - scale)
        y = weight / scale + zero + offset * spacing
        reach = 0.5 * spacing
        y = jnp.clip(y, spec.element.lowest - reach, spec.element.largest + reach)
        grid = y + jax.lax.stop_gradient(rounded.grid - y)
        return jnp.sum(cotangent * (grid - zero) * scale)

    by_offset, by_shrink = jax.grad(dense, argnums=(0, 1))(offset, shrink)
    ours = tuning.gradient_of(matrix, tuned, rounded, cotangent)
    assert ours.shrink is not None
    np.testing.assert_allclose(ours.offset, by_offset, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours.shrink, by_shrink, rtol=2e-3, atol=1e-3)


# ---- compilation and errors ---------------------------------------------------------------------


def test_layers_of_one_kind_are_compiled_once():
    traces = []

    def apply(context, dense, x):
        traces.append(None)
        return linear(x, dense["w"], context)

    x, results = correlated(WINDOWS, IN), []
    for i in range(3):
        weights, bias = {"w": random(i, OUT, IN)}, random(10 + i, OUT)
        y = linear_layer(bias, weights, x)
        options = {"targets": y, "seed": i, "learning_rate": 0.02 + 0.01 * i, "steps": 4}
        results.append(run(apply, bias, weights, SPECS["nvfp4"], x, **options)[1])
        if i == 0:
            first = len(traces)
    assert len(traces) == first
    assert all(bool(losses.best < losses.nearest) for _, _, losses in results)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scales": {}}, "must each have an entry for w"),
        ({"inputs": jnp.zeros((3, 4))}, r"must both be \[windows, T, D\]"),
        ({"targets": jnp.zeros((2, 4, OUT))}, r"must both be \[windows, T, D\]"),
        ({"token_weights": jnp.ones((3,))}, r"token_weights \[3\]"),
        ({"steps": -1}, "steps -1"),
        ({"batch": 0}, "batch 0"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(change, message):
    weights, spec = {"w": random(0, OUT, IN)}, SPECS["int4_g32"]
    arguments = {
        "apply": linear_layer,
        "context": None,
        "weights": weights,
        "scales": nearest(weights, spec),
        "specs": {"w": spec},
        "inputs": jnp.zeros((3, 4, IN)),
        "targets": jnp.zeros((3, 4, OUT)),
    }
    with pytest.raises(UserError, match=message):
        autoround(**(arguments | change))
