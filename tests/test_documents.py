"""Documents: what is read of a file, which tokens are learnt, and how they share rows."""

import copy
import json

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_models.documents import Document, pack_documents, read_documents
from jaxopt_models.errors import UserError

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat(byte_tokenizer, monkeypatch):
    """A tokenizer with a chat template, whose ids are bytes."""
    monkeypatch.setattr(byte_tokenizer, "chat_template", TEMPLATE)
    return byte_tokenizer


def _file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


RECORDS = [{"text": "naïve", "messages": None}, {"text": None, "messages": TALK}]


def test_every_kind_of_file_holds_the_same(chat, tmp_path, monkeypatch):
    lines = "".join(json.dumps(record) + "\n\n" for record in RECORDS)
    by_line = read_documents(_file(tmp_path, "some.jsonl", lines), chat)
    by_list = read_documents(_file(tmp_path, "some.json", json.dumps(RECORDS)), chat)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(RECORDS).to_parquet(tmp_path / "some.parquet")
    by_row = read_documents(str(tmp_path / "some.parquet"), chat)
    for found in (by_line, by_list, by_row):
        assert [chat.decode(one.tokens) for one in found] == [
            "naïve",
            "<system>be brief\n<user>one\n<assistant>two\n<user>three\n<assistant>four\n",
        ]
        assert all(one.learnt.all() and one.tokens.dtype == np.int32 for one in found)
    (line,) = read_documents(_file(tmp_path, "lines.jsonl", '{"text": "a\u2028b"}'), chat)
    assert chat.decode(line.tokens) == "a\u2028b"
    (whole,) = read_documents(_file(tmp_path, "some.txt", "one\n\ntwo"), chat)
    assert chat.decode(whole.tokens) == "one\n\ntwo"


def test_a_dataset_has_a_column_of_messages_or_text(chat, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, column in (("talks", "messages"), ("texts", "text"), ("numbers", "number")):
        (tmp_path / name).mkdir()
        value = {"messages": TALK, "text": "a b", "number": 2}[column]
        _file(tmp_path / name, "train.jsonl", json.dumps({"id": 7, column: value}))
    (talk,) = read_documents(f"hf:{tmp_path / 'talks'}", chat)
    assert "<assistant>two" in chat.decode(talk.tokens)
    (text,) = read_documents(f"hf:{tmp_path / 'texts'}", chat)
    assert chat.decode(text.tokens) == "a b"
    with pytest.raises(UserError, match="no column 'messages' or 'text', only id, number"):
        read_documents(f"hf:{tmp_path / 'numbers'}", chat)


def test_a_text_ends(byte_tokenizer, tmp_path):
    ending = copy.deepcopy(byte_tokenizer)
    ending.eos_token = "!"
    (one,) = read_documents(_file(tmp_path, "some.jsonl", '{"text": "ab"}'), ending)
    assert ending.decode(one.tokens) == "ab!" and one.learnt.all()


def test_what_the_assistant_says_is_learnt(chat, tmp_path):
    """Its words and what ends them, not what announces them."""
    file = _file(tmp_path, "talk.jsonl", json.dumps({"messages": TALK}))
    (one,) = read_documents(file, chat, "assistant")
    assert chat.decode(one.tokens[one.learnt]) == "two\nfour\n"


def test_a_template_that_looks_ahead_is_refused(chat, tmp_path, monkeypatch):
    """Here only the last answer keeps its end, as templates that drop thoughts do."""
    ahead = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last %}.{% endif %}"
    monkeypatch.setattr(chat, "chat_template", ahead + "{% endfor %}")
    file = _file(tmp_path, "talk.jsonl", json.dumps({"messages": TALK}))
    with pytest.raises(UserError, match=r"talk.jsonl, record 1: .* message 3 otherwise once more"):
        read_documents(file, chat, "assistant")
    assert read_documents(file, chat)[0].learnt.all()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{', r"a\.jsonl, line 2: no JSON"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', r"a\.jsonl, record 2: needed is a 'text'"),
        ("a.jsonl", '{"messages": [{"content": "b"}]}', r"record 1: needed .* a 'role' and"),
        ("a.jsonl", '{"messages": "b"}', r"record 1: needed .* a 'role' and"),
        ("a.jsonl", "[1]", r"record 1: needed"),
        ("a.json", "{", r"a\.json is no JSON"),
        ("a.json", '{"text": "a"}', r"a\.json holds no list of documents"),
        ("a.parquet", "none", r"cannot read .*a\.parquet"),
        ("a.jsonl", '{"messages": []}', r"record 1: the tokenizer has no chat template"),
    ],
)
def test_what_is_no_document_is_named(byte_tokenizer, tmp_path, monkeypatch, name, text, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        read_documents(_file(tmp_path, name, text), byte_tokenizer)


def test_a_text_has_no_assistant(byte_tokenizer, tmp_path):
    file = _file(tmp_path, "some.jsonl", '{"text": "ab"}')
    with pytest.raises(UserError, match="record 1: a text has no assistant; learn all of it"):
        read_documents(file, byte_tokenizer, "assistant")


def test_a_template_that_fails_is_named(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", "{{ raise_exception('no system') }}")
    file = _file(tmp_path, "talk.jsonl", json.dumps({"messages": TALK}))
    with pytest.raises(UserError, match="record 1: the chat template refuses .*no system"):
        read_documents(file, chat)


def _document(first: int, learnt: list[bool]) -> Document:
    return Document(np.arange(first, first + len(learnt), dtype=np.int32), np.array(learnt, bool))


@given(st.lists(st.lists(st.booleans(), max_size=12), min_size=1, max_size=20), st.integers(2, 8))
def test_every_learnt_token_has_what_came_before_it(masks, length):
    """In its row, from the beginning of its document or the cut before it, and nothing else."""
    documents = [_document(100 * i, mask) for i, mask in enumerate(masks)]
    wanted = {}  # token to learn -> the first of its piece
    for tokens, learnt in documents:
        for at in np.flatnonzero(learnt):
            if at % length:
                wanted[int(tokens[at])] = int(tokens[at - at % length])
    if not wanted:
        with pytest.raises(UserError, match="nothing to learn"):
            pack_documents(documents, length)
        return
    rows = pack_documents(documents, length)
    assert {array.shape for array in rows.values()} == {(len(rows["tokens"]), length)}
    found = {}
    for tokens, starts, mask in zip(*rows.values(), strict=True):
        for at in np.flatnonzero(mask & (np.arange(length) > starts)):
            before = tokens[starts[at] : at + 1]
            np.testing.assert_array_equal(before, before[0] + np.arange(len(before)))
            found[int(before[-1])] = int(before[0])
        assert np.all(starts <= np.arange(length)) and np.all(np.diff(starts) >= 0)
    assert found == wanted


def test_rows_are_filled():
    sizes = [5, 3, 2, 6, 4, 4]
    documents = [_document(10 * i, [True] * size) for i, size in enumerate(sizes)]
    rows = pack_documents(documents, 8)
    assert rows["mask"].all() and len(rows["mask"]) == 3
    with pytest.raises(UserError, match="rows of 1 tokens train nothing"):
        pack_documents(documents, 1)
