"""The decoder against itself: with and without cache, chunks, jit; taps; widths; initial values."""

import dataclasses
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models import attention
from jaxopt_models.models.attention import cached_attend, rotate, self_attend
from jaxopt_models.models.cache import LayerCache, cache_bytes, empty_cache
from jaxopt_models.models.cached import decode_step, prefill
from jaxopt_models.models.config import Rope
from jaxopt_models.models.moe import moe_feed_forward, route
from jaxopt_models.models.transformer import (
    abstract_params,
    forward,
    forward_with_taps,
    hidden_states,
    hidden_states_with_layers,
    init,
)
from jaxopt_models.qtensor import QTensor, quantize_array
from kernels_pallas import reference

_jitted_forward = jax.jit(forward, static_argnums=0)


def _random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(3, 96, shape), jnp.int32)


# ---- the cache ----------------------------------------------------------------------------------

_LENGTHS = (9, 4, 7)
_STEPS = 5


@partial(jax.jit, static_argnums=0)
def _with_cache(config, params, tokens):
    """The same tokens by prefill and single steps, by one long step, and after a rollback."""
    rows, width = len(_LENGTHS), max(_LENGTHS)
    lengths = jnp.asarray(_LENGTHS, jnp.int32)
    ahead = lengths[:, None] + jnp.arange(_STEPS, dtype=jnp.int32)[None]
    following = jnp.take_along_axis(tokens, ahead, axis=1)
    padding = jnp.arange(width)[None] >= lengths[:, None]
    prompts = jnp.where(padding, 95 - tokens[:, :width], tokens[:, :width])
    first, cache = prefill(
        config, params, prompts, lengths, empty_cache(config, params, rows, tokens.shape[1])
    )

    def step(cache, column):
        token, position = column
        logits, cache = decode_step(config, params, token[:, None], position[:, None], cache)
        return cache, logits[:, 0]

    _, single = jax.lax.scan(step, cache, (following.T, ahead.T))
    _, spoiled = decode_step(config, params, 95 - following, ahead, cache)
    together, _ = decode_step(config, params, following, ahead, spoiled)
    everything = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    blank = empty_cache(config, params, rows, tokens.shape[1] + 3)
    whole, _ = decode_step(config, params, tokens, everything, blank)
    return first, jnp.swapaxes(single, 0, 1), together, whole


@pytest.mark.parametrize("name", ["qwen2_sliding", "gemma3", "qwen3_moe"])
def test_a_cache_changes_nothing(golden, name):
    """Logits of ragged rows at every position, however the tokens were fed."""
    model, tokens = golden(name), _tokens(0, 3, 16)
    plain = np.asarray(_jitted_forward(model.config, model.params, tokens))
    first, single, together, whole = _with_cache(model.config, model.params, tokens)
    for row, length in enumerate(_LENGTHS):
        after = plain[row, length : length + _STEPS]
        np.testing.assert_allclose(first[row], plain[row, length - 1], atol=2e-5)
        np.testing.assert_allclose(single[row], after, atol=2e-5)
        np.testing.assert_allclose(together[row], after, atol=2e-5)
    np.testing.assert_allclose(whole, plain, atol=2e-5)


@pytest.mark.parametrize("name", ["qwen2_sliding", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("least", [128, 4])
def test_documents_of_a_row_see_themselves_only(golden, monkeypatch, name, least):
    """In every chunk of queries, under windows and for experts."""
    monkeypatch.setattr(attention, "_LEAST_CHUNK", least)
    model, tokens = golden(name), _tokens(4, 2, 16)
    cuts = ((0, 5, 16), (0, 9, 16))  # of each row
    starts = jnp.asarray([[b * (i >= b) for i in range(16)] for _, b, _ in cuts], jnp.int32)
    found = jax.jit(hidden_states, static_argnums=0)(model.config, model.params, tokens, starts)
    for row, own in enumerate(cuts):
        for first, last in pairwise(own):
            alone = tokens[row : row + 1, first:last]
            expected = hidden_states(model.config, model.params, alone)
            np.testing.assert_allclose(found[row, first:last], expected[0], atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "layers"])
def test_streams_behind_layers_are_those_that_are_tapped(golden, remat):
    model, tokens = golden("gemma3"), _tokens(5, 2, 9)
    names = {f"layers/{i}/output": i for i in (0, model.config.num_layers - 1)}
    _, taps = forward_with_taps(model.config, model.params, tokens, [*names, "norm/output"])
    hidden, behind = hidden_states_with_layers(
        model.config, model.params, tokens, names.values(), remat=remat
    )
    np.testing.assert_allclose(hidden, taps["norm/output"], atol=2e-5)
    assert behind.keys() == set(names.values())
    for name, i in names.items():
        np.testing.assert_allclose(behind[i], taps[name], rtol=1e-5, atol=1e-5)


def test_appending_writes_each_row_at_its_slots_and_drops_what_is_past_the_end():
    cache = LayerCache(jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 3, 4, 5), jnp.bfloat16))
    keys, values = _random(1, 2, 2, 3, 5), _random(2, 2, 2, 3, 5)
    slots = jnp.asarray([[1, 2], [3, 4]])  # the last one is past the capacity of 4
    new = cache.append(keys, values, slots)
    assert new.values.dtype == jnp.bfloat16
    expected = np.zeros((2, 3, 4, 5), np.float32)
    expected[0, :, 1], expected[0, :, 2], expected[1, :, 3] = keys[0, 0], keys[0, 1], keys[1, 0]
    assert np.array_equal(new.keys, expected)
    assert np.count_nonzero(new.values) == np.count_nonzero(expected)


