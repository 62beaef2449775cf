"""Checkpoints of this library: every bit comes back, on any mesh, and nothing half-written does."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from jaxopt_models.checkpoint import leaf_kinds, native
from jaxopt_models.errors import UserError
from jaxopt_models.formats import FORMATS
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import forward, init
from jaxopt_models.qtensor import InputQuantizer, LowRank, quantize_array
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.sharding import DEFAULT_RULES, make_mesh, shard
from jaxopt_models.tree import replace, select

CONFIG = ModelConfig.from_hf(
    {
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
        "eos_token_id": [1, 2],
    }
)


@pytest.fixture(scope="module")
def plain():
    return init(CONFIG, jax.random.key(0), jnp.bfloat16)


def convert(params, change):
    """The parameters with `change(array)` in place of some matrices, stacked experts among them."""
    chosen = ("layers/0/self_attn/q_proj/weight", "layers/0/mlp/experts/down_proj/weight")
    change = jax.jit(change)
    return replace(params, {path: change(w) for path, w in select(params, chosen).items()})


def assert_identical(found, expected):
    """The same structure with static fields, the same dtypes and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def with_input(q):
    return dataclasses.replace(q, input=InputQuantizer(jnp.float32(1.5), q.spec))


def with_everything(w):
    rows, columns = w.shape[-2:]
    down, up = jnp.ones((*w.shape[:-2], 2, columns), jnp.bfloat16), jnp.ones((*w.shape[:-1], 2))
    q = quantize_array(w, "nvfp4")
    return dataclasses.replace(
        q,
        pre_scale=jnp.linspace(0.5, 2, columns),
        low_rank=LowRank(down, up),
        input=InputQuantizer(None, q.spec),
        rotate=16,
    )


