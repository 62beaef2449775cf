"""Text to tokens to batches: the measurement protocol and the resumable training stream.

Measuring (calibration, evaluation) follows one protocol, so that figures compare:

1. the text is tokenized once, without special tokens, to `T` ids (`tokenize`);
2. `N` windows of `L` ids are taken, window `i` starting at `i * (T // N)` (`windows`); a model that
   expects a beginning-of-sequence id sees it first, followed by `L - 1` ids;
3. the windows are grouped, in order, into batches of at most `B` (`batches`).

Training packs documents end to end into rows (`pack`; `documents` keeps them apart) and draws
shuffled rows (`PackedBatches`). Whatever reads tokens takes `int32` arrays `[B, T]`; nothing here
pads, so every id counts.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_models.builtin_text import Split, builtin_text
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model

_HF_SPLITS: dict[Split, str] = {"calibration": "train", "evaluation": "test"}


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Sequence[int]: ...


def load_text(source: str, split: Split = "calibration") -> str:
    """The text that `source` names.

    Args:
      source: `"builtin"` (see `builtin_text`), `"hf:NAME[:config][:split]"` (a Hugging Face
        dataset, from the hub or its local cache), or the path of a UTF-8 text file.
      split: which of the two built-in texts; for a dataset named without a split, calibration reads
        its `train` split and evaluation its `test` split. A file is read whole, and so is a split:
        `"hf:NAME:config:train[:1%]"` takes a part of a large one.

    Raises:
      UserError: the file or dataset cannot be read; the message names it.
    """
    if source == "builtin":
        return builtin_text(split)
    if source.startswith("hf:"):
        return _read_hub(source, split)
    return read_text(source)


def read_text(path: str | Path) -> str:
    """The contents of a UTF-8 text file, with or without a byte order mark.

    Raises:
      UserError: the file is missing, is not a file, is not UTF-8, or holds nothing but white space.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, for instance with iconv."
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot read the text file {path}: {error.strerror}; give the path of a UTF-8 text "
            'file, "builtin" or "hf:NAME".'
        ) from error
    if not text.strip():
        raise UserError(f"the text file {path} is empty; put text in it or name another file.")
    return text


def tokenize(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of the whole text, int32 `[T]`, without special tokens."""
    # verbose=False: a text beyond the model's context is no mistake, the ids are cut into windows.
    return np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int32)


def windows(ids: np.ndarray, count: int, length: int, bos: int | None = None) -> np.ndarray:
    """Evenly spaced windows without overlap: row `i` starts at `ids[i * (T // count)]`.

    Args:
      ids: int32 `[T]`.
      count: the number of windows.
      length: the ids in a window, `bos` included.
      bos: the id that each window starts with, where the model expects one.

    Returns:
      int32 `[count, length]`.

    Raises:
      UserError: there are fewer than `count * length` ids (`count * (length - 1)` with `bos`), or
        `count < 1`, or a window is too short to predict anything.
    """
    if count < 1 or length < 2:
        raise UserError(
            f"{count} windows of {length} tokens measure nothing; ask for at least 1 window of 2."
        )
    body = length if bos is None else length - 1
    stride = len(ids) // count
    if stride < body:
        raise UserError(
            f"the text has {len(ids)} tokens but {count} windows of {length} need {count * body}; "
            "use a longer text, fewer windows or a shorter length."
        )
    starts = stride * np.arange(count)
    rows = ids[starts[:, None] + np.arange(body)[None, :]].astype(np.int32)
    return rows if bos is None else np.insert(rows, 0, bos, axis=1)


def batches(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The rows `[N, T]` in order, as arrays `[B, T]`; the last is smaller where B leaves a rest.

    Raises:
      UserError: `batch_size < 1`.
    """
    _check_batch_size(batch_size)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def token_arrays(config: ModelConfig, batches: Iterable[Any], shortest: int = 1) -> list[jax.Array]:
    """Batches as int32 [B, T] arrays of ids that the model has embeddings for.

    Raises:
      UserError: a batch has another shape, holds no ids or rows of fewer than `shortest`, or holds
        what is not an id of the vocabulary, which a look-up would replace without a word.
    """
    # Arrays on devices stay there, with their sharding.
    arrays = [b if isinstance(b, jax.Array) else np.asarray(b) for b in batches]
    for array in arrays:
        if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < shortest:
            raise UserError(
                f"a batch must be [B, L] with B >= 1 and L >= {shortest}; "
                f"one has shape {array.shape}"
            )
        if array.dtype.kind not in "iu":
            raise UserError(f"a batch must hold integer token ids; one holds {array.dtype}")
        if array.min() < 0 or array.max() >= config.vocab_size:
            raise UserError(
                f"a batch holds token ids outside the vocabulary of {config.vocab_size}; "
                "tokenize with the model's own tokenizer"
            )
    return [jnp.asarray(array, jnp.int32) for array in arrays]


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], length: int, eos: int | None = None
) -> np.ndarray:
    """Documents laid end to end, an `eos` after each, and cut into rows: int32 `[N, length]`.

    Without an `eos` nothing is between them.

    A row may hold several documents, and attention sees across their boundaries, as in
    pretraining. The last, incomplete row (fewer than `length` ids) is left out.

    Raises:
      UserError: the documents do not fill one row, or a row is too short to predict anything.
    """
    if length < 2:
        raise UserError(f"rows of {length} tokens train nothing; ask for a length of at least 2.")
    end = np.asarray([] if eos is None else [eos], np.int32)
    pieces = [np.append(np.asarray(ids, np.int32), end) for ids in documents]
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    count = len(stream) // length
    if count == 0:
        raise UserError(
            f"the training text has {len(stream)} tokens but one row needs {length}; use more text "
            "or a shorter length."
        )
    return stream[: count * length].reshape(count, length)


