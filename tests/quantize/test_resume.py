"""Finished layers on disk: a run that was killed ends with the bits of one that was not."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init
from jaxopt_models.quantize.ptq import Report, quantize
from jaxopt_models.quantize.recipe import Recipe
from jaxopt_models.quantize.resume import LayerStore, signature

HF = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CONFIG = ModelConfig.from_hf(HF)
PARAMS = init(CONFIG, jax.random.key(0))
TEXT = [np.random.default_rng(seed).integers(0, 64, (4, 12)).astype(np.int32) for seed in (1, 2)]
RECIPES: dict[str, dict[str, Any]] = {
    # Calibrated behind quantized layers, with leaves of every kind.
    "gptq": {
        "rules": [
            {
                "match": "*",
                "weight": "nvfp4",
                "activation": "nvfp4",
                "rotate": 16,
                "low_rank": 2,
                "rounding": "gptq",
            }
        ],
        "kv_cache": "fp8",
    },
    # Calibrated behind the original layers.
    "awq": {
        "rules": [{"match": "*", "weight": {"format": "int4", "block_size": 16}, "smooth": "awq"}],
        "fold": False,
    },
}
# Kills itself when the second layer has been stored.
_KILLED = """
import json, os, signal, sys
import jax, numpy as np

for name, value in {
    "jax_num_cpu_devices": 8,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}.items():
    jax.config.update(name, value)

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import init
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe

hf, recipe, text, store = json.loads(sys.argv[1])


def killing(layers, description):
    for layer in layers:
        if layer == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield layer


