"""Recipes: what they select, in which order, and every way in which a file can be wrong."""

import textwrap

import jax.numpy as jnp
import pytest
import yaml
from small_models import LLAMA, MIXTRAL, SIZES

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.formats import FORMATS
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.qtensor import quantize_array
from jaxopt_models.quantize.recipe import Recipe, presets

DENSE, MOE = LLAMA, MIXTRAL


# Widths that the blocks and ranks of presets divide.
_LARGE = SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}
WEIGHTS = [name for name in presets() if Recipe.load(name).rules]
OF_DENSE_MODELS = [name for name in WEIGHTS if name != "nvfp4_experts_only"]


@pytest.fixture
def dense():
    return abstract_params(DENSE)


@pytest.fixture
def moe():
    return abstract_params(MOE)


@pytest.fixture
def write(tmp_path):
    """Puts a recipe into a file."""

    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return write


def recipe(*rules, **fields) -> Recipe:
    return Recipe.model_validate({"rules": list(rules)} | fields)


def formats(plan) -> dict[str, str]:
    return {path: rule.weight.format for path, rule in plan.items()}


# Presets


def meant(name: str, path: str) -> bool:
    """Whether a preset is for a matrix, from its name: all but a few are for all."""
    if name == "nvfp4_omlp_only":
        return "/mlp/" in path or "/o_proj/" in path
    if "_mlp_" in name:
        return "/mlp/" in path
    return "/experts/" in path or "_experts_" not in name


def test_there_are_presets_for_every_family_of_formats():
    rules = [rule for name in presets() for rule in Recipe.load(name).rules]
    used = {rule.weight.spec().format for rule in rules if rule.weight}
    # Of the MX formats with two elements the more precise, or the wider one, stands for both.
    assert used == FORMATS.keys() - {"mxfp6_e2m3", "mxfp8_e5m2"}


@pytest.mark.parametrize("name", presets())
def test_a_preset_says_what_it_is_called_and_what_it_does(name):
    loaded = Recipe.load(name)
    assert loaded.name == name
    assert loaded.description and "\n" not in loaded.description


# Of ModelOpt all that are for transformers that generate text, of llm-compressor the schemes.
KNOWN_NAMES = """
    FP8_DEFAULT_CFG FP8_PER_CHANNEL_PER_TOKEN_CFG FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG INT8_DEFAULT_CFG
    INT8_SMOOTHQUANT_CFG INT8_WEIGHT_ONLY_CFG INT4_BLOCKWISE_WEIGHT_ONLY_CFG INT4_AWQ_CFG
    W4A8_AWQ_BETA_CFG W4A8_NVFP4_FP8_CFG W4A8_MXFP4_FP8_CFG W4A16_NVFP4_CFG MXFP4_DEFAULT_CFG
    MXFP6_DEFAULT_CFG MXFP8_DEFAULT_CFG MXINT8_DEFAULT_CFG NVFP4_DEFAULT_CFG NVFP4_AWQ_LITE_CFG
    NVFP4_AWQ_CLIP_CFG NVFP4_AWQ_FULL_CFG NVFP4_SVDQUANT_DEFAULT_CFG NVFP4_FOUR_OVER_SIX_CFG
    NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG NVFP4_MLP_ONLY_CFG
    NVFP4_EXPERTS_ONLY_CFG NVFP4_OMLP_ONLY_CFG NVFP4_MLP_WEIGHT_ONLY_CFG MXFP4_MLP_WEIGHT_ONLY_CFG
    FP8_KV_CFG FP8_AFFINE_KV_CFG NVFP4_KV_CFG NVFP4_AFFINE_KV_CFG NVFP4_KV_ROTATE_CFG
    W4A16 W8A16 W8A8 FP8 FP8_DYNAMIC FP8_BLOCK NVFP4 NVFP4A16 MXFP4 MXFP4A16 MXFP8
""".split()


@pytest.mark.parametrize("name", KNOWN_NAMES)
def test_presets_go_by_the_names_that_users_know(name):
    assert Recipe.load(name) == Recipe.load(Recipe.load(name).name)


