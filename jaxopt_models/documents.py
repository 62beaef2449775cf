"""Documents to train on, each on its own: texts and conversations, as rows of tokens.

A file of documents has one JSON object a line (.jsonl), a list of them (.json), or rows (.parquet):

    {"text": "…"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

A row of training holds several documents. Attention stays within each, positions begin anew, and
the tokens to learn are marked: of a conversation all, or what the assistant says.
"""

import bisect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxopt_models import data
from jaxopt_models.errors import UserError

Learn = Literal["all", "assistant"]


class Document(NamedTuple):
    """Tokens, and which of them are to be learnt.

    Attributes:
      tokens: int32 [n].
      learnt: bool [n].
    """

    tokens: np.ndarray
    learnt: np.ndarray


def read_documents(source: str, tokenizer: Any, learn: Learn = "all") -> list[Document]:
    """The documents of a source.

    Args:
      source: a file of documents, see the module; "hf:NAME[:config][:split]", a dataset with a
        column of messages or text; else what `data.load_text` takes, as one document.
      tokenizer: of transformers; its chat template writes conversations.
      learn: every token, or, of conversations, only what the assistant says.

    Raises:
      UserError: for a source that cannot be read, a record that is no document, a conversation
        without a chat template or one whose turns cannot be told apart, or a text of which only the
        assistant's part is to be learnt; source and record are named.
    """
    found = []
    for number, record in enumerate(records(source), 1):
        try:
            found.append(_document(tokenizer, record, learn))
        except UserError as error:
            raise UserError(f"{source}, record {number}: {error}") from error
    return found


def records(source: str) -> Sequence[Any]:
    """The JSON values of a source's lines, elements or rows; see `read_documents`."""
    if source.startswith("hf:"):
        rows = data.read_dataset(source, "calibration")
        column = next((name for name in ("messages", "text") if name in rows.column_names), None)
        if column is None:
            columns = ", ".join(rows.column_names)
            raise UserError(f"{source} has no column 'messages' or 'text', only {columns}")
        return [{column: value} for value in rows[column]]
    if Path(source).suffix == ".parquet":
        return _parquet(source)
    if Path(source).suffix in (".jsonl", ".json"):
        return _json(source)
    return [{"text": data.load_text(source)}]


def _json(source: str) -> list[Any]:
    text = data.read_text(source)
    if Path(source).suffix == ".json":
        try:
            records = json.loads(text)
        except ValueError as error:
            raise UserError(f"{source} is no JSON ({error})") from error
        if not isinstance(records, list):
            raise UserError(f"{source} holds no list of documents")
        return records
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 ends no line
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{source}, line {number}: no JSON ({error})") from error
    return found


def _parquet(source: str) -> list[Any]:
    import datasets  # slow to import, and needed for this source alone
    from datasets.exceptions import DatasetsError

    try:
        return list(datasets.Dataset.from_parquet(source))  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot read {source}: {str(error).splitlines()[0]}") from error


def _document(tokenizer: Any, record: Any, learn: Learn) -> Document:
    known = record if isinstance(record, dict) else {}
    messages, text = known.get("messages"), known.get("text")
    if isinstance(messages, list) and all(_is_message(message) for message in messages):
        return _conversation(tokenizer, messages, learn)
    if not isinstance(text, str) or messages is not None:
        raise UserError("needed is a 'text', or 'messages' with a 'role' and 'content' each")
    if learn == "assistant":
        raise UserError("a text has no assistant; learn all of it, or give 'messages'")
    tokens = data.tokenize(tokenizer, text)
    if tokenizer.eos_token_id is not None:
        tokens = np.append(tokens, np.int32(tokenizer.eos_token_id))
    return Document(tokens, np.ones(len(tokens), bool))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _conversation(tokenizer: Any, messages: list[Any], learn: Learn) -> Document:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("the tokenizer has no chat template; give documents as 'text'")
    tokens = templated(tokenizer, messages)
    learnt = np.full(len(tokens), learn == "all")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers if learn == "assistant" else ():
        asked = templated(tokenizer, messages[:i], add_generation_prompt=True)
        answered = templated(tokenizer, messages[: i + 1])
        for part in (asked, answered):
            if not np.array_equal(tokens[: len(part)], part):
                raise UserError(
                    f"the chat template writes all up to message {i + 1} otherwise once more "
                    "follows, so the assistant's tokens cannot be told apart; learn all of them"
                )
        learnt[len(asked) : len(answered)] = True
    return Document(tokens, learnt)


def templated(tokenizer: Any, messages: list[Any], **options: Any) -> np.ndarray:
    """int32 ids of a conversation in the tokenizer's chat template.

    Raises:
      UserError: the template refuses it.
    """
    try:
        found = tokenizer.apply_chat_template(messages, return_dict=False, **options)
    except Exception as error:  # templates are programs of others
        raise UserError(f"the chat template refuses a conversation: {error}") from error
    return np.asarray(found, np.int32)


def pack_documents(documents: Iterable[Document], length: int) -> dict[str, np.ndarray]:
    """Documents in as few rows as best fit finds, the longest first.

    One longer than a row is cut, and its pieces are documents of their own. Those in which nothing
    is to be learnt are left out: a first token never is, since nothing comes before it.

    Args:
      documents: at least one with something to learn.
      length: T, of a row.

    Returns:
      For N rows: "tokens" int32 [N, T], 0 behind the documents; "starts" int32 [N, T], where in its
      row the document of each token begins; "mask" bool [N, T], whether it is to be learnt.

    Raises:
      UserError: for a row too short to predict anything, or nothing to learn.
    """
    if length < 2:
        raise UserError(f"rows of {length} tokens train nothing; ask for a length of at least 2")
    pieces = [
        Document(tokens[first : first + length], learnt[first : first + length])
        for tokens, learnt in documents
        for first in range(0, len(tokens), length)
        if learnt[first + 1 : first + length].any()
    ]
    if not pieces:
        raise UserError("there is nothing to learn in the documents; use others")
    rows = _rows(pieces, length)
    found = {
        "tokens": np.zeros((len(rows), length), np.int32),
        "starts": np.zeros((len(rows), length), np.int32),
        "mask": np.zeros((len(rows), length), bool),
    }
    for number, row in enumerate(rows):
        start = 0
        for piece in (pieces[i] for i in row):
            own = number, slice(start, start + len(piece.tokens))
            found["tokens"][own], found["mask"][own] = piece
            found["starts"][own] = start
            start += len(piece.tokens)
        found["starts"][number, start:] = start
    return found


def _rows(pieces: Sequence[Document], length: int) -> list[list[int]]:
    """Which pieces share a row: each in the row with the least room that takes it."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for i in sorted(range(len(pieces)), key=lambda i: -len(pieces[i].tokens)):
        size = len(pieces[i].tokens)
        place = bisect.bisect_left(rooms, (size, 0))
        if place == len(rooms):
            rows.append([])
            room, row = length, len(rows) - 1
        else:
            room, row = rooms.pop(place)
        rows[row].append(i)
        bisect.insort(rooms, (room - size, row))
    return rows
