"""GPTQ against a textbook implementation in float64, and what the paper promises of it.

The width, 139, is one block of columns and part of another, ends in a short block of every
format, and in half a byte.
"""

import functools
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import numerics
from jaxopt_models.formats import QuantSpec, resolve
from jaxopt_models.numerics import Scales, find_scales, from_grid, to_grid
from jaxopt_models.qtensor import from_grid_values
from jaxopt_models.quantize.gptq import gptq

ROWS, WIDTH = 48, 139

PROMISED = {
    "int4": resolve("int4"),
    "int4 asymmetric": resolve("int4", symmetric=False),
    "nvfp4": resolve("nvfp4"),
    "mxfp4": resolve("mxfp4"),
    "fp8 channel": resolve("fp8", granularity="channel"),
}
CHANNEL = resolve("int4", granularity="channel")
SPECS = PROMISED | {
    "int4 channel": CHANNEL,
    "int4 tensor bf16": resolve("int4", granularity="tensor", scale_dtype="bfloat16"),
    "int4 asymmetric tiles": resolve("int4", granularity="block2d", block_size=32, symmetric=False),
    "int8 block": resolve("int8", block_size=32),
    "fp8 tensor": resolve("fp8"),
    "fp8 tiles": resolve("fp8", granularity="block2d", block_size=32),
    "mxfp6_e3m2": resolve("mxfp6_e3m2"),
    "mxfp6_e2m3": resolve("mxfp6_e2m3", mx_rule="floor"),
    "mxfp8_e4m3": resolve("mxfp8_e4m3"),
    "mxfp8_e5m2": resolve("mxfp8_e5m2"),
    "mxint8": resolve("mxint8"),
    "nf4": resolve("nf4"),
    "nf4 double": resolve("nf4", scale_dtype="float8_e4m3fn"),
}
promised = pytest.mark.parametrize("spec", PROMISED.values(), ids=PROMISED)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
in_either_order = pytest.mark.parametrize(
    "spec, act_order",
    [(spec, False) for spec in SPECS.values()] + [(spec, True) for spec in PROMISED.values()],
    ids=[*SPECS, *(f"{name} act_order" for name in PROMISED)],
)


