"""Attention over a cache: the kernel under the interpreter, and what is around it everywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import attention, cached_attention, reference
from kernels_pallas.attention_kernel import TILE, attention_kernel, has_kernel

# B, T, H, G, S, d; what a query sees; CTAs that share a head.
CASES = {
    "one token": ((2, 1, 8, 2, 520, 128), {}, 3),
    "a tile": ((1, 1, 4, 1, 128, 128), {}, 1),
    "no groups": ((1, 1, 2, 2, 200, 64), {}, 2),
    "several tokens": ((2, 5, 9, 3, 520, 64), {}, 2),
    "all rows": ((1, 16, 4, 1, 384, 128), {}, 3),
    "window": ((2, 3, 4, 2, 520, 64), {"window": 150}, 3),
    "itself": ((2, 2, 2, 1, 264, 64), {"window": 1}, 2),
    "soft cap": ((1, 2, 4, 2, 264, 128), {"softcap": 0.7}, 2),
}


def arrays(sizes, seed: int = 0, dtype=jnp.bfloat16) -> tuple[jax.Array, ...]:
    batch, length, heads, groups, slots, dim = sizes
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (batch, length, heads, dim), *2 * [(batch, groups, slots, dim)]
    made = [jax.random.normal(*pair, dtype) for pair in zip(keys, shapes, strict=True)]
    first = np.random.default_rng(seed).integers(0, slots - length + 1, (batch, 1))
    positions = np.minimum(first, slots - length) + np.arange(length)
    return *made, jnp.asarray(positions, jnp.int32)


def exact(query, key, value, positions, scale, window=None, softcap=None) -> np.ndarray:
    """In float64, one head at a time."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    out = np.zeros(query.shape)
    for b, t, h in np.ndindex(query.shape[:3]):
        last = int(positions[b, t])
        seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
        g = h * key.shape[1] // query.shape[2]
        scores = key[b, g, seen] @ query[b, t, h] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ value[b, g, seen] / weights.sum()
    return out


def assert_close(found: jax.Array, expected: np.ndarray) -> None:
    difference = np.asarray(found, np.float64) - expected
    assert np.linalg.norm(difference) <= 6e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_float64(name):
    sizes, options, parts = CASES[name]
    given = arrays(sizes)
    options = options | {"scale": 2 * sizes[-1] ** -0.5}
    found = attention_kernel(*given, **options, parts=parts, interpret=True)
    assert found.shape == given[0].shape and found.dtype == jnp.bfloat16
    assert_close(found, exact(*given, **options))


def test_tiles_that_nobody_sees_are_not_read():
    query, key, value, positions = arrays((2, 1, 2, 1, 5 * TILE, 64))
    positions = jnp.asarray([[3 * TILE - 1], [2 * TILE + 5]], jnp.int32)
    options = {"scale": 0.2, "window": 60, "parts": 2, "interpret": True}
    slots = jnp.arange(5 * TILE)[None, None, :, None]
    # The second row's window begins a tile earlier.
    begin = jnp.asarray([2, 1])[:, None, None, None] * TILE
    unread = (slots < begin) | (slots >= 3 * TILE)
    poisoned = (jnp.where(unread, jnp.nan, array) for array in (key, value))
    found = attention_kernel(query, *poisoned, positions, **options)
    np.testing.assert_array_equal(found, attention_kernel(query, key, value, positions, **options))


@pytest.mark.parametrize("name", CASES)
def test_it_lowers_for_a_gpu(name):
    sizes, options, parts = CASES[name]
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        run = partial(attention_kernel, **options, scale=0.1, parts=parts)
        shapes = jax.eval_shape(partial(arrays, sizes))
        traced = jax.jit(run).trace(*shapes)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def hopper(monkeypatch):
    """Takes the way of the kernel, whose last step on a CPU is the reference."""
    monkeypatch.setattr(attention, "hopper_processors", lambda: 132)


@pytest.mark.parametrize("name", CASES)
def test_elsewhere_it_is_the_reference(hopper, name):
    sizes, options, _ = CASES[name]
    given = arrays(sizes)
    found = jax.jit(partial(cached_attention, scale=0.3, **options))(*given)
    assert_close(found, exact(*given, scale=0.3, **options))


