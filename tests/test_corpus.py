"""Text that a model writes: what is kept of it, and the same bytes in any batch, after any kill."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import pytest
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import jaxopt_models as jom
from jaxopt_models import cli, corpus_requests, export_hf
from jaxopt_models.chat_turns import find_turn
from jaxopt_models.checkpoint import hub
from jaxopt_models.corpus import write_corpus
from jaxopt_models.corpus_requests import read_prompts
from jaxopt_models.documents import read_documents
from jaxopt_models.errors import UserError
from jaxopt_models.generate import Generation, generate
from jaxopt_models.models.config import ModelConfig

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}\n{{ m.content }}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant\n{% endif %}"
)
# Prompts and answers fit the least buffers, so that a batch size is compiled once.
SHORT: dict[str, Any] = {"max_prompt_tokens": 20, "max_answer_tokens": 20, "batch_size": 4}


@pytest.fixture(scope="module")
def model() -> jom.Model:
    """Random weights over few letters, so that turns end soon; "[" and "]" are special."""
    letters = sorted(set("Why so? name 12 apples (yes) 2 + 2 = user assistant system\n"))
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in "[]"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="]")
    tokenizer.chat_template = TEMPLATE
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "bos_token_id": tokenizer.convert_tokens_to_ids("["),
            "eos_token_id": tokenizer.eos_token_id,
        }
    )
    return jom.Model(config, jom.init(config, jax.random.key(1)), tokenizer, "tiny")


@pytest.fixture
def scripted(model, monkeypatch):
    """Makes the model say given texts, one after the other; rows behind them are copies."""

    def script(*said: str) -> None:
        rest = iter(said)

        def speak(config, params, prompts, *, request_ids, **options) -> Generation:
            rows = {}
            for request in request_ids:
                if request not in rows:
                    words = next(rest, None)
                    if words is None:
                        raise KeyboardInterrupt
                    rows[request] = model.tokenizer.encode(words, add_special_tokens=False)
            return Generation(tokens=[rows[request] for request in request_ids])

        monkeypatch.setattr(corpus_requests, "generate", speak)

    return script


def _talk(asked: str, answered: str) -> dict[str, Any]:
    roles = {"user": asked, "assistant": answered}
    return {"messages": [{"role": role, "content": said} for role, said in roles.items()]}


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conversations_are_the_same_in_any_batch(model, tmp_path):
    found = []
    for size in (4, 6):
        out = tmp_path / f"{size}.jsonl"
        report = write_corpus(model, out, 12, **dict(SHORT, batch_size=size))
        found.append((out.read_bytes(), report.documents, report.tokens, report.dropped))
        assert not out.with_name(f"{out.name}.partial").exists()
    assert found[0] == found[1] and found[0][1] == 12
    write_corpus(model, tmp_path / "other.jsonl", 12, seed=1, **SHORT)
    assert (tmp_path / "other.jsonl").read_bytes() != found[0][0]


def test_conversations_are_documents_to_learn_answers_of(model, tmp_path):
    out = tmp_path / "talks.jsonl"
    report = write_corpus(model, out, 6, **SHORT)
    documents = read_documents(str(out), model.tokenizer, "assistant")
    assert len(documents) == 6 == len({line["messages"][0]["content"] for line in _lines(out)})
    for document, line in zip(documents, _lines(out), strict=True):
        asked, answered = line["messages"]
        assert (asked["role"], answered["role"]) == ("user", "assistant")
        learnt = model.tokenizer.decode(document.tokens[document.learnt])
        assert learnt == answered["content"] + "]\n"
    # More tokens were sampled than are left, by white space and ends.
    assert report.tokens >= sum(len(m["content"]) for line in _lines(out) for m in line["messages"])


def test_a_killed_run_goes_on(model, tmp_path, monkeypatch):
    """With what is complete, in batches of another size, and with no request asked twice."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    write_corpus(model, whole, 12, **SHORT)
    asked = []

    def dying(*arguments, request_ids, **options):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(set(request_ids))
        return generate(*arguments, request_ids=request_ids, **options)

    monkeypatch.setattr(corpus_requests, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(model, out, 12, **SHORT)
    partial = tmp_path / "killed.jsonl.partial"
    assert not out.exists() and len(_lines(partial)) == 1 + 8
    with partial.open("a") as file:
        file.write('{"document": {"mess')
    asked.append(set())
    write_corpus(model, out, 12, **dict(SHORT, batch_size=6))
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()
    assert min(set.union(*asked[6:])) == 8


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"kind": "texts"}, "kind"),
        ({"max_answer_tokens": 8}, "max_answer_tokens"),
        ({"prompts": [[{"role": "user", "content": "so"}]]}, "prompts"),
        ({}, "model"),
    ],
)
def test_other_arguments_do_not_go_on(model, tmp_path, scripted, change, key):
    scripted("me]", "yes]")
    with pytest.raises(KeyboardInterrupt):
        write_corpus(model, tmp_path / "a.jsonl", 2, **dict(SHORT, batch_size=1))
    other = jom.init(model.config, jax.random.key(2))
    asked = model if change else jom.Model(model.config, other, model.tokenizer)
    with pytest.raises(UserError, match=rf"a\.jsonl\.partial was begun with another {key}"):
        write_corpus(asked, tmp_path / "a.jsonl", 2, **{**SHORT, **change})


