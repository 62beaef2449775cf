"""Parameter trees by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.formats import resolve
from jaxopt_models.qtensor import InputQuantizer, quantize_array

_SPEC = resolve("fp8")


def _params():
    def layer(seed):
        weight = jnp.full((4, 32), float(seed), jnp.bfloat16)
        return {"mlp": {"up_proj": {"weight": weight, "bias": jnp.zeros(4, jnp.bfloat16)}}}

    return {
        "embed_tokens": {"weight": jnp.ones((8, 32), jnp.bfloat16)},
        "layers": (layer(1), layer(2)),
        "norm": {"weight": jnp.ones(32, jnp.bfloat16)},
    }


_quantize = jax.jit(lambda weight: quantize_array(weight, "mxfp4"))


def _quantized():
    params = _params()
    leaf = _quantize(params["layers"][1]["mlp"]["up_proj"]["weight"])
    leaf = leaf.replace(input=InputQuantizer(jnp.float32(1), _SPEC))
    return tree.replace(params, {"layers/1/mlp/up_proj/weight": leaf}), leaf


def test_paths_are_keys_joined_and_a_quantized_weight_is_one_leaf():
    params, leaf = _quantized()
    paths = dict(tree.leaves_with_paths(params))
    assert list(paths) == [
        "embed_tokens/weight",
        "layers/0/mlp/up_proj/bias",
        "layers/0/mlp/up_proj/weight",
        "layers/1/mlp/up_proj/bias",
        "layers/1/mlp/up_proj/weight",
        "norm/weight",
    ]
    assert paths["layers/1/mlp/up_proj/weight"] is leaf


def test_map_gets_paths_and_all_trees_and_keeps_the_structure():
    params, _ = _quantized()
    shapes = tree.map_with_path(lambda path, leaf: (path, leaf.shape), params)
    assert shapes["layers"][1]["mlp"]["up_proj"]["weight"] == (
        "layers/1/mlp/up_proj/weight",
        (4, 32),
    )
    assert isinstance(shapes["layers"], tuple)
    counts = tree.map_with_path(lambda path, leaf, other: leaf.size + other.size, params, _params())
    assert counts["layers"][1]["mlp"]["up_proj"]["weight"] == 2 * 4 * 32


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("norm/weight", 1),
        ("layers/*/weight", 2),
        ("*", 6),
        ("layers/[!0]/*bias", 1),
        (["norm/*", "embed*"], 2),
        (["norm/*", "*norm*"], 1),
    ],
)
def test_select_by_globs_on_the_whole_path(pattern, count):
    chosen = tree.select(_params(), pattern)
    assert len(chosen) == count
    assert all(tree.matches(path, pattern) for path in chosen)


def test_a_pattern_without_a_match_is_an_error_that_shows_a_path():
    message = (
        r"pattern 'layers/7/\*' matches no tensor; paths look like 'layers/1/mlp/up_proj/bias'"
    )
    with pytest.raises(UserError, match=message):
        tree.select(_params(), ["norm/*", "layers/7/*"])


def test_replace_shares_what_it_does_not_replace():
    params = _params()
    new = tree.replace(params, {"norm/weight": jnp.zeros(32)})
    assert not np.asarray(new["norm"]["weight"]).any()
    assert np.asarray(params["norm"]["weight"]).all()
    assert (
        new["layers"][0]["mlp"]["up_proj"]["weight"]
        is params["layers"][0]["mlp"]["up_proj"]["weight"]
    )
    with pytest.raises(UserError, match="have no tensor 'layers/9/x' to replace"):
        tree.replace(params, {"norm/weight": 0, "layers/9/x": 1})


def test_sizes_count_codes_and_scales():
    params, leaf = _quantized()
    assert tree.size_in_bits(params["norm"]) == 32 * 16
    assert tree.weight_bits(leaf) == 4 * 32 * 4.25
    assert tree.weight_bits(jnp.zeros((4, 32), jnp.bfloat16)) == 4 * 32 * 16
    assert tree.size_in_bits(jax.ShapeDtypeStruct((3,), "float4_e2m1fn")) == 12


def test_bits_per_weight_are_those_of_decoder_matrices():
    params, _ = _quantized()
    assert tree.bits_per_weight(_params()) == 16
    assert tree.bits_per_weight(params) == (16 + 4.25) / 2


@pytest.mark.parametrize(
    ("path", "shape", "counts"),
    [
        ("layers/0/self_attn/q_proj/weight", (4, 4), True),
        ("layers/0/mlp/experts/up_proj/weight", (2, 4, 4), True),
        ("layers/0/mlp/router/weight", (4, 4), False),
        ("layers/0/self_attn/q_proj/bias", (4,), False),
        ("layers/0/input_layernorm/weight", (4,), False),
        ("lm_head/weight", (4, 4), False),
    ],
)
def test_decoder_matrices(path, shape, counts):
    assert tree.is_decoder_matrix(path, jax.ShapeDtypeStruct(shape, "float32")) is counts
