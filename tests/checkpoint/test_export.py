"""Exported directories: what transformers was seen to open, and what the leaves compute with."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxopt_models.checkpoint import huggingface
from jaxopt_models.checkpoint.export import export_hf
from jaxopt_models.checkpoint.load import load
from jaxopt_models.checkpoint.safetensors import DTYPES, open_index
from jaxopt_models.errors import UserError
from jaxopt_models.hadamard import hadamard
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward, init
from jaxopt_models.ops import expert_linear, linear
from jaxopt_models.qtensor import DenseTensor, InputQuantizer, LowRank, quantize_array
from jaxopt_models.sharding import make_mesh, shard
from jaxopt_models.tree import WeightLeaf, replace, select

_GOLDEN = Path(__file__).parents[1] / "golden" / "hf" / "export.json"

HF = {
    "model_type": "qwen3_moe",
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "mlp_only_layers": [1],
    "bos_token_id": 3,
    "eos_token_id": [1, 2],
}
CONFIG = ModelConfig.from_hf(HF)
DENSE, EXPERTS = "layers/0/self_attn/q_proj/weight", "layers/0/mlp/experts/down_proj/weight"


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, init(CONFIG, jax.random.key(0), jnp.bfloat16))


@pytest.fixture
def golden_model(golden, write_checkpoint):
    """A golden model as our own reader gives it."""

    def read(name):
        directory = write_checkpoint(*golden(name))
        config = huggingface.read_config(directory)
        return Model(config, huggingface.read_params(directory, config))

    return read


def read_back(directory):
    config = huggingface.read_config(directory)
    return config, huggingface.read_params(directory, config)


def test_is_what_transformers_opened(golden_name, golden, golden_model, tmp_path):
    """Names, shapes, dtypes and config are those that were seen to give the same logits."""
    expected = json.loads(_GOLDEN.read_text())["models"][golden_name]
    assert expected["float32"] < 1e-4
    export_hf(tmp_path / "out", golden_model(golden_name))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected["config"]
    index = open_index(tmp_path / "out")
    found = {name: (index.dtype(name), list(index.shape(name))) for name in index.names()}
    assert found == {name: (DTYPES[d], shape) for name, (d, shape) in expected["tensors"].items()}
    for name, array in golden(golden_name)[1].items():  # bfloat16 holds these values exactly
        np.testing.assert_array_equal(index.read(name).astype(np.float32), array, err_msg=name)


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_reading_it_back_gives_the_logits_of_transformers(name, golden_model, golden_run, tmp_path):
    export_hf(tmp_path / "out", golden_model(name), max_shard_bytes=20_000)
    config, params = read_back(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    tokens, logits = golden_run(name)
    np.testing.assert_allclose(forward(config, params, jnp.asarray(tokens)), logits, atol=1e-4)


def quantized(weight, format, rotate=0, **options):
    """A leaf with a correction, a rotation and input scales, on top of the format."""
    keys = jax.random.split(jax.random.key(1), 3)
    *lead, rows, columns = weight.shape
    down = jax.random.normal(keys[0], (*lead, 2, columns)) * 0.1
    up = jax.random.normal(keys[1], (*lead, rows, 2)) * 0.1
    return dataclasses.replace(
        jax.jit(partial(quantize_array, format=format, **options))(weight),
        pre_scale=jax.random.uniform(keys[2], (columns,), minval=0.5, maxval=2.0),
        low_rank=LowRank(down, up.astype(jnp.bfloat16)),
        rotate=rotate,
    )


FORMATS = {
    "nvfp4": {},
    "int4": {"block_size": 32, "symmetric": False},
    "fp8": {"granularity": "block2d", "block_size": 32},
}


@pytest.mark.parametrize(("format", "rotate"), [*((name, 0) for name in FORMATS), ("fp8", 16)])
def test_quantized_leaves_become_what_they_compute(format, rotate, model, tmp_path):
    weights = select(model.params, (DENSE, EXPERTS))
    leaves = {path: quantized(w, format, rotate, **FORMATS[format]) for path, w in weights.items()}
    export_hf(tmp_path / "out", model, replace(model.params, leaves))
    exported = select(read_back(tmp_path / "out")[1], (DENSE, EXPERTS))

    def rows(path):
        shape = (8, leaves[path].shape[-1])
        return jax.random.normal(jax.random.key(2), shape)

    x, sizes = rows(EXPERTS), jnp.asarray([3, 0, 4, 1], jnp.int32)
    for ours, theirs in (
        (linear(rows(DENSE), leaves[DENSE]), linear(rows(DENSE), exported[DENSE])),
        (
            expert_linear(x, leaves[EXPERTS], sizes),
            expert_linear(x, exported[EXPERTS], sizes),
        ),
    ):
        # one rounding to bfloat16 of each weight
        error = jnp.linalg.norm(theirs - ours) / jnp.linalg.norm(ours)
        assert error < 2**-8


def test_an_adapter_beside_floats_is_folded_in(model, tmp_path):
    weight = model.params["layers"][0]["self_attn"]["q_proj"]["weight"]
    adapter = quantized(weight, "nvfp4").low_rank
    adapted = DenseTensor(weight, low_rank=adapter)
    export_hf(tmp_path / "out", model, replace(model.params, {DENSE: adapted}))
    found = read_back(tmp_path / "out")[1]["layers"][0]["self_attn"]["q_proj"]["weight"]
    expected = weight.astype(jnp.float32) + adapter.product()
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def test_a_plain_quantized_leaf_is_its_dequantization(model, tmp_path):
    q = quantize_array(model.params["layers"][0]["self_attn"]["q_proj"]["weight"], "nvfp4")
    export_hf(tmp_path / "out", model, replace(model.params, {DENSE: q}))
    found = read_back(tmp_path / "out")[1]["layers"][0]["self_attn"]["q_proj"]["weight"]
    np.testing.assert_array_equal(found, q.dequantize(jnp.bfloat16))


def test_a_rotated_leaf_becomes_the_weight_it_was_made_of(model, tmp_path):
    weight = model.params["layers"][0]["self_attn"]["q_proj"]["weight"].astype(jnp.float32)
    scale = jnp.linspace(0.5, 2, weight.shape[1])
    q = quantize_array(hadamard(weight / scale[None], 32), "int8", granularity="channel")
    leaf = dataclasses.replace(q, pre_scale=scale, rotate=32)
    export_hf(tmp_path / "out", model, replace(model.params, {DENSE: leaf}))
    found = read_back(tmp_path / "out")[1]["layers"][0]["self_attn"]["q_proj"]["weight"]
    error = jnp.linalg.norm(found.astype(jnp.float32) - weight) / jnp.linalg.norm(weight)
    assert error < 0.02  # 8 bits


def test_parameters_may_be_spread_over_devices(model, tmp_path):
    spread = shard(model.params, make_mesh({"data": 2, "model": 4}))
    for name, params in (("one", model.params), ("eight", spread)):
        export_hf(tmp_path / name, model, params)
    one, eight = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "eight"))
    assert one == eight


def test_quantizers_of_inputs_are_left_out(model, tmp_path):
    q = quantize_array(model.params["layers"][0]["self_attn"]["q_proj"]["weight"], "fp8")
    with_input = dataclasses.replace(q, input=InputQuantizer(jnp.float32(1.0), q.spec))
    for name, leaf in (("without", q), ("with", with_input)):
        export_hf(tmp_path / name, model, replace(model.params, {DENSE: leaf}))
    without, with_ = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("without", "with")
    )
    assert without == with_


def test_tokenizer_and_generation_settings(model, tmp_path):
    words = {"<unk>": 0, "<s>": 1, "to": 2, "be": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
    )
    export_hf(tmp_path / "out", dataclasses.replace(model, tokenizer=tokenizer))
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.get_vocab() == words and found.bos_token == "<s>"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 3, "eos_token_id": [1, 2]}
    loaded = load(tmp_path / "out")
    assert loaded.config == CONFIG and loaded.tokenizer.get_vocab() == words
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_the_tree_decides_whether_the_head_is_tied(golden_model, tmp_path):
    tied = golden_model("smollm2")
    head = {"weight": tied.params["embed_tokens"]["weight"] * 2}
    export_hf(tmp_path / "out", tied, tied.params | {"lm_head": head})
    config, params = read_back(tmp_path / "out")
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"]["weight"], head["weight"].astype(jnp.bfloat16))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Masked(WeightLeaf):
    weight: jax.Array

    @property
    def shape(self):
        return self.weight.shape


def test_what_cannot_be_exported_is_named(model, tmp_path):
    weight = model.params["layers"][0]["self_attn"]["q_proj"]["weight"]
    q = quantize_array(weight, "int8")
    overflowing = dataclasses.replace(q, scale=q.scale * jnp.inf)
    extra = {"lm_head": model.params["lm_head"] | {"bias": jnp.zeros(24)}}
    cases = [
        (replace(model.params, {DENSE: weight.at[0, 0].set(jnp.nan)}), "q_proj/weight' holds NaN"),
        (replace(model.params, {DENSE: overflowing}), "q_proj/weight' holds NaN or infinity"),
        (replace(model.params, {DENSE: Masked(weight)}), "is a Masked, which layout 'bf16' cannot"),
        (
            replace(model.params, {DENSE: weight[:32]}),
            r"q_proj/weight': the parameters have shape \[32, 64\], .* describes shape \[64, 64\]",
        ),
        (model.params | extra, "'lm_head/bias': the parameters have shape .* describes nothing"),
        (model.params | {"norm": {}}, "'norm/weight': the parameters have nothing"),
    ]
    for params, message in cases:
        with pytest.raises(UserError, match=message):
            export_hf(tmp_path / "out", model, params)
        assert not list(tmp_path.iterdir())


def test_a_config_that_says_something_else_is_refused(model, tmp_path):
    odd = dataclasses.replace(model, config=dataclasses.replace(CONFIG, attention_softcap=3.0))
    with pytest.raises(UserError, match="qwen3_moe model cannot say attention_softcap = 3.0"):
        export_hf(tmp_path / "out", odd)


def test_layouts_and_targets(model, tmp_path):
    with pytest.raises(UserError, match="layout 'gguf' is not supported; supported: bf16"):
        export_hf(tmp_path / "out", model, layout="gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: already exists; choose another directory"):
        export_hf(tmp_path / "out", model)


class BrokenTokenizer:
    def save_pretrained(self, directory):
        raise OSError("disk full")


def test_an_error_while_writing_leaves_nothing(model, tmp_path):
    with pytest.raises(OSError, match="disk full"):
        export_hf(tmp_path / "out", dataclasses.replace(model, tokenizer=BrokenTokenizer()))
    assert not list(tmp_path.iterdir())