VARIANTS = {
    **{name: lambda w, name=name: quantize_array(w, name) for name in FORMATS},
    "int4 asymmetric": lambda w: quantize_array(w, "int4", block_size=32, symmetric=False),
    "int4 bfloat16 scales": lambda w: quantize_array(w, "int4", scale_dtype="bfloat16"),
    "fp8 block2d": lambda w: quantize_array(w, "fp8", granularity="block2d", block_size=32),
    "static input": lambda w: with_input(quantize_array(w, "fp8")),
    "everything": with_everything,
    "odd size": lambda w: quantize_array(w[..., :13], "mxfp4"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, plain, tmp_path):
    params = convert(plain, VARIANTS[variant])
    native.save(tmp_path / "saved", CONFIG, params)
    model = native.restore(tmp_path / "saved")
    assert model.config == CONFIG and model.tokenizer is None
    assert_identical(model.params, params)


def test_a_checkpoint_from_before_rotations_has_none(plain, tmp_path):
    params = convert(plain, VARIANTS["nvfp4"])
    native.save(tmp_path / "saved", CONFIG, params)
    marker = tmp_path / "saved" / native.MARKER
    metadata = json.loads(marker.read_text())
    text = json.dumps(metadata["params"])
    assert ', "rotate": 0' in text
    metadata["params"] = json.loads(text.replace(', "rotate": 0', ""))
    metadata["tree"]["sha256"] = leaf_kinds.digest(metadata["params"])
    marker.write_text(json.dumps(metadata))
    assert_identical(native.restore(tmp_path / "saved").params, params)


def test_round_trip_of_other_dtypes(tmp_path):
    dtypes = "float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu int8 uint8 int32"
    bits = jnp.arange(256, dtype=jnp.uint8).reshape(8, 32)  # every pattern, those of NaN included
    params = {name: ({"w": jax.device_put(_viewed(bits, name))},) for name in dtypes.split()}
    params |= {"empty": ()}
    native.save(tmp_path / "saved", CONFIG, params)
    assert_identical(native.restore(tmp_path / "saved").params, params)


@pytest.mark.parametrize("variant", ["int4 asymmetric", "fp8 block2d", "everything"])
def test_round_trip_over_the_host(variant, plain, tmp_path):
    params = convert(plain, VARIANTS[variant])
    params |= {"norm": jax.device_get(params["norm"])}  # a tree may be on both
    native.save(tmp_path / "device", CONFIG, params)
    on_host = native.restore(tmp_path / "device", host=True).params
    assert {type(leaf) for leaf in jax.tree.leaves(on_host)} == {np.ndarray}
    assert_identical(on_host, params)
    native.save(tmp_path / "host", CONFIG, on_host)
    found = native.restore(tmp_path / "host").params
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    assert_identical(found, params)


def _viewed(bits, name):
    return np.asarray(bits).view(jnp.dtype(name))


MESHES = {"2x4": {"data": 2, "model": 4}, "1x8": {"data": 1, "model": 8}, "2": {"model": 2}}


@pytest.mark.parametrize("variant", ["int4 asymmetric", "fp8 block2d", "everything"])
def test_restores_onto_another_mesh(variant, plain, tmp_path):
    params = convert(plain, VARIANTS[variant])
    native.save(tmp_path / "saved", CONFIG, shard(params, make_mesh(MESHES["2x4"])))
    for mesh in map(make_mesh, MESHES.values()):
        found = native.restore(tmp_path / "saved", mesh=mesh).params
        assert_identical(found, params)
        assert all(a.sharding.mesh == mesh for a in jax.tree.leaves(found))
        assert found["embed_tokens"]["weight"].sharding.spec == P("model", None)
    assert_identical(native.restore(tmp_path / "saved").params, params)


def test_restores_by_given_rules(plain, tmp_path):
    native.save(tmp_path / "saved", CONFIG, plain)
    mesh = make_mesh(MESHES["2x4"])
    rules = DEFAULT_RULES | {"embed_tokens/weight": P(None, "data")}
    found = native.restore(tmp_path / "saved", mesh=mesh, rules=rules).params
    assert found["embed_tokens"]["weight"].sharding.spec == P(None, "data")


def test_restored_model_computes_the_same(plain, tmp_path):
    params = convert(plain, VARIANTS["nvfp4"])
    native.save(tmp_path / "saved", CONFIG, params)
    model = native.restore(tmp_path / "saved")
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    expected = forward(CONFIG, params, tokens)
    np.testing.assert_array_equal(forward(model.config, model.params, tokens), expected)


def word_tokenizer():
    words = {word: i for i, word in enumerate("<unk> to be or not".split())}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )


def test_tokenizer_and_records_come_back(plain, tmp_path, capfd):
    recipe = Recipe.load("nvfp4")
    target = tmp_path / "deep" / "saved"
    report = {"perplexity": jnp.float32(2.5), "rows": [{"bits": np.int64(4)}]}
    source = {"source": Path("some/model")}
    native.save(
        target, CONFIG, plain, word_tokenizer(), recipe=recipe, report=report, provenance=source
    )
    model = native.restore(target)
    assert model.tokenizer.get_vocab() == word_tokenizer().get_vocab()
    assert model.source == str(target)
    metadata = native.read_metadata(target)
    assert metadata["recipe"] == recipe.model_dump(mode="json")
    assert metadata["report"] == {"perplexity": 2.5, "rows": [{"bits": 4}]}
    provenance = metadata["provenance"]
    assert provenance["source"] == "some/model" and provenance["versions"]["jax"] == jax.__version__
    assert provenance["device"] == "cpu" and provenance["created"].startswith("20")
    assert metadata["tree"]["leaves"] == metadata["tree"]["arrays"] == len(jax.tree.leaves(plain))
    stored = native.ocp.metadata(str(target / "params")).custom_metadata
    assert stored == {key: value for key, value in metadata.items() if key != "files"}
    assert capfd.readouterr().out == ""


def test_an_existing_target_is_not_touched(plain, tmp_path):
    target = tmp_path / "saved"
    target.mkdir()
    (target / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="saved: exists and is not a checkpoint"):
            native.save(target, CONFIG, plain, overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "thesis.txt"]


