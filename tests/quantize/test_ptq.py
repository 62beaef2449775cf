"""The driver: plain recipes bit for bit, and what it promises of leaves, reports and caches.

The width, 40, is a multiple of none of the block sizes 16, 32, 64 and 128, so that every row of a
weight ends in a short block. All matrices have it, so that each recipe is compiled once.
"""

import functools
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.calibrate import calibrate
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import evaluate
from jaxopt_models.formats import QuantSpec
from jaxopt_models.generate import generate
from jaxopt_models.hadamard import hadamard
from jaxopt_models.kv_quantizer import KVQuantizer
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward, forward_with_taps, init
from jaxopt_models.qtensor import QTensor, quantize_array
from jaxopt_models.quantize.ptq import Report, quantize
from jaxopt_models.quantize.recipe import Recipe, presets
from jaxopt_models.statistics import Wanted

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DENSE = ModelConfig.from_hf({"model_type": "llama"} | _SIZES)
MOE = ModelConfig.from_hf(
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | _SIZES
)


def is_plain(name: str) -> bool:
    """Whether a preset rounds all matrices to nearest under scales of their amax, and that is all.

    Of algorithms: `test_algorithms`.
    """
    recipe = Recipe.load(name)
    whole = [rule.match for rule in recipe.rules] == [("*",)] and recipe.kv_cache is None
    return whole and recipe.rules[0].algorithm == "rtn"


PLAIN = [name for name in presets() if is_plain(name)]
EVERYWHERE = [(DENSE, name) for name in PLAIN] + [
    (MOE, name) for name in ("fp8", "fp8_block", "int4", "nvfp4")
]
TWO_LEVEL = [(config, name) for config, name in EVERYWHERE if name.startswith("nvfp4")]
every_preset = pytest.mark.parametrize(
    "config, name", EVERYWHERE, ids=lambda value: getattr(value, "model_type", value)
)
two_level = pytest.mark.parametrize(
    "config, name", TWO_LEVEL, ids=lambda value: getattr(value, "model_type", value)
)


def batch(rows: int, length: int, seed: int = 0) -> jax.Array:
    ids = np.random.default_rng(seed).integers(0, DENSE.vocab_size, (rows, length))
    return jnp.asarray(ids, jnp.int32)


BATCHES = (batch(4, 24, seed=1), batch(2, 17, seed=2))
HELD_OUT = batch(6, 24, seed=3)


@functools.cache
def params(config: ModelConfig) -> Any:
    return init(config, jax.random.key(0))


@functools.cache
def quantized(config: ModelConfig, name: str) -> tuple[Any, Report]:
    return quantize(Model(config, params(config)), Recipe.load(name), BATCHES)


def leaves(tree_of_params: Any) -> dict[str, Any]:
    return dict(tree.leaves_with_paths(tree_of_params))


def quantized_leaves(config: ModelConfig, name: str) -> dict[str, QTensor]:
    found = leaves(quantized(config, name)[0])
    return {path: leaf for path, leaf in found.items() if isinstance(leaf, QTensor)}


@functools.cache
def quantizer(spec: QuantSpec) -> Any:
    return jax.jit(lambda weight, amax: quantize_array(weight, spec, amax=amax))


def fused_with(path: str) -> list[str]:
    """Paths of the linears that read the same input, written out."""
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name in group:
            if name in path:
                return [path.replace(name, other) for other in group]
    return [path]


def matrix_amax(weight: Any) -> np.ndarray:
    return np.abs(np.asarray(weight)).max((-2, -1))


def group_amax(weights: dict[str, Any], path: str) -> np.ndarray:
    """Largest magnitude in the linears fused with this one, scalar or [E]."""
    return np.max([matrix_amax(weights[p]) for p in fused_with(path)], axis=0)


