"""Masks and cuts of a model that is split over devices compute what they compute on one."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pruned_models import CONFIGS, masks_of, params_of, tokens

from jaxopt_models.models.transformer import forward
from jaxopt_models.prune.masks import apply_masks
from jaxopt_models.prune.slicing import slice_model
from jaxopt_models.sharding import make_mesh, place, shard
from jaxopt_models.sharding_rules import TRAINING_RULES, rows_spec

ALL = ("hidden", "layers", "heads", "neurons", "experts")
_forward = jax.jit(forward, static_argnums=0)
_masked = jax.jit(
    lambda config, p, m, t: forward(config, apply_masks(config, p, m), t), static_argnums=0
)


@pytest.mark.parametrize("name", ["tied", "qwen3_moe"])
def test_masked_and_sliced_models_are_the_same_on_a_mesh(name):
    config, params, text = CONFIGS[name], params_of(name), tokens(4)
    masks, mesh = masks_of(name, ALL), make_mesh({"data": 2, "fsdp": 2, "model": 2})
    expected = _masked(config, params, masks, text)
    split = shard(params, mesh, TRAINING_RULES)
    up = split["layers"][1]["mlp"]["up_proj"]["weight"]
    assert up.sharding.shard_shape(up.shape) == (24, 16)  # not one device's alone
    rows = place(text, NamedSharding(mesh, rows_spec(mesh)))
    here = jax.tree.map(lambda mask: place(mask, NamedSharding(mesh, P())), masks)
    found = _masked(config, split, here, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    small, cut = slice_model(config, split, masks)  # as it lies
    np.testing.assert_allclose(_forward(small, cut, rows), expected, rtol=1e-5, atol=1e-5)
    again = shard(cut, mesh, TRAINING_RULES)  # as it would be trained
    np.testing.assert_allclose(_forward(small, again, rows), expected, rtol=1e-5, atol=1e-5)