def test_overwriting_must_be_asked_for(plain, tmp_path):
    native.save(tmp_path / "saved", CONFIG, {"w": jnp.zeros(3)})
    with pytest.raises(UserError, match="already holds a checkpoint; .* allow overwriting"):
        native.save(tmp_path / "saved", CONFIG, plain)
    native.save(tmp_path / "saved", CONFIG, plain, overwrite=True)
    assert_identical(native.restore(tmp_path / "saved").params, plain)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


class BrokenTokenizer:
    def save_pretrained(self, directory):
        raise OSError("disk full")


def test_an_error_while_saving_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        native.save(tmp_path / "saved", CONFIG, {"w": jnp.zeros(3)}, BrokenTokenizer())
    with pytest.raises(UserError, match="recipe holds a object, which has no JSON form"):
        native.save(tmp_path / "saved", CONFIG, {"w": jnp.zeros(3)}, recipe=[object()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": ({"w": [1.0]},)}, "the parameters hold a list at 'a/0/w'"),
        ({"a": np.zeros(3)}, "hold float64 at 'a', which JAX would narrow"),
        ({"a": np.array(["text"])}, "hold a ndarray at 'a'"),
        ({1: jnp.zeros(3)}, "hold a dict at ''.*text keys"),
    ],
)
def test_leaves_of_other_kinds_are_named(params, message, tmp_path):
    with pytest.raises(UserError, match=message):
        native.save(tmp_path / "saved", CONFIG, params)


