"""Turns of a chat template: what stands before somebody's words, and what ends them.

A template is a program, so its turns are found by example: one conversation is written with several
last messages, and what all of these begin and end with is the template's own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxopt_models.documents import templated
from jaxopt_models.errors import UserError

# No two begin or end alike, so that nothing of them is taken for the template's.
_EXAMPLES = ("Why so?", "name 12 apples", "(yes)", "2 + 2 =")


class Turn(NamedTuple):
    """Tokens around what somebody says.

    Attributes:
      prefix: ids before it, from the beginning of the conversation.
      end: the id that ends it; None where that is ordinary text, which words may hold too.
    """

    prefix: tuple[int, ...]
    end: int | None


def find_turn(tokenizer: Any, before: Sequence[dict[str, str]], role: str) -> Turn:
    """The turn of `role` after the messages `before`.

    Raises:
      UserError: there is no chat template, or it refuses such a conversation, or does not write
        what is said as it stands.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "the tokenizer has no chat template, so there are no turns to write; write texts"
        )
    rows = [
        templated(tokenizer, [*before, {"role": role, "content": said}]).tolist()
        for said in _EXAMPLES
    ]
    prefix = _common(rows)
    suffix = _common([row[::-1] for row in rows])[::-1]
    for row, said in zip(rows, _EXAMPLES, strict=True):
        if tokenizer.decode(row[len(prefix) : len(row) - len(suffix)]).strip() != said:
            raise UserError(
                f"the chat template does not write what the {role} says as it stands, so its turn "
                "cannot be told apart; use another tokenizer or template"
            )
    return Turn(tuple(prefix), suffix[0] if suffix and _is_added(tokenizer, suffix[0]) else None)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that stand for no text: ends, turns, padding."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def _is_added(tokenizer: Any, token: int) -> bool:
    return token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids


def _common(rows: Sequence[Sequence[int]]) -> list[int]:
    """The longest beginning that all rows share."""
    shared = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared
