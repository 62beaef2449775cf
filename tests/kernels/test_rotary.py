"""Rotation and what is rotated into the cache: the kernel under the interpreter, and around it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import rotary, rotate_append
from kernels_pallas.rotary import has_kernel, rotate_append_kernel, rotate_append_reference

# B, T, H, G, S, d
CASES = [(1, 1, 8, 4, 16, 128), (3, 1, 4, 4, 9, 128), (2, 5, 12, 4, 16, 128), (1, 2, 8, 8, 8, 256)]


def arrays(sizes, seed: int = 0, dtype=jnp.bfloat16) -> list[jax.Array]:
    """The last slot of the last row is beyond the cache."""
    batch, length, heads, groups, slots, dim = sizes
    shapes = [(batch, length, n, dim) for n in (heads, groups, groups)]
    shapes += [(batch, groups, slots, dim)] * 2
    keys = jax.random.split(jax.random.key(seed), 6)
    query, key, value, *cache = (
        jax.random.normal(*pair, dtype) for pair in zip(keys, shapes, strict=False)
    )
    angles = 100 * jax.random.normal(keys[5], (batch, length, dim // 2))
    rng = np.random.default_rng(seed)
    places = np.stack([rng.permutation(slots)[:length] for _ in range(batch)])
    places[-1, -1] = slots
    places = jnp.asarray(places, jnp.int32)
    return [query, key, value, jnp.cos(angles), jnp.sin(angles), places, *cache]


def exact(query, key, value, cos, sin, slots, keys, values) -> list[np.ndarray]:
    """In float64, one token at a time; what is written is what is rotated, rounded."""
    turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)

    def rotated(x):
        first, second = np.split(np.asarray(x, np.float64), 2, -1)
        turned = (first + 1j * second) * turn[:, :, None]
        return np.concatenate([turned.real, turned.imag], -1)

    query, key = rotated(query), rotated(key)
    keys, values = (np.array(a, np.float64) for a in (keys, values))
    for b, t in np.ndindex(slots.shape):
        if slots[b, t] < keys.shape[2]:
            keys[b, :, slots[b, t]] = key[b, t]
            values[b, :, slots[b, t]] = np.asarray(value[b, t], np.float64)
    return [query, key, keys, values]


def assert_rounded(found, expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16 and one.shape == other.shape
        difference = np.abs(np.asarray(one, np.float64) - other)
        assert np.all(difference <= 2**-8 * np.abs(other) + 1e-6)


@pytest.mark.parametrize("sizes", CASES)
def test_the_kernel_equals_float64(sizes):
    given = arrays(sizes)
    found = rotate_append_kernel(*given, interpret=True)
    assert_rounded(found, exact(*given))
    # What was there stays as it was, bit for bit.
    for old, new in zip(given[6:], found[2:], strict=True):
        written = np.zeros(old.shape[::2][:2], bool)
        for b, t in np.ndindex(given[5].shape):
            if given[5][b, t] < old.shape[2]:
                written[b, given[5][b, t]] = True
        kept = np.broadcast_to(~written[:, None, :, None], old.shape)
        np.testing.assert_array_equal(np.asarray(new)[kept], np.asarray(old)[kept])


@pytest.mark.parametrize("sizes", CASES)
def test_it_lowers_for_a_gpu_and_writes_in_place(sizes):
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        shapes = jax.eval_shape(partial(arrays, sizes))
        text = jax.jit(rotate_append_kernel).trace(*shapes).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in text.as_text()
        assert text.as_text().count("operand_index") == 4


@pytest.fixture
def hopper(monkeypatch):
    """Takes the way of the kernel, whose last step on a CPU is the reference."""
    monkeypatch.setattr(rotary, "hopper_processors", lambda: 132)


@pytest.mark.parametrize("sizes", CASES)
def test_elsewhere_it_is_the_reference(hopper, sizes):
    given = arrays(sizes)
    found = jax.jit(rotate_append)(*given)
    assert_rounded(found, exact(*given))


def test_gradients_are_the_reference_s(hopper):
    given = arrays(CASES[2])
    floats, slots = [*given[:5], *given[6:]], given[5]

    def loss(function, floats):
        out = function(*floats[:5], slots, *floats[5:])
        return sum(jnp.sum(jnp.sin(array.astype(jnp.float32))) for array in out)

    found = jax.jit(jax.grad(partial(loss, rotate_append)))(floats)
    expected = jax.jit(jax.grad(partial(loss, rotate_append_reference)))(floats)
    for one, other in zip(found, expected, strict=True):
        assert jnp.any(one != 0)
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2e-2, atol=2e-2
        )


def test_a_batch_adds_to_the_rows(hopper):
    given = arrays((6, 2, 4, 4, 9, 128))
    expected = jax.jit(rotate_append)(*given)
    by_two = [array.reshape(3, 2, *array.shape[1:]) for array in given]
    found = jax.jit(jax.vmap(rotate_append))(*by_two)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.reshape(other.shape), other)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model")])
def test_rows_and_heads_stay_split(hopper, mesh, spec):
    given = arrays((4, 1, 32, 16, 9, 128))
    alone = jax.jit(rotate_append)(*given)
    batch, heads = (*spec, None)[:2]

    def put(array: jax.Array, spec: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    specs = [(batch, None, heads)] * 3 + [(batch,)] * 3 + [(batch, heads)] * 2
    split = [put(array, spec) for array, spec in zip(given, specs, strict=True)]
    run = jax.jit(rotate_append)
    text = str(run.lower(*split).compile().as_text())
    assert "all-gather" not in text and "all-reduce" not in text
    for one, other in zip(run(*split), alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_has_no_kernel():
    assert has_kernel(*arrays(CASES[0]))
    for given in (
        arrays((1, 1, 9, 3, 8, 128)),
        arrays((1, 1, 8, 4, 8, 64)),
        arrays((1, 1, 8, 4, 8, 96)),
        arrays(CASES[0], dtype=jnp.float32),
    ):
        assert not has_kernel(*given)
        with pytest.raises(ValueError, match="no kernel for"):
            rotate_append_kernel(*given, interpret=True)
        for one, other in zip(rotate_append(*given), exact(*given), strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=2**-8, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*CASES, (8, 1, 32, 8, 2048, 128), (2, 8, 32, 8, 512, 128)])
def test_on_a_gpu(sizes):
    run = jax.jit(rotate_append_kernel)
    for seed in range(5):
        given = arrays(sizes, seed)
        found = run(*given)
        assert_rounded(found, exact(*given))
        for one, other in zip(run(*given), found, strict=True):
            np.testing.assert_array_equal(one, other)
