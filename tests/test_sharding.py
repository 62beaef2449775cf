"""Sharding: which array is split where, and that splitting changes no result."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params, forward, init
from jaxopt_models.qtensor import InputQuantizer, LowRank, QTensor, quantize_array
from jaxopt_models.sharding import make_mesh, shard, shardings
from jaxopt_models.sharding_rules import AXES, DEFAULT_RULES, TRAINING_RULES
from jaxopt_models.tree import WeightLeaf, is_decoder_matrix, leaves_with_paths, map_with_path

DENSE = ModelConfig.from_hf(
    {
        "model_type": "qwen2",  # with biases
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
)
MOE = ModelConfig.from_hf(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "mlp_only_layers": [1],
    }
)
SIX_EXPERTS = dataclasses.replace(MOE, num_experts=6)

FORMATS = {
    "nvfp4": {},
    "mxfp4": {},
    "mxfp6_e3m2": {},
    "mxfp8_e4m3": {},
    "nf4": {"block_size": 16},
    "int4": {"block_size": 32},
    "int4 asymmetric": {"block_size": 16, "symmetric": False},
    "int8": {"granularity": "channel"},
    "fp8": {"granularity": "block2d", "block_size": 32},
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "model": 4})


def quantize(params, format, options):
    """Every decoder matrix in the format."""

    run = jax.jit(partial(quantize_array, format=format.split()[0], **options))

    def leaf(path, array):
        return run(array) if is_decoder_matrix(path, array) else array

    return map_with_path(leaf, params)


def assert_same_logits(config, params, mesh, **options):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (4, 12)), "int32")
    batch = jax.device_put(tokens, jax.NamedSharding(mesh, P("data")))
    expected = forward(config, params, tokens)
    split = shard(params, mesh, **options)
    run = jax.jit(forward, static_argnums=0)
    np.testing.assert_allclose(run(config, split, batch), expected, rtol=1e-5, atol=1e-5)
    return split


@pytest.mark.parametrize("config", [DENSE, MOE, SIX_EXPERTS], ids=["dense", "moe", "six experts"])
def test_tensor_parallel_logits_are_the_same(config, mesh):
    assert_same_logits(config, init(config, jax.random.key(0)), mesh)


@pytest.mark.parametrize("format", FORMATS)
def test_tensor_parallel_logits_are_the_same_for_quantized_leaves(format, mesh):
    params = quantize(init(DENSE, jax.random.key(1)), format, FORMATS[format])
    split = assert_same_logits(DENSE, params, mesh)
    up, down = (split["layers"][0]["mlp"][name]["weight"] for name in ("up_proj", "down_proj"))
    assert up.codes.sharding.spec == P("model", None)
    assert down.codes.sharding.spec == P(None, "model")


@pytest.mark.parametrize("format", ["nvfp4", "int4", "fp8"])
@pytest.mark.parametrize("config", [MOE, SIX_EXPERTS], ids=["moe", "six experts"])
def test_tensor_parallel_logits_are_the_same_for_quantized_experts(config, format, mesh):
    params = quantize(init(config, jax.random.key(2)), format, FORMATS[format])
    assert_same_logits(config, params, mesh)


def test_outside_jit_too(mesh):
    params = quantize(init(DENSE, jax.random.key(3)), "nvfp4", {})
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    logits = forward(DENSE, shard(params, mesh), tokens)
    np.testing.assert_allclose(logits, forward(DENSE, params, tokens), rtol=1e-5, atol=1e-5)


def test_extra_parts_of_a_leaf(mesh):
    """A leaf with everything a `QTensor` may have computes the same when it is split."""
    params = init(DENSE, jax.random.key(4))
    keys = iter(jax.random.split(jax.random.key(5), 100))
    run = jax.jit(partial(quantize_array, format="nvfp4"))

    def leaf(path, array):
        if not is_decoder_matrix(path, array):
            return array
        rows, columns = array.shape
        down, up = (jax.random.normal(next(keys), s) * 0.01 for s in ((3, columns), (rows, 3)))
        return dataclasses.replace(
            run(array),
            pre_scale=jax.random.uniform(next(keys), (columns,), minval=0.5, maxval=2.0),
            low_rank=LowRank(down, up),
            # No rounding of inputs, which would magnify the last bit in which sums differ.
            input=None,
            rotate=64,  # o_proj's input has 32 channels a device
        )

    params = map_with_path(leaf, params)
    split = assert_same_logits(DENSE, params, mesh)
    down = split["layers"][0]["mlp"]["down_proj"]["weight"]
    assert down.pre_scale.sharding.spec == P("model")
    assert down.low_rank.down.sharding.spec == P(None, "model")
    assert down.low_rank.up.sharding.spec == P(None, None)


@pytest.mark.parametrize(
    ("shape", "format", "options", "codes", "scale"),
    [
        # four shards of two blocks of 16
        ((8, 128), "nvfp4", {}, P("data", "model"), P("data", "model")),
        # six blocks do not make four equal shards, though 96 codes do
        ((8, 96), "nvfp4", {}, P("data", None), P("data", None)),
        # a shard of one block and a half
        ((8, 96), "nf4", {"block_size": 16}, P("data", None), P("data", None)),
        # four shards of one block each
        ((8, 64), "nf4", {"block_size": 16}, P("data", "model"), P("data", "model")),
        # one scale a row leaves its columns free, but not halves of bytes
        ((8, 40), "int4", {"block_size": 40}, P("data", "model"), P("data", None)),
        ((8, 36), "int4", {"block_size": 36}, P("data", None), P("data", None)),
        ((8, 36), "int8", {"granularity": "channel"}, P("data", "model"), P("data", None)),
        ((8, 36), "int8", {"granularity": "tensor"}, P("data", "model"), P(None, None)),
        # an odd number of rows, an odd number of columns with padding
        ((7, 128), "nvfp4", {}, P(None, "model"), P(None, "model")),
        ((8, 13), "nvfp4", {}, P("data", None), P("data", None)),
        # square tiles: columns must not cut them, rows may, but then scales stay whole
        ((64, 128), "fp8", {"granularity": "block2d", "block_size": 32}, *[P("data", "model")] * 2),
        (
            (32, 128),
            "fp8",
            {"granularity": "block2d", "block_size": 32},
            P("data", "model"),
            P(None, "model"),
        ),
        (
            (80, 128),
            "fp8",
            {"granularity": "block2d", "block_size": 64},
            P("data", None),
            P(None, None),
        ),
        # three bytes hold four 6-bit codes
        ((8, 128), "mxfp6_e2m3", {}, P("data", "model"), P("data", "model")),
    ],
)
def test_boundaries_fall_between_bytes_and_tiles(shape, format, options, codes, scale, mesh):
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    q = jax.eval_shape(partial(quantize_array, format=format, **options), array)
    (leaf,) = shardings((q,), mesh, {"0": P("data", "model")})
    assert leaf.codes.spec == codes
    assert leaf.scale.spec == scale
    if leaf.global_scale is not None:
        assert leaf.global_scale.spec == P(None, None)


def test_zero_points_follow_scales_and_inputs_are_replicated(mesh):
    q = quantize_array(jnp.ones((8, 128)), "int4", block_size=16, symmetric=False)
    q = dataclasses.replace(q, input=InputQuantizer(jnp.float32(1.0), q.spec))
    (leaf,) = shardings((q,), mesh, {"0": P("data", "model")})
    assert leaf.zero_point.spec == leaf.scale.spec == P("data", "model")
    assert leaf.input.amax.spec == P()
    (dynamic,) = shardings(
        (dataclasses.replace(q, input=InputQuantizer(None, q.spec)),), mesh, {"0": P()}
    )
    assert dynamic.input.amax is None


def test_a_stack_of_tensors_keeps_their_scales_together(mesh):
    stack = jax.eval_shape(
        jax.vmap(lambda w: quantize_array(w, "nvfp4")),
        jax.ShapeDtypeStruct((8, 4, 32), jnp.float32),
    )
    (leaf,) = shardings((stack,), mesh, {"0": P("model")})
    assert leaf.global_scale.spec == leaf.codes.spec == P("model", None, None)


def test_experts_are_split_among_devices_or_each_is_split(mesh):
    for config, gate, down in (
        (MOE, P("model", None, None), P("model", None, None)),
        (SIX_EXPERTS, P(None, "model", None), P(None, None, "model")),
    ):
        experts = shardings(abstract_params(config), mesh)["layers"][0]["mlp"]["experts"]
        assert experts["gate_proj"]["weight"].spec == experts["up_proj"]["weight"].spec == gate
        assert experts["down_proj"]["weight"].spec == down


def test_default_rules(mesh):
    found = {path: s.spec for path, s in leaves_with_paths(shardings(abstract_params(DENSE), mesh))}
    layer = "layers/1/"
    rows, columns, whole = P("model", None), P(None, "model"), P(None)
    assert found["embed_tokens/weight"] == found["lm_head/weight"] == rows
    assert found[f"{layer}self_attn/k_proj/weight"] == found[f"{layer}mlp/gate_proj/weight"] == rows
    assert found[f"{layer}self_attn/k_proj/bias"] == P("model")
    assert found[f"{layer}self_attn/o_proj/weight"] == columns
    assert found[f"{layer}mlp/down_proj/weight"] == columns
    assert found[f"{layer}input_layernorm/weight"] == found["norm/weight"] == whole
    moe = shardings(abstract_params(MOE), mesh)["layers"][0]
    assert moe["mlp"]["router"]["weight"].spec == P(None, None)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
@pytest.mark.parametrize("config", [DENSE, MOE, SIX_EXPERTS], ids=["dense", "moe", "six experts"])
def test_training_splits_every_matrix_over_both_axes(config, sizes):
    mesh = make_mesh(sizes, AXES)
    params = abstract_params(config, jnp.float32)
    kinds = params, jax.eval_shape(lambda p: quantize(p, "nvfp4", {}), params)
    for tree in kinds:
        for path, leaf in leaves_with_paths(shardings(tree, mesh, TRAINING_RULES)):
            spec = (leaf.codes if isinstance(leaf, QTensor) else leaf).spec  # pyright: ignore[reportAttributeAccessIssue]
            names = [name for entry in spec for name in np.atleast_1d(entry) if name]
            if is_decoder_matrix(path, dict(leaves_with_paths(params))[path]):
                assert sorted(names) == ["fsdp", "model"], path


def test_training_splits_another_axis_where_tiles_would_be_cut():
    """Rather than nothing: three blocks of 32 columns are no two halves, 64 rows are."""
    mesh = make_mesh((1, 2, 2), AXES)
    array = jax.ShapeDtypeStruct((64, 96), jnp.float32)
    q = jax.eval_shape(partial(quantize_array, format="int4", block_size=32), array)
    found = shardings({"up_proj": {"weight": q}}, mesh, {"*": TRAINING_RULES["*/up_proj/weight"]})
    leaf = found["up_proj"]["weight"]
    assert leaf.codes.spec == leaf.scale.spec == P(("model", "fsdp"), None)


def test_uneven_axes_are_replicated(mesh):
    params = {"embed_tokens": {"weight": jnp.ones((6, 8))}}
    assert shardings(params, mesh)["embed_tokens"]["weight"].spec == P(None, None)


def test_the_last_rule_that_matches_decides(mesh):
    rules = DEFAULT_RULES | {"layers/0/*/up_proj/weight": P(None, ("data", "model"))}
    layers = shardings(abstract_params(DENSE), mesh, rules)["layers"]
    assert layers[0]["mlp"]["up_proj"]["weight"].spec == P(None, ("data", "model"))
    assert layers[1]["mlp"]["up_proj"]["weight"].spec == P("model", None)


def test_other_leaf_kinds_split_what_has_the_extents_of_the_weight(mesh):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Masked(WeightLeaf):
        weight: jax.Array
        mask: jax.Array
        temperature: jax.Array

        @property
        def shape(self):
            return (8, 16)

    leaf = Masked(jnp.ones((8, 16)), jnp.ones((8, 1), bool), jnp.float32(1.0))
    found = shardings({"w": leaf}, mesh, {"w": P("data", "model")})["w"]
    assert found.weight.spec == P("data", "model")
    assert found.mask.spec == P("data", None)
    assert found.temperature.spec == P()


def test_abstract_parameters_and_structure(mesh):
    params = init(DENSE, jax.random.key(0))
    abstract = jax.eval_shape(lambda p: quantize(p, "nvfp4", {}), params)
    found = shardings(abstract, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(abstract)
    assert isinstance(found["layers"][0]["mlp"]["up_proj"]["weight"], QTensor)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*/q_prj/weight": P()}, r"rule '\*/q_prj/weight' matches no tensor"),
        ({"*/up_proj/weight": P("tensor")}, "splits over 'tensor', but the mesh has .*data, model"),
        ({"norm/weight": P(None, "model")}, r"has 2 axes, but 'norm/weight' has the shape \[128\]"),
    ],
)
def test_rules_that_do_not_fit_are_named(rules, message, mesh):
    with pytest.raises(UserError, match=message):
        shardings(abstract_params(DENSE), mesh, DEFAULT_RULES | rules)


def test_make_mesh():
    mesh = make_mesh((2, 4))
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    assert dict(make_mesh({"model": 2}).shape) == {"model": 2}
    assert dict(make_mesh((1, 2, 3), ("a", "b", "c")).shape) == {"a": 1, "b": 2, "c": 3}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    for wrong, message in (
        ({"data": 3, "model": 4}, "needs 12 devices and there are 8"),
        ({"data": 0}, "needs 0 devices"),
        ((2, 2, 2), "needs 3 names"),
    ):
        with pytest.raises(UserError, match=message):
            make_mesh(wrong)
