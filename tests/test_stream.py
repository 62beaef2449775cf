"""Tokens as they come are those of `generate`, in pieces."""

import functools
from typing import Any

import jax
import pytest
from small_models import LLAMA, PROMPTS

import jaxopt_models as jom
from jaxopt_models.checkpoint.tokenizer import text_as_it_comes
from jaxopt_models.decoding import decode_loop
from jaxopt_models.errors import UserError
from jaxopt_models.speculative import DraftModel, NGram

OPTIONS: dict[str, Any] = {"max_new_tokens": 20, "temperature": [0.0, 1.0, 0.7]}


@functools.cache
def params():
    return jom.init(LLAMA, jax.random.key(0))


def pieces(**options: Any) -> list[list[list[int]]]:
    return list(jom.stream(LLAMA, params(), PROMPTS, **(OPTIONS | options)))


def joined(found: list[list[list[int]]]) -> list[list[int]]:
    return [sum(row, []) for row in zip(*found, strict=True)]


@pytest.mark.parametrize("passes", [1, 3, 100])
@pytest.mark.parametrize("draft", ["none", "ngram", "self"])
def test_pieces_are_what_is_generated(draft, passes):
    """Also where rows end at different times, and the last piece is short."""
    free = jom.generate(LLAMA, params(), PROMPTS, **OPTIONS).tokens
    count = 3
    own = DraftModel(LLAMA, params(), count)
    drafters = {"none": None, "ngram": NGram(count=count), "self": own}
    options = {"draft": drafters[draft], "eos_token_ids": (free[1][4],)}
    expected = jom.generate(LLAMA, params(), PROMPTS, **(OPTIONS | options)).tokens
    found = pieces(passes=passes, **options)
    assert joined(found) == expected and len(set(map(len, expected))) > 1
    assert all(len(row) == 1 for row in found[0])
    most = passes * (1 if draft == "none" else count + 1)
    assert all(len(row) <= most for piece in found[1:] for row in piece)
    assert any(map(any, found[-1]))


def test_pieces_of_any_size_share_a_program():
    loop: Any = decode_loop
    pieces(passes=2)
    before = loop._cache_size()
    pieces(passes=7)
    jom.generate(LLAMA, params(), PROMPTS, **OPTIONS)
    assert loop._cache_size() == before


def test_a_piece_is_of_some_passes():
    with pytest.raises(UserError, match="passes must be at least 1; it is 0"):
        pieces(passes=0)


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_text_comes_in_whole_characters(size):
    text = "naïve → 日本, done"
    ids = list(text.encode())
    parts = list(text_as_it_comes(Bytes(), (ids[i : i + size] for i in range(0, len(ids), size))))
    assert "".join(parts) == text and not any("\N{REPLACEMENT CHARACTER}" in p for p in parts)
    assert len(parts) > 1 or size == 50


def test_text_that_ends_inside_of_a_character_is_said_to():
    parts = list(text_as_it_comes(Bytes(), iter([[104, 105], [0xC3]])))
    assert parts == ["hi", "\N{REPLACEMENT CHARACTER}"]
