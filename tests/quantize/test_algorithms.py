"""What each step of a recipe is for: less output error than plain rounding on a model in which a
few channels stand out, steps combined at will, and the same bits each time.

All seven matrices are 32x32, so that each method is compiled once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.evaluate import evaluate
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init
from jaxopt_models.quantize.ptq import Report, quantize
from jaxopt_models.quantize.recipe import Recipe

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
)
_NORMS = ("input_layernorm/weight", "post_attention_layernorm/weight")
_PRODUCERS = ("v_proj/weight", "up_proj/weight")


def text(seed: int, rows: int = 16) -> jax.Array:
    ids = np.random.default_rng(seed).integers(0, 64, (rows, 16))
    return jnp.asarray(ids, jnp.int32)


TEXT, HELD_OUT = (text(1), text(2)), text(3)


@functools.cache
def params() -> Any:
    """Random weights of a model in which two channels of each linear's input stand out."""

    def planted(path: str, leaf: jax.Array) -> jax.Array:
        array = np.array(leaf)
        if path.endswith(_NORMS):
            array[[3, 20]] = 12
        if path.endswith(_PRODUCERS):
            array[[5, 17]] *= 8
        return jnp.asarray(array)

    return tree.map_with_path(planted, init(CONFIG, jax.random.key(0)))


INT4 = {"weight": {"format": "int4", "block_size": 16}}
W4A4 = {"weight": "nvfp4", "activation": "nvfp4"}
MXFP4 = {"weight": "mxfp4", "activation": "mxfp4"}
INT8 = {"weight": "int8", "activation": {"format": "int8", "granularity": "tensor"}}
AUTOROUND = {"rounding": {"method": "autoround", "steps": 60, "batch": 8}}
RULES: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "int4 awq": INT4 | {"smooth": "awq"},
    "int4 gptq": INT4 | {"rounding": "gptq"},
    "int4 gptq in order": INT4 | {"rounding": {"method": "gptq", "act_order": True}},
    "int4 hessian": INT4 | {"scales": "hessian"},
    "int4 clip": INT4 | {"scales": "clip"},
    "int4 autoround": INT4 | AUTOROUND,
    "nvfp4": W4A4,
    "nvfp4 awq": W4A4 | {"smooth": "awq"},
    "nvfp4 gptq": W4A4 | {"rounding": "gptq"},
    "nvfp4 hessian": W4A4 | {"scales": "hessian"},
    "nvfp4 svd": W4A4 | {"low_rank": 6},
    "mxfp4": MXFP4,
    "mxfp4 rotated": MXFP4 | {"rotate": 32},
    "mxfp4 gptq": MXFP4 | {"rounding": "gptq"},
    "int8": INT8,
    "int8 smoothquant": INT8 | {"smooth": {"method": "smoothquant", "alpha": "search"}},
}
BETTER = [name for name in RULES if " " in name]


def run(rule: dict[str, Any], **fields: Any) -> tuple[Any, Report]:
    recipe = Recipe.model_validate({"rules": [{"match": "*"} | rule]} | fields)
    return quantize(Model(CONFIG, params()), recipe, TEXT)


@functools.cache
def quantized(name: str) -> tuple[Any, Report]:
    return run(RULES[name])


def kl(qparams: Any) -> float:
    found = evaluate(CONFIG, qparams, [HELD_OUT], reference=params()).kl
    assert found is not None
    return found


@functools.cache
def divergence(name: str) -> float:
    return kl(quantized(name)[0])


def first_layer_error(report: Report) -> float:
    """Mean relative error of the outputs in the first layer, whose inputs no recipe changes."""
    rows = [row for row in report.tensors if row.path.startswith("layers/0/")]
    assert len(rows) == 7
    return float(np.mean(np.asarray([row.output_error for row in rows], np.float64)))