def test_a_name_is_that_of_one_preset():
    names = [name for preset in presets() for name in (preset, *Recipe.load(preset).aliases)]
    assert len({name.lower() for name in names}) == len(names)


@pytest.mark.parametrize("name", OF_DENSE_MODELS)
def test_a_preset_plans_all_linears_of_a_dense_model_and_nothing_else(name):
    # Of a real size, so that rotations and ranks fit.
    large = abstract_params(ModelConfig.from_hf(_LARGE | {"model_type": "llama"}))
    linears = [p for p, leaf in tree.leaves_with_paths(large) if tree.is_decoder_matrix(p, leaf)]
    assert len(linears) == 2 * 7
    assert list(Recipe.load(name).plan(large)) == [p for p in linears if meant(name, p)]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_preset_plans_all_experts_and_no_router(name):
    large = abstract_params(
        ModelConfig.from_hf(
            _LARGE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
        )
    )
    linears = [p for p, leaf in tree.leaves_with_paths(large) if tree.is_decoder_matrix(p, leaf)]
    assert sum("/experts/" in path for path in linears) == 2 * 3
    assert list(Recipe.load(name).plan(large)) == [p for p in linears if meant(name, p)]


@pytest.mark.parametrize("name", presets())
def test_text_is_needed_by_static_scales_and_by_what_measures_outputs(name):
    loaded = Recipe.load(name)
    static = any(rule.activation and rule.activation.calibrated for rule in loaded.rules)
    measured = any(
        rule.smooth or rule.scales in ("hessian", "clip") or rule.rounding.method != "nearest"
        for rule in loaded.rules
    )
    cached = loaded.kv_cache is not None and loaded.kv_cache.calibrated
    assert loaded.needs_text == (static or measured or cached)
    assert not (loaded.needs_text and "needs no calibration" in loaded.description)


PLAIN_TEXT = {"fp8", "nvfp4"}
PLAIN_NO_TEXT = {"fp8_block", "fp8_dynamic", "int4", "int8", "int8_weight_only", "mxfp4", "mxfp6"}
PLAIN_NO_TEXT |= {"mxfp8", "mxint8", "nf4", "nvfp4_weight_only"}


def test_plain_presets_need_text_for_static_scales_only():
    assert PLAIN_TEXT | PLAIN_NO_TEXT <= set(presets())
    for name in PLAIN_TEXT | PLAIN_NO_TEXT:
        assert Recipe.load(name).needs_text == (name in PLAIN_TEXT)
        assert not Recipe.load(name).sequential


@pytest.mark.parametrize("name", presets())
def test_a_preset_survives_being_written_and_read_again(name, write):
    loaded = Recipe.load(name)
    again = Recipe.load(write(yaml.safe_dump(loaded.model_dump(mode="json"))))
    assert again == loaded and hash(again) == hash(loaded)


# Algorithms


def test_every_step_may_be_written_short_or_long():
    short = recipe(
        {"match": "*", "weight": "nvfp4", "smooth": "awq", "rounding": "gptq"}, kv_cache="fp8"
    )
    long = recipe(
        {
            "match": ["*"],
            "weight": {"format": "nvfp4"},
            "smooth": {"method": "awq"},
            "rounding": {"method": "gptq", "damping": 0.01},
        },
        kv_cache={"format": "fp8"},
    )
    assert short == long


@pytest.mark.parametrize(
    "steps, name",
    [
        ({}, "rtn"),
        ({"smooth": "awq"}, "awq"),
        ({"smooth": {"method": "smoothquant", "alpha": 0.5}}, "smoothquant"),
        ({"rotate": 16}, "hadamard16"),
        ({"low_rank": 8}, "svd8"),
        ({"scales": "hessian"}, "hessian"),
        ({"rounding": "gptq"}, "gptq"),
        (
            {
                "smooth": "awq",
                "rotate": 8,
                "low_rank": 4,
                "scales": "mse",
                "rounding": "autoround",
            },
            "awq+hadamard8+svd4+mse+autoround",
        ),
        ({"scales": "four_over_six", "rounding": "gptq"}, "four_over_six+gptq"),
    ],
)
def test_an_algorithm_is_called_by_its_steps(steps, name):
    assert recipe({"match": "*", "weight": "nvfp4"} | steps).rules[0].algorithm == name


