"""Tokenizers: from a Hugging Face directory, or built from a GGUF file's vocabulary.

A GGUF file holds tokens, merges or scores, and the *name* of the rule that splits text before the
merges apply. A wrong rule goes unnoticed: text still round-trips, but into tokens the model has
seldom seen, so an unknown name is an error here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from jaxopt_models.checkpoint.gguf_file import GgufFile
from jaxopt_models.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types in GGUF

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _ByteLevelRule:
    """How text is split before byte-level merges.

    Attributes:
      pattern: regular expression of the pieces; None is GPT-2's, which the byte level brings along.
      single_digits: every digit is a piece, whatever the pattern says.
      whole_words: a piece that is a token stays whole even where merges would not build it.
      nfc: text is normalized first.
      add_bos: where the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False


_LLAMA3 = _ByteLevelRule(
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}", whole_words=True, add_bos=True
)
_RULES = {
    "gpt-2": _ByteLevelRule(),
    "smollm": _ByteLevelRule(single_digits=True),
    "qwen2": _ByteLevelRule(f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}", nfc=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
}


def from_directory(directory: str | Path) -> Any:
    """The tokenizer saved beside a model's weights; code from the directory is never run.

    Raises:
      UserError: if there is none, or none that transformers can read without running code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # for a malformed file, tokenizers raises nothing more specific
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{directory}: no tokenizer can be loaded ({reason}); "
            "put tokenizer.json and tokenizer_config.json there"
        ) from error


def from_gguf(path: str | Path) -> Any:
    """Builds a transformers `PreTrainedTokenizerFast` from a GGUF file.

    Raises:
      UserError: for a tokenizer model or pre-tokenizer name that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    file = GgufFile(path)
    prefix = "tokenizer.ggml."
    settings = {key.removeprefix(prefix): value for key, value in file.metadata.items()}
    kind, tokens = settings.get("model"), settings.get("tokens")
    if kind not in _BUILDERS or not tokens:
        raise UserError(
            f"{path}: tokenizer model {kind!r} is not supported, only {', '.join(_BUILDERS)}; "
            "use the tokenizer of the model's safetensors checkpoint"
        )
    tokenizer, adds_bos = _BUILDERS[kind](file.path, settings)
    _mark(tokenizer, tokens, settings.get("token_type", ()))
    named = {
        role: tokens[settings[f"{key}_token_id"]]
        for role, key in _ROLES.items()
        if f"{key}_token_id" in settings
    }
    added = {
        "bos_token": settings.get("add_bos_token", adds_bos),
        "eos_token": settings.get("add_eos_token", False),
    }
    for role, is_added in added.items():
        if is_added and role not in named:
            raise UserError(f"{path}: {role} is to be added but has no id; convert the model again")
    before, after = ([named[role]] if added[role] else [] for role in added)
    _surround(tokenizer, before, after)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        **named,
    )


def _byte_level(path: Path, settings: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """GPT-2's kind, merges of bytes within pieces of text; and whether BOS is added by default."""
    name = settings.get("pre")
    if name not in _RULES:
        raise UserError(
            f"{path}: pre-tokenizer {name!r} is not known, only {', '.join(_RULES)}; "
            "use the tokenizer of the model's safetensors checkpoint"
        )
    rule = _RULES[name]
    tokens, merges = settings["tokens"], settings.get("merges", [])
    tokenizer = Tokenizer(
        BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in merges],
            ignore_merges=rule.whole_words,
        )
    )
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.single_digits else []
    if rule.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def _sentencepiece(path: Path, settings: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE as in Llama 2 and Gemma: spaces are "▁", unknown characters are bytes."""
    tokens, scores, types = (settings.get(key) for key in ("tokens", "scores", "token_type"))
    if tokens is None or scores is None or types is None:
        raise UserError(f"{path}: the vocabulary has no scores or types; convert the model again")
    if settings.get("remove_extra_whitespaces", False):
        raise UserError(f"{path}: a tokenizer that removes extra whitespace is not supported")
    tokenizer = Tokenizer(
        BPE(
            {token: i for i, token in enumerate(tokens)},
            _merges_by_score(tokens, scores, types),
            unk_token=tokens[settings.get("unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    leading = settings.get("add_space_prefix", True)
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *spaces] if leading else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if leading else steps)
    return tokenizer, True


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def text_as_it_comes(tokenizer: Any, pieces: Iterable[Sequence[int]]) -> Iterator[str]:
    """Text of the ids of a row, which come in pieces; a character waits for all of its tokens.

    Args:
      tokenizer: its `decode` leaves out special tokens, if told to.
      pieces: ids, each of which comes once.
    """
    ids: list[int] = []
    text, said = "", 0
    for piece in pieces:
        ids += piece
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(text) > said and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[said:]
            said = len(text)
    if len(text) > said:
        yield text[said:]


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Merges that give what SentencePiece gives, which has none but scores.

    It joins the two neighbours whose union is the token of highest score, however that token is
    split. So every split of a token into two tokens is a merge, ranked by the score of the token.
    """
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
    return [
        (token[:cut], token[cut:])
        for token in (tokens[i] for i in ranked if types[i] == _NORMAL)
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _mark(tokenizer: Tokenizer, tokens: Sequence[str], types: Iterable[int]) -> None:
    """Tells which tokens are found in text before all else; those not user-defined are special."""
    marked = {
        token: kind != _USER_DEFINED
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    for special in (True, False):
        chosen = [token for token, is_special in marked.items() if is_special == special]
        added = [AddedToken(token, special=special, normalized=False) for token in chosen]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _surround(tokenizer: Tokenizer, before: list[str], after: list[str]) -> None:
    """Puts tokens before and after every encoded text."""
    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*before, *after}],
        )
