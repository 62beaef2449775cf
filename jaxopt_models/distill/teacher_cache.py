"""A teacher's most likely tokens of a whole training set, on disk.

They are found once, and read by every run that has the same teacher and the same rows, whatever is
trained, in whichever format and order. Of N rows of T tokens:

DIR/indices.npy      uint16 [N, T, k], or int32 for a vocabulary of more than 65536
DIR/log_probs.npy    float16 [N, T, k]
DIR/tail.npy         float32 [N, T]
DIR/teacher.json     what made them

That is 4 k + 4 bytes a token, 260 for k = 64, or 6 k + 4. What stands at position t is said of
token t + 1, as in `objective.summed_losses`.

Rounding changes log p by at most 2^-11 |log p|, or 2^-25, and `losses.widened` makes probabilities
sum to one again. With p' for what is read then, and H(p) the entropy in nats of what was found,

    Σ |p' - p|  <=  2^-10 H(p)

and so much, times the temperature, may the loss's gradient by the student's logits change: 0.3% for
an entropy of 3 nats. bfloat16, of the same size, is 8 times as coarse. The tail is kept, since it
is often smaller than the errors of what k rounded probabilities would leave of one.
"""

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_models import tree
from jaxopt_models.checkpoint.atomic import new_directory
from jaxopt_models.data import global_batch
from jaxopt_models.distill.losses import TopK
from jaxopt_models.distill.pieces import most_likely
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_json
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import hidden_states, output_head
from jaxopt_models.progress import Progress, silent
from jaxopt_models.sharding_rules import rows_spec

MARKER = "teacher.json"
_FORMAT = 1


@dataclass(frozen=True)
class Signature:
    """What decides about a teacher's predictions; equal ones make the same.

    Attributes:
      vocabulary: V.
      length, rows: T and N.
      temperature: of the predictions.
      dtype: that they were computed in.
      model, tokens, starts: digests of the architecture with its weights, and of the rows; rows
        that are one document each have no starts.
    """

    vocabulary: int
    length: int
    rows: int
    temperature: float
    dtype: str
    model: str
    tokens: str
    starts: str | None


def signature(
    model: Model, rows: Mapping[str, np.ndarray], temperature: float, dtype: str
) -> Signature:
    """The signature of predictions.

    Args:
      model: as it was loaded, whole in this process.
      rows: "tokens" int32 [N, T], and "starts" if rows hold several documents; see
        `documents.pack_documents`.
      temperature: above 0.
      dtype: of computation.
    """
    tokens, starts = rows["tokens"], rows.get("starts")
    return Signature(
        vocabulary=model.config.vocab_size,
        length=tokens.shape[1],
        rows=tokens.shape[0],
        temperature=temperature,
        dtype=dtype,
        model=_digest(model.params, json.dumps(model.config.to_json(), sort_keys=True)),
        tokens=_digest(tokens),
        starts=None if starts is None else _digest(starts),
    )


def write(
    directory: str | Path,
    made_of: Signature,
    model: Model,
    rows: Mapping[str, np.ndarray],
    k: int,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    progress: Progress = silent,
) -> None:
    """Finds what a teacher says of rows and writes it; the directory appears once it is complete.

    A process that is killed leaves nothing that `read` reads, and the next one begins anew. One
    that another run has completed in the meantime is left as it is. In a distributed run every
    process must call this, with one file system among them.

    Args:
      directory: to create.
      made_of: of the model and the rows.
      model: with the parameters and the dtype to compute with; on the mesh, if there is one.
      rows: see `signature`.
      k: tokens to keep of each position.
      batch_size: rows at a time; a multiple of the mesh's axes "data" and "fsdp".
      progress: wraps the loop.

    Raises:
      UserError: for a k that the vocabulary does not have, logits that are not finite, or a
        directory that cannot be written.
    """
    target, arrays = _resolved(directory), _arrays(made_of, k)
    find = _finder(model, arrays, made_of.temperature, mesh)
    try:
        with new_directory(target) as scratch:
            firsts = list(range(0, made_of.rows, batch_size))
            for first in progress(firsts, "asking the teacher"):
                # The last row again, so that all batches have one shape.
                numbers = np.minimum(np.arange(first, first + batch_size), made_of.rows - 1)
                found, finite = find(_placed(rows, numbers, mesh))
                if not finite:
                    raise UserError(
                        f"the logits of {model.source} are not finite in rows {first} to "
                        f"{numbers[-1]} of the text; look for NaN in its weights"
                    )
                _write_rows(scratch, arrays, first, found)
            if jax.process_index() == 0:
                _describe(scratch, made_of, model.source, arrays)
    except OSError as error:
        if (target / MARKER).exists():  # another run's
            return
        size = tree.size_in_bits(arrays) / 8e9
        raise UserError(
            f"cannot write {target} ({error.strerror}); it takes {size:.3g} GB"
        ) from error