@pytest.mark.parametrize(
    "steps, needed",
    [
        ({}, False),
        ({"activation": "mxfp4"}, False),
        ({"activation": "nvfp4"}, True),
        ({"activation": {"format": "int8", "granularity": "token"}}, False),
        ({"activation": {"format": "int8", "granularity": "tensor"}}, True),
        ({"rotate": 16}, False),
        ({"low_rank": 8}, False),
        ({"scales": "mse"}, False),
        ({"scales": "sweep"}, False),
        ({"scales": "four_over_six"}, False),
        ({"scales": "hessian"}, True),
        ({"scales": "clip"}, True),
        ({"smooth": "awq"}, True),
        ({"smooth": "smoothquant"}, True),
        ({"rounding": "gptq"}, True),
        ({"rounding": "autoround"}, True),
    ],
)
def test_a_step_that_measures_outputs_needs_text(steps, needed):
    rule = {"match": "*", "weight": "nvfp4"} | steps
    assert recipe(rule).needs_text == needed
    # One rule that needs it is enough.
    assert recipe({"match": "*", "weight": "int8"}, rule).needs_text == needed


@pytest.mark.parametrize(
    "kv_cache, needed",
    [
        ("fp8", True),
        ("nvfp4", True),
        ("int8", False),
        ({"format": "fp8", "granularity": "token"}, False),
        ({"format": "int8", "bias": "key"}, True),
        ({"format": "int8", "rotate": True}, False),
    ],
)
def test_a_cache_needs_text_for_static_scales_and_biases(kv_cache, needed):
    assert Recipe.model_validate({"kv_cache": kv_cache}).needs_text == needed
    assert recipe({"match": "*", "weight": "int4"}, kv_cache=kv_cache).needs_text == needed


@pytest.mark.parametrize(
    "rounding, propagate, sequential",
    [
        ("nearest", None, False),
        ("gptq", None, True),
        ("autoround", None, True),
        ("gptq", "original", False),
        ("nearest", "quantized", True),
    ],
)
def test_layers_see_quantized_layers_where_rounding_can_make_up_for_them(
    rounding, propagate, sequential
):
    rule = {"match": "*", "weight": "int4", "smooth": "awq", "rounding": rounding}
    assert recipe(rule, propagate=propagate).sequential == sequential


@pytest.mark.parametrize(
    "steps, problem",
    [
        ({"rotate": 6}, "channels has no block of 6; set 'rotate' to a power of two"),
        ({"rotate": 32}, "mlp/down_proj/weight: a rotation of 48 channels has no block of 32"),
        ({"low_rank": 33}, "has no rank 33; set 'low_rank'"),
    ],
)
def test_a_step_that_does_not_fit_a_matrix_names_it(dense, steps, problem):
    with pytest.raises(UserError, match="^layers/0/") as error:
        recipe({"match": "*", "weight": "int8"} | steps).plan(dense)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "steps",
    [{"rotate": 8}, {"low_rank": 2}, {"smooth": "awq"}, {"rounding": "gptq"}, {"scales": "clip"}],
)
def test_an_embedding_has_no_input_that_an_algorithm_could_read(dense, steps):
    rule = {"match": "*", "weight": "int8"} | steps
    with pytest.raises(UserError, match="no activation reaches embed_tokens/weight"):
        recipe(rule, skip=[]).plan(dense)
    assert "lm_head/weight" in recipe(rule, skip=["embed_tokens/*"]).plan(dense)


# Rules


def test_the_last_rule_that_matches_decides(dense):
    plan = recipe(
        {"match": "*", "weight": "nvfp4"},
        {"match": "layers/1/*", "weight": "int8"},
        {"match": "*/down_proj/weight", "weight": "fp8"},
    ).plan(dense)
    assert formats(plan) == {
        path: "fp8" if "down_proj" in path else "int8" if "layers/1/" in path else "nvfp4"
        for path in plan
    }


def test_an_earlier_rule_does_not_add_to_a_later_one(dense):
    plan = recipe(
        {"match": "*", "weight": "int8", "activation": {"format": "int8", "granularity": "token"}},
        {"match": "layers/0/*", "weight": "int8"},
    ).plan(dense)
    assert all((rule.activation is None) == ("layers/0/" in path) for path, rule in plan.items())


