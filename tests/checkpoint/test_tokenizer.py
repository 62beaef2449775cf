"""Tokenizers built from GGUF files, against their definitions and against the published ones."""

import json
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from jaxopt_models.checkpoint import tokenizer
from jaxopt_models.errors import UserError

TEXTS = [
    "Hello world",
    " two  spaces ",
    "In 2024: 1234567 of them, 3.14 each.",
    "naïve café, Привет, 日本語のテキスト, \U0001f600",
    "def f(x):\n\treturn x\n\n\nprint(f(1))\r\n",
    "it's we'll I'VE",
]


def write(path, model, tokens, settings):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for add, value in settings.items():
        getattr(writer, add)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


MERGES = ["1 2", "12 3", "Ġ t", "h e", "Ġt he", "l l"]
BYTES = sorted(ByteLevel.alphabet())


@pytest.fixture
def byte_level(tmp_path):
    """A tokenizer of bytes, six merges and three marked tokens, under a pre-tokenizer's name."""

    def build(pre, **settings):
        marked = ["<s>", "</s>", "<tool>"]
        tokens = marked + BYTES + [merge.replace(" ", "") for merge in MERGES] + ["whole"]
        types = [3, 3, 4] + [1] * (len(tokens) - 3)
        table = {
            "add_tokenizer_pre": pre,
            "add_token_types": types,
            "add_token_merges": MERGES,
            "add_bos_token_id": 0,
            "add_eos_token_id": 1,
        }
        return tokenizer.from_gguf(write(tmp_path / "t.gguf", "gpt2", tokens, table | settings))

    return build


def pieces(tok, text, **options):
    return tok.convert_ids_to_tokens(tok(text, **options).input_ids)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_round_trip(byte_level, pre, text):
    tok = byte_level(pre)
    assert tok.decode(tok(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("gpt-2", ["123", "4"]),
        ("llama-bpe", ["123", "4"]),
    ],
)
def test_pre_tokenizers_split_digits_as_named(byte_level, pre, digits):
    assert pieces(byte_level(pre), "1234", add_special_tokens=False) == digits


def test_pre_tokenizers_bound_merges(byte_level):
    # "ll" is a token, but GPT-2 and Qwen2 keep "'ll" together and apart from what precedes it.
    assert pieces(byte_level("gpt-2"), "the'll") == ["t", "he", "'", "ll"]
    assert pieces(byte_level("gpt-2"), "I'LL the") == ["I", "'", "L", "L", "Ġthe"]


def test_llama3_keeps_whole_words_that_no_merge_builds(byte_level):
    assert pieces(byte_level("llama-bpe"), "whole") == ["<s>", "whole"]
    assert pieces(byte_level("gpt-2"), "whole") == ["w", "h", "o", "l", "e"]


def test_qwen_normalizes_to_composed_characters(byte_level):
    tok = byte_level("qwen2")
    assert tok.decode(tok("e\u0301").input_ids) == "\u00e9"


def test_marked_tokens_are_found_in_text(byte_level):
    tok = byte_level("smollm")
    assert pieces(tok, "a<tool></s>b") == ["a", "<tool>", "</s>", "b"]
    ids = tok("a<tool></s>b").input_ids
    assert tok.decode(ids, skip_special_tokens=True) == "a<tool>b"  # user-defined is not special
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (0, 1, None)


def test_flags_surround_the_text(byte_level):
    assert pieces(byte_level("smollm"), "a") == ["a"]
    both = byte_level("smollm", add_add_bos_token=True, add_add_eos_token=True)
    assert pieces(both, "a") == ["<s>", "a", "</s>"]
    assert pieces(both, "a", add_special_tokens=False) == ["a"]
    assert pieces(byte_level("llama-bpe", add_add_bos_token=False), "a") == ["a"]


def test_a_flag_without_its_token_is_an_error(tmp_path):
    path = write(
        tmp_path / "t.gguf",
        "gpt2",
        BYTES,
        {"add_tokenizer_pre": "smollm", "add_add_eos_token": True},
    )
    with pytest.raises(UserError, match="eos_token is to be added but has no id"):
        tokenizer.from_gguf(path)


def test_chat_template_comes_along(byte_level):
    tok = byte_level("smollm", add_chat_template="{{ messages[0]['content'] }}!")
    chat = [{"role": "user", "content": "hi"}]
    assert tok.apply_chat_template(chat, tokenize=False) == "hi!"


@pytest.mark.parametrize("pre", ["default", "tekken"])
def test_unknown_pre_tokenizer_is_an_error(byte_level, pre):
    with pytest.raises(UserError, match=f"t.gguf: pre-tokenizer '{pre}' is not known"):
        byte_level(pre)


def test_unknown_model_is_an_error(tmp_path):
    path = write(tmp_path / "t.gguf", "t5", ["a"], {})
    with pytest.raises(UserError, match="t.gguf: tokenizer model 't5' is not supported"):
        tokenizer.from_gguf(path)


WORDS = ["▁t", "he", "▁the", "th", "er", "▁▁", "in", "ing", "her", "▁th", "e▁", "aa", "aaa"]
LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz'<>"]