def read(directory: str | Path, made_of: Signature, k: int) -> TopK:
    """The predictions of all rows, mapped into memory from where they lie.

    Args:
      directory: that `write` made.
      made_of: of this run's teacher and rows.
      k: tokens of each position that are needed; there may be more.

    Returns:
      Of [N, T, k], in the dtypes of the files: see `losses.widened` and `losses.narrowed`.

    Raises:
      UserError: for a directory that holds something else, was made of something else, has fewer
        tokens, or is damaged.
    """
    target = _resolved(directory)
    found = _described(target)
    theirs, ours = found["signature"] | {"format": found["format"]}, _described_as(made_of)
    name = next((name for name in ours if theirs.get(name) != ours[name]), None)
    if name is not None:
        raise UserError(
            f"{target}, made of {found['source']}, has {name} {theirs.get(name)!r}, and this run "
            f"{ours[name]!r}; choose another directory, or remove it to make it anew"
        )
    if found["k"] < k:
        raise UserError(
            f"{target} has the {found['k']} most likely tokens, and this run needs {k}; choose "
            "another directory, or remove it to make it anew"
        )
    arrays = _arrays(made_of, found["k"])
    files: dict[str, Any] = {
        name: _mapped(_file(target, name), like) for name, like in _named(arrays)
    }
    return TopK(**files)


def _arrays(made_of: Signature, k: int) -> TopK:
    """Shapes and dtypes of what is stored."""
    shape = made_of.rows, made_of.length
    index = jnp.uint16 if made_of.vocabulary <= 2**16 else jnp.int32
    arrays: list[Any] = [
        jax.ShapeDtypeStruct((*shape, k), index),
        jax.ShapeDtypeStruct((*shape, k), jnp.float16),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ]
    return TopK(*arrays)


def _finder(
    model: Model, arrays: TopK, temperature: float, mesh: Mesh | None
) -> Callable[[Any], tuple[TopK, jax.Array]]:
    """Some rows -> (what is to be stored of them, whether it is finite)."""
    k = arrays.indices.shape[-1]

    def find(params: Any, rows: Any) -> tuple[TopK, jax.Array]:
        hidden = hidden_states(model.config, params, rows["tokens"], rows.get("starts"))
        found = most_likely(model.config, output_head(params), hidden, k, temperature)
        stored = jax.tree.map(lambda array, like: array.astype(like.dtype), found, arrays)
        return stored, ~jnp.isnan(found.log_probs[..., 0]).any()

    if mesh is None:
        return partial(jax.jit(find), model.params)
    where = NamedSharding(mesh, rows_spec(mesh)), NamedSharding(mesh, P())
    return partial(jax.jit(find, out_shardings=where), model.params)


def _placed(rows: Mapping[str, np.ndarray], numbers: np.ndarray, mesh: Mesh | None) -> Any:
    needed = {name: rows[name] for name in ("tokens", "starts") if name in rows}
    if mesh is None:
        return {name: jnp.asarray(own[numbers]) for name, own in needed.items()}
    spec = rows_spec(mesh)
    return {name: global_batch(own, numbers, mesh, spec) for name, own in needed.items()}


def _write_rows(directory: Path, arrays: TopK, first: int, found: TopK) -> None:
    """Writes what this process has of the rows from `first` on to their places.

    Not through mapped memory: processes on several hosts would write each other's part of a page.
    """
    for (name, like), array in zip(_named(arrays), jax.tree.leaves(found), strict=True):
        begin = len(_header(like))
        for shard in array.addressable_shards:
            row = first + (shard.index[0].start or 0)
            if shard.replica_id == 0 and row < like.shape[0]:
                own = np.asarray(shard.data)[: like.shape[0] - row]
                _put(_file(directory, name), begin + row * own[0].nbytes, own.tobytes())


def _describe(directory: Path, made_of: Signature, source: str, arrays: TopK) -> None:
    """Completes the files: their headers, and what they are."""
    for name, like in _named(arrays):
        _put(_file(directory, name), 0, _header(like))
    described = {
        "format": _FORMAT,
        "source": source,
        "k": arrays.indices.shape[-1],
        "signature": asdict(made_of),
        "arrays": {name: [like.dtype.name, list(like.shape)] for name, like in _named(arrays)},
        "versions": {name: version(name) for name in ("jaxopt-models", "jax")},
    }
    write_json(directory / MARKER, described)


def _described(target: Path) -> dict[str, Any]:
    try:
        found = json.loads((target / MARKER).read_text(encoding="utf-8"))
        if not isinstance(found["signature"], dict) or not isinstance(found["k"], int):
            raise ValueError
        return {"format": None, "source": None} | found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{target} holds no teacher (it has no readable {MARKER}); choose another directory"
        ) from error


def _described_as(made_of: Signature) -> dict[str, Any]:
    return {"format": _FORMAT} | asdict(made_of)


def _mapped(file: Path, like: jax.ShapeDtypeStruct) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
        if (array.shape, array.dtype) != (like.shape, like.dtype):
            raise ValueError(f"it is {array.dtype} {list(array.shape)}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged ({error}); remove {file.parent}") from error
    return array


def _header(like: jax.ShapeDtypeStruct) -> bytes:
    """What a .npy file begins with."""
    described = np.lib.format.dtype_to_descr(np.dtype(like.dtype))
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": described, "fortran_order": False, "shape": like.shape}
    )
    return out.getvalue()


def _put(file: Path, offset: int, content: bytes) -> None:
    """Writes part of a file, which is there or not."""
    with open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as out:
        out.seek(offset)
        out.write(content)


def _named(arrays: TopK) -> list[tuple[str, Any]]:
    return [(field.name, getattr(arrays, field.name)) for field in fields(TopK)]


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.npy"


def _resolved(directory: str | Path) -> Path:
    return Path(directory).expanduser().resolve()


def _digest(node: Any, text: str = "") -> str:
    """Of the arrays below a node, with their paths, dtypes and shapes."""
    digest = sha256(text.encode())
    for path, array in tree.arrays_with_paths(node):
        array = np.asarray(array)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
