"""Text that a model writes to train on, so that training needs nothing but the model.

    write_corpus(model, "talks.jsonl", 4096)

A conversation begins at the bare user turn of the chat template: what a model trained on
conversations writes there is what people ask it (Magpie, Xu et al. 2024, arXiv:2406.08464). It then
answers itself. Given the prompts, it writes the answers only, which is the text of sequence-level
distillation (Kim & Rush 2016, arXiv:1606.07947). Without a chat template it writes texts from the
beginning-of-sequence token on.

The noise of a request is its own, so its text depends on the seed and its number, not on the batch.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import jax

from jaxopt_models.corpus_requests import Entry, Requests, Sampling, make_requests
from jaxopt_models.data import tokenizer_of
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_text
from jaxopt_models.inference import for_device
from jaxopt_models.journal import Journal
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress, silent
from jaxopt_models.tree import checksum

# Of so many requests, fewer kept than this share means that the model does not write such text.
_TRIAL, _LEAST_KEPT = 64, 0.05


@dataclass(frozen=True)
class Corpus:
    """What `write_corpus` wrote.

    Attributes:
      documents: conversations or texts in the file.
      tokens: sampled tokens in them.
      cut: documents whose last words were cut at the greatest length.
      dropped: requests that gave no document, by reason.
      tokens_per_second: sampled by this call, dropped ones included, compilation too; 0 if it
        sampled none.
    """

    documents: int
    tokens: int
    cut: int
    dropped: dict[str, int]
    tokens_per_second: float


def write_corpus(
    model: Model,
    out: str | Path,
    count: int | None = None,
    *,
    kind: Literal["conversations", "texts"] = "conversations",
    prompts: Sequence[list[dict[str, str]]] | None = None,
    max_prompt_tokens: int = 128,
    max_answer_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress = silent,
) -> Corpus:
    """Writes documents that a model samples, a line of JSON each, for `read_documents`.

    Dropped are, of prompts and answers: empty ones, those with special tokens or bytes that are no
    text, and those that repeat themselves, which is that fewer than half of the four-token
    sequences of 32 tokens or more differ. Dropped too are prompts without an end or longer than
    `max_prompt_tokens`, and all but the first of the conversations that the model began alike, or
    of equal texts. Answers and texts that reach `max_answer_tokens` are kept as they are; a chat
    template closes them as it does others.

    A killed run leaves `out` with ".partial" behind its name, and one of equal arguments, but for
    `count` and `batch_size`, goes on there. `out` itself is there only when complete.

    Args:
      model: with its tokenizer; `config.dtype` is the dtype of the activations.
      out: the file, a .jsonl.
      count: documents to write. With `prompts` it is how many of them are answered, all by default.
      kind: "conversations", {"messages": [user, assistant]}; or "texts", {"text": …}.
      prompts: conversations that end with the user's message (`read_prompts`), for the model to
        answer.
      max_prompt_tokens: of a user's message that the model writes; of a whole conversation given.
      max_answer_tokens: of an answer or text.
      temperature, top_p: see `sampling`; at 1 and 1 tokens follow the model's own distribution.
      seed: of the noise.
      batch_size: requests sampled at a time; a GPU wants hundreds.

    Raises:
      UserError: `out` exists or its partial file is of other arguments; the tokenizer is missing or
        its template has no turns to be told apart; a value is out of range; or next to nothing is
        kept of what the model writes.
    """
    out = Path(out)
    sampling = Sampling(max_prompt_tokens, max_answer_tokens, temperature, top_p, seed, batch_size)
    _check(out, count, kind, prompts, sampling)
    given = None if prompts is None else list(prompts)[:count]
    tokenizer = tokenizer_of(model)
    params = for_device(model.config, model.params)
    requests = make_requests(model.config, params, tokenizer, kind, given, sampling)
    journal = Journal(out.with_name(f"{out.name}.partial"), _run(model, kind, prompts, sampling))

    found, begun = len(journal.entries), time.perf_counter()
    last = None if given is None else len(given)
    taken = _take(journal, requests, batch_size, count or 0, last, f"writing {out.name}", progress)
    seconds = time.perf_counter() - begun
    kept = [entry for entry in taken if "document" in entry]
    if not kept:
        raise UserError(f"{out}: nothing of what the model writes can be kept ({_reasons(taken)})")
    lines = (json.dumps(entry["document"], ensure_ascii=False) + "\n" for entry in kept)
    write_text(out, "".join(lines))
    journal.remove()
    return Corpus(
        documents=len(kept),
        tokens=sum(entry["tokens"] for entry in kept),
        cut=sum(entry["cut"] for entry in kept),
        dropped=_dropped(taken),
        tokens_per_second=sum(entry["tokens"] for entry in journal.entries[found:]) / seconds,
    )


def _take(
    journal: Journal,
    requests: Requests,
    batch_size: int,
    count: int,
    last: int | None,
    description: str,
    progress: Progress,
) -> list[Entry]:
    """Entries of requests up to the one that completes the count, or of all where `last` is."""
    taken, entries = [], _entries(journal, requests, batch_size, last)
    for _ in progress(range(count if last is None else last), description):
        for entry in entries:
            taken.append(entry)
            if last is not None or "document" in entry:
                break
    return taken


def _entries(
    journal: Journal, requests: Requests, batch_size: int, last: int | None
) -> Iterator[Entry]:
    """Entries in the order of their requests: those of the journal, then new ones."""
    yield from list(journal.entries)
    seen = {entry["key"] for entry in journal.entries if "key" in entry}
    while last is None or len(journal.entries) < last:
        if last is None:
            _check_yield(journal)
        first = len(journal.entries)
        numbers = range(
            first, first + batch_size if last is None else min(first + batch_size, last)
        )
        new = [_unless_seen(entry, seen) for entry in requests(numbers)]
        journal.append(new)
        yield from new


def _unless_seen(entry: Entry, seen: set[str]) -> Entry:
    """The entry, dropped if an earlier document has its key."""
    key = entry.get("key")
    if key is None:
        return entry
    if key in seen:
        return {"dropped": "duplicate", "tokens": entry["tokens"]}
    seen.add(key)
    return entry


def _check_yield(journal: Journal) -> None:
    kept = sum("document" in entry for entry in journal.entries)
    if len(journal.entries) >= _TRIAL and kept < _LEAST_KEPT * len(journal.entries):
        raise UserError(
            f"of {len(journal.entries)} requests only {kept} gave a document "
            f"({_reasons(journal.entries)}); lower the temperature, raise the greatest lengths or "
            f"use another model, and remove {journal.path}"
        )


def _dropped(entries: Sequence[Entry]) -> dict[str, int]:
    """How many requests were dropped, by reason, the most frequent first."""
    return dict(Counter(e["dropped"] for e in entries if "dropped" in e).most_common())


def _reasons(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{reason}: {times}" for reason, times in _dropped(entries).items())


def _run(
    model: Model,
    kind: str,
    prompts: Sequence[list[dict[str, str]]] | None,
    sampling: Sampling,
) -> dict[str, Any]:
    """What all calls that go on with one another's work have in common."""
    settings = asdict(sampling)
    del settings["batch_size"]
    first_layer = jax.tree.leaves(model.params["layers"][:1])
    return {
        "model": {"config": model.config.to_json(), "first layer": checksum(first_layer)},
        "chat template": model.tokenizer.chat_template,
        "kind": kind,
        "prompts": prompts if prompts is None else sha256(json.dumps(prompts).encode()).hexdigest(),
        **settings,
    }


def _check(
    out: Path,
    count: int | None,
    kind: str,
    prompts: Sequence[Any] | None,
    sampling: Sampling,
) -> None:
    if out.suffix != ".jsonl":
        raise UserError(f"{out} is to hold a JSON object a line; give it a name ending in .jsonl")
    if out.exists():
        raise UserError(f"{out} exists already; choose another file or remove it")
    if not out.parent.is_dir():
        raise UserError(f"there is no directory {out.parent} to write {out.name} in; make it")
    if kind not in ("conversations", "texts"):
        raise UserError(f"kind {kind!r} is not known; write conversations or texts")
    if prompts is not None and (kind == "texts" or not prompts):
        raise UserError("prompts are there to be answered; give some, of conversations")
    if count is None and prompts is None:
        raise UserError("how many documents to write is not known; give a count or prompts")
    for name, value in {"count": count, **asdict(sampling)}.items():
        if name.startswith(("count", "max_", "batch")) and value is not None and value < 1:
            raise UserError(f"{name} must be at least 1; it is {value}")