config = ModelConfig.from_hf(hf)
model = Model(config, init(config, jax.random.key(0)))
batches = [np.asarray(batch, np.int32) for batch in text]
quantize(model, Recipe.model_validate(recipe), batches, killing, resume=store)
"""


def run(name: str, store: Path | None, params: Any = PARAMS, text: Any = TEXT, **fields: Any):
    recipe = Recipe.model_validate(RECIPES[name] | fields)
    return quantize(Model(CONFIG, params), recipe, text, resume=store)


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Any, Report]]:
    """Runs that nothing interrupted and that stored nothing."""
    return {name: run(name, None) for name in RECIPES}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, whole) -> dict[str, Path]:
    """Stores of processes that were killed after two of three layers."""
    stores = {name: tmp_path_factory.mktemp("stores") / name for name in RECIPES}
    running = [
        subprocess.Popen([sys.executable, "-c", _KILLED, json.dumps(arguments)], env=os.environ)
        for arguments in (
            [HF, RECIPES[name], [batch.tolist() for batch in TEXT], str(store)]
            for name, store in stores.items()
        )
    ]
    assert [process.wait() for process in running] == [-signal.SIGKILL] * len(stores)
    return stores


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """The store of a whole run."""
    store = tmp_path_factory.mktemp("whole") / "store"
    run("awq", store)
    return store


@pytest.fixture
def copied(stored, tmp_path) -> Path:
    """The same, to be spoiled."""
    for file in stored.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def assert_same(a: tuple[Any, Report], b: tuple[Any, Report]) -> None:
    """The same parameters bit for bit, and the same report but for seconds."""
    assert jax.tree.structure(a[0]) == jax.tree.structure(b[0])
    for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert_same_rows(a[1], b[1])


def assert_same_rows(a: Report, b: Report) -> None:
    for ours, theirs in zip(a.tensors, b.tensors, strict=True):
        assert {**vars(ours), "seconds": 0} == {**vars(theirs), "seconds": 0}
    same = ("recipe", "bits_per_weight", "tokens", "seeds")
    assert all(getattr(a, field) == getattr(b, field) for field in same)


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_goes_on_to_the_same_bits(name, killed, whole):
    kept = sorted(path.name for path in killed[name].iterdir() if "layer" in path.name)
    assert kept == [f"layer_000{i}.{kind}" for i in (0, 1) for kind in ("json", "npz")]
    before = (killed[name] / "layer_0000.npz").stat().st_mtime_ns
    assert_same(run(name, killed[name]), whole[name])
    assert (killed[name] / "layer_0000.npz").stat().st_mtime_ns == before
    # Once more, from nothing but the store.
    assert_same(run(name, killed[name]), whole[name])


def test_what_was_stored_is_not_computed_again(stored, whole, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("quantized a layer that was stored")

    # The package has a function of the module's name.
    monkeypatch.setattr(import_module("jaxopt_models.quantize.ptq"), "_quantize_layer", refuse)
    assert_same(run("awq", stored), whole["awq"])


def test_a_layer_counts_when_its_last_file_is_written(copied, whole):
    (copied / "layer_0002.json").unlink()
    (copied / "layer_0001.json").unlink()
    (copied / "layer_0002.tmp-99.npz").write_bytes(b"half")
    assert_same(run("awq", copied), whole["awq"])


def test_host_arrays_come_back_as_host_arrays(stored, whole):
    on_host = jax.tree.map(np.asarray, PARAMS)
    qparams, report = run("awq", stored, on_host)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(qparams["layers"]))
    assert_same((qparams, report), whole["awq"])


# Refusals


_other_text = [TEXT[0], TEXT[1] * 0 + 3]
_embedding = {"embed_tokens/weight": PARAMS["embed_tokens"]["weight"] * 2}


@pytest.mark.parametrize(
    "arguments",
    [
        {"fold": True},
        {"kv_cache": "int8"},
        {"text": _other_text},
        {"text": TEXT[:1]},
        {"text": TEXT[::-1]},
        {"params": tree.replace(PARAMS, _embedding)},
    ],
    ids=["recipe", "cache", "text", "less text", "order of text", "embedding"],
)
def test_the_store_of_another_run_is_refused(stored, arguments):
    with pytest.raises(UserError, match="belongs to another model, recipe or calibration") as error:
        run("awq", stored, **arguments)
    assert str(stored) in str(error.value) and "\n" not in str(error.value)


def test_another_architecture_is_another_run():
    recipe, table = Recipe.model_validate(RECIPES["awq"]), PARAMS["embed_tokens"]
    other = ModelConfig.from_hf(HF | {"rms_norm_eps": 1e-3})
    assert signature(CONFIG, recipe, TEXT, table) != signature(other, recipe, TEXT, table)
    assert signature(CONFIG, recipe, TEXT, table) == signature(CONFIG, recipe, TEXT, table)


def test_a_layer_of_other_weights_is_refused(stored):
    path = "layers/1/mlp/down_proj/weight"
    weight = PARAMS["layers"][1]["mlp"]["down_proj"]["weight"]
    changed = tree.replace(PARAMS, {path: weight.at[0, 0].add(1e-3)})
    with pytest.raises(UserError, match="layer_0001.json: was made of other weights; remove"):
        run("awq", stored, changed)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGES = {
    "a bit of an array": lambda store: flip(store / "layer_0001.npz"),
    "half of the arrays": lambda store: (store / "layer_0001.npz").write_bytes(
        (store / "layer_0001.npz").read_bytes()[:900]
    ),
    "no arrays": lambda store: (store / "layer_0001.npz").unlink(),
    "empty": lambda store: (store / "layer_0001.npz").write_bytes(b""),
    "arrays of another layer": lambda store: (store / "layer_0001.npz").write_bytes(
        (store / "layer_0000.npz").read_bytes()
    ),
    "half of the structure": lambda store: (store / "layer_0001.json").write_text('{"layer": '),
    "another structure": lambda store: (store / "layer_0001.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_layer_is_refused(copied, damage):
    DAMAGES[damage](copied)
    with pytest.raises(UserError, match=r"layer_0001.json: damaged \(.*\); remove ") as error:
        run("awq", copied)
    assert "\n" not in str(error.value)


def test_a_damaged_marker_is_refused(copied):
    (copied / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json: damaged; remove"):
        run("awq", copied)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="holds other files; choose an empty directory"):
        LayerStore(tmp_path, "run")
    with pytest.raises(UserError, match="thesis.tex: cannot be used"):
        LayerStore(tmp_path / "thesis.tex", "run")


def test_arrays_of_every_dtype_come_back(tmp_path):
    layer = {
        name: jnp.asarray([[0.5, 2.0]], name)
        for name in ("float32", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "int8", "uint8")
    }
    LayerStore(tmp_path, "run").put(3, PARAMS["layers"][0], layer, [])
    found = LayerStore(tmp_path, "run").get(3, PARAMS["layers"][0])
    assert found is not None and found[1] == []
    assert jax.tree.map(lambda leaf: leaf.dtype, found[0]) == jax.tree.map(
        lambda leaf: leaf.dtype, layer
    )
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), found[0], layer
        )
    )
    assert LayerStore(tmp_path, "run").get(4, PARAMS["layers"][0]) is None
