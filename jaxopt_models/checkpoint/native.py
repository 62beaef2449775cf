"""Checkpoints of this library: leaf kinds, dtypes and bits come back as they were, on any mesh.

jaxopt_models.json  written last: format version, model config, description of the parameter
                    tree (`leaf_kinds`), size and checksum of every other file, recipe, report,
                        provenance
params/             the arrays, an Orbax checkpoint with the same text as its custom metadata
tokenizer/          the files of a transformers tokenizer, if there is one
"""

import dataclasses
import importlib.metadata
import json
import platform
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp
from pydantic import BaseModel

from jaxopt_models.checkpoint import leaf_kinds
from jaxopt_models.checkpoint import tokenizer as tokenizers
from jaxopt_models.checkpoint.atomic import new_directory
from jaxopt_models.errors import UserError
from jaxopt_models.inference import refuse_prepared
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.sharding import DEFAULT_RULES, Rules, shardings
from jaxopt_models.tree import leaves_with_paths

MARKER = "jaxopt_models.json"
FORMAT_VERSION = 1
_FORMAT = "jaxopt-models checkpoint"
_PACKAGES = ("jaxopt-models", "jax", "flax", "orbax-checkpoint", "transformers")


def save(
    directory: str | Path,
    config: ModelConfig,
    params: Any,
    tokenizer: Any = None,
    *,
    recipe: Any = None,
    report: Any = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint, which appears under its name only when it is complete.

    In a distributed run every process must call it, with one file system among them.

    Args:
      params: parameter tree of dicts, tuples, arrays (of JAX or NumPy) and leaf dataclasses.
      tokenizer: of transformers, or None.
      recipe: how the parameters were made; JSON values, dataclasses or pydantic models.
      report: what was measured; likewise.
      provenance: what else to remember, as {"source": "Qwen/Qwen3-0.6B"}; versions, date and device
        are recorded anyway.
      overwrite: whether to replace a checkpoint of this library that is there already.

    Raises:
      UserError: if something is there already, for leaves of unknown kind, parameters of
        `inference.prepare`, and a recipe or report that has no JSON form.
    """
    target = Path(directory).expanduser().resolve()
    _check_target(target, overwrite)
    refuse_prepared(params, "saved")
    metadata = _metadata(config, params, recipe, report, provenance)
    with new_directory(target, overwrite=overwrite) as scratch:
        ocp.save(str(scratch / "params"), params, custom_metadata=metadata)
        if jax.process_index() == 0:
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch / "tokenizer")
            files = {"files": _fingerprints(scratch)}
            (scratch / MARKER).write_text(json.dumps(metadata | files, indent=1) + "\n")


def restore(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    host: bool = False,
) -> Model:
    """Reads a checkpoint that `save` wrote.

    Args:
      mesh: devices to spread the parameters over, not necessarily as they were when they were
        saved; None puts them onto one device.
      rules: how; see `sharding`.
      host: leaves them in host memory, as NumPy arrays; `mesh` is not looked at then.

    Raises:
      UserError: for a directory that is missing, not such a checkpoint, damaged, or written by a
        newer version, naming the file or the tensor.
    """
    directory = Path(directory).expanduser().resolve()
    metadata = read_metadata(directory)
    try:
        config = ModelConfig.from_json(metadata["config"])
        abstract = leaf_kinds.build(metadata["params"])
        if leaf_kinds.digest(metadata["params"]) != metadata["tree"]["sha256"]:
            raise KeyError("params")
        _check_files(directory, metadata["files"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / MARKER}: damaged at {error}; save again") from error
    abstract = _on_host(abstract) if host else _on_devices(abstract, mesh, rules)
    params = _load(directory, abstract)
    folder = directory / "tokenizer"
    tokenizer = tokenizers.from_directory(folder) if folder.is_dir() else None
    return Model(config, params, tokenizer, source=str(directory))


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint says about itself, "recipe", "report" and "provenance" among it.

    Raises:
      UserError: if it is missing, not a checkpoint of this library, or of a newer version of it.
    """
    directory = Path(directory).expanduser()
    marker = directory / MARKER
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the path that was saved to")
    if not marker.is_file():
        raise UserError(
            f"{directory}: not a checkpoint of this library, since it has no {MARKER}; "
            "use `load` for other models"
        )
    try:
        metadata = json.loads(marker.read_bytes())
    except ValueError as error:
        raise UserError(f"{marker}: not valid JSON ({error}); copy or save it again") from error
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise UserError(f"{marker}: not the description of a checkpoint of this library")
    version = metadata.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{marker}: written in format {version} by jaxopt-models "
            f"{metadata.get('library_version')}, and this version reads formats up to "
            f"{FORMAT_VERSION}; upgrade jaxopt-models"
        )
    return metadata


def _metadata(
    config: ModelConfig, params: Any, recipe: Any, report: Any, provenance: Any
) -> dict[str, Any]:
    description = leaf_kinds.describe(params)
    versions = {name: package_version(name) for name in _PACKAGES}
    recorded = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
    }
    return {
        "format": _FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": versions["jaxopt-models"],
        "config": _as_json("config", config.to_json()),
        "tree": {
            "leaves": len(leaves_with_paths(params)),
            "arrays": len(jax.tree.leaves(params)),
            "sha256": leaf_kinds.digest(description),
        },
        "recipe": _as_json("recipe", recipe),
        "report": _as_json("report", report),
        "provenance": recorded | dict(_as_json("provenance", provenance or {})),
        "params": description,
    }


def package_version(package: str) -> str | None:
    """Installed version of a package; None for one that runs from a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_json(name: str, value: Any) -> Any:
    """The value in JSON's own types, as it will be read back."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, (np.generic, np.ndarray, jax.Array)):
            return item.tolist()
        if isinstance(item, Path):
            return str(item)
        raise UserError(
            f"{name} holds a {type(item).__name__}, which has no JSON form; "
            "leave it out, or turn it into numbers and text"
        )

    return json.loads(json.dumps(value, default=plain))


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not (target / MARKER).is_file():
        raise UserError(
            f"{target}: exists and is not a checkpoint of this library; choose another directory"
        )
    if not overwrite:
        raise UserError(
            f"{target}: already holds a checkpoint; choose another directory, or allow overwriting"
        )


def _fingerprints(directory: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below a directory, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _fingerprint(path) for path in files}


def _fingerprint(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return [size, checksum]


def _check_files(directory: Path, fingerprints: Mapping[str, list[int]]) -> None:
    for name, (size, checksum) in fingerprints.items():
        path = directory / name
        if not path.is_file():
            state = "is missing"
        elif path.stat().st_size != size:
            state = f"has {path.stat().st_size} bytes instead of {size}"
        elif _fingerprint(path)[1] != checksum:
            state = "is not what was written (its checksum differs)"
        else:
            continue
        raise UserError(f"{path}: {state}; the checkpoint is damaged, copy or save it again")


def _on_devices(abstract: Any, mesh: Mesh | None, rules: Rules) -> Any:
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        targets = jax.tree.map(lambda _: here, abstract)
    else:
        targets = shardings(abstract, mesh, rules)
    return jax.tree.map(
        lambda a, target: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=target), abstract, targets
    )


def _on_host(abstract: Any) -> Any:
    # Orbax takes a NumPy array for the wish to get one; these hold a single number.
    return jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), abstract)


def _load(directory: Path, abstract: Any) -> Any:
    try:
        return ocp.load(str(directory / "params"), abstract)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax raises that very class for unreadable chunks
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{directory}: the arrays cannot be read ({reason}); copy or save it again"
        ) from error
