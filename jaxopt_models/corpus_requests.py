"""What is asked of the model for each document of a corpus, and what of its answers is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxopt_models.chat_turns import find_turn, special_ids
from jaxopt_models.documents import records, templated
from jaxopt_models.errors import UserError
from jaxopt_models.generate import generate
from jaxopt_models.models.config import ModelConfig

Messages = list[dict[str, str]]

# {"document": …, "key": …, "cut": bool, "tokens": int}, the key being what no two documents share,
# absent where they may be equal; or {"dropped": reason, "tokens": int}.
Entry = dict[str, Any]

# Entries of requests by their numbers.
Requests = Callable[[Sequence[int]], list[Entry]]

_QUESTION = [{"role": "user", "content": "Why?"}]
_NGRAM, _LONG, _DISTINCT = 4, 32, 0.5


@dataclass(frozen=True)
class Sampling:
    """Settings of `corpus.write_corpus` that decide about tokens, and the batch size."""

    max_prompt_tokens: int
    max_answer_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int


class Said(NamedTuple):
    """What the model wrote.

    Attributes:
      text: without white space around it.
      tokens: how many it took, its end included.
      ended: whether it came to an end.
      fault: why it is no good, None if it is.
    """

    text: str
    tokens: int
    ended: bool
    fault: str | None


@dataclass(frozen=True, eq=False)
class Writer:
    """The model, and how it is sampled."""

    config: ModelConfig
    params: Any
    tokenizer: Any
    sampling: Sampling

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        ends: Sequence[int],
        *,
        part: int,
        room: int,
        max_new_tokens: int,
    ) -> list[Said]:
        """What the model writes after prompts.

        Args:
          numbers: of the requests.
          ends: ids that properly end it; the model's own end-of-sequence ids stop it too.
          part: 0 or 1; noise of one part is not used again in another.
          room: longest prompt of any batch, so that all batches share one compilation.
        """
        if not prompts:
            return []
        # Rows to fill the batch are copies, and so are done when their original is.
        rest = self.sampling.batch_size - len(prompts)
        rows = generate(
            self.config,
            self.params,
            [*prompts, *[prompts[0]] * rest],
            max_new_tokens=max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            key=jax.random.fold_in(jax.random.key(self.sampling.seed), part),
            request_ids=[*numbers, *[numbers[0]] * rest],
            eos_token_ids=sorted({*ends, *self.config.eos_token_ids}),
            max_prompt_tokens=room,
        )
        special = special_ids(self.tokenizer)
        return [_said(self.tokenizer, row, ends, special) for row in rows.tokens[: len(prompts)]]


def make_requests(
    config: ModelConfig,
    params: Any,
    tokenizer: Any,
    kind: str,
    prompts: Sequence[Messages] | None,
    sampling: Sampling,
) -> Requests:
    """What to call with numbers of requests, for the arguments of `corpus.write_corpus`."""
    writer = Writer(config, params, tokenizer, sampling)
    if kind == "texts":
        return _texts(writer)
    return _conversations(writer) if prompts is None else _answers(writer, prompts)


def read_prompts(source: str) -> list[Messages]:
    """Conversations to be answered, each up to its last message of a user.

    Args:
      source: a .txt with a prompt a line; else a file of {"prompt": …}, {"messages": …} or
        {"turns": […]}, of which the first is taken, or a dataset with messages, as
        `documents.read_documents` takes.

    Raises:
      UserError: it cannot be read, or a record is no prompt.
    """
    if not source.startswith("hf:") and source.endswith(".txt"):
        (whole,) = records(source)
        lines = (line.strip() for line in whole["text"].split("\n"))
        return [[{"role": "user", "content": line}] for line in lines if line]
    return [_prompt(source, number, record) for number, record in enumerate(records(source), 1)]


def _prompt(source: str, number: int, record: Any) -> Messages:
    known = record if isinstance(record, dict) else {}
    if isinstance(known.get("prompt"), str):
        return [{"role": "user", "content": known["prompt"]}]
    turns = known.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        return [{"role": "user", "content": turns[0]}]
    messages = known.get("messages")
    found = messages if isinstance(messages, list) else []
    roles = [one.get("role") if isinstance(one, dict) else None for one in found]
    if "user" not in roles:
        raise UserError(
            f"{source}, record {number}: needed is a 'prompt', or 'messages' one of which is a "
            "user's"
        )
    return found[: len(roles) - roles[::-1].index("user")]


def _texts(writer: Writer) -> Requests:
    config = writer.config
    ends = list(config.eos_token_ids)
    first = config.bos_token_id if config.bos_token_id is not None else next(iter(ends), None)
    if first is None:
        raise UserError("the model has no token that begins a text; write conversations")
    limit = writer.sampling.max_answer_tokens

    def write(numbers: Sequence[int]) -> list[Entry]:
        options = {"part": 0, "room": 1, "max_new_tokens": limit}
        said = writer.continuations([[first]] * len(numbers), numbers, ends, **options)
        return [_text_entry(one) for one in said]

    return write


def _text_entry(said: Said) -> Entry:
    if said.fault:
        return {"dropped": f"text {said.fault}", "tokens": said.tokens}
    document = {"text": said.text}
    return {
        "document": document,
        "key": said.text,
        "cut": not said.ended,
        "tokens": said.tokens,
    }


def _conversations(writer: Writer) -> Requests:
    """The user's message, then the answer to it."""
    turn, limit = find_turn(writer.tokenizer, [], "user"), writer.sampling.max_prompt_tokens
    end = turn.end
    if end is None:
        raise UserError(
            "the chat template ends what a user says with ordinary text, so that its end cannot be "
            "told; give prompts"
        )
    around = templated(writer.tokenizer, _QUESTION, add_generation_prompt=True)
    answer = _answering(writer, limit + len(around))

    def write(numbers: Sequence[int]) -> list[Entry]:
        options = {"part": 0, "room": len(turn.prefix), "max_new_tokens": limit}
        asked = writer.continuations([turn.prefix] * len(numbers), numbers, [end], **options)
        contexts = [[{"role": "user", "content": said.text}] for said in asked]
        faults = [said.fault or (None if said.ended else "unfinished") for said in asked]
        entries = answer(contexts, numbers, faults)
        for entry, said in zip(entries, asked, strict=True):
            entry["tokens"] += said.tokens
            if "document" in entry:
                entry["key"] = said.text
        return entries

    return write