@functools.cache
def problem(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """A weight [48, 139] and H of correlated inputs, whose magnitudes span a decade."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(WIDTH, WIDTH)) * (1 + np.arange(WIDTH)[:, None]) ** -0.5
    x = rng.normal(size=(4 * WIDTH, WIDTH)) @ mixing * np.exp(rng.normal(size=WIDTH) * 0.6)
    weight = rng.normal(size=(ROWS, WIDTH)) * 0.02
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x / len(x), jnp.float32)


def f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def output_error(weight: jax.Array, rounded: jax.Array, hessian: jax.Array) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ), in float64."""
    exact, h = f64(weight), f64(hessian)
    difference = exact - f64(rounded)
    return np.sum(difference @ h * difference) / np.sum(exact @ h * exact)


def levels(spec: QuantSpec) -> np.ndarray:
    """Every value of a format's grid, ascending."""
    element = spec.element
    if element.storage == "int8":
        return np.arange(element.lowest, element.largest + 1)
    codes = np.arange(2**element.bits, dtype=np.uint8)
    decoded = f64(element.decode(jnp.asarray(codes.view(jnp.dtype(element.storage)))))
    return np.unique(decoded[np.isfinite(decoded)])


def textbook(
    weight: jax.Array, hessian: jax.Array, scales: Scales, spec: QuantSpec, act_order: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of the GPTQ paper without blocks, in float64.

    Returns:
      (grid values [N, K], how far each value was from the border to the next grid value, in real
      units).
    """
    shape, h, codes = weight.shape, f64(hessian), levels(spec)
    expand = functools.partial(numerics.tile_expand, tile=spec.tile(shape), shape=shape)
    scale = f64(expand(numerics.real_scale(scales, spec)))
    zero = np.zeros(shape) if scales.zero_point is None else f64(expand(scales.zero_point))
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(shape[1])
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(shape[1])
    factor = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    left, grid, margin = f64(weight)[:, order], np.zeros(shape), np.zeros(shape)
    for i, k in enumerate(order):
        real = (codes - zero[:, [k]]) * scale[:, [k]]
        distance = np.abs(left[:, [i]] - real)
        nearest, second = np.argsort(distance, axis=1)[:, :2].T
        grid[:, k] = codes[nearest]
        value = np.take_along_axis(real, nearest[:, None], 1)[:, 0]
        apart = np.take_along_axis(distance, np.stack([nearest, second], 1), 1)
        margin[:, k] = (apart[:, 1] - apart[:, 0]) / 2
        error = (left[:, i] - value) / factor[i, i]
        left[:, i:] -= error[:, None] * factor[i, i:]
    return grid, margin


def rows_apart(one: jax.Array | np.ndarray, other: jax.Array | np.ndarray) -> int:
    """Rows that differ. A near-tie that float32 decides otherwise changes all that follows it."""
    return int(np.sum(np.any(np.asarray(one) != np.asarray(other), axis=-1)))


@functools.cache
def rounded(
    spec: QuantSpec, act_order: bool = False
) -> tuple[jax.Array, jax.Array, Scales, jax.Array, jax.Array]:
    """(weight, hessian, scales, grid, damping) of the first problem."""
    weight, hessian = problem()
    scales = find_scales(weight, spec)
    return weight, hessian, scales, *gptq(weight, hessian, scales, spec, act_order=act_order)


# What the paper promises


@promised
def test_the_output_is_nearer_and_the_weight_is_farther_than_by_rounding(spec):
    weight, hessian, scales, grid, damping = rounded(spec)
    ours = from_grid(grid, scales, spec)
    nearest = from_grid(to_grid(weight, scales, spec), scales, spec)
    assert output_error(weight, ours, hessian) < 0.5 * output_error(weight, nearest, hessian)
    assert jnp.linalg.norm(weight - ours) > jnp.linalg.norm(weight - nearest)
    assert damping.dtype == jnp.float32 and damping.item() == np.float32(0.01)


@in_either_order
def test_agrees_with_the_textbook_but_for_near_ties(spec, act_order):
    weight, hessian, scales, grid, _ = rounded(spec, act_order)
    expected, margin = textbook(weight, hessian, scales, spec, act_order)
    order = np.argsort(-np.diagonal(hessian), kind="stable") if act_order else slice(None)
    differs = (np.asarray(grid) != expected)[:, order]
    rows = np.flatnonzero(differs.any(axis=1))
    assert len(rows) <= ROWS // 12
    first = differs[rows].argmax(axis=1)
    assert np.all(margin[:, order][rows, first] < 1e-5 * np.abs(np.asarray(weight)).max())


@in_either_order
def test_rounds_to_nearest_where_inputs_are_uncorrelated(spec, act_order):
    weight, hessian = problem()
    diagonal, scales = jnp.diag(jnp.diagonal(hessian)), find_scales(weight, spec)
    grid, _ = gptq(weight, diagonal, scales, spec, act_order=act_order)
    np.testing.assert_array_equal(grid, to_grid(weight, scales, spec))


@pytest.mark.parametrize("block", [1, 48, 1024])
@pytest.mark.parametrize("name", ["int4 asymmetric", "nvfp4"])
def test_the_size_of_a_block_does_not_matter(name, block):
    weight, hessian, scales, grid, _ = rounded(PROMISED[name])
    other, _ = gptq(weight, hessian, scales, PROMISED[name], block=block)
    assert rows_apart(other, grid) <= ROWS // 12


def test_the_magnitude_of_the_inputs_does_not_matter():
    weight, hessian, scales, grid, _ = rounded(CHANNEL)
    for power in (-60, 60):
        again, damping = gptq(weight, hessian * 2.0**power, scales, CHANNEL)
        np.testing.assert_array_equal(again, grid)
        assert damping.item() == np.float32(0.01)


# Order of columns


@promised
def test_act_order_is_better_on_average(spec):
    ratios = []
    for seed in range(6):
        weight, hessian = problem(seed)
        scales = find_scales(weight, spec)
        errors = [
            output_error(weight, from_grid(grid, scales, spec), hessian)
            for grid, _ in (
                gptq(weight, hessian, scales, spec, act_order=act_order)
                for act_order in (False, True)
            )
        ]
        ratios.append(errors[1] / errors[0])
    assert np.exp(np.mean(np.log(ratios))) < 1


def test_act_order_is_gptq_of_the_columns_in_that_order():
    weight, hessian, scales, grid, _ = rounded(CHANNEL, act_order=True)
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    assert np.any(order != np.arange(WIDTH))
    sorted_grid, _ = gptq(weight[:, order], hessian[order][:, order], scales, CHANNEL)
    np.testing.assert_array_equal(np.asarray(grid)[:, order], sorted_grid)


# Hessians that need care

DEAD = (0, 7, 40, WIDTH - 1)


def with_dead_columns() -> tuple[jax.Array, jax.Array]:
    weight, hessian = problem()
    read = np.ones(WIDTH, np.float32)
    read[list(DEAD)] = 0
    return weight, hessian * read[:, None] * read[None, :]


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
def test_a_column_that_is_never_read_is_rounded_to_nearest(act_order):
    weight, hessian = with_dead_columns()
    scales = find_scales(weight, CHANNEL)
    grid, _ = gptq(weight, hessian, scales, CHANNEL, act_order=act_order)
    nearest = to_grid(weight, scales, CHANNEL)
    dead, live = np.array(DEAD), np.setdiff1d(np.arange(WIDTH), DEAD)
    np.testing.assert_array_equal(grid[:, dead], nearest[:, dead])
    # It is as if it were not there, and so whatever it holds.
    alone, _ = gptq(weight[:, live], hessian[live][:, live], scales, CHANNEL, act_order=act_order)
    assert rows_apart(grid[:, live], alone) <= ROWS // 12
    other = weight.at[:, dead].multiply(1e6)
    again, _ = gptq(other, hessian, scales, CHANNEL, act_order=act_order)
    np.testing.assert_array_equal(again[:, live], grid[:, live])


def test_an_input_that_was_never_seen_leaves_rounding_to_nearest():
    weight, _ = problem()
    scales = find_scales(weight, CHANNEL)
    grid, damping = gptq(weight, jnp.zeros((WIDTH, WIDTH)), scales, CHANNEL)
    np.testing.assert_array_equal(grid, to_grid(weight, scales, CHANNEL))
    assert damping.item() == np.float32(0.01)


def indefinite(hessian: jax.Array, below: float) -> jax.Array:
    """The matrix with its smallest eigenvalue at -below times the mean of the new diagonal."""
    h = f64(hessian)
    shift = (np.linalg.eigvalsh(h)[0] + below * np.mean(np.diag(h))) / (1 + below)
    return jnp.asarray(h - shift * np.eye(len(h)), jnp.float32)


@pytest.mark.parametrize("below, used", [(0.005, 0.01), (0.03, 0.1), (0.3, 1.0)])
def test_damping_is_raised_until_the_matrix_is_positive_definite(below, used):
    weight, hessian, scales, *_ = rounded(CHANNEL)
    grid, damping = gptq(weight, indefinite(hessian, below), scales, CHANNEL)
    assert damping.item() == pytest.approx(used, rel=1e-6)
    assert np.all(np.isfinite(grid))


def test_fewer_inputs_than_columns_are_enough():
    weight, _ = problem()
    x = np.random.default_rng(1).normal(size=(WIDTH // 8, WIDTH))
    hessian = jnp.asarray(x.T @ x / len(x), jnp.float32)
    scales = find_scales(weight, CHANNEL)
    nearest = from_grid(to_grid(weight, scales, CHANNEL), scales, CHANNEL)
    grid, damping = gptq(weight, hessian, scales, CHANNEL)
    assert damping.item() == np.float32(0.01)
    ours = output_error(weight, from_grid(grid, scales, CHANNEL), hessian)
    assert ours < 0.1 * output_error(weight, nearest, hessian)


def test_damping_of_zero_is_raised_where_inputs_are_all_alike():
    weight, hessian, scales, *_ = rounded(CHANNEL)
    _, unneeded = gptq(weight, hessian, scales, CHANNEL, damping=0.0)
    assert unneeded.item() == 0
    grid, damping = gptq(weight, jnp.ones((WIDTH, WIDTH)), scales, CHANNEL, damping=0.0)
    assert 0 < damping.item() <= 0.01
    assert np.all(np.isfinite(grid))


@pytest.mark.parametrize("fault", ["NaN", "infinity", "negative"])
def test_a_hopeless_matrix_is_reported(fault):
    weight, hessian, scales, *_ = rounded(CHANNEL)
    broken = {
        "NaN": hessian.at[3, 5].set(jnp.nan).at[5, 3].set(jnp.nan),
        "infinity": hessian.at[3, 3].set(jnp.inf),
        "negative": -hessian,
    }[fault]
    assert np.isnan(gptq(weight, broken, scales, CHANNEL)[1])


# Transformations and leaves


def test_experts_mapped_are_experts_one_by_one():
    """Of which one raises the damping, one was never seen, and one is beyond hope."""
    spec = PROMISED["nvfp4"]
    problems = [problem(seed) for seed in range(5)]
    weights = jnp.stack([weight for weight, _ in problems])
    hessians = jnp.stack([hessian for _, hessian in problems])
    hessians = hessians.at[1].set(indefinite(hessians[1], 0.03)).at[2].set(0.0).at[3].set(jnp.nan)
    scales = jax.jit(jax.vmap(lambda weight: find_scales(weight, spec)))(weights)
    grids, dampings = jax.vmap(lambda *expert: gptq(*expert, spec))(weights, hessians, scales)
    np.testing.assert_allclose(dampings, [0.01, 0.1, 0.01, np.nan, 0.01], rtol=1e-6)
    for e in (0, 1, 2, 4):
        one, _ = gptq(weights[e], hessians[e], jax.tree.map(itemgetter(e), scales), spec)
        assert rows_apart(grids[e], one) <= ROWS // 12


@every_spec
def test_a_leaf_holds_the_grid_values(spec):
    *_, scales, grid, _ = rounded(spec)
    leaf = from_grid_values(grid, scales, spec, "float32")
    np.testing.assert_array_equal(leaf.spec.element.decode(leaf.unpack()), grid)
    np.testing.assert_array_equal(leaf.dequantize(), from_grid(grid, scales, spec))


def test_the_same_bits_again_and_inside_another_program():
    spec = PROMISED["nvfp4"]
    weight, hessian, scales, grid, _ = rounded(spec)
    again, _ = gptq(weight, hessian, scales, spec)
    inside, _ = jax.jit(lambda *arrays: gptq(*arrays, spec))(weight, hessian, scales)
    for other in (again, inside):
        assert np.asarray(other).tobytes() == np.asarray(grid).tobytes()


# Expanded scales


@every_spec
def test_columns_under_expanded_scales_are_columns_of_the_whole(spec):
    weight, _ = problem()
    scales = find_scales(weight, spec)
    grid = to_grid(weight, scales, spec)
    real = from_grid(grid, scales, spec)
    order = np.random.default_rng(0).permutation(WIDTH)[:7]
    each = jax.tree.map(lambda s: s[:, order], numerics.expand(scales, spec, weight.shape))
    part = to_grid(weight[:, order], each, spec)
    np.testing.assert_array_equal(part, grid[:, order])
    np.testing.assert_array_equal(from_grid(part, each, spec), real[:, order])
