"""Operations of a step, beside those of the products that JAX traces."""

import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.interpreters import partial_eval as pe

import jaxopt_models as jom
from jaxopt_models import tree
from jaxopt_models.bench.decode import MODELS
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.qtensor import LowRank
from jaxopt_models.train.flops import forward_flops, least_seconds, peak_rate, training_flops
from jaxopt_models.train.leaves import fake_quantized
from jaxopt_models.train.trainable import combine, partition

LENGTH = 20
MIXTURE = ModelConfig.from_hf(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
)


def _products(jaxpr) -> int:
    """Operations of all products of matrices."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[axis] for axis in contracted]
            total += 2 * eqn.outvars[0].aval.size * math.prod(sizes)
        elif eqn.primitive.name == "ragged_dot_general":
            rows, _ = eqn.invars[0].aval.shape
            others = {*eqn.invars[0].aval.shape[1:], *eqn.invars[1].aval.shape[-2:]} - {rows}
            total += 2 * rows * math.prod(others)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += _products(inner) if hasattr(inner, "eqns") else 0
    return total


def _traced(config, trained, frozen, gradients: bool) -> float:
    """Of a token."""
    tokens = jnp.zeros((1, LENGTH), jnp.int32)

    def loss(trained):
        return jnp.sum(jnp.sin(jom.forward(config, combine(trained, frozen), tokens)))

    function = jax.grad(loss) if gradients else loss
    closed = jax.make_jaxpr(function)(trained)
    dead = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    return _products(dead[0]) / LENGTH


@pytest.mark.parametrize("kind", ["tied", "untied", "mixture", "adapters"])
def test_they_are_those_of_the_products(kind):
    config = MIXTURE if kind == "mixture" else tiny.CONFIG
    config = replace(config, tie_word_embeddings=False) if kind == "untied" else config
    params = jom.init(config, jax.random.key(0))
    if kind == "adapters":
        path, quantized = "layers/1/mlp/up_proj/weight", tiny.quantized(params)
        correction = LowRank(jnp.zeros((2, 32)), jnp.zeros((64, 2)))
        leaf = replace(quantized["layers"][1]["mlp"]["up_proj"]["weight"], low_rank=correction)
        params = fake_quantized(params, tree.replace(quantized, {path: leaf}))
    freeze = ("layers/1/*/up_proj/weight/weight",) if kind == "adapters" else ()
    trained, frozen = partition(params, freeze=freeze)
    found = training_flops(config, params, trained, LENGTH)
    assert found == _traced(config, trained, frozen, gradients=True)
    assert forward_flops(config, params, LENGTH) == _traced(config, trained, frozen, False)


def test_palm_s_formula():
    """6 N + 12 L H d T, of a Llama of a billion weights, head tied."""
    config = ModelConfig.from_hf(MODELS["llama-1b"])
    params = abstract_params(config)
    n = 16 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192) + 128256 * 2048
    expected = 6 * n + 12 * 16 * 32 * 64 * 2048
    assert training_flops(config, params, params, 2048) == expected
    assert forward_flops(config, params, 2048) == expected / 3


def test_a_window_bounds_attention():
    config = replace(tiny.CONFIG, attention_kinds=("full", "sliding"), sliding_window=4)
    params = jom.init(config, jax.random.key(0))
    wide = forward_flops(tiny.CONFIG, params, LENGTH)
    assert wide - forward_flops(config, params, LENGTH) == 4 * 32 * (LENGTH - 4)


def test_peaks():
    h100, other = (SimpleNamespace(device_kind=k) for k in ("NVIDIA H100 80GB HBM3", "cpu"))
    assert peak_rate([h100] * 2) == 2 * 989.4e12
    assert peak_rate([h100, other]) is None and peak_rate([]) is None
    assert least_seconds(989.4e12, [h100]) == 1.0 and least_seconds(1.0, [other]) is None