def same_bits(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(same)


# Better than plain rounding


@functools.cache
def output_error(name: str) -> float:
    """Measured on text also where the recipe reads none: a cache makes calibration run."""
    recipe = Recipe.model_validate({"rules": [{"match": "*"} | RULES[name]]})
    fields = {} if recipe.needs_text else {"kv_cache": "fp8"}
    return first_layer_error(run(RULES[name], **fields)[1] if fields else quantized(name)[1])


@pytest.mark.parametrize("name", BETTER)
def test_every_algorithm_lowers_the_error_of_outputs(name):
    assert output_error(name) < 0.97 * output_error(name.split()[0])


@pytest.mark.parametrize("name", BETTER)
def test_every_algorithm_lowers_the_divergence_of_the_model(name):
    assert divergence(name) < divergence(name.split()[0])


@pytest.mark.parametrize("name", ["int4 gptq", "int4 gptq in order", "nvfp4 gptq"])
def test_gptq_moves_weights_further_to_keep_outputs_closer(name):
    plain = {row.path: row for row in quantized(name.split()[0])[1].tensors}
    for row in quantized(name)[1].tensors:
        assert row.weight_error > plain[row.path].weight_error
        assert row.damping is not None and row.damping > 0


def test_gptq_finds_its_own_order():
    orders = (quantized("int4 gptq")[0], quantized("int4 gptq in order")[0])
    assert not same_bits(*orders)


def test_a_low_rank_correction_costs_its_bits():
    """And is counted: 6 · (32 + 32) float32 numbers beside 32 · 32 weights."""
    plain, corrected = quantized("nvfp4")[1], quantized("nvfp4 svd")[1]
    extra = 6 * 64 * 32 / 32**2
    assert corrected.bits_per_weight == pytest.approx(plain.bits_per_weight + extra)


# Steps combined


@pytest.mark.parametrize(
    "rule",
    [
        INT4 | {"smooth": "awq", "scales": "clip"},
        INT4 | {"rotate": 16, "scales": "hessian", "rounding": "gptq"},
        W4A4 | {"smooth": "awq", "low_rank": 4, "scales": "hessian", "rounding": "gptq"},
        W4A4 | {"smooth": "smoothquant", "rotate": 32, "scales": "four_over_six"},
        MXFP4 | {"rotate": 32, "low_rank": 4, "scales": "sweep", "rounding": "gptq"},
        {
            "weight": {"format": "int4", "block_size": 16, "symmetric": False},
            "activation": {"format": "fp8", "granularity": "tensor", "calibrator": "percentile"},
            "smooth": "awq",
            "rounding": "gptq",
        },
    ],
    ids=lambda rule: Recipe.model_validate({"rules": [{"match": "*"} | rule]}).rules[0].algorithm,
)
def test_steps_go_together(rule):
    plain = {key: rule[key] for key in ("weight", "activation") if key in rule}
    qparams, report = run(rule)
    assert 0 < kl(qparams) < kl(run(plain)[0])
    assert all(row.algorithm != "rtn" and row.output_error is not None for row in report.tensors)


def test_fused_rotations_help_the_plain_format():
    qparams, report = run(MXFP4, rotation={"hidden": True, "heads": True, "seed": 1})
    assert kl(qparams) < divergence("mxfp4")
    assert report.seeds == {"rotation": 1} and "lm_head" in qparams


# The same again


@pytest.mark.parametrize("name", ["nvfp4 awq", "int4 gptq", "int4 autoround"])
def test_a_recipe_gives_the_same_bits_each_time(name):
    first, report = quantized(name)
    again, second = run(RULES[name])
    assert same_bits(first, again)
    seconds = {"seconds": 0.0}
    rows = [[{**vars(row), **seconds} for row in found.tensors] for found in (report, second)]
    assert rows[0] == rows[1]
    assert second.seeds == ({"rules.0.rounding": 0} if "autoround" in name else {})


def test_the_seed_of_autoround_is_what_the_recipe_says():
    other = INT4 | {"rounding": AUTOROUND["rounding"] | {"seed": 7}}
    qparams, report = run(other)
    assert report.seeds == {"rules.0.rounding": 7}
    assert not same_bits(qparams, quantized("int4 autoround")[0])


# Whose activations


def test_gptq_sees_the_layers_before_it_quantized_unless_told_otherwise():
    sequential = quantized("int4 gptq")[0]["layers"]
    original = run(RULES["int4 gptq"], propagate="original")[0]["layers"]
    spelled = run(RULES["int4 gptq"], propagate="quantized")[0]["layers"]
    assert same_bits(sequential, spelled)
    assert same_bits(sequential[0], original[0]) and not same_bits(sequential[1], original[1])


def test_awq_sees_the_original_layers_unless_told_otherwise():
    plain = quantized("nvfp4 awq")[0]["layers"]
    spelled = run(RULES["nvfp4 awq"], propagate="original")[0]["layers"]
    sequential = run(RULES["nvfp4 awq"], propagate="quantized")[0]["layers"]
    assert same_bits(plain, spelled)
    assert same_bits(plain[0], sequential[0]) and not same_bits(plain[1], sequential[1])
    # A layer of its own is calibrated as it is in the whole.
    recipe = Recipe.model_validate({"rules": [{"match": "layers/1/*"} | RULES["nvfp4 awq"]]})
    alone, _ = quantize(Model(CONFIG, params()), recipe, TEXT)
    assert same_bits(plain[1], alone["layers"][1])
    assert all(
        leaf is dict(tree.leaves_with_paths(params()["layers"][0]))[path]
        for path, leaf in tree.leaves_with_paths(alone["layers"][0])
    )