SAME = "so so so so so so so so so so so so so]"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (["]"], "prompt empty"),
        ([" ]"], "prompt empty"),
        (["name"], "prompt unfinished"),
        (["a[user]"], "prompt with special tokens"),
        ([SAME], "prompt repetitive"),
        (["yes yes yes yes yes yes yes yes yes yes yes]"], "prompt repetitive"),
        (["nay]", "]"], "answer empty"),
        (["nay]", "a[m"], "answer with special tokens"),
        (["nay]", SAME], "answer repetitive"),
        (["me]", "other]"], "duplicate"),
    ],
)
def test_what_is_dropped(model, tmp_path, scripted, said, reason):
    scripted("me]", "yes]", *said, "you]", " no one")
    report = write_corpus(model, tmp_path / "a.jsonl", 2, batch_size=1)
    assert _lines(tmp_path / "a.jsonl") == [_talk("me", "yes"), _talk("you", "no one")]
    assert report.dropped == {reason: 1} and report.documents == 2 and report.cut == 1


def test_a_short_text_may_repeat_itself(model, tmp_path, scripted):
    scripted("so so so so so]", "yes]")
    assert write_corpus(model, tmp_path / "a.jsonl", 1, batch_size=1).dropped == {}


def test_a_model_that_writes_next_to_nothing_is_given_up(model, tmp_path, scripted):
    scripted(*["]"] * 64)
    with pytest.raises(UserError, match=r"of 64 requests only 0 .*prompt empty: 64\); lower the"):
        write_corpus(model, tmp_path / "a.jsonl", 5, batch_size=16)
    assert not (tmp_path / "a.jsonl").exists()


def test_texts_need_no_chat_template(model, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend_tokenizer)
    bare.eos_token = "]"
    plain = jom.Model(model.config, model.params, bare)
    found = []
    for size in (4, 6):
        out = tmp_path / f"{size}.jsonl"
        options = dict(SHORT, batch_size=size)
        write_corpus(plain, out, 5, kind="texts", **options)
        found.append(out.read_bytes())
        assert len(read_documents(str(out), bare)) == 5
    assert found[0] == found[1]
    with pytest.raises(UserError, match="no chat template, so there are no turns"):
        write_corpus(plain, tmp_path / "a.jsonl", 5)


def test_given_prompts_are_answered(model, tmp_path):
    """Each in its place, after its whole conversation, however often it is asked."""
    ruled = [{"role": "system", "content": "name me"}, {"role": "user", "content": "you"}]
    asked = [[{"role": "user", "content": said}] for said in ("no", "yes", "no", "so " * 200)]
    options: dict[str, Any] = {"prompts": [ruled, *asked], **SHORT, "max_prompt_tokens": 44}
    report = write_corpus(model, tmp_path / "a.jsonl", **options)
    lines = _lines(tmp_path / "a.jsonl")
    assert report.dropped["prompt too long"] == 1
    assert len(lines) + sum(report.dropped.values()) == 5
    kept = [line["messages"][:-1] for line in lines]
    remaining = iter([ruled, *asked[:3]])
    assert kept and all(context in remaining for context in kept)
    write_corpus(model, tmp_path / "b.jsonl", 2, **options)
    first = _lines(tmp_path / "b.jsonl")
    assert first == lines[: len(first)]


def test_prompts_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two\u2028three \n")
    assert [p[0]["content"] for p in read_prompts(str(tmp_path / "a.txt"))] == [
        "one",
        "two\u2028three",
    ]
    talk = [{"role": "system", "content": "s"}, *_talk("one", "two")["messages"]]
    records = [{"prompt": "one"}, {"messages": talk}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_prompts(str(tmp_path / "a.jsonl")) == [
        [{"role": "user", "content": "one"}],
        talk[:2],
    ]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}')
    with pytest.raises(UserError, match=r"b\.jsonl, record 1: needed is a 'prompt'"):
        read_prompts(str(tmp_path / "b.jsonl"))