@dataclass(frozen=True, eq=False)
class PackedBatches:
    """An endless stream of training batches that is a function of the step alone.

    Its whole state is `(seed, step)`: a run that stops after step `s` goes on with `batch(s + 1)`,
    and sees what an uninterrupted run would have seen. Batches follow one another through
    successive epochs without a gap, so every row is seen exactly once an epoch, in an order drawn
    anew from `(seed, epoch)`.

    Attributes:
      rows: int32 `[N, T]`, from `pack` or `windows`, or arrays `[N, ...]`, as those of
        `documents.pack_documents`.
      batch_size: B; may exceed N.
      seed: at least 0.
    """

    rows: Any
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)

    def batch(self, step: int) -> Any:
        """Batch number `step`, counted from 0: `[B, T]` of each array."""
        numbers = self.numbers(step)
        return jax.tree.map(lambda rows: rows[numbers], self.rows)

    def numbers(self, step: int) -> np.ndarray:
        """Which rows batch `step` has, int `[B]`."""
        count, start = len(jax.tree.leaves(self.rows)[0]), step * self.batch_size
        first, last = start // count, (start + self.batch_size - 1) // count
        epochs = [_epoch_order(self.seed, epoch, count) for epoch in range(first, last + 1)]
        return np.concatenate(epochs)[start - first * count :][: self.batch_size]


def global_batch(
    rows: np.ndarray, numbers: np.ndarray, mesh: Mesh, spec: PartitionSpec
) -> jax.Array:
    """`rows[numbers]` as one array over the mesh, of which each process reads its own shards.

    Args:
      rows: `[N, ...]`, in memory or mapped from a file; the same in every process.
      numbers: int `[B]`, or `[parts, B]`; likewise.
      mesh, spec: how the array is split.

    Raises:
      UserError: the batch does not divide evenly over the mesh.
    """
    sharding, shape = NamedSharding(mesh, spec), numbers.shape + rows.shape[1:]
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise UserError(
            f"a batch of shape {shape} does not divide as {spec} over the mesh "
            f"{dict(mesh.shape)}; make the batch size a multiple of the axis it is split over."
        ) from error

    @functools.cache  # devices that hold the same shard ask for it one after the other
    def read(index: tuple[slice, ...]) -> np.ndarray:
        own, within = index[: numbers.ndim], index[numbers.ndim :]
        return rows[numbers[own]][(..., *within)]

    return jax.make_array_from_callback(shape, sharding, read, dtype=rows.dtype)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def read_dataset(source: str, split: Split) -> Any:
    """A Hugging Face dataset; see `load_text`.

    Raises:
      UserError: it cannot be loaded; the message names it.
    """
    import datasets  # slow to import, and needed for this source alone
    from datasets.exceptions import DatasetsError

    name, config, part = (source.removeprefix("hf:").split(":", 2) + ["", ""])[:3]
    part = part or _HF_SPLITS[split]
    try:
        rows = datasets.load_dataset(name, config or None, split=part)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"cannot load the dataset {source} (split {part}): {reason}; check the name and the "
            "network, or name a text file."
        ) from error
    return rows


def _read_hub(source: str, split: Split) -> str:
    """The `text` column of a dataset, its rows joined by blank lines."""
    rows = read_dataset(source, split)
    if "text" not in rows.column_names:
        raise UserError(
            f"the dataset {source} has no text column, only {', '.join(rows.column_names)}; "
            "write the column you want to a text file and name that."
        )
    return "\n\n".join(text or "" for text in rows["text"])


def tokenizer_of(model: Model) -> Any:
    """The model's tokenizer.

    Raises:
      UserError: if it was loaded without one.
    """
    if model.tokenizer is None:
        raise UserError(
            f"{model.source} has no tokenizer beside its weights; add its tokenizer files"
        )
    return model.tokenizer


def token_batches(
    model: Model, text: str, count: int, length: int, batch_size: int
) -> list[np.ndarray]:
    """The whole protocol: text to `count` windows of `length` ids in batches.

    Windows begin with the beginning-of-sequence id where the tokenizer puts one before a text.
    """
    tokenizer = tokenizer_of(model)
    ids, bos = tokenize(tokenizer, text), bos_of(tokenizer)
    return batches(windows(ids, count, length, bos), batch_size)


def bos_of(tokenizer: Any) -> int | None:
    """The beginning-of-sequence id, where the tokenizer puts one before a text."""
    first = tokenizer.encode("a", add_special_tokens=True)[0]
    return first if first == tokenizer.bos_token_id else None