@pytest.fixture
def sentencepiece(tmp_path):
    """A SentencePiece vocabulary: marked tokens, bytes, words ranked by score, letters."""

    def build(**settings):
        marked = ["<unk>", "<s>", "</s>", "\n\n"]
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        tokens = marked + bytes_ + WORDS + LETTERS
        types = [2, 3, 3, 4] + [6] * 256 + [1] * (len(WORDS) + len(LETTERS))
        scores = [0.0] * 260 + [-float(i) for i in range(len(WORDS) + len(LETTERS))]
        table = {
            "add_token_scores": scores,
            "add_token_types": types,
            "add_unk_token_id": 0,
            "add_bos_token_id": 1,
            "add_eos_token_id": 2,
        }
        return tokenizer.from_gguf(write(tmp_path / "t.gguf", "llama", tokens, table | settings))

    return build


def joined_by_score(text):
    """SentencePiece's definition: join the leftmost neighbours whose union scores highest."""
    rank = {word: i for i, word in enumerate(WORDS)}
    parts = list(text.replace(" ", "▁"))
    while True:
        unions = [(rank.get(a + b, len(rank)), i) for i, (a, b) in enumerate(pairwise(parts))]
        best, i = min(unions, default=(len(rank), 0))
        if best == len(rank):
            return parts
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


def test_sentencepiece_joins_by_score(sentencepiece):
    tok = sentencepiece(add_add_space_prefix=False)
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("  theringa"), size=30))
        assert pieces(tok, text, add_special_tokens=False) == joined_by_score(text), text


def test_sentencepiece_falls_back_to_bytes(sentencepiece):
    tok = sentencepiece(add_add_space_prefix=False)
    assert pieces(tok, "é", add_special_tokens=False) == ["<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", ["the thing", " the", "a é b\U0001f600", "a  b   c"])
def test_sentencepiece_round_trip(sentencepiece, prefix, text):
    tok = sentencepiece(add_add_space_prefix=prefix)
    assert tok.decode(tok(text).input_ids, skip_special_tokens=True) == text


def test_sentencepiece_prefix_and_bos_are_the_default(sentencepiece):
    assert pieces(sentencepiece(), "the") == ["<s>", "▁the"]
    without = sentencepiece(add_add_space_prefix=False, add_add_bos_token=False)
    assert pieces(without, "the") == joined_by_score("the")


def test_sentencepiece_finds_user_defined_tokens_first(sentencepiece):
    tok = sentencepiece(add_add_space_prefix=False, add_add_bos_token=False)
    assert pieces(tok, "a\n\nb") == ["a", "\n\n", "b"]
    assert tok.decode(tok("a\n\nb").input_ids) == "a\n\nb"


def test_sentencepiece_prefixes_every_stretch_of_text(sentencepiece):
    # As in the published tokenizer of Llama 2: what follows a marked token begins a stretch.
    assert pieces(sentencepiece(), "a</s>the") == ["<s>", "▁", "a", "</s>", "▁the"]


def test_vocabulary_without_scores_is_an_error(tmp_path):
    path = write(tmp_path / "t.gguf", "llama", ["a", "b"], {})
    with pytest.raises(UserError, match="no scores or types"):
        tokenizer.from_gguf(path)


def test_saved_tokenizer_is_read_back(tmp_path, byte_level):
    tok = byte_level("smollm", add_add_bos_token=True)
    tok.save_pretrained(tmp_path / "saved")
    # With a config beside it, transformers could pick a class that splits text by its own rules.
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = tokenizer.from_directory(tmp_path / "saved")
    for text in TEXTS:
        assert again(text).input_ids == tok(text).input_ids


def test_directory_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("text", ["", "[", "{}", '{"version": "1.0", "added_tokens": []}'])
def test_malformed_tokenizer_file_is_an_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        tokenizer.from_directory(tmp_path)


def test_code_in_a_directory_is_never_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        tokenizer.from_directory(tmp_path)


REAL = {"smollm2-135m": "smollm2", "gemma3-270m": "gemma3"}


@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies_give_the_published_ids(name, builtin, real_run):
    path = Path(__file__).parents[1] / "golden" / "hf" / "tokenizers.json"
    if not path.exists():
        pytest.skip("tokenizers.json has not been made")
    expected = json.loads(path.read_text())[REAL[name]]
    tok = tokenizer.from_gguf(builtin(name))
    assert tok.bos_token_id == (expected["bos"] or tok.bos_token_id)
    for case in expected["cases"]:
        assert tok(case["text"], add_special_tokens=False).input_ids == case["ids"], case["text"]
        assert tok.decode(case["ids"]) == case["text"]
    run = real_run(REAL[name])
    assert tok(str(run["text"])).input_ids[: run["tokens"].shape[1]] == run["tokens"][0].tolist()
    if "chat" in expected:
        chat = expected["chat"]
        text = tok.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
        assert text == chat["text"]
        assert tok(text, add_special_tokens=False).input_ids == chat["ids"]