def assert_same_leaf(leaf: Any, expected: Any) -> None:
    assert jax.tree.structure(leaf) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def dequantized(qparams: Any) -> Any:
    """The same model with every quantized leaf replaced by the array that it stands for."""
    found = leaves(qparams)
    return tree.replace(
        qparams, {p: leaf.dequantize() for p, leaf in found.items() if isinstance(leaf, QTensor)}
    )


# Leaves


@every_preset
def test_planned_weights_are_quantized_and_all_else_is_shared(config, name):
    qparams, report = quantized(config, name)
    before, after = leaves(params(config)), leaves(qparams)
    plan = Recipe.load(name).plan(params(config))
    assert list(after) == list(before)
    assert list(plan) == [p for p, leaf in before.items() if tree.is_decoder_matrix(p, leaf)]
    assert [row.path for row in report.tensors] == list(plan)
    for path, leaf in after.items():
        if path in plan:
            assert isinstance(leaf, QTensor)
            assert (leaf.shape, leaf.dtype) == (before[path].shape, "float32")
            choice = plan[path].weight
            assert choice is not None and leaf.spec == choice.spec()
        else:
            assert leaf is before[path]


@every_preset
def test_a_leaf_is_what_quantize_array_makes_of_the_weight(config, name):
    """Of each expert's own, where there are experts."""
    weights = leaves(params(config))
    for path, leaf in quantized_leaves(config, name).items():
        run, weight = quantizer(leaf.spec), weights[path]
        shared = jnp.asarray(group_amax(weights, path)) if leaf.spec.two_level else None
        if weight.ndim == 2:
            expected = run(weight, shared)
        else:
            amax = [None] * len(weight) if shared is None else list(shared)
            experts = [run(weight[e], amax[e]) for e in range(len(weight))]
            expected = jax.tree.map(lambda *parts: jnp.stack(parts), *experts)
        assert_same_leaf(replace(leaf, input=None), expected)


@two_level
def test_linears_that_read_one_input_share_a_global_scale(config, name):
    weights, found = leaves(params(config)), quantized_leaves(config, name)
    sharing_matters = 0
    for path, leaf in found.items():
        amax = group_amax(weights, path)
        assert leaf.global_scale is not None
        scale = np.asarray(leaf.global_scale)
        assert scale.shape == amax.shape + (1, 1)  # one an expert
        np.testing.assert_allclose(scale[..., 0, 0], amax / (6 * 448), rtol=1e-6)
        sharing_matters += bool(np.any(matrix_amax(weights[path]) < amax))
    assert sharing_matters >= config.num_layers * 3


@two_level
def test_linears_that_read_different_inputs_do_not(config, name):
    groups = {
        tuple(fused_with(path)): np.asarray(leaf.global_scale).ravel().tolist()
        for path, leaf in quantized_leaves(config, name).items()
    }
    # Query-key-value and output for each layer, gate-up and down for each expert.
    scales = [scale for group in groups.values() for scale in group]
    assert len(scales) == config.num_layers * (2 + 2 * max(1, config.num_experts))
    assert len(scales) == len(set(scales))


@pytest.mark.parametrize("apart", ["q", "k", "v"])
def test_a_scale_is_shared_only_among_weights_of_one_format(apart):
    rules = [
        {"match": "layers/0/self_attn/*", "weight": "nvfp4"},
        {"match": f"*/{apart}_proj/weight", "weight": "int8"},
    ]
    recipe = Recipe.model_validate({"rules": rules})
    found = leaves(quantize(Model(DENSE, params(DENSE)), recipe)[0])
    paths = [f"layers/0/self_attn/{n}_proj/weight" for n in "qkv" if n != apart]
    expected = max(matrix_amax(leaves(params(DENSE))[path]) for path in paths) / (6 * 448)
    for path in paths:
        assert found[path].global_scale.item() == pytest.approx(expected, rel=1e-6)