def _answers(writer: Writer, prompts: Sequence[Messages]) -> Requests:
    answer = _answering(writer, writer.sampling.max_prompt_tokens)

    def write(numbers: Sequence[int]) -> list[Entry]:
        return answer([prompts[i] for i in numbers], numbers, [None] * len(numbers))

    return write


def _answering(
    writer: Writer, room: int
) -> Callable[[Sequence[Messages], Sequence[int], Sequence[str | None]], list[Entry]]:
    """A function of conversations, request numbers and faults that answers those without fault.

    Args:
      room: longest conversation that is answered, in tokens.
    """
    tokenizer = writer.tokenizer
    end = find_turn(tokenizer, _QUESTION, "assistant").end
    ends = [*writer.config.eos_token_ids, *([] if end is None else [end])]
    limit = writer.sampling.max_answer_tokens

    def answer(
        contexts: Sequence[Messages], numbers: Sequence[int], faults: Sequence[str | None]
    ) -> list[Entry]:
        entries: list[Entry] = [{"dropped": f"prompt {fault}", "tokens": 0} for fault in faults]
        asked = {}
        for i in (i for i, fault in enumerate(faults) if fault is None):
            ids = templated(tokenizer, contexts[i], add_generation_prompt=True).tolist()
            entries[i]["dropped"] = "prompt too long"
            if len(ids) <= room:
                asked[i] = ids
        options = {"part": 1, "room": room, "max_new_tokens": limit}
        asking = [numbers[i] for i in asked]
        said = writer.continuations(list(asked.values()), asking, ends, **options)
        for i, one in zip(asked, said, strict=True):
            entries[i] = _answer_entry(contexts[i], one)
        return entries

    return answer


def _answer_entry(context: Messages, said: Said) -> Entry:
    if said.fault:
        return {"dropped": f"answer {said.fault}", "tokens": said.tokens}
    messages = [*context, {"role": "assistant", "content": said.text}]
    return {
        "document": {"messages": messages},
        "cut": not said.ended,
        "tokens": said.tokens,
    }


def _said(tokenizer: Any, ids: Sequence[int], ends: Sequence[int], special: frozenset[int]) -> Said:
    ended = ids[-1] in ends
    words = ids[:-1] if ended else ids
    text = tokenizer.decode(words, skip_special_tokens=False)
    # A cut may leave part of a character.
    text = (text if ended else text.rstrip("\ufffd")).strip()
    return Said(text, len(ids), ended, _fault(words, text, special))


def _fault(ids: Sequence[int], text: str, special: frozenset[int]) -> str | None:
    if not special.isdisjoint(ids):
        return "with special tokens"
    if not text:
        return "empty"
    if "\ufffd" in text:
        return "not text"
    return "repetitive" if _is_repetitive(ids) else None


def _is_repetitive(ids: Sequence[int]) -> bool:
    """Whether a long text says the same again and again."""
    grams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return len(ids) >= _LONG and len(set(grams)) < _DISTINCT * len(grams)
