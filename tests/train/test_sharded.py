"""Training on a mesh: the same numbers, all of it split, and weights move, not activations."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import ONE_LAYER, quantized, sure_model

from jaxopt_models import tree
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.sharding_rules import BATCH, TRAINING_RULES
from jaxopt_models.train.leaves import computed, fake_quantized
from jaxopt_models.train.objectives import QAT, next_token_loss
from jaxopt_models.train.step import make_train_step, start

ADAM = optax.adam(1e-3)
MOE = ModelConfig.from_hf(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
)


def _sharded(config, params, optimizer, mesh, **options):
    """(step, state, rows of a batch) on a mesh."""
    rows = NamedSharding(mesh, P(BATCH))
    state = start(shard(params, mesh, TRAINING_RULES), optimizer)
    places = jax.tree.map(lambda array: array.sharding, state)
    loss = next_token_loss(config, sharding=rows, **options)
    prepare = partial(computed, dtype=jnp.float32)
    step = make_train_step(loss, optimizer, max_norm=1.0, prepare=prepare, shardings=places)
    return step, state, rows


@pytest.mark.parametrize(
    ("config", "format", "scales"),
    [(ONE_LAYER, "nvfp4", "dynamic"), (MOE, "int8", "learned")],
    ids=["dense", "moe"],
)
def test_several_devices_learn_the_same(config, format, scales, tokens):
    """As one does, from a teacher, under quantization."""
    params, mesh = sure_model(config), make_mesh({"data": 2, "fsdp": 2, "model": 2})
    fakes = fake_quantized(params, quantized(params, format), scales)
    step, shared, rows = _sharded(config, fakes, ADAM, mesh)
    places = jax.tree.map(lambda array: array.sharding, shared)
    teacher = shard(params, mesh, TRAINING_RULES)
    own, alone = make_train_step(next_token_loss(config), ADAM, max_norm=1.0), start(fakes, ADAM)
    for i in range(2):
        batch = jnp.roll(tokens, i, axis=0)
        alone, expected = own(alone, params, {"tokens": batch})
        shared, found = step(shared, teacher, {"tokens": jax.device_put(batch, rows)})
        for name, value in expected.items():
            # A weight on the border between two values of the grid may round to the other one.
            np.testing.assert_allclose(found[name], value, rtol=1e-3, err_msg=name)
    assert jax.tree.map(lambda array: array.sharding, shared) == places
    for path, array in tree.arrays_with_paths((shared.trained, shared.optimizer)):
        if path.endswith(("_proj/weight/weight", "embed_tokens/weight")):
            assert array.addressable_shards[0].data.size * 4 == array.size, path


def test_devices_that_hold_all_weights_add_gradients_once_a_step(tokens):
    """Not in each part of a batch or piece of its logits; and the step is the one of one device."""
    mesh, params = make_mesh({"data": 2, "model": 1}), sure_model(ONE_LAYER)
    parts = {"tokens": jnp.stack([tokens, tokens[::-1]])}
    options = {"parts": 2, "max_norm": 1.0, "prepare": partial(computed, dtype=jnp.float32)}
    rows, loss = NamedSharding(mesh, P("data")), next_token_loss(ONE_LAYER)
    state = start(shard(params, mesh), ADAM)
    places = jax.tree.map(lambda array: array.sharding, state)
    step = make_train_step(loss, ADAM, shardings=places, rows=rows, **options)
    teacher = params | {"norm": {"weight": 2 * params["norm"]["weight"]}}
    taught, shared = (
        shard(teacher, mesh),
        jax.device_put(parts, NamedSharding(mesh, P(None, "data"))),
    )
    program = step.lower(state, taught, shared).compile().as_text()
    inner, entry = program.split("\nENTRY ")
    assert "while(" in entry and "all-reduce(" in entry and "all-reduce(" not in inner

    alone, expected = make_train_step(loss, ADAM, **options)(start(params, ADAM), teacher, parts)
    state, found = step(state, taught, shared)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    for one, other in zip(*map(jax.tree.leaves, (state.trained, alone.trained)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_weights_move_and_activations_do_not(tokens):
    """No array with a row's positions is in any collective; what is gathered are whole weights."""
    length = 24  # no weight has that extent
    kinds = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
    mesh = make_mesh({"data": 2, "fsdp": 4, "model": 1})
    params = sure_model(ONE_LAYER)
    step, state, rows = _sharded(ONE_LAYER, params, ADAM, mesh, terms=QAT)
    batch = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=rows)
    program = step.lower(state, None, {"tokens": batch}).compile().as_text()
    moved = {
        kind: [
            tuple(map(int, extents.split(",")))
            for result in re.findall(rf"= (.*?) {kind}(?:-start)?\(", program)
            for extents in re.findall(r"\[([\d,]+)\]", result)
        ]
        for kind in kinds
    }
    assert not [shape for shapes in moved.values() for shape in shapes if length in shape]
    assert not moved["all-to-all"] and not moved["collective-permute"]
    matrices = {leaf.shape for _, leaf in tree.leaves_with_paths(params) if leaf.ndim == 2}
    assert matrices <= set(moved["all-gather"])
    assert matrices <= {*moved["all-reduce"], *moved["reduce-scatter"]}