def test_a_weight_keeps_the_dtype_it_was_stored_in():
    half = init(DENSE, jax.random.key(0), jnp.bfloat16)
    recipe = Recipe.load("int8_weight_only", ["rules.0.match='*/down_proj/weight'"])
    found = leaves(quantize(Model(DENSE, half), recipe)[0])
    leaf = found["layers/1/mlp/down_proj/weight"]
    assert leaf.dtype == "bfloat16" and leaf.dequantize().dtype == jnp.bfloat16
    expected = quantizer(leaf.spec)(half["layers"][1]["mlp"]["down_proj"]["weight"], None)
    assert_same_leaf(leaf, expected)


# Activations


@every_preset
def test_inputs_are_quantized_as_the_recipe_says(config, name):
    (rule,) = Recipe.load(name).rules
    static = rule.activation is not None and rule.activation.calibrated
    for leaf in quantized_leaves(config, name).values():
        if rule.activation is None:
            assert leaf.input is None
        else:
            assert leaf.input is not None and leaf.input.spec == rule.activation.spec()
            assert (leaf.input.amax is not None) == static


@functools.cache
def largest_inputs(config: ModelConfig) -> dict[str, float]:
    """max |x| of the input of each planned weight and of the head; of all experts together."""
    paths = [p for p, leaf in leaves(params(config)).items() if tree.is_decoder_matrix(p, leaf)]
    wants = dict.fromkeys([*paths, "lm_head/weight"], Wanted())
    found = calibrate(config, params(config), BATCHES, wants)
    return {path: float(jnp.max(statistics.amax)) for path, statistics in found.items()}


@pytest.mark.parametrize("config", [DENSE, MOE], ids=lambda config: config.model_type)
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_static_scales_are_those_of_the_calibration_text(config, name):
    found = quantized_leaves(config, name)
    expected = largest_inputs(config)
    for path, leaf in found.items():
        assert leaf.input is not None and leaf.input.amax is not None
        assert leaf.input.amax.shape == ()
        assert leaf.input.amax == expected[path]


def test_the_output_head_can_be_calibrated_and_quantized():
    recipe = Recipe.load("fp8", ["skip=[embed_tokens/*]"])
    qparams, report = quantize(Model(DENSE, params(DENSE)), recipe, BATCHES)
    head = qparams["lm_head"]["weight"]
    assert isinstance(head, QTensor) and head.input is not None
    assert report.tensors[-1].path == "lm_head/weight"
    assert head.input.amax == largest_inputs(DENSE)["lm_head/weight"]


def test_quantizing_a_model_calibrates_on_the_original_not_on_quantized_layers():
    """Static scales of the second layer do not see the rounding of the first."""
    both = quantized_leaves(DENSE, "fp8")
    only = Recipe.load("fp8", ["rules.0.match=layers/1/*"])
    second = leaves(quantize(Model(DENSE, params(DENSE)), only, BATCHES)[0])
    for path in (p for p in both if p.startswith("layers/1/")):
        assert_same_leaf(second[path], both[path])


@pytest.mark.parametrize("name", [name for name in PLAIN if not Recipe.load(name).needs_text])
def test_recipes_without_static_scales_need_no_text(name):
    without, _ = quantize(Model(DENSE, params(DENSE)), Recipe.load(name))
    for path, leaf in quantized_leaves(DENSE, name).items():
        assert_same_leaf(leaves(without)[path], leaf)


# What it does to the model


@functools.cache
def divergence(name: str) -> float:
    """KL of the quantized model to the original on text that it was not calibrated on."""
    qparams, _ = quantized(DENSE, name)
    kl = evaluate(DENSE, qparams, [HELD_OUT], reference=params(DENSE)).kl
    assert kl is not None
    return kl


EIGHT_BITS = [n for n in PLAIN if n.startswith(("fp8", "int8", "mxfp8", "mxint8"))]
FOUR_BITS = [n for n in PLAIN if n.startswith(("nvfp4", "mxfp4", "int4", "nf4", "w4a8"))]


