"""AutoRound inside a layer: it lowers the error of the layer's output, with whatever else its
matrices go through."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import init
from jaxopt_models.numerics import from_grid, to_grid
from jaxopt_models.qtensor import QTensor
from jaxopt_models.quantize.groups import wants
from jaxopt_models.quantize.layer import Rounded, prepare_layer, quantize_layer
from jaxopt_models.quantize.layer_smoothing import LayerJob, smooth_layer
from jaxopt_models.quantize.method import Method
from jaxopt_models.quantize.reconstruct import reconstruct

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
DENSE = ModelConfig.from_hf({"model_type": "llama"} | _SIZES)
MOE = ModelConfig.from_hf(
    {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1} | _SIZES
)
STEPS = {"method": "autoround", "steps": 40, "batch": 4}
METHODS = {
    "weights": Method.model_validate(
        {"weight": {"format": "int4", "block_size": 16}, "rounding": STEPS}
    ),
    "everything": Method.model_validate(
        {
            "weight": "nvfp4",
            "activation": "nvfp4",
            "smooth": {"method": "smoothquant", "alpha": 0.5},
            "rotate": 16,
            "low_rank": 2,
            "rounding": STEPS,
        }
    ),
}
CASES = [(DENSE, "weights"), (DENSE, "everything"), (MOE, "weights")]
every_case = pytest.mark.parametrize(
    "config, name", CASES, ids=lambda value: getattr(value, "model_type", value)
)


@functools.cache
def stream(config: ModelConfig, lengths: tuple[int, ...] = (12, 12)) -> Stream:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 64, (8, length)).astype(np.int32) for length in lengths]
    return Stream(config, init(config, jax.random.key(0)), tokens)


@functools.cache
def job(config: ModelConfig, name: str) -> tuple[LayerJob, dict[str, Method]]:
    (layer,) = init(config, jax.random.key(0))["layers"]
    ends = ("q_proj/weight", "up_proj/weight", "down_proj/weight")  # fewer compile sooner
    paths = [path for path, _ in tree.leaves_with_paths(layer) if path.endswith(ends)]
    plan = {path.removesuffix("/weight"): METHODS[name] for path in paths}
    taps = stream(config).observe(layer, config.attention_kinds[0], wants(plan))
    return smooth_layer(config, layer, plan, taps, False), plan


@functools.cache
def rounded(config: ModelConfig, name: str) -> dict[str, Rounded]:
    return reconstruct(stream(config), config.attention_kinds[0], *job(config, name))


def output_error(config: ModelConfig, name: str, found: dict[str, Rounded]) -> float:
    """Mean squared error of the quantized layer's output."""
    made, plan = job(config, name)
    layer, _ = quantize_layer(made, plan, "", found)
    text = stream(config)
    kind = config.attention_kinds[0]
    outputs = zip(text.outputs(layer, kind), text.outputs(made.layer, kind), strict=True)
    return float(sum(np.mean(np.square(found - exact)) for found, exact in outputs))


@every_case
def test_the_layer_errs_less_than_rounded_to_nearest(config, name):
    found = rounded(config, name)
    assert found.keys() == job(config, name)[1].keys()
    assert output_error(config, name, found) < 0.97 * output_error(config, name, {})


@every_case
def test_what_it_chose_is_what_the_leaf_holds(config, name):
    made, plan = job(config, name)
    layer, _ = quantize_layer(made, plan, "", rounded(config, name))
    leaves: dict[str, Any] = dict(tree.leaves_with_paths(layer))
    for linear, choice in rounded(config, name).items():
        leaf = leaves[f"{linear}/weight"]
        assert isinstance(leaf, QTensor) and leaf.rotate == METHODS[name].rotate
        restored = jnp.asarray(leaf.dequantize())
        restore = from_grid if restored.ndim == 2 else jax.vmap(from_grid, (0, 0, None))
        np.testing.assert_array_equal(restored, restore(choice.grid, choice.scales, leaf.spec))


def test_weights_move_by_a_step_at_most():
    """Of the prepared matrix; rounding to nearest moves them by half."""
    made, plan = job(DENSE, "weights")
    prepared, _ = prepare_layer(made, plan)
    spec, moved = METHODS["weights"].weight.spec(), 0  # pyright: ignore[reportOptionalMemberAccess]
    for linear, choice in rounded(DENSE, "weights").items():
        nearest = to_grid(prepared[linear].weight, choice.scales, spec)
        assert jnp.max(jnp.abs(choice.grid - nearest)) <= 1
        moved += int(jnp.sum(choice.grid != nearest))
    assert moved > 0


def test_matrices_of_other_methods_stay_dense():
    made, plan = job(DENSE, "weights")
    plain = Method.model_validate({"weight": "int8"})
    mixed = {name: how if "self_attn" in name else plain for name, how in plan.items()}
    found = reconstruct(stream(DENSE), DENSE.attention_kinds[0], made, mixed)
    assert found.keys() == {name for name in plan if "self_attn" in name}
    assert reconstruct(stream(DENSE), None, made, dict.fromkeys(plan, plain)) == {}


def test_windows_of_different_lengths_are_refused():
    text = stream(DENSE, (12, 9))
    with pytest.raises(UserError, match=r"windows of one length, not of \[9, 12\]"):
        reconstruct(text, DENSE.attention_kinds[0], *job(DENSE, "weights"))
