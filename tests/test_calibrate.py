"""Calibration: the statistics are those of the taps, layer by layer and however they are spread."""

import dataclasses
import functools
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import LLAMA, MIXTRAL, SIZES

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream, calibrate, tap_of
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward_with_taps, init
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.statistics import BINS, BINS_AN_OCTAVE, LOWEST, InputStatistics, Wanted

GROUPED_QUERY, MOE = LLAMA, MIXTRAL
# Biases, and a head of keys for each of queries.
DENSE = ModelConfig.from_hf({"model_type": "qwen2"} | SIZES | {"num_key_value_heads": 2})
# Alternates sliding and full attention, scales embeddings, has norms behind each half of a layer.
GEMMA = ModelConfig.from_hf(
    {"model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 2, "head_dim": 16}
    | SIZES
)
CONFIGS = {"dense": DENSE, "grouped query": GROUPED_QUERY, "experts": MOE, "gemma": GEMMA}
each_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EVERYTHING = Wanted(second_moment=True, histogram=True, sample=8)
Rows = dict[str, list[list[np.ndarray]]]  # by path, batch and expert


@functools.cache
def params(config: ModelConfig) -> Any:
    return init(config, jax.random.key(0))


def text(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (rows, length))


def linears(config: ModelConfig) -> list[str]:
    """Every weight that an activation reaches, router and output head among them."""
    found = [path for path, leaf in tree.leaves_with_paths(params(config)) if leaf.ndim > 1]
    return [path for path in found if path.startswith(("layers/", "lm_head"))]


def everything(paths: Iterable[str]) -> dict[str, Wanted]:
    return dict.fromkeys(paths, EVERYTHING)


def tapped(config: ModelConfig, batches: list[np.ndarray], paths: list[str]) -> Rows:
    """Rows [T, K] of each input, by batch and group, from whole forward passes."""
    names = {path: tap_of(path) for path in paths} | {"lm_head/weight": "norm/output"}
    sizes = [f"layers/{i}/mlp/experts/group_sizes" for i in config.moe_layers]
    found: Rows = {path: [] for path in paths}
    for batch in batches:
        _, taps = forward_with_taps(
            config,
            params(config),
            jnp.asarray(batch, jnp.int32),
            [
                *(names[path] for path in paths),
                *sizes,
            ],
        )
        for path in paths:
            x = np.asarray(taps[names[path]], np.float64)
            x = x.reshape(-1, x.shape[-1])
            if "/experts/" in path:
                groups = taps[path.split("/experts/")[0] + "/experts/group_sizes"]
                found[path].append(np.split(x, np.cumsum(groups)[:-1]))
            else:
                found[path].append([x])
    return found


def assert_describe(found: InputStatistics, batches: list[list[np.ndarray]], path: str) -> None:
    """Statistics against batches of groups of rows; a dense linear has one group."""
    experts = len(batches[0]) if "/experts/" in path else 0
    for i in range(max(experts, 1)):
        one = dataclasses.replace(found, histogram=None)
        one = jax.tree.map(lambda field, i=i: field[i], one) if experts else one
        x = np.concatenate([groups[i] for groups in batches])
        scale = max(np.abs(x).max(initial=0), 1e-9)
        assert float(one.count) == len(x), path
        np.testing.assert_allclose(one.amax, np.abs(x).max(initial=0), rtol=1e-4, err_msg=path)
        for name, expected in {
            "channel_amax": np.abs(x).max(0, initial=0),
            "channel_abs": np.abs(x).sum(0) / max(len(x), 1),
        }.items():
            np.testing.assert_allclose(
                getattr(one, name), expected, atol=1e-5 * scale, err_msg=f"{path} {name}"
            )
        assert one.second_moment is not None
        moment = x.T @ x / max(len(x), 1)
        np.testing.assert_allclose(
            one.second_moment, moment, atol=1e-5 * scale**2, err_msg=f"{path} second_moment"
        )
        parts = np.split(np.asarray(one.sample), len(batches))
        for part, groups in zip(parts, batches, strict=True):
            rows, count = groups[i], len(part)
            middles = [(2 * j + 1) * len(rows) // (2 * count) for j in range(count)]
            expected = rows[middles] if len(rows) else 0 * part
            np.testing.assert_allclose(part, expected, atol=1e-5 * scale, err_msg=path)
    assert_counts(found.histogram, np.concatenate([x for groups in batches for x in groups]))


def assert_counts(histogram: Any, x: np.ndarray) -> None:
    """Almost: a value at the edge of two bins may be rounded into either."""
    with np.errstate(divide="ignore"):
        bins = np.floor((np.log2(np.abs(x)) - LOWEST) * BINS_AN_OCTAVE)
    expected = np.bincount(np.clip(bins, 0, BINS - 1).astype(int).ravel(), minlength=BINS)
    assert np.sum(histogram) == x.size
    assert np.abs(np.asarray(histogram) - expected).sum() <= 0.002 * x.size + 2


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same statistics to float tolerance, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    for path in found:
        a, b = (dataclasses.replace(of[path], histogram=None) for of in (found, expected))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            largest = float(np.max(np.abs(y)))
            np.testing.assert_allclose(x, y, atol=tolerance * max(largest, 1e-9), err_msg=path)
        moved = np.abs(np.asarray(found[path].histogram) - np.asarray(expected[path].histogram))
        assert moved.sum() <= 0.002 * np.sum(expected[path].histogram) + 2


# What it finds


@each_model
def test_statistics_are_those_of_what_reaches_each_linear(config):
    batches, paths = [text(3, 16, seed=1), text(3, 16, seed=2)], linears(config)
    found = calibrate(config, params(config), batches, everything(paths))
    expected = tapped(config, batches, paths)
    assert found.keys() == set(paths)
    for path in paths:
        assert_describe(found[path], expected[path], path)


def test_batches_may_have_any_shapes_and_come_from_a_generator():
    batches, paths = [text(3, 16, seed=1), text(2, 9, seed=2)], linears(GROUPED_QUERY)
    generated = (np.asarray(batch, np.uint16) for batch in batches)
    found = calibrate(GROUPED_QUERY, params(GROUPED_QUERY), generated, everything(paths))
    expected = tapped(GROUPED_QUERY, batches, paths)
    for path in paths:
        assert_describe(found[path], expected[path], path)


def test_only_what_was_asked_for_is_returned():
    batches = [text(3, 16, seed=1), text(3, 16, seed=2)]
    wants = {"layers/1/self_attn/o_proj/weight": Wanted(), "lm_head/weight": Wanted(sample=4)}
    found = calibrate(DENSE, params(DENSE), batches, wants)
    assert found.keys() == wants.keys()
    one, head = found.values()
    assert one.second_moment is None and one.histogram is None and one.sample is None
    assert head.second_moment is None and head.sample is not None and head.sample.shape == (4, 32)
    expected = tapped(DENSE, batches, list(wants))
    for path, rows in expected.items():
        x = np.concatenate([group for groups in rows for group in groups])
        assert float(found[path].amax) == pytest.approx(np.abs(x).max(), rel=1e-5)


def test_the_cut_into_batches_does_not_matter():
    rows, wants = text(4, 16, seed=4), dict.fromkeys(linears(MOE), Wanted(second_moment=True))
    whole = calibrate(MOE, params(MOE), [rows], wants)
    for cut in ([rows[:1], rows[1:]], list(np.split(rows, 4))):
        found = calibrate(MOE, params(MOE), cut, wants)
        for path, statistics in found.items():
            np.testing.assert_array_equal(statistics.count, whole[path].count)
            a, b = statistics.second_moment, whole[path].second_moment
            assert a is not None and b is not None
            assert np.linalg.norm(a - b) <= 3e-7 * np.linalg.norm(b), path


def test_the_same_text_gives_the_same_bits():
    batches, wants = [text(3, 16, seed=1), text(3, 16, seed=2)], everything(linears(MOE))
    once = calibrate(MOE, params(MOE), batches, wants)
    again = calibrate(MOE, params(MOE), batches, wants)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_on_the_host_give_the_same():
    batches, wants = [text(3, 16, seed=1), text(3, 16, seed=2)], everything(linears(GROUPED_QUERY))
    on_device = calibrate(GROUPED_QUERY, params(GROUPED_QUERY), batches, wants)
    on_host = calibrate(GROUPED_QUERY, jax.device_get(params(GROUPED_QUERY)), batches, wants)
    for a, b in zip(jax.tree.leaves(on_host), jax.tree.leaves(on_device), strict=True):
        np.testing.assert_array_equal(a, b)


# The stream


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_may_be_scaled_and_rotated_before_they_are_looked_at(dtype):
    config = dataclasses.replace(GROUPED_QUERY, dtype=dtype)
    layer, kind = params(GROUPED_QUERY)["layers"][0], config.attention_kinds[0]
    stream = Stream(config, params(GROUPED_QUERY), [text(2, 12)])
    tap, scale = "mlp/down_proj/input", jnp.linspace(0.25, 4.0, 48)
    wants = {tap: Wanted(second_moment=True, rotate=16), "mlp/up_proj/input": Wanted()}
    plain = Wanted(second_moment=True, sample=24)
    rows = stream.observe(layer, kind, {tap: plain})[tap].sample
    assert rows is not None  # all 24 of them
    found = stream.observe(layer, kind, wants, scales={tap: scale})
    expected = np.asarray(hadamard(rows * scale[None], 16), np.float64)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found[tap].amax, largest, rtol=tolerance)
    moment = found[tap].second_moment
    assert moment is not None
    np.testing.assert_allclose(moment, expected.T @ expected / 24, atol=tolerance * largest**2)


def test_a_stream_moves_layer_by_layer_and_may_fork():
    batches, config = [text(2, 12), text(1, 7)], GEMMA
    layers, kinds = params(config)["layers"], config.attention_kinds
    stream = Stream(config, params(config), batches)
    assert (len(stream), stream.tokens) == (2, 31)
    twin = stream.fork()
    outputs = stream.outputs(layers[0], kinds[0])
    stream.observe(layers[0], kinds[0], {"mlp/up_proj/input": Wanted()}, advance=True)
    twin.advance(layers[0], kinds[0])
    for i, batch in enumerate(batches):
        tap = "layers/0/output"
        _, taps = forward_with_taps(config, params(config), jnp.asarray(batch, jnp.int32), [tap])
        for found in (outputs[i], stream.values[i], twin.values[i]):
            assert isinstance(found, np.ndarray)
            np.testing.assert_allclose(found, taps[tap], atol=1e-5)
    before = stream.fork()
    stream.advance(layers[1], kinds[1])
    assert not np.allclose(stream.values[0], before.values[0])


def _sum_and_rows(taps: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    key = taps["self_attn/key"]
    return jnp.sum(key, axis=(0, 1)), jnp.float32(key.shape[0] * key.shape[1])


def test_any_statistic_of_any_tap_may_be_merged():
    batches, config = [text(2, 12), text(1, 7)], GROUPED_QUERY
    stream = Stream(config, params(config), batches)
    total, rows = stream.reduce(
        params(config)["layers"][0],
        config.attention_kinds[0],
        frozenset(["self_attn/key"]),
        _sum_and_rows,
        lambda a, b: jax.tree.map(jnp.add, a, b),
    )
    taps = [
        forward_with_taps(
            config, params(config), jnp.asarray(b, jnp.int32), ["layers/0/self_attn/key"]
        )[1]["layers/0/self_attn/key"]
        for b in batches
    ]
    assert float(rows) == 31
    np.testing.assert_allclose(total, sum(np.sum(t, (0, 1)) for t in taps), atol=1e-4)


def test_it_goes_layer_by_layer_and_compiles_once_for_each_kind_of_layer(monkeypatch):
    module, order, traced = import_module("jaxopt_models.calibrate"), [], []
    observe, update = module._observe, module.update

    def observing(config, layer, *rest, **options):
        order.append(np.asarray(layer["input_layernorm"]["weight"])[0])
        return observe(config, layer, *rest, **options)

    def tracing(*args):
        traced.append(args)
        return update(*args)

    monkeypatch.setattr(module, "_observe", observing)
    monkeypatch.setattr(module, "update", tracing)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = ModelConfig.from_hf(GEMMA.to_hf() | {"num_hidden_layers": 4, "layer_types": kinds})
    model = init(config, jax.random.key(0))
    numbered = {
        f"layers/{i}/input_layernorm/weight": jnp.full(32, i / 8, jnp.float32) for i in range(4)
    }
    model = tree.replace(model, numbered)
    paths = [f"layers/{i}/mlp/gate_proj/weight" for i in range(4)]
    calibrate(config, model, [text(1, 10), text(1, 10, seed=1)], everything(paths))
    assert order == [i / 8 for i in range(4) for _ in range(2)]  # both batches, then the next layer
    assert len(traced) == 2  # a layer of full and one of sliding attention


def test_progress_wraps_the_layers():
    seen = []

    def progress(items, description):
        for item in items:
            yield item
            seen.append(description)

    wants = {"layers/1/mlp/up_proj/weight": Wanted()}
    calibrate(GROUPED_QUERY, params(GROUPED_QUERY), [text(3, 16)], wants, progress)
    assert seen == ["calibrating"] * GROUPED_QUERY.num_layers


# Spread over devices


@pytest.mark.parametrize("config", [GROUPED_QUERY, MOE], ids=lambda config: config.model_type)
def test_text_may_be_spread_over_devices(config):
    # Three rows do not split over eight devices: each of them then has them all.
    batches, wants = [text(8, 12, seed=1), text(3, 12, seed=2)], everything(linears(config))
    alone = calibrate(config, params(config), batches, wants)
    mesh = make_mesh({"data": 8})
    spread = calibrate(config, params(config), batches, wants, mesh=mesh)
    assert_close(spread, alone)


def test_a_spread_stream_stays_on_the_devices():
    config, mesh = GROUPED_QUERY, make_mesh({"data": 4, "model": 2})
    stream = Stream(config, params(config), [text(8, 12)], mesh)
    stream.advance(params(config)["layers"][0], config.attention_kinds[0])
    (x,) = stream.values
    assert isinstance(x, jax.Array) and x.sharding.shard_shape(x.shape) == (2, 12, 32)


def test_weights_must_be_on_the_mesh_or_free_to_go_there():
    config, mesh, wants = GROUPED_QUERY, make_mesh({"data": 4, "model": 2}), {"x": Wanted()}
    bound = jax.device_put(params(config), jax.devices()[0])
    with pytest.raises(UserError, match="embed_tokens/weight is bound to other devices"):
        calibrate(config, bound, [text(8, 12)], wants, mesh=mesh)
    with pytest.raises(UserError, match="mesh has .'model',.; name an axis of it 'data'"):
        calibrate(config, bound, [text(8, 12)], wants, mesh=make_mesh({"model": 8}))
    wants = {"layers/0/mlp/up_proj/weight": EVERYTHING}
    alone = calibrate(config, bound, [text(8, 12)], wants)
    for free in (jax.device_get(bound), shard(bound, mesh)):
        assert_close(calibrate(config, free, [text(8, 12)], wants, mesh=mesh), alone)


# What it refuses


def test_there_must_be_text():
    with pytest.raises(UserError, match="no batches were given"):
        calibrate(DENSE, params(DENSE), [], everything(linears(DENSE)))


@pytest.mark.parametrize(
    "batch, problem",
    [
        (np.array([[1, 64]]), "outside the vocabulary of 64"),
        (np.array([[-1, 3]]), "outside the vocabulary of 64"),
        (np.array([1, 2, 3]), "shape"),
        (np.zeros((0, 4), np.int32), "shape"),
        (np.zeros((2, 0), np.int32), "shape"),
        (np.array([[0.5, 1.5]]), "integer token ids"),
    ],
)
def test_a_batch_must_hold_ids_of_the_vocabulary(batch, problem):
    with pytest.raises(UserError, match=problem):
        calibrate(DENSE, params(DENSE), [text(2, 11), batch], everything(linears(DENSE)))


@pytest.mark.parametrize(
    "path, named",
    [
        ("layers/9/mlp/up_proj/weight", "layers/9/mlp/up_proj/weight"),
        ("embed_tokens/weight", "embed_tokens/weight"),
        ("layers/0/mlp/up/weight", "mlp/up/weight"),
        ("layers/0/input_layernorm/weight", "input_layernorm/weight"),
    ],
)
def test_a_weight_that_nothing_reaches_is_named(path, named):
    wants = {"layers/1/mlp/up_proj/weight": Wanted(), path: Wanted()}
    with pytest.raises(UserError, match=f"no activation reaches {named}; it cannot be calibrated"):
        calibrate(GROUPED_QUERY, params(GROUPED_QUERY), [text(3, 16)], wants)


@pytest.mark.parametrize("value, problem", [(np.nan, "not finite"), (0.0, "zero on all")])
def test_an_input_without_a_usable_maximum_is_named(value, problem):
    model = params(GROUPED_QUERY)
    norm = jnp.full_like(model["layers"][1]["post_attention_layernorm"]["weight"], value)
    broken = tree.replace(model, {"layers/1/post_attention_layernorm/weight": norm})
    path = "layers/1/mlp/up_proj/weight"
    with pytest.raises(UserError, match=f"{path} is {problem}"):
        calibrate(GROUPED_QUERY, broken, [text(3, 16)], {path: Wanted()})
    earlier = {"layers/0/mlp/up_proj/weight": Wanted()}
    assert len(calibrate(GROUPED_QUERY, broken, [text(3, 16)], earlier)) == 1
