"""Norms, and what is between gate/up and down: kernels under the interpreter, and around them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import add_rms_norm, elementwise, reference, rms_norm, silu_mul
from kernels_pallas.elementwise import _Step, has_kernel, step_kernel, step_reference

STEPS = {
    "norm": _Step("rms_norm", 1e-5),
    "norm of a sum": _Step("add_rms_norm", 1e-5),
    "norm, 1 + w": _Step("rms_norm", 1e-3, True),
    "norm of a sum, 1 + w": _Step("add_rms_norm", 1e-3, True),
    "silu": _Step("silu_mul"),
}
PUBLIC = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}


def inputs(step: _Step, m: int, k: int, seed: int = 0, dtype=jnp.bfloat16) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    first, second, weight = (
        scale * jax.random.normal(key, shape, dtype)
        for key, shape, scale in zip(keys, ((m, k), (m, k), (k,)), (1.5, 0.7, 1), strict=True)
    )
    return {
        "rms_norm": [first, weight],
        "add_rms_norm": [first, second, weight],
        "silu_mul": [first, second],
    }[step.kind]


def exact(step: _Step, *arrays: jax.Array) -> list[np.ndarray]:
    """In float64; what is added is rounded."""
    if step.kind == "silu_mul":
        gate, up = (np.asarray(a, np.float64) for a in arrays)
        return [gate / (1 + np.exp(-gate)) * up]
    *rows, weight = arrays
    x = np.asarray(sum(rows[1:], rows[0]), np.float64)
    factor = np.asarray(weight, np.float64) + step.unit_offset
    return [x] * (len(rows) - 1) + [
        x / np.sqrt(np.mean(x * x, -1, keepdims=True) + step.eps) * factor
    ]


def assert_rounded(found, expected: list[np.ndarray]) -> None:
    """Each within one unit of bfloat16's last place, the most half of one."""
    for one, other in zip(jax.tree.leaves(found), expected, strict=True):
        assert one.dtype == jnp.bfloat16
        difference = np.abs(np.asarray(one, np.float64) - other)
        assert np.all(difference <= 2**-7 * np.abs(other) + 1e-30)
        assert np.mean(difference <= 2**-8 * np.abs(other) + 1e-30) > 0.99


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("m", "k"), [(1, 512), (3, 1536), (17, 1024), (2, 4096), (1, 14336)])
def test_the_kernel_equals_float64(name, m, k):
    arrays = inputs(STEPS[name], m, k)
    found = step_kernel(STEPS[name], *arrays, interpret=True)
    assert_rounded(found, exact(STEPS[name], *arrays))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("k", [512, 1536, 4096, 14336])
def test_it_lowers_for_a_gpu(name, k):
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        arrays = jax.eval_shape(partial(inputs, STEPS[name], 3, k))
        traced = jax.jit(partial(step_kernel, STEPS[name])).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


@pytest.fixture
def hopper(monkeypatch):
    """Takes the way of kernels, whose last step on a CPU is the reference."""
    monkeypatch.setattr(elementwise, "hopper_processors", lambda: 132)


def call(step: _Step) -> Callable[..., Any]:
    if step.kind == "silu_mul":
        return silu_mul
    return partial(PUBLIC[step.kind], eps=step.eps, unit_offset=step.unit_offset)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_elsewhere_it_is_the_reference_and_so_are_gradients(hopper, name, dtype):
    step = STEPS[name]
    arrays = inputs(step, 6, 512, dtype=dtype)
    shaped = [a.reshape(2, 3, 512) if a.ndim == 2 else a for a in arrays]
    found = jax.jit(call(step))(*shaped)
    expected = jax.jit(partial(step_reference, step))(*arrays)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one.reshape(other.shape), other)

    def loss(function, arrays):
        leaves = jax.tree.leaves(function(*arrays))
        return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in leaves)

    ours = jax.jit(jax.grad(partial(loss, call(step))))(arrays)
    plain = jax.jit(jax.grad(partial(loss, partial(step_reference, step))))(arrays)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(one, np.float32),
            np.asarray(other, np.float32),
            atol=tolerance,
            rtol=tolerance,
        )


@pytest.mark.parametrize("name", STEPS)
def test_outside_jit_a_shape_compiles_once(hopper, name, monkeypatch):
    traced, shared = [], elementwise._shared
    monkeypatch.setattr(elementwise, "_shared", lambda *a: traced.append(1) or shared(*a))
    arrays = inputs(STEPS[name], 7, 512)
    for _ in range(3):
        call(STEPS[name])(*arrays)
    assert len(traced) == 1


def test_the_reference_is_the_formula():
    x, weight = inputs(STEPS["norm"], 5, 64, dtype=jnp.float32)
    (expected,) = exact(STEPS["norm"], x, weight)
    np.testing.assert_allclose(reference.rms_norm(x, weight, 1e-5), expected, rtol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_a_batch_adds_to_the_rows(hopper, name):
    step = STEPS[name]
    arrays = inputs(step, 6, 512)
    expected = jax.tree.leaves(jax.jit(call(step))(*arrays))
    by_two = [a.reshape(3, 2, 512) if a.ndim == 2 else a for a in arrays]
    axes = tuple(0 if a.ndim == 3 else None for a in by_two)
    found = jax.tree.leaves(jax.jit(jax.vmap(call(step), axes))(*by_two))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.reshape(other.shape), other)
    if step.kind != "silu_mul":  # a weight for each
        weights, rows = jnp.stack([2 * arrays[-1], arrays[-1]]), arrays[:-1]
        found = jax.jit(jax.vmap(lambda weight: call(step)(*rows, weight)))(weights)
        np.testing.assert_array_equal(jax.tree.leaves(found)[-1][1], expected[-1])
        assert jnp.any(jax.tree.leaves(found)[-1][0] != expected[-1])


@pytest.mark.parametrize("name", STEPS)
def test_rows_stay_split(hopper, mesh, name):
    step = STEPS[name]
    arrays = inputs(step, 16, 2048)
    alone = jax.tree.leaves(jax.jit(call(step))(*arrays))
    split = P("data", "model" if step.kind == "silu_mul" else None)
    given = [jax.device_put(a, NamedSharding(mesh, split if a.ndim == 2 else P())) for a in arrays]
    text = str(jax.jit(call(step)).lower(*given).compile().as_text())
    assert "all-gather" not in text and "all-reduce" not in text
    for one, other in zip(jax.tree.leaves(jax.jit(call(step))(*given)), alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_does_not_fit():
    step = STEPS["norm of a sum"]
    x, y, weight = inputs(step, 2, 512)
    with pytest.raises(
        ValueError, match=r"add_rms_norm of .* and a weight .* the last axes differ"
    ):
        add_rms_norm(x, y, weight[1:], 1e-5)
    with pytest.raises(ValueError, match="silu_mul of"):
        silu_mul(x, y[:, 1:])
    assert has_kernel(x, y, weight) and not has_kernel(x[:, :500], y[:, :500], weight[:500])
    with pytest.raises(ValueError, match="no kernel for"):
        step_kernel(step, *inputs(step, 2, 512, dtype=jnp.float32), interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (8, 8192), (300, 14336)])
def test_on_a_gpu(name, m, k):
    run = jax.jit(partial(step_kernel, STEPS[name]))
    for seed in range(5):
        arrays = inputs(STEPS[name], m, k, seed)
        found = run(*arrays)
        assert_rounded(found, exact(STEPS[name], *arrays))
        for one, other in zip(jax.tree.leaves(run(*arrays)), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(one, other)