def test_a_rule_may_name_several_patterns(dense):
    plan = recipe({"match": ["*/q_proj/weight", "*/o_proj/weight"], "weight": "fp8"}).plan(dense)
    assert list(plan) == [
        f"layers/{i}/self_attn/{name}/weight" for i in (0, 1) for name in ("o_proj", "q_proj")
    ]


def test_null_leaves_weights_as_they_are(dense):
    plan = recipe(
        {"match": "*", "weight": "nvfp4"}, {"match": "*/self_attn/*", "weight": None}
    ).plan(dense)
    assert plan and all("/mlp/" in path for path in plan)


def test_null_can_be_overruled_by_a_later_rule(dense):
    plan = recipe(
        {"match": "*", "weight": None}, {"match": "layers/1/mlp/*", "weight": "nf4"}
    ).plan(dense)
    assert list(plan) == [f"layers/1/mlp/{n}_proj/weight" for n in ("down", "gate", "up")]


def test_weights_that_no_rule_matches_are_left_alone(dense):
    plan = recipe({"match": "layers/0/mlp/gate_proj/weight", "weight": "int4"}).plan(dense)
    assert list(plan) == ["layers/0/mlp/gate_proj/weight"]


@pytest.mark.parametrize(
    "skip, extra",
    [
        ([], {"lm_head/weight", "embed_tokens/weight"}),
        (["embed_tokens/*"], {"lm_head/weight"}),
        (["lm_head/*", "embed_tokens/*", "layers/0/*"], set()),
    ],
)
def test_skip_replaces_the_default(dense, skip, extra):
    planned = recipe({"match": "*", "weight": "int8"}, skip=skip).plan(dense).keys()
    linears = {p for p, leaf in tree.leaves_with_paths(dense) if tree.is_decoder_matrix(p, leaf)}
    linears = {p for p in linears if not tree.matches(p, skip)}
    assert planned == linears | extra


def test_an_empty_skip_lets_routers_in_but_never_norms(moe):
    planned = recipe({"match": "*", "weight": "int8"}, skip=[]).plan(moe)
    assert "layers/0/mlp/router/weight" in planned
    assert not any("norm" in path for path in planned)


def test_biases_are_never_planned():
    biased = ModelConfig.from_hf({"model_type": "qwen2"} | SIZES)
    planned = recipe({"match": "*", "weight": "int8"}, skip=[]).plan(abstract_params(biased))
    assert planned and all(path.endswith("/weight") for path in planned)


# What a recipe may not say about a model


@pytest.mark.parametrize(
    "pattern",
    ["*/query_proj/weight", "layers/7/*", "q_proj", "lm_head/weight", "*/input_layernorm/weight"],
)
def test_a_pattern_that_matches_no_matrix_is_an_error(dense, pattern):
    rules = [{"match": "*", "weight": "int8"}, {"match": ["*/q_proj/*", pattern], "weight": "fp8"}]
    with pytest.raises(UserError, match="matches no matrix") as error:
        recipe(*rules).plan(dense)
    assert repr(pattern) in str(error.value)
    assert "layers/0/" in str(error.value)  # what paths look like
    assert "lm_head/*" in str(error.value)  # what is skipped


def test_a_router_is_no_matrix_that_may_be_quantized(moe):
    with pytest.raises(UserError, match="router"):
        recipe({"match": "*/router/weight", "weight": "int8"}).plan(moe)


def test_a_quantized_model_is_not_quantized_again(dense):
    weight = quantize_array(jnp.ones((32, 32)), "int8")
    params = tree.replace(dense, {"layers/1/self_attn/q_proj/weight": weight})
    with pytest.raises(UserError, match="layers/1/self_attn/q_proj/weight is already quantized"):
        Recipe.load("nvfp4").plan(params)


def test_quantized_weights_that_no_rule_would_touch_are_no_error(dense):
    weight = quantize_array(jnp.ones((32, 32)), "int8")
    params = tree.replace(dense, {"layers/1/self_attn/q_proj/weight": weight})
    plan = recipe({"match": "layers/0/*", "weight": "nvfp4"}).plan(params)
    assert len(plan) == 7