def test_a_quantized_model_says_nearly_the_same():
    stranger = init(DENSE, jax.random.key(1))
    far = evaluate(DENSE, stranger, [HELD_OUT], reference=params(DENSE)).kl
    assert far is not None and len(EIGHT_BITS) + len(FOUR_BITS) + 1 == len(PLAIN)
    for name in PLAIN:
        assert 0 < divergence(name) < far * (0.02 if name in EIGHT_BITS else 0.25)


def test_fewer_bits_say_less_of_it():
    worst = [max(map(divergence, names)) for names in (EIGHT_BITS, ["mxfp6"])]
    best = [min(map(divergence, names)) for names in (["mxfp6"], FOUR_BITS)]
    assert worst[0] < best[0] and worst[1] < best[1]


@pytest.mark.parametrize(
    "weights, both", [("nvfp4_weight_only", "nvfp4"), ("int8_weight_only", "int8")]
)
def test_rounding_activations_as_well_costs_something(weights, both):
    assert divergence(weights) < divergence(both)


@pytest.mark.parametrize(
    "config, name",
    [(DENSE, "nvfp4_weight_only"), (MOE, "int4")],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_weight_only_model_is_its_dequantized_self(config, name):
    qparams, _ = quantized(config, name)
    ours = forward(config, qparams, HELD_OUT)
    theirs = forward(config, dequantized(qparams), HELD_OUT)
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=2e-5)


def test_a_quantized_model_goes_through_jit():
    qparams, _ = quantized(DENSE, "int8")
    jitted = jax.jit(functools.partial(forward, DENSE))(qparams, HELD_OUT)
    plain = forward(DENSE, qparams, HELD_OUT)
    # A last-bit difference can carry an activation over a rounding boundary of its 8 bits.
    np.testing.assert_allclose(np.asarray(jitted), np.asarray(plain), atol=0.02)


@pytest.mark.parametrize("name", ["int8", "nvfp4_weight_only"])
def test_gradients_reach_the_inputs_of_quantized_layers(name):
    direction = jax.random.normal(jax.random.key(2), (*HELD_OUT.shape, DENSE.vocab_size))
    table = params(DENSE)["embed_tokens"]["weight"]

    def gradient(model: Any) -> np.ndarray:
        def loss(table: jax.Array) -> jax.Array:
            logits = forward(DENSE, model | {"embed_tokens": {"weight": table}}, HELD_OUT)
            return jnp.sum(logits * direction)

        return np.asarray(jax.grad(loss)(table)).ravel()

    qparams, _ = quantized(DENSE, name)
    ours, theirs = gradient(qparams), gradient(dequantized(qparams))
    if name == "nvfp4_weight_only":
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    else:  # straight through the rounding of activations: the same direction
        assert ours @ theirs > 0.99 * np.linalg.norm(ours) * np.linalg.norm(theirs)


# The report