def test_outside_jit_a_shape_compiles_once(hopper, monkeypatch):
    traced, shared = [], attention._shared
    monkeypatch.setattr(attention, "_shared", lambda *a: traced.append(1) or shared(*a))
    given = arrays((1, 3, 4, 2, 72, 64))
    for _ in range(3):
        cached_attention(*given, scale=0.31)
    assert len(traced) == 1


def test_gradients_are_the_reference_s(hopper):
    *given, positions = arrays((2, 3, 4, 2, 40, 64))
    slots = jnp.arange(40)[None]

    def loss(attend, *given):
        return jnp.sum(jnp.sin(attend(*given).astype(jnp.float32)))

    def ours(query, key, value):
        return cached_attention(query, key, value, positions, scale=0.3, window=9)

    def plain(query, key, value):
        return reference.attention(query, key, value, positions, slots, scale=0.3, window=9)

    found = jax.grad(partial(loss, ours), argnums=(0, 1, 2))(*given)
    expected = jax.grad(partial(loss, plain), argnums=(0, 1, 2))(*given)
    for one, other in zip(found, expected, strict=True):
        assert jnp.any(one != 0)
        np.testing.assert_array_equal(one, other)


def test_a_batch_adds_to_the_rows(hopper):
    query, key, value, positions = arrays((6, 2, 4, 2, 40, 64))
    whole = cached_attention(query, key, value, positions, scale=0.3)
    attend = jax.jit(jax.vmap(partial(cached_attention, scale=0.3)))
    by_two = [array.reshape(3, 2, *array.shape[1:]) for array in (query, key, value, positions)]
    np.testing.assert_array_equal(attend(*by_two).reshape(whole.shape), whole)
    one_cache = partial(cached_attention, key=key[:2], value=value[:2], scale=0.3)
    found = jax.vmap(lambda q, p: one_cache(q, positions=p))(by_two[0], by_two[3])
    np.testing.assert_array_equal(found[0], whole[:2])
    expected = one_cache(by_two[0][1], positions=by_two[3][1])
    np.testing.assert_array_equal(found[1], expected)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model")])
def test_rows_and_heads_stay_split(hopper, mesh, spec):
    query, key, value, positions = arrays((4, 1, 8, 4, 40, 64))
    alone = cached_attention(query, key, value, positions, scale=0.3)

    def put(array, *dimensions):
        return jax.device_put(array, NamedSharding(mesh, P(*dimensions)))

    batch, heads = (*spec, None)[:2]
    given = (
        put(query, batch, None, heads),
        put(key, *spec),
        put(value, *spec),
        put(positions, batch),
    )
    run = jax.jit(partial(cached_attention, scale=0.3))
    text = str(run.lower(*given).compile().as_text())
    assert "all-gather" not in text and "all-reduce" not in text
    np.testing.assert_array_equal(run(*given), alone)


def test_what_has_no_kernel():
    shapes = jax.eval_shape(partial(arrays, (1, 1, 4, 2, 64, 64)))
    assert has_kernel(*shapes[:2])
    for sizes in [(1, 33, 4, 2, 64, 64), (1, 1, 4, 2, 64, 96), (1, 1, 4, 2, 63, 64)]:
        given = arrays(sizes)
        assert not has_kernel(*given[:2])
        with pytest.raises(ValueError, match="no kernel for queries"):
            attention_kernel(*given, scale=1.0, interpret=True)
    assert not has_kernel(*arrays((1, 1, 4, 2, 64, 64), dtype=jnp.float32)[:2])
    query, key, value, positions = arrays((1, 1, 4, 2, 64, 64))
    with pytest.raises(ValueError, match="do not fit keys"):
        cached_attention(query[:, :, :3], key, value, positions, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    sizes, options, parts = CASES[name]
    run = jax.jit(partial(attention_kernel, **options, scale=0.2, parts=parts))
    for seed in range(20):
        given = arrays(sizes, seed)
        found = run(*given)
        assert_close(found, exact(*given, scale=0.2, **options))
        for _ in range(5):
            np.testing.assert_array_equal(run(*given), found)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 40])
def test_long_caches_on_a_gpu(batch):
    given = arrays((batch, 1, 32, 8, 4096, 128), batch)
    found = jax.jit(partial(cached_attention, scale=0.2))(*given)
    assert_close(found[:2], exact(*(array[:2] for array in given), scale=0.2))