def test_a_step_past_the_capacity_leaves_the_cache_alone(golden):
    model = golden("qwen2_sliding")
    cache = empty_cache(model.config, model.params, 1, 6)
    tokens, lengths = _tokens(3, 1, 6), jnp.asarray([6])
    _, full = prefill(model.config, model.params, tokens, lengths, cache)
    past = jnp.asarray([[6, 7]], jnp.int32)
    _, after = decode_step(model.config, model.params, tokens[:, :2], past, full)
    assert all(map(np.array_equal, jax.tree.leaves(full), jax.tree.leaves(after)))


def test_cache_size_is_that_of_its_arrays(golden):
    model = golden("qwen2_sliding")
    cache = empty_cache(model.config, model.params, 2, 10, jnp.bfloat16)
    config = model.config
    values = config.num_layers * 2 * 2 * 10 * config.num_kv_heads * config.head_dim
    assert cache_bytes(cache) == 2 * values


# ---- attention ----------------------------------------------------------------------------------


def _brute_force(query, key, value, query_at, key_at, scale, window, softcap):
    """Attention of one head at a time, with the mask written as a condition."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    out = np.zeros(query.shape)
    heads_per_group = query.shape[2] // key.shape[1]
    for b, t, h in np.ndindex(query.shape[:3]):
        g = h // heads_per_group
        scores = key[b, g] @ query[b, t, h] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        distance = int(query_at[b, t]) - np.asarray(key_at[b])
        seen = (distance >= 0) & (distance < (window or 10**9))
        weights = np.where(seen, np.exp(scores - scores[seen].max()), 0)
        out[b, t, h] = weights @ value[b, g] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_equals_brute_force(window, softcap):
    query, key, value = _random(4, 2, 5, 4, 8), _random(5, 2, 2, 9, 8), _random(6, 2, 2, 9, 8)
    query_at = jnp.asarray([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    key_at = jnp.asarray([[0, 1, 2, 3, 4, 99, 99, 99, 99], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    options = {"scale": 0.7, "window": window, "softcap": softcap}
    got = jax.jit(partial(reference.attention, **options))(query, key, value, query_at, key_at)
    expected = _brute_force(query, key, value, query_at, key_at, **options)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("length", [8, 10])
def test_long_queries_in_chunks(monkeypatch, length):
    query, key, value = (_random(seed, 2, 4, length, 8) for seed in (7, 8, 9))
    query = jnp.swapaxes(query, 1, 2)
    at = jnp.broadcast_to(jnp.arange(length), (2, length))

    def run():
        return jax.jit(lambda q: cached_attend(q, key, value, at, scale=0.5, window=3))(query)

    whole = run()
    monkeypatch.setattr(attention, "_QUERY_CHUNK", 4)
    np.testing.assert_allclose(run(), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("length", [1, 4, 11])
def test_self_attention_equals_brute_force_in_any_chunks(monkeypatch, length, window, softcap):
    query, key, value = (_random(seed, 2, 4, length, 8) for seed in (7, 8, 9))
    query, key = jnp.swapaxes(query, 1, 2), key[:, :2]
    value = value[:, :2]
    at = jnp.broadcast_to(jnp.arange(length), (2, length))
    options = {"scale": 0.7, "window": window, "softcap": softcap}
    expected = _brute_force(query, key, value, at, at, **options)
    for least in (128, 2):
        monkeypatch.setattr(attention, "_LEAST_CHUNK", least)
        run = jax.jit(lambda q, k, v: self_attend(q, k, v, **options))
        np.testing.assert_allclose(run(query, key, value), expected, atol=1e-5)


def test_rotation_makes_scores_depend_on_the_distance_only():
    rope = Rope(100.0)
    query, key = _random(10, 1, 1, 1, 16), _random(11, 1, 1, 1, 16)

    @jax.jit
    def score(p, q):
        at = (jnp.full((1, 1), p), jnp.full((1, 1), q))
        return jnp.sum(rotate(query, at[0], rope) * rotate(key, at[1], rope))

    assert float(score(3, 1)) == pytest.approx(float(score(42, 40)), abs=1e-4)
    assert float(score(3, 1)) != pytest.approx(float(score(3, 2)), abs=1e-2)
    assert float(score(0, 0)) == pytest.approx(float(jnp.sum(query * key)), abs=1e-5)


# ---- mixture of experts -------------------------------------------------------------------------


def _mlp(seed, experts=5, width=8, size=6):
    shapes = {"gate_proj": (size, width), "up_proj": (size, width), "down_proj": (width, size)}
    stacks = {
        name: {"weight": _random(seed + i, experts, *shape)}
        for i, (name, shape) in enumerate(shapes.items())
    }
    return {"router": {"weight": _random(seed + 9, experts, width)}, "experts": stacks}


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_are_the_weighted_sum_of_those_chosen(normalize):
    """Against every expert applied to every token; none is dropped, one may starve."""
    x, mlp, saved = _random(12, 2, 6, 8), _mlp(13), {}
    starving = mlp["router"]["weight"].at[2].set(0.0).at[0].set(0.0)
    x = x.at[..., 0].set(9.0)  # a feature that pushes all but experts 0 and 2
    mlp["router"] = {"weight": starving.at[1, 0].set(3.0).at[3:, 0].set(2.0)}

    def layer(x):
        out = moe_feed_forward(
            x,
            mlp,
            jax.nn.silu,
            experts_per_token=2,
            normalize=normalize,
            save=saved.__setitem__,
        )
        return out, dict(saved)

    out, taps = jax.jit(layer)(x)
    sizes = np.asarray(taps["experts/group_sizes"])
    assert sizes.sum() == 2 * 6 * 2
    assert (sizes[[0, 2]] == 0).all() and (sizes[[1, 3, 4]] > 0).all()
    weights, chosen = jax.jit(
        lambda x: route(x.reshape(-1, 8), mlp["router"]["weight"], 2, normalize)
    )(x)
    if normalize:
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert np.array_equal(np.bincount(np.asarray(chosen).ravel(), minlength=5), sizes)

    tokens = np.asarray(x).reshape(-1, 8)
    gate, up, down = (np.asarray(leaf["weight"]) for leaf in mlp["experts"].values())
    expected = np.zeros_like(tokens)
    for t, k in np.ndindex(chosen.shape):
        e = int(chosen[t, k])
        hidden = np.asarray(jax.nn.silu(gate[e] @ tokens[t])) * (up[e] @ tokens[t])
        expected[t] += float(weights[t, k]) * (down[e] @ hidden)
    np.testing.assert_allclose(out.reshape(-1, 8), expected, rtol=1e-4, atol=1e-4)


def test_router_weights_are_a_softmax_over_all_experts():
    x, router = _random(14, 7, 8), _random(15, 5, 8)
    weights, chosen = jax.jit(lambda x: route(x, router, 3, False))(x)
    probabilities = np.asarray(jax.nn.softmax(x @ router.T, axis=-1))
    order = np.argsort(-probabilities, axis=-1)[:, :3]
    assert np.array_equal(chosen, order)
    np.testing.assert_allclose(weights, np.take_along_axis(probabilities, order, -1), rtol=1e-5)


# ---- taps ---------------------------------------------------------------------------------------

_EVERY_LAYER = {
    *("input", "output"),
    *(
        f"{w}_layernorm/{end}"
        for w in ("input", "post_attention")
        for end in ("unnormed", "output")
    ),
    *(f"self_attn/{p}_proj/input" for p in "qkvo"),
    *(f"self_attn/{name}" for name in ("query", "key", "value")),
}
_DENSE = {f"mlp/{p}_proj/input" for p in ("gate", "up", "down")}
_SPARSE = {
    *(f"mlp/experts/{p}_proj/input" for p in ("gate", "up", "down")),
    *("mlp/experts/group_sizes", "mlp/experts/order", "mlp/experts/down_proj/output"),
    *("mlp/router/input", "mlp/router/output"),
}


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3"])
def test_names_of_taps(golden, name):
    model = golden(name)
    _, taps = jax.eval_shape(
        lambda p: forward_with_taps(model.config, p, _tokens(16, 1, 4), ["*"]), model.params
    )
    expected = {"embed_tokens/output", "norm/output", "logits"}
    for i in range(model.config.num_layers):
        names = _EVERY_LAYER | (_SPARSE if i in model.config.moe_layers else _DENSE)
        if name == "gemma3":
            both = [f"{w}_feedforward_layernorm" for w in ("pre", "post")]
            names |= {f"{norm}/{end}" for norm in both for end in ("unnormed", "output")}
        expected |= {f"layers/{i}/{tap}" for tap in names}
    assert set(taps) == expected


def test_values_of_taps_and_globs(golden):
    model, tokens = golden("qwen3_moe"), _tokens(17, 2, 6)
    wanted = ["layers/*/input", "layers/[02]/output", "*q_proj/input", "*layernorm/output"]
    wanted += ["embed_tokens/output", "logits", "*/group_sizes"]

    @jax.jit
    def run(params, tokens):
        return forward_with_taps(model.config, params, tokens, wanted)

    logits, taps = run(model.params, tokens)
    eager_logits, eager = forward_with_taps(model.config, model.params, tokens, wanted)
    assert list(eager) == sorted(eager) and set(eager) == set(taps)
    assert "layers/1/output" not in taps
    for key, value in eager.items():
        np.testing.assert_allclose(taps[key], value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, eager_logits, rtol=1e-5, atol=1e-5)
    assert np.array_equal(taps["logits"], logits)
    assert np.array_equal(taps["layers/0/input"], taps["embed_tokens/output"])
    assert np.array_equal(taps["layers/0/output"], taps["layers/1/input"])
    assert np.array_equal(
        taps["layers/2/self_attn/q_proj/input"], taps["layers/2/input_layernorm/output"]
    )
    for layer in model.config.moe_layers:
        assert int(taps[f"layers/{layer}/mlp/experts/group_sizes"].sum()) == 2 * 6 * 3


def test_a_tap_that_names_nothing(golden):
    model = golden("qwen2_sliding")
    with pytest.raises(UserError, match=r"tap 'layers/9/\*' names no activation of this model"):
        forward_with_taps(model.config, model.params, _tokens(18, 1, 2), ["logits", "layers/9/*"])


# ---- the forward pass as a function of its arguments --------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3"])
def test_jit_changes_nothing(golden, name):
    model, tokens = golden(name), _tokens(19, 2, 6)
    eager = forward(model.config, model.params, tokens)
    assert eager.dtype == jnp.float32
    compiled = _jitted_forward(model.config, model.params, tokens)
    np.testing.assert_allclose(compiled, eager, rtol=1e-6, atol=1e-5)


def test_later_tokens_do_not_reach_back(golden):
    model, tokens = golden("qwen2_sliding"), _tokens(20, 1, 12)
    changed = tokens.at[0, 7].add(1)
    before, after = (
        np.asarray(_jitted_forward(model.config, model.params, t)) for t in (tokens, changed)
    )
    assert np.array_equal(before[0, :7], after[0, :7])
    assert np.abs(before[0, 7:] - after[0, 7:]).max(axis=-1).min() > 0


def test_layers_may_differ_in_width(golden):
    """Removing neurons and a key-value group equals zeroing what reads them."""
    model, tokens = golden("qwen3"), _tokens(21, 1, 5)
    config, layers = model.config, model.params["layers"]
    dim, keep = config.head_dim, 40
    queries = config.num_heads // config.num_kv_heads * dim
    attn, mlp = layers[1]["self_attn"], layers[1]["mlp"]

    def cut(module, count, axis=0):
        return {"weight": jax.lax.slice_in_dim(module["weight"], 0, count, axis=axis)}

    narrow_attn = attn | {
        "q_proj": cut(attn["q_proj"], queries),
        "k_proj": cut(attn["k_proj"], dim),
        "v_proj": cut(attn["v_proj"], dim),
        "o_proj": cut(attn["o_proj"], queries, axis=1),
    }
    narrow_mlp = {
        "gate_proj": cut(mlp["gate_proj"], keep),
        "up_proj": cut(mlp["up_proj"], keep),
        "down_proj": cut(mlp["down_proj"], keep, axis=1),
    }
    narrow = layers[1] | {"self_attn": narrow_attn, "mlp": narrow_mlp}
    zeroed = layers[1] | {
        "self_attn": attn
        | {"o_proj": {"weight": attn["o_proj"]["weight"].at[:, queries:].set(0.0)}},
        "mlp": mlp | {"down_proj": {"weight": mlp["down_proj"]["weight"].at[:, keep:].set(0.0)}},
    }
    outs = []
    for layer in (narrow, zeroed):
        params = model.params | {"layers": (layers[0], layer, *layers[2:])}
        outs.append(_jitted_forward(config, params, tokens))
        cache = empty_cache(config, params, 1, 3)
        groups = layer["self_attn"]["k_proj"]["weight"].shape[0] // dim
        assert cache[1].keys.shape == (1, groups, 3, dim)
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_bias", "mixtral"])
def test_quantized_leaves_compute_with_their_dequantized_values(golden, name):
    model, tokens = golden(name), _tokens(22, 2, 6)

    def quantize(path, leaf):
        chosen = tree.matches(path, ["embed*", "layers/1/*/q_proj/*t", "layers/1/*up_proj/*t"])
        return quantize_array(leaf, "mxfp6") if chosen else leaf

    def dequantize(_, leaf):
        return leaf.dequantize() if isinstance(leaf, QTensor) else leaf

    quantized = jax.jit(partial(tree.map_with_path, quantize))(model.params)
    plain = jax.jit(partial(tree.map_with_path, dequantize))(quantized)
    outs = [_jitted_forward(model.config, params, tokens) for params in (quantized, plain)]
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-5)


def test_compute_dtype_is_that_of_the_config(golden):
    model = golden("gemma3")
    config = dataclasses.replace(model.config, dtype="bfloat16")
    logits, taps = jax.eval_shape(
        lambda p: forward_with_taps(config, p, _tokens(23, 1, 4), ["layers/*", "norm/output"]),
        model.params,
    )
    assert logits.dtype == jnp.float32
    assert {tap.dtype.name for tap in taps.values()} == {"bfloat16"}
    cache = jax.eval_shape(lambda p: empty_cache(config, p, 1, 4), model.params)
    assert cache[0].keys.dtype == jnp.bfloat16


# ---- initial values -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_bias", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_shapes_are_the_abstract_ones(golden, name, dtype):
    config = golden(name).config
    abstract = abstract_params(config, jnp.dtype(dtype))
    params = jax.eval_shape(lambda key: init(config, key, jnp.dtype(dtype)), jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), params, abstract)
    assert jax.tree.all(same)


@pytest.fixture(scope="module")
def initial(golden):
    config = dataclasses.replace(
        golden("gemma3").config,
        num_layers=2,
        attention_kinds=("sliding", "full"),
        intermediate_size=500,
        qkv_bias=True,
    )
    return config, jax.jit(lambda key: init(config, key))(jax.random.key(1))


def test_initial_values(initial):
    _, params = initial
    attn, mlp = params["layers"][1]["self_attn"], params["layers"][1]["mlp"]
    assert not np.asarray(params["norm"]["weight"]).any()  # Gemma multiplies by 1 + w
    assert not np.asarray(attn["q_norm"]["weight"]).any()
    assert not np.asarray(attn["q_proj"]["bias"]).any()
    assert float(jnp.std(params["embed_tokens"]["weight"])) == pytest.approx(0.02, rel=0.1)
    assert float(jnp.std(mlp["up_proj"]["weight"])) == pytest.approx(32**-0.5, rel=0.1)
    assert float(jnp.std(mlp["down_proj"]["weight"])) == pytest.approx(500**-0.5, rel=0.1)
    everywhere = [p["mlp"]["up_proj"]["weight"] for p in params["layers"]]
    everywhere.append(mlp["gate_proj"]["weight"])
    for i, one in enumerate(everywhere):
        assert all(not np.array_equal(one, other) for other in everywhere[:i])


def test_initial_values_do_not_depend_on_other_tensors(initial):
    config, params = initial
    fewer = dataclasses.replace(
        config, num_layers=1, attention_kinds=("full",), qkv_bias=False, tie_word_embeddings=False
    )
    small = jax.jit(lambda key: init(fewer, key))(jax.random.key(1))
    values = dict(tree.leaves_with_paths(params))
    for path, leaf in tree.leaves_with_paths(small):
        assert path == "lm_head/weight" or np.array_equal(leaf, values[path]), path