def test_a_turn_is_what_stands_around_words(model):
    encode = model.tokenizer.encode
    user = find_turn(model.tokenizer, [], "user")
    assert user == (tuple(encode("[user\n")), *encode("]"))
    talk = _talk("no", "yes")["messages"]
    assert find_turn(model.tokenizer, talk, "user").prefix == tuple(
        encode("[user\nno]\n[assistant\nyes]\n[user\n")
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}[{{ m.content | upper }}]{% endfor %}", "user says as it stands"),
        ("[user]", "user says as it stands"),
        ("{{ raise_exception('no') }}", "refuses a conversation"),
        ("{% for m in messages %}{{ m.content }}so{% endfor %}", "ends what a user says with ord"),
        ("{% for m in messages %}[{{ m.content }}{% endfor %}", "ends what a user says with ord"),
    ],
)
def test_templates_without_a_user_turn_are_refused(model, tmp_path, monkeypatch, template, message):
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=message):
        write_corpus(model, tmp_path / "a.jsonl", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "a.txt"}, r"a\.txt is to hold a JSON object a line"),
        ({"out": "here.jsonl"}, r"here\.jsonl exists already"),
        ({"out": "no/a.jsonl"}, "there is no directory .*no to write a.jsonl in"),
        ({"count": None}, "give a count or prompts"),
        ({"count": 0}, "count must be at least 1; it is 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"kind": "talks"}, "kind 'talks' is not known"),
        ({"kind": "texts", "prompts": [[]]}, "prompts are there to be answered"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_mistakes_are_named(model, tmp_path, options, message):
    (tmp_path / "here.jsonl").write_text("")
    given: dict[str, Any] = {"out": "a.jsonl", "count": 1} | options
    with pytest.raises(UserError, match=message):
        write_corpus(model, tmp_path / given.pop("out"), given.pop("count"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["here.jsonl"]


def test_batches_share_one_compilation(model, tmp_path, monkeypatch):
    """However long their prompts are."""
    shapes = []

    def watched(*arguments, max_new_tokens, max_prompt_tokens, **options):
        prompts = arguments[2]
        assert max(map(len, prompts)) <= max_prompt_tokens
        shapes.append((len(prompts), max_new_tokens, max_prompt_tokens))
        return generate(
            *arguments,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            **options,
        )

    monkeypatch.setattr(corpus_requests, "generate", watched)
    write_corpus(model, tmp_path / "a.jsonl", 8, **SHORT)
    assert len(shapes) > 4 and len(set(shapes)) == 2


def test_the_command_writes_and_says_what(model, tmp_path, monkeypatch, capsys):
    export_hf(tmp_path / "model", model)
    (tmp_path / "asked.txt").write_text("no\nyes\nso\n")
    out, figures = tmp_path / "a.jsonl", tmp_path / "figures.json"
    options = ["--max-prompt-tokens", "44", "--max-answer-tokens", "20", "--batch", "4"]
    command = ["corpus", tmp_path / "model", "--out", out, "--prompts", tmp_path / "asked.txt"]
    line = ["jaxopt-models", *command, *options, "--json", figures]
    monkeypatch.setattr("sys.argv", [str(part) for part in line])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    found = json.loads(figures.read_text())
    assert not stop.value.code and found["documents"] == len(_lines(out)) > 0
    assert f"{len(_lines(out))} conversations" in capsys.readouterr().out


@pytest.mark.slow
def test_smollm2_asks_and_answers(tmp_path):
    try:
        hub.resolve("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))
    real = jom.load("smollm2-135m")
    turn = find_turn(real.tokenizer, [], "user")
    before = real.tokenizer.decode(turn.prefix)
    assert before.startswith("<|im_start|>system\nYou are a helpful")
    assert before.endswith("<|im_end|>\n<|im_start|>user\n")
    assert turn.end == real.tokenizer.convert_tokens_to_ids("<|im_end|>")
    lengths: dict[str, Any] = {"max_prompt_tokens": 32, "max_answer_tokens": 6}
    out = tmp_path / "a.jsonl"
    write_corpus(real, out, 2, temperature=0.7, top_p=0.9, batch_size=2, **lengths)
    for document in read_documents(str(out), real.tokenizer, "assistant"):
        assert document.learnt.any()
    asked = [line["messages"][0]["content"] for line in _lines(out)]
    assert all(" " in question for question in asked) and all(a != b for a, b in pairwise(asked))