@every_preset
def test_the_report_counts_every_bit(config, name):
    """Codes, one scale a tile, a global scale a matrix: counted from the format's definition."""
    qparams, report = quantized(config, name)
    total = 0.0
    weights = leaves(params(config))
    for row in report.tensors:
        leaf, (*experts, rows, width) = leaves(qparams)[row.path], weights[row.path].shape
        spec, count = leaf.spec, int(np.prod(experts))
        element = spec.element.bits
        codes = rows * -(-width * element // 8) * 8
        tiles = {
            "tensor": 1,
            "channel": rows,
            "block": rows * -(-width // (spec.block_size or 1)),
            "block2d": -(-rows // (spec.block_size or 1)) * -(-width // (spec.block_size or 1)),
        }[spec.granularity]
        scales = tiles * jnp.dtype(spec.scale_dtype).itemsize * 8 + 32 * spec.two_level
        assert row.bits == pytest.approx(
            count * (codes + scales) / weights[row.path].size, rel=1e-12
        )
        total += count * (codes + scales)
    size = sum(weights[row.path].size for row in report.tensors)
    assert report.bits_per_weight == pytest.approx(total / size, rel=1e-12)
    assert report.bits_per_weight == tree.bits_per_weight(qparams)


@every_preset
def test_the_report_says_how_far_each_weight_moved(config, name):
    (rule,) = Recipe.load(name).rules
    assert rule.weight is not None
    qparams, report = quantized(config, name)
    weights, found = leaves(params(config)), leaves(qparams)
    assert report.recipe == name
    for row in report.tensors:
        exact = np.asarray(weights[row.path], np.float64)
        leaf = found[row.path]
        restored = np.asarray(leaf.dequantize(), np.float64)  # what the forward pass computes with
        error = np.linalg.norm(exact - restored) / np.linalg.norm(exact)
        assert row.weight_error == pytest.approx(error, rel=1e-4)
        assert 0 < error < 0.2
        assert row.shape == exact.shape
        assert (row.format, row.granularity) == (leaf.spec.format, leaf.spec.granularity)
        assert row.activation == (rule.activation.format if rule.activation else "")
        assert row.algorithm == "rtn" and row.seconds > 0


def test_the_report_is_made_of_json_values():
    fields = quantized(DENSE, "nvfp4")[1].as_dict()
    assert fields["recipe"] == "nvfp4" and len(fields["tensors"]) == 14
    assert fields["calibration_seconds"] > 0 and fields["quantization_seconds"] > 0
    kinds = {type(value) for value in fields["tensors"][0].values()}
    assert kinds == {str, tuple, float, type(None)}
    assert json.loads(json.dumps(fields))["tokens"] == sum(b.size for b in BATCHES)


@every_preset
def test_output_errors_are_those_on_text_and_hardly_anything_is_clipped(config, name):
    _, report = quantized(config, name)
    for row in report.tensors:
        if Recipe.load(name).needs_text:
            assert row.output_error is not None and 0 < row.output_error < 0.3
        else:
            assert row.output_error is None
        assert (row.damping, report.seeds) == (None, {})
        # Block scales in E4M3 are rounded to nearest, and may end below the amax.
        assert row.clipped <= (0.1 if row.format == "nvfp4" else 0)


def test_progress_is_shown_over_layers():
    seen: list[tuple[str, int]] = []

    def progress(items, description):
        items = list(items)
        seen.append((description, len(items)))
        return items

    quantize(Model(DENSE, params(DENSE)), Recipe.load("fp8"), BATCHES, progress)
    assert seen == [("quantizing to fp8", 2)]


def test_a_matrix_of_zeros_has_no_error():
    path = "layers/1/mlp/up_proj/weight"
    zeros = tree.replace(params(DENSE), {path: jnp.zeros((40, 40))})
    for name in ("int8_weight_only", "nvfp4_weight_only"):
        qparams, report = quantize(Model(DENSE, zeros), Recipe.load(name))
        (row,) = [row for row in report.tensors if row.path == path]
        assert row.weight_error == 0
        assert not np.any(np.asarray(leaves(qparams)[path].dequantize()))


# What it refuses


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize(
    "batches, problem", [(None, "give calibration batches"), ([], "no batches")]
)
def test_static_scales_need_text(name, batches, problem):
    with pytest.raises(UserError, match=problem):
        quantize(Model(DENSE, params(DENSE)), Recipe.load(name), batches)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["int8", "nvfp4_weight_only", "mxfp4", "nf4"])
def test_a_weight_that_is_not_finite_is_named(name, value):
    path = "layers/1/mlp/down_proj/weight"
    broken = leaves(params(DENSE))[path].at[3, 5].set(value)
    model = Model(DENSE, tree.replace(params(DENSE), {path: broken}))
    with pytest.raises(UserError, match=f"^{path} holds NaN or infinity"):
        quantize(model, Recipe.load(name))


@pytest.mark.parametrize("overrides", [[], ["rules.0.smooth=smoothquant"]])
def test_a_weight_that_is_not_finite_is_named_before_it_spreads(overrides):
    """Whatever its layer computes, smoothing factors among it, would be NaN as well."""
    path = "layers/0/self_attn/v_proj/weight"
    broken = leaves(params(DENSE))[path].at[0, 0].set(np.nan)
    model = Model(DENSE, tree.replace(params(DENSE), {path: broken}))
    with pytest.raises(UserError, match=f"^{path} holds NaN or infinity"):
        quantize(model, Recipe.load("fp8", overrides), BATCHES)


def test_an_input_that_is_not_finite_is_named():
    broken = params(DENSE)["layers"][0]["input_layernorm"]["weight"].at[0].set(jnp.inf)
    path = "layers/0/input_layernorm/weight"
    model = Model(DENSE, tree.replace(params(DENSE), {path: broken}))
    with pytest.raises(UserError, match="^the input of layers/0/self_attn/.* is not finite"):
        quantize(model, Recipe.load("fp8", ["rules.0.match='*/self_attn/*'"]), BATCHES)


def test_a_head_that_is_not_finite_is_named():
    broken = tree.replace(params(DENSE), {"lm_head/weight": jnp.full((96, 40), jnp.nan)})
    recipe = Recipe.load("int8", ["skip=[embed_tokens/*]", "rules.0.match=lm_head/*"])
    with pytest.raises(UserError, match="^lm_head/weight holds NaN or infinity"):
        quantize(Model(DENSE, broken), recipe)


def test_a_quantized_model_is_refused():
    with pytest.raises(UserError, match="already quantized"):
        quantize(Model(DENSE, quantized(DENSE, "int8")[0]), Recipe.load("int8"))


def test_embeddings_have_no_input_to_calibrate():
    recipe = Recipe.load("fp8", ["skip=[]"])
    with pytest.raises(UserError, match="embed_tokens/weight; it cannot be calibrated"):
        quantize(Model(DENSE, params(DENSE)), recipe, BATCHES)


def test_a_rule_that_matches_nothing_is_refused_before_anything_runs():
    recipe = Recipe.load("int8", ["rules.0.match=[layers/0/*, layers/2/*]"])
    with pytest.raises(UserError, match="'layers/2/\\*' matches no matrix"):
        quantize(Model(DENSE, params(DENSE)), recipe)


def test_the_model_that_was_given_is_unchanged():
    given = params(DENSE)
    before = {path: np.array(leaf) for path, leaf in leaves(given).items()}
    quantize(Model(DENSE, given), Recipe.load("nvfp4"), BATCHES)
    assert all(np.array_equal(before[path], leaf) for path, leaf in leaves(given).items())


# Behind a rotation


def test_a_smoothed_and_rotated_input_has_the_scale_of_what_reaches_its_quantizer():
    recipe = Recipe.model_validate(
        {
            "rules": [
                {
                    "match": "layers/0/self_attn/?_proj/weight",
                    "weight": {"format": "int8", "granularity": "channel"},
                    "activation": {"format": "int8", "granularity": "tensor"},
                    "smooth": {"method": "smoothquant", "alpha": 0.6},
                    "rotate": 8,
                }
            ]
        }
    )
    qparams, _ = quantize(Model(DENSE, params(DENSE)), recipe, BATCHES)
    before, after = (p["layers"][0]["input_layernorm"]["weight"] for p in (params(DENSE), qparams))
    factors, largest = np.asarray(before / after), 0.0
    assert np.std(factors) > 0.1
    for tokens in BATCHES:
        tap = "layers/0/self_attn/q_proj/input"
        _, taps = forward_with_taps(DENSE, params(DENSE), tokens, [tap])
        rotated = hadamard(taps[tap] / factors.reshape(1, 1, -1), 8)
        largest = max(largest, float(jnp.max(jnp.abs(rotated))))
    for name in "qkv":
        leaf = qparams["layers"][0]["self_attn"][f"{name}_proj"]["weight"]
        assert float(leaf.input.amax) == pytest.approx(largest, rel=1e-5)


# Keys and values


KV = ModelConfig.from_hf({"model_type": "llama", "head_dim": 16} | _SIZES)
CACHES = {
    "int8": {"kv_cache": "int8"},
    "nvfp4 rotated": {"kv_cache": {"format": "nvfp4", "rotate": True, "bias": "key"}},
    "fp8 and weights": {
        "kv_cache": {"format": "fp8", "granularity": "head"},
        "rules": [{"match": "*", "weight": {"format": "int8", "granularity": "channel"}}],
    },
}


@functools.cache
def with_cache(name: str) -> tuple[Any, Report]:
    recipe = Recipe.model_validate(CACHES[name])
    return quantize(Model(KV, params(KV)), recipe, BATCHES if recipe.needs_text else None)


@pytest.mark.parametrize("name", CACHES)
def test_every_layer_gets_a_cache_quantizer(name):
    qparams, report = with_cache(name)
    choice = Recipe.model_validate(CACHES[name]).kv_cache
    assert choice is not None
    for layer in qparams["layers"]:
        quantizer = layer["self_attn"]["kv_cache"]
        assert isinstance(quantizer, KVQuantizer)
        assert quantizer.key.spec == choice.spec() and quantizer.rotate == choice.rotate
    if "rules" not in CACHES[name]:
        before, after = leaves(params(KV)), leaves(qparams)
        assert all(after[path] is before[path] for path in before)
        assert report.tensors == () and report.bits_per_weight == 32
    else:
        assert len(report.tensors) == 14 and report.bits_per_weight < 9


@pytest.mark.parametrize("name", CACHES)
def test_generating_from_a_quantized_cache_is_the_forward_pass(name):
    """Token for token: the cache holds what `forward` rounds keys and values to."""
    qparams, _ = with_cache(name)
    prompt = np.asarray(HELD_OUT[:1, :6])
    found = generate(KV, qparams, [prompt[0].tolist()], max_new_tokens=6)
    tokens = prompt[0].tolist()
    step = jax.jit(functools.partial(forward, KV))
    padded = np.zeros((1, 12), np.int32)
    for _ in range(6):
        padded[0, : len(tokens)] = tokens
        logits = step(qparams, jnp.asarray(padded))[0, len(tokens) - 1]
        tokens.append(int(jnp.argmax(logits)))
    assert found.tokens == [tokens[6:]]


def test_a_cheaper_cache_says_less():
    kl = {
        name: evaluate(KV, with_cache(name)[0], [HELD_OUT], reference=params(KV)).kl
        for name in ("int8", "nvfp4 rotated")
    }
    assert kl["int8"] is not None and kl["nvfp4 rotated"] is not None
    assert 0 < kl["int8"] < kl["nvfp4 rotated"] < 0.1


# Many devices


def test_calibrating_on_eight_devices_gives_the_same_codes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    text = [batch(8, 16, seed) for seed in (4, 5)]
    match = "rules.0.match=[layers/0/self_attn/*, layers/1/mlp/down_proj/*]"
    recipe = Recipe.load("int8_weight_only", [match, "rules.0.scales=hessian"])
    one, _ = quantize(Model(DENSE, params(DENSE)), recipe, text)
    many, report = quantize(Model(DENSE, params(DENSE)), recipe, text, mesh=mesh)
    assert report.tokens == 2 * 8 * 16
    different = total = 0
    for path, leaf in leaves(one).items():
        if isinstance(leaf, QTensor):
            different += int(np.sum(np.asarray(leaf.codes) != np.asarray(leaves(many)[path].codes)))
            total += leaf.codes.size
    assert different < 0.005 * total  # ties, which a sum in another order may turn
    logits = [np.asarray(forward(DENSE, tree_, HELD_OUT)) for tree_ in (one, many)]
    assert np.linalg.norm(logits[0] - logits[1]) < 0.02 * np.linalg.norm(logits[0])