def test_a_kill_at_any_moment_leaves_nothing_that_loads(tmp_path):
    moments = ["before the arrays", "0.02", "0.1", "0.3", "after the arrays", "in the tokenizer"]
    moments += ["in the marker", "before the rename", "between the renames"]
    overwritten = "before the old one is gone"
    script = Path(__file__).parent / "killed_save.py"
    command = [sys.executable, str(script), str(tmp_path), *moments, overwritten]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    for moment in moments:
        target = tmp_path / moment / "model"
        if target.exists():  # a timer that came late
            assert moment[0].isdecimal()
            assert native.restore(target).params["w"].shape == (512, 1024)
            continue
        with pytest.raises(UserError, match="no such directory"):
            native.restore(target)
        assert moment[0].isdecimal() or any(target.parent.iterdir())
    assert native.restore(tmp_path / overwritten / "model").params["w"].shape == (512, 1024)
    for moment in [*moments, overwritten]:
        target = tmp_path / moment / "model"
        native.save(target, CONFIG, {"w": jnp.ones(3)}, overwrite=True)
        assert [path.name for path in target.parent.iterdir()] == ["model"]
        assert native.restore(target).params["w"].shape == (3,)


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    target = tmp_path_factory.mktemp("native") / "saved"
    native.save(target, CONFIG, convert(plain, VARIANTS["nvfp4"]), word_tokenizer())
    return target


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_every_damaged_file_is_named(saved, tmp_path):
    files = [path for path in saved.rglob("*") if path.is_file() and path.name != native.MARKER]
    assert any("params" in path.parts for path in files)
    assert any("tokenizer" in path.parts for path in files)
    for i, file in enumerate(files):
        damaged = shutil.copytree(saved, tmp_path / str(i)) / file.relative_to(saved)
        content = bytearray(file.read_bytes())
        if content:
            damaged.write_bytes(content[: len(content) // 2])
            with pytest.raises(UserError, match=f"{file.name}: has .* bytes instead of"):
                native.restore(tmp_path / str(i))
            content[len(content) // 2] ^= 1
            damaged.write_bytes(content)
            with pytest.raises(UserError, match=f"{file.name}: is not what was written"):
                native.restore(tmp_path / str(i))
        damaged.unlink()
        with pytest.raises(UserError, match=f"{file.name}: is missing; the checkpoint is damaged"):
            native.restore(tmp_path / str(i))


def test_what_orbax_cannot_read_is_an_error_with_the_directory(copy, monkeypatch):
    def load(*_):
        raise Exception("DATA_LOSS: no such chunk\nand much more")

    monkeypatch.setattr(native.ocp, "load", load)
    with pytest.raises(UserError, match=r"copy: the arrays cannot be read \(DATA_LOSS: .*chunk\);"):
        native.restore(copy)


def edit(directory, change):
    """Changes the description of a checkpoint, with a digest that fits."""
    path = directory / native.MARKER
    metadata = json.loads(path.read_text())
    change(metadata)
    metadata["tree"]["sha256"] = leaf_kinds.digest(metadata["params"])
    path.write_text(json.dumps(metadata))


def first_weight(metadata):
    return metadata["params"]["layers"][0]["self_attn"]["q_proj"]["weight"]


EDITS = {
    "newer format": (
        lambda m: m.update(format_version=2, library_version="9.9"),
        r"written in format 2 by jaxopt-models 9.9, .* up to 1; upgrade jaxopt-models",
    ),
    "other program": (lambda m: m.update(format="x"), "not the description of a checkpoint"),
    "leaf kind": (
        lambda m: first_weight(m).update(kind="Sparse"),
        "'layers/0/self_attn/q_proj/weight' has leaf kind 'Sparse', which this version does not",
    ),
    "static field": (
        lambda m: first_weight(m)["static"].update(sparsity=2),
        "q_proj/weight' has a QTensor with the fields .*sparsity",
    ),
    "number format": (
        lambda m: first_weight(m)["static"]["spec"].update(format="int3"),
        "q_proj/weight' has number format 'int3'",
    ),
    "option": (
        lambda m: first_weight(m)["static"]["spec"].update(rounding="down"),
        "q_proj/weight' has a number format with the fields .*rounding",
    ),
    "config": (lambda m: m["config"].update(depth=3), "does not fit this version of the library"),
    "no config": (lambda m: m.pop("config"), "jaxopt_models.json: damaged at 'config'"),
    "one array less": (lambda m: m["params"].pop("norm"), "the arrays cannot be read"),
}


@pytest.mark.parametrize("case", EDITS)
def test_descriptions_that_do_not_fit(case, copy):
    change, message = EDITS[case]
    edit(copy, change)
    with pytest.raises(UserError, match=message):
        native.restore(copy)


def test_a_description_edited_by_hand_is_damaged(copy):
    path = copy / native.MARKER
    path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"', 1))
    with pytest.raises(UserError, match="jaxopt_models.json: damaged at 'params'"):
        native.restore(copy)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="jaxopt_models.json: not valid JSON"):
        native.restore(copy)


def test_directories_that_are_no_checkpoints(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        native.restore(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a checkpoint of this library, since it has no jax"):
        native.restore(tmp_path)


def test_processes_of_a_distributed_run_save_together(tmp_path):
    code = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from jaxopt_models.checkpoint import native
from jaxopt_models.distributed import initialize_distributed
from jaxopt_models.sharding import make_mesh, shard
process, port, target = int(sys.argv[1]), *sys.argv[2:]
initialize_distributed(f"localhost:{port}", 2, process)
from killed_save import CONFIG
params = {"lm_head": {"weight": np.arange(64, dtype=np.float32).reshape(8, 8)}}
for mesh in make_mesh({"model": 4}), make_mesh({"data": 2, "model": 2}):
    native.save(target, CONFIG, shard(params, mesh), overwrite=True)
    array = native.restore(target, mesh=make_mesh({"model": 4})).params["lm_head"]["weight"]
    assert len(array.addressable_shards) == 2
    for part in array.addressable_shards:
        np.testing.assert_array_equal(part.data, params["lm_head"]["weight"][part.index])
"""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i), str(port), str(tmp_path / "saved")],
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    errors = [child.communicate(timeout=240)[1].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    expected = np.arange(64, dtype=np.float32).reshape(8, 8)
    found = native.restore(tmp_path / "saved").params["lm_head"]["weight"]
    np.testing.assert_array_equal(found, expected)