# Reading files


def test_a_file_reads_like_the_preset_it_copies(write):
    path = write(
        """
        description: FP8 weights by output channel
        rules:
          - match: ["*"]
            weight: {format: fp8, granularity: channel}
            activation:
              format: fp8
              granularity: token
            rounding: nearest
        skip: [lm_head/*, embed_tokens/*, "*/router/*"]
        """
    )
    mine, preset = Recipe.load(path), Recipe.load("fp8_dynamic")
    assert mine.name == "mine"
    assert (mine.rules, mine.skip) == (preset.rules, preset.skip)


def test_a_file_may_name_itself(write):
    assert Recipe.load(write("{name: other, rules: [{match: '*', weight: fp8}]}")).name == "other"


def test_a_format_may_be_written_short_or_long():
    short, long = ({"match": "*", "weight": w} for w in ("nvfp4", {"format": "nvfp4"}))
    assert recipe(short) == recipe(long)


_RULE = "rules: [{match: '*', weight: fp8}]"


@pytest.mark.parametrize(
    "text, problem",
    [
        # unknown keys, at every depth
        (_RULE + "\nrule: []", "unknown key 'rule'"),
        ("rules: [{match: '*', weight: fp8, bits: 4}]", "unknown key 'rules.0.bits'"),
        ("rules: [{match: '*', weight: {format: fp8, group: 4}}]", "rules.0.weight.group"),
        (
            "rules: [{match: '*', weight: fp8, activation: {format: fp8, static: true}}]",
            "rules.0.activation.static",
        ),
        # missing keys
        ("description: nothing else", "neither 'rules' nor a 'kv_cache'"),
        ("rules: [{weight: fp8}]", "rules.0.match"),
        ("rules: [{match: '*'}]", "rules.0.weight"),
        ("rules: [{match: '*', weight: {block_size: 16}}]", "rules.0.weight.format"),
        # wrong types
        ("rules: nvfp4", "rules"),
        ("rules: {match: '*', weight: fp8}", "rules"),
        ("rules: [nvfp4]", "rules.0"),
        ("rules: [{match: 7, weight: fp8}]", "rules.0.match"),
        ("rules: [{match: '*', weight: 8}]", "rules.0.weight"),
        ("rules: [{match: '*', weight: [fp8]}]", "rules.0.weight"),
        (_RULE + "\nskip: 3", "skip"),
        (_RULE + "\ndescription: [one, two]", "description"),
        (_RULE + "\n7: seven", "7"),
        (
            "rules: [{match: '*', weight: {format: int4, block_size: many}}]",
            "rules.0.weight.block_size",
        ),
        (
            "rules: [{match: '*', weight: {format: int4, block_size: true}}]",
            "rules.0.weight.block_size",
        ),
        (
            "rules: [{match: '*', weight: {format: int4, block_size: 64.0}}]",
            "rules.0.weight.block_size",
        ),
        (
            "rules: [{match: '*', weight: {format: int4, symmetric: 0}}]",
            "rules.0.weight.symmetric",
        ),
        # rules that could never match
        ("rules: []", "rules"),
        ("rules: [{match: [], weight: fp8}]", "rules.0.match"),
        # values that do not exist, or do not go together
        ("rules: [{match: '*', weight: fp7}]", "'fp7' is unknown; known are"),
        ("rules: [{match: '*', weight: fp8, algorithm: rtn}]", "rules.0.algorithm"),
        ("rules: [{match: '*', weight: fp8, smooth: magic}]", "rules.0.smooth.method"),
        ("rules: [{match: '*', weight: fp8, rounding: up}]", "rules.0.rounding.method"),
        ("rules: [{match: '*', weight: fp8, scales: best}]", "rules.0.scales"),
        ("rules: [{match: '*', weight: fp8, rotate: -8}]", "rules.0.rotate"),
        ("rules: [{match: '*', weight: fp8, rotate: true}]", "rules.0.rotate"),
        ("rules: [{match: '*', weight: fp8, low_rank: few}]", "rules.0.low_rank"),
        (
            "rules: [{match: '*', weight: fp8, rounding: {method: gptq, damping: 0}}]",
            "rules.0.rounding.damping",
        ),
        (
            "rules: [{match: '*', weight: fp8, rounding: {method: gptq, dampening: 1}}]",
            "unknown key 'rules.0.rounding.dampening'",
        ),
        (
            "rules: [{match: '*', weight: fp8, smooth: {method: smoothquant, alpha: most}}]",
            "rules.0.smooth.alpha",
        ),
        ("rules: [{match: '*', weight: int4, scales: sweep}]", "rules.0: scale method 'sweep'"),
        ("rules: [{match: '*', weight: mxfp4, scales: four_over_six}]", "belongs to 'nvfp4'"),
        (_RULE + "\nkv_cache: fp4", "kv_cache.format"),
        (_RULE + "\nkv_cache: {format: int8, search: mse}", "kv_cache: search 'mse'"),
        (_RULE + "\nrotation: {residual: true}", "unknown key 'rotation.residual'"),
        (_RULE + "\nrotation: hidden", "rotation"),
        (_RULE + "\nexperts: {tokens: some}", "experts.tokens"),
        (_RULE + "\nexperts: {min_tokens: 0}", "experts.min_tokens"),
        (_RULE + "\nfold: 1", "fold"),
        (_RULE + "\npropagate: both", "propagate"),
        (
            "rules: [{match: '*', weight: fp8, activation: {format: fp8, granularity: token, "
            "calibrator: mse}}]",
            "calibrator 'mse' needs a static scale",
        ),
        (
            "rules: [{match: '*', weight: fp8, activation: {format: fp8, search: mse}}]",
            "no block scales to search",
        ),
        ("rules: [{match: '*', weight: null, rounding: gptq}]", "need a weight format"),
        (
            "rules: [{match: '*', weight: {format: fp8, granularity: row}}]",
            "rules.0.weight.granularity",
        ),
        ("rules: [{match: '*', weight: {format: nvfp4, granularity: tensor}}]", "granularity"),
        ("rules: [{match: '*', weight: {format: mxfp4, block_size: 16}}]", "blocks of 32"),
        ("rules: [{match: '*', weight: {format: int4, block_size: -8}}]", "block_size -8"),
        ("rules: [{match: '*', weight: {format: int8, symmetric: false}}]", "symmetric"),
        (
            "rules: [{match: '*', weight: fp8, activation: {format: fp8, granularity: block2d}}]",
            "block2d",
        ),
        (
            "rules: [{match: '*', weight: fp8, activation: {format: int4, symmetric: false}}]",
            "zero point",
        ),
        ("rules: [{match: '*', weight: null, activation: fp8}]", "need a weight format"),
        # not a recipe at all
        ("rules: [", "not valid YAML"),
        ("rules: \t[]", "not valid YAML"),
        ("", "expected keys such as 'rules'"),
        ("just a sentence", "expected keys such as 'rules'"),
        ("- match: '*'", "expected keys such as 'rules'"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong_in_it(write, text, problem):
    path = write(text)
    with pytest.raises(UserError) as error:
        Recipe.load(path)
    message = str(error.value)
    assert path in message and problem in message
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.yml: cannot be read"):
        Recipe.load(tmp_path / "absent.yml")


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.yaml: cannot be read"):
        Recipe.load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["nvfp5", "NVFP4_", "", "../recipes/fp8"])
def test_an_unknown_name_lists_the_presets(name):
    with pytest.raises(UserError) as error:
        Recipe.load(name)
    assert repr(name) in str(error.value)
    assert all(preset in str(error.value) for preset in presets())


# Overrides


def test_overrides_set_values_of_any_type():
    loaded = Recipe.load(
        "int4",
        [
            "rules.0.weight.block_size=64",
            "rules.0.weight.symmetric=false",
            "rules.0.weight.scale_dtype=float16",
            "rules.0.match=[layers/0/*, layers/1/*]",
            "rules.0.activation={format: fp8, granularity: token}",
            "description=a = b",
            "skip=[]",
        ],
    )
    (rule,) = loaded.rules
    assert rule.weight is not None and rule.activation is not None
    spec = rule.weight.spec()
    assert (spec.block_size, spec.symmetric, spec.scale_dtype) == (64, False, "float16")
    assert rule.match == ("layers/0/*", "layers/1/*")
    assert rule.activation.spec().granularity == "channel"
    assert (loaded.description, loaded.skip) == ("a = b", ())


def test_overrides_reach_the_options_of_algorithms():
    loaded = Recipe.load(
        "nvfp4",
        [
            "rules.0.rounding=gptq",
            "rules.0.rounding.act_order=true",
            "rules.0.rounding.damping=0.1",
            "rules.0.smooth={method: smoothquant, alpha: search}",
            "rules.0.scales=hessian",
            "rules.0.rotate=16",
            "rules.0.activation.search=mse",
            "kv_cache=nvfp4",
            "kv_cache.rotate=true",
            "rotation={hidden: true, seed: 3}",
            "experts={tokens: all}",
            "fold=false",
            "propagate=original",
        ],
    )
    (rule,) = loaded.rules
    assert (rule.rounding.act_order, rule.rounding.damping) == (True, 0.1)
    assert rule.smooth is not None and rule.smooth.alpha == "search"
    assert rule.algorithm == "smoothquant+hadamard16+hessian+gptq"
    assert rule.activation is not None and rule.activation.search == "mse"
    assert loaded.kv_cache is not None and loaded.kv_cache.rotate
    assert loaded.rotation.seed == 3 and loaded.experts.tokens == "all"
    assert not loaded.fold and not loaded.sequential


def test_an_override_may_take_something_away():
    (rule,) = Recipe.load("nvfp4", ["rules.0.activation=null"]).rules
    assert rule == Recipe.load("nvfp4_weight_only").rules[0]
    (rule,) = Recipe.load("int4", ["rules.0.weight="]).rules  # no value is YAML's null
    assert rule.weight is None


def test_an_override_spells_out_a_shorthand():
    (rule,) = Recipe.load("nf4", ["rules.0.weight.block_size=32"]).rules
    assert rule.weight is not None
    assert (rule.weight.format, rule.weight.spec().block_size) == ("nf4", 32)


def test_overrides_apply_in_order_and_the_preset_stays_what_it_was():
    overrides = [f"rules.0.weight.block_size={size}" for size in (16, 32)]
    (rule,) = Recipe.load("int4", overrides).rules
    assert rule.weight is not None and rule.weight.block_size == 32
    (untouched,) = Recipe.load("int4").rules
    assert untouched.weight is not None and untouched.weight.block_size == 128


@pytest.mark.parametrize(
    "override, problem",
    [
        ("rules.0.weight.block_size", "key=value"),
        ("=64", "key=value"),
        ("rules.1.weight=fp8", "no '1' there"),
        ("rules.first.weight=fp8", "no 'first' there"),
        ("rules.-1.weight=fp8", "no '-1' there"),
        ("rules.².weight=fp8", "no '²' there"),
        ("rules.0.activation.format=fp8", "no 'activation' there"),
        ("rule.0.weight=fp8", "no 'rule' there"),
        ("rules.0=fp8", "ends inside a list"),
        ("rules.0.weight.block_size.more=1", "'block_size' holds a value"),
        ("rules.0.weight=[", "not valid YAML"),
        # a path that exists nowhere, or a value that does not fit, is found by the recipe itself
        ("rules.0.weight.blocksize=64", "unknown key 'rules.0.weight.blocksize'"),
        ("bits=4", "unknown key 'bits'"),
        ("rules.0.weight.block_size=wide", "rules.0.weight.block_size"),
        ("rules.0.weight.symmetric=perhaps", "rules.0.weight.symmetric"),
        ("rules.0.weight.format=int5", "'int5' is unknown"),
    ],
)
def test_a_wrong_override_is_quoted_with_what_is_wrong_in_it(override, problem):
    with pytest.raises(UserError) as error:
        Recipe.load("int4", [override])
    assert problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["rules", "skip", "name"])
def test_recipes_do_not_change(field):
    with pytest.raises(ValueError, match="frozen"):
        setattr(Recipe.load("fp8"), field, ())
