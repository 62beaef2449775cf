"""A layer's matrices together: before anything is rounded, the layer computes what it did."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream
from jaxopt_models.errors import UserError
from jaxopt_models.models.block import block
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import init, positions_of
from jaxopt_models.qtensor import DenseTensor, QTensor
from jaxopt_models.quantize.groups import group_of, leader_tap, wants
from jaxopt_models.quantize.layer import check_weights, prepare_layer, quantize_layer, static_amax
from jaxopt_models.quantize.layer_smoothing import LayerJob, smooth_layer
from jaxopt_models.quantize.method import Method
from jaxopt_models.statistics import InputStatistics, Wanted

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_MODELS = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 8},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
CONFIGS = {name: ModelConfig.from_hf(_SIZES | hf) for name, hf in _MODELS.items()}
INT4 = {"format": "int4", "block_size": 16}
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")

_run = jax.jit(
    lambda config, kind, layer, x: block(config, layer, x, positions_of(x), kind=kind)[0],
    static_argnums=(0, 1),
)


def method(**fields: Any) -> Method:
    return Method.model_validate({"weight": INT4} | fields)


@functools.cache
def setting(name: str) -> tuple[ModelConfig, Any, Stream]:
    """(config, a layer with channels that stand out, text at its input)."""
    config, rng = CONFIGS[name], np.random.default_rng(0)
    params = init(config, jax.random.key(0))

    def disturb(path: str, leaf: jax.Array) -> jax.Array:
        array = np.array(leaf)
        if "norm" in path or path.endswith("bias"):
            array += 0.4 * rng.standard_normal(array.shape)
        if path.split("/")[0] in NORMS:
            array[..., 3] += 10
        return jnp.asarray(array, jnp.float32)

    tokens = [rng.integers(0, 64, (4, 16)).astype(np.int32) for _ in range(2)]
    layer = tree.map_with_path(disturb, params["layers"][0])
    return config, layer, Stream(config, params, tokens)


def linears(layer: Any) -> list[str]:
    found = [path for path, _ in tree.leaves_with_paths(layer) if path.endswith("_proj/weight")]
    return [path.removesuffix("/weight") for path in found]


def smooth(
    name: str, plan: Mapping[str, Method], folding: bool = True
) -> tuple[LayerJob, dict[str, InputStatistics]]:
    config, layer, stream = setting(name)
    taps = stream.observe(layer, config.attention_kinds[0], wants(plan))
    return smooth_layer(config, layer, plan, taps, folding), taps


def of_layer(layer: Any) -> dict[str, Any]:
    return dict(tree.leaves_with_paths(layer))


def unrounded(job: LayerJob, plan: Mapping[str, Method]) -> Any:
    """The layer with each matrix in the space in which it would be quantized."""
    prepared, _ = prepare_layer(job, plan)
    leaves = {
        f"{name}/weight": DenseTensor(
            prepared[name].weight,
            pre_scale=job.pre_scale.get(name),
            low_rank=prepared[name].low_rank,
            rotate=how.rotate,
        )
        for name, how in plan.items()
    }
    return tree.replace(job.layer, leaves)


def assert_same_function(name: str, changed: Any) -> None:
    config, layer, stream = setting(name)
    kind, x = config.attention_kinds[0], jnp.asarray(stream.values[0])
    expected, found = (np.asarray(_run(config, kind, part, x)) for part in (layer, changed))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


SMOOTHINGS = {
    "awq": {"smooth": "awq"},
    "smoothquant": {"smooth": {"method": "smoothquant", "alpha": 0.5}},
}
CASES = [(name, "smoothquant", folding) for name in CONFIGS for folding in (True, False)]
CASES += [("llama", "awq", True)]


@functools.cache
def smoothed_everywhere(name: str, smoothing: str, folding: bool) -> tuple[LayerJob, Any]:
    plan = dict.fromkeys(linears(setting(name)[1]), method(**SMOOTHINGS[smoothing]))
    return smooth(name, plan, folding)[0], plan


# Smoothing


@pytest.mark.parametrize("name, smoothing, folding", CASES)
def test_a_smoothed_layer_computes_what_it_did(name, smoothing, folding):
    job, plan = smoothed_everywhere(name, smoothing, folding)
    assert_same_function(name, job.layer)
    assert_same_function(name, unrounded(job, plan))


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_are_folded_into_what_comes_before(name):
    """Everywhere but in front of experts, who share their norm with the router."""
    job, plan = smoothed_everywhere(name, "smoothquant", True)
    before, after = of_layer(setting(name)[1]), of_layer(job.layer)
    apart = {n for n in plan if "experts" in n and "down" not in n}
    assert job.pre_scale.keys() == job.factors.keys() == apart
    changed = {path for path in before if after[path] is not before[path]}
    norms = {"input_layernorm/weight"}
    if name != "mixtral":
        second = "pre_feedforward" if name == "gemma3" else "post_attention"
        norms.add(f"{second}_layernorm/weight")
    biases = {"self_attn/v_proj/bias"} if name == "qwen2" else set()
    # Rows of up_proj make what down_proj reads, though the columns of experts' are left.
    weights = {f"{n}/weight" for n in plan if n != "mlp/experts/gate_proj"}
    assert changed == norms | biases | weights


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_that_are_not_folded_stay_with_the_leaf(name):
    job, plan = smoothed_everywhere(name, "smoothquant", False)
    before, after = of_layer(setting(name)[1]), of_layer(job.layer)
    assert all(after[path] is before[path] for path in before)
    assert job.pre_scale.keys() == job.factors.keys() == plan.keys()
    quantized, _ = quantize_layer(job, plan, "", {})
    for path, leaf in of_layer(quantized).items():
        if path.removesuffix("/weight") in plan:
            assert isinstance(leaf, QTensor) and leaf.pre_scale is not None
            assert leaf.pre_scale.shape == leaf.shape[-1:]
        else:
            assert leaf is before[path]


def test_linears_that_read_one_input_share_its_factors():
    job, plan = smoothed_everywhere("mixtral", "smoothquant", False)
    for name in plan:
        for other in group_of(name):
            assert np.array_equal(job.pre_scale[name], job.pre_scale[other])
            assert np.array_equal(job.factors[name], job.factors[other])


@pytest.mark.parametrize(
    "left_out, apart",
    [
        ("self_attn/v_proj", {"self_attn/q_proj", "self_attn/k_proj", "self_attn/o_proj"}),
        ("self_attn/q_proj", {"self_attn/k_proj", "self_attn/v_proj"}),
        ("mlp/up_proj", {"mlp/gate_proj", "mlp/down_proj"}),
        ("mlp/down_proj", set()),
    ],
)
def test_nothing_is_folded_into_or_for_what_is_not_planned(left_out, apart):
    names = [name for name in linears(setting("llama")[1]) if name != left_out]
    plan = dict.fromkeys(names, method(**SMOOTHINGS["smoothquant"]))
    job, _ = smooth("llama", plan)
    before, after = of_layer(setting("llama")[1]), of_layer(job.layer)
    assert job.pre_scale.keys() == apart
    assert after[f"{left_out}/weight"] is before[f"{left_out}/weight"]
    norm = "input_layernorm" if "self_attn" in left_out else "post_attention_layernorm"
    if left_out != "mlp/down_proj":
        assert after[f"{norm}/weight"] is before[f"{norm}/weight"]
    assert_same_function("llama", unrounded(job, plan))


def test_linears_of_one_input_may_have_methods_of_their_own():
    plan = {
        "self_attn/q_proj": method(smooth="awq"),
        "self_attn/k_proj": method(**SMOOTHINGS["smoothquant"]),
        "self_attn/v_proj": method(),
    }
    job, taps = smooth("llama", plan)
    q, k = job.pre_scale["self_attn/q_proj"], job.pre_scale["self_attn/k_proj"]
    assert job.pre_scale.keys() == {"self_attn/q_proj", "self_attn/k_proj"}
    assert not np.array_equal(q, k)
    tap = leader_tap("self_attn/v_proj")
    assert job.statistics["self_attn/v_proj"] is taps[tap]
    assert_same_function("llama", unrounded(job, plan))


@pytest.mark.parametrize("folding", [True, False])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_statistics_are_those_of_the_smoothed_input(name, folding):
    """As they would be measured in the smoothed layer."""
    job, plan = smoothed_everywhere(name, "smoothquant", folding)
    config, _, stream = setting(name)
    kind = config.attention_kinds[0]
    seen = stream.observe(job.layer, kind, wants(plan))
    for linear in plan:
        factor = job.factors.get(linear, jnp.ones(1))
        expected, found = seen[leader_tap(linear)], job.statistics[linear]
        for field in ("channel_amax", "channel_abs"):
            array = np.asarray(getattr(expected, field)) / np.asarray(factor)
            np.testing.assert_allclose(getattr(found, field), array, rtol=1e-4, atol=1e-6)
        outer = factor[..., :, None] * factor[..., None, :]
        moment = np.asarray(expected.second_moment) / np.asarray(outer)
        close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(moment).max()}
        np.testing.assert_allclose(np.asarray(found.second_moment), moment, **close)
        assert np.array_equal(found.amax, jnp.max(found.channel_amax, axis=-1))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_rotating_and_taking_out_a_low_rank_change_nothing_either(name):
    how = method(**SMOOTHINGS["smoothquant"], rotate=16, low_rank=4)
    plan = dict.fromkeys(linears(setting(name)[1]), how)
    job, _ = smooth(name, plan)
    assert_same_function(name, unrounded(job, plan))


def test_without_text_nothing_is_smoothed():
    plan = {"self_attn/q_proj": method()}
    config, layer, _ = setting("llama")
    job = smooth_layer(config, layer, plan, {}, True)
    assert job.layer is layer and not job.statistics


# What calibration is asked for


def test_a_group_is_asked_for_all_that_one_of_it_needs():
    plan = {
        "self_attn/q_proj": method(),
        "self_attn/k_proj": method(rounding="gptq"),
        "mlp/down_proj": method(rotate=16),
        "mlp/up_proj": method(rotate=16, smooth="awq"),
        "mlp/gate_proj": method(
            activation={"format": "fp8", "granularity": "tensor", "calibrator": "mse"}
        ),
    }
    assert wants(plan) == {
        "self_attn/q_proj/input": Wanted(second_moment=True, sample=256),
        "mlp/down_proj/input": Wanted(sample=256, rotate=16),
        # Smoothed first, rotated then: statistics are of the input as it is.
        "mlp/gate_proj/input": Wanted(second_moment=True, histogram=True, sample=256),
    }


def test_a_group_has_one_rotation():
    plan = {"mlp/gate_proj": method(rotate=16), "mlp/up_proj": method(rotate=8)}
    with pytest.raises(UserError, match="mlp/up_proj .* different rotations"):
        wants(plan)


# Leaves and rows


@functools.cache
def quantized_half() -> tuple[Any, Any, Any]:
    config, layer, stream = setting("llama")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    static = {"format": "fp8", "granularity": "tensor"}
    names = [name for name in linears(layer) if name.endswith(("v_proj", "o_proj"))]
    how = method(**SMOOTHINGS["smoothquant"], activation=static)
    plan = dict.fromkeys(names, how)
    taps = stream.observe(half, config.attention_kinds[0], wants(plan))
    job = smooth_layer(config, half, plan, taps, True)
    quantized, rows = quantize_layer(job, plan, "layers/7/", {})
    return job, quantized, rows


def test_leaves_have_the_dtype_of_the_original_weights():
    """Although folding has made float32 of some."""
    job, quantized, _ = quantized_half()
    assert job.layer["self_attn"]["v_proj"]["weight"].dtype == jnp.float32
    for leaf in of_layer(quantized).values():
        if isinstance(leaf, QTensor):
            assert leaf.dtype == "bfloat16" and leaf.dequantize().dtype == jnp.bfloat16


def test_rows_are_named_and_in_the_order_of_the_plan():
    job, quantized, rows = quantized_half()
    assert [row.path for row in rows] == [f"layers/7/{name}/weight" for name in job.dtypes]
    for row in rows:
        assert (row.algorithm, row.format, row.activation) == ("smoothquant", "int4", "fp8")
        assert row.output_error is not None and 0 < row.output_error < 0.5


def test_a_static_scale_is_one_for_all_experts():
    static = {"format": "fp8", "granularity": "tensor"}
    plan = {"mlp/experts/down_proj": method(smooth="awq", activation=static)}
    job, _ = smooth("mixtral", plan)
    amax = static_amax(job.statistics["mlp/experts/down_proj"], plan["mlp/experts/down_proj"])
    statistics = job.statistics["mlp/experts/down_proj"]
    assert amax is not None and amax.shape == ()
    assert statistics.amax.shape == (4,) and amax == jnp.max(statistics.amax)


def test_a_dynamic_scale_has_no_magnitude():
    how = method(activation={"format": "int8", "granularity": "token"})
    assert static_amax(None, how) is None


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    _, layer, _ = setting("mixtral")
    path = "mlp/experts/up_proj/weight"
    broken = tree.replace(layer, {path: of_layer(layer)[path].at[2, 0, 1].set(value)})
    plan = dict.fromkeys(linears(layer), method())
    check_weights(layer, plan, "layers/4/")
    with pytest.raises(UserError, match=f"^layers/4/{path} holds NaN or infinity"):
        check_weights(broken, plan, "layers/4/")
    check_weights(broken, {"self_attn/q_proj": method()}, "layers/4/")
