"""The bench's texts, made from a package of a few pages that is built here."""

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from jaxopt_models.bench import texts
from jaxopt_models.errors import UserError

FOLDER = "usr/share/doc/prose/html"
PAGES = {
    "b.html": "<p>{b}</p><p>short</p>",
    "a/z.html": "<div class='para'>{az}<ul><li>{li}</li></ul></div><p>{az}</p>",
    "a.html": "<table><tr><p>{table}</td></table><p>{a}<br>and\n\t<b>more</b> &amp; more<p>{p}</p>",
    "a.txt": "<p>{txt}</p>",
}


def sentence(name: str) -> str:
    """Long enough to be kept, and recognizable."""
    return " ".join([name] * 150)


def archive(files: dict[str, bytes], compression: str = "xz") -> bytes:
    buffer = io.BytesIO()
    mode: Literal["w:xz", "w:gz"] = "w:xz" if compression == "xz" else "w:gz"
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, body in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, body in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body
        out += b"\n" * (len(body) % 2)
    return out


def package(
    version: str = "1.0",
    pages: dict[str, str] = PAGES,
    compression: str = "xz",
    name: str = "prose",
) -> bytes:
    control = f"Package: {name}\nVersion: {version}\nDescription: words\n more: of them\n"
    names = ("b", "az", "li", "table", "a", "p", "txt")
    filled = {
        f"{FOLDER}/{path}": page.format(**{n: sentence(n) for n in names}).encode()
        for path, page in pages.items()
    }
    return ar(
        {
            "debian-binary": b"2.0\n",
            f"control.tar.{compression}": archive({"control": control.encode()}, compression),
            f"data.tar.{compression}": archive(filled | {"usr/x.html": b"<p>outside"}, compression),
        }
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(texts, "_BLOCK", 1)


@pytest.fixture
def deb(tmp_path) -> Path:
    path = tmp_path / "any name.deb"
    path.write_bytes(package())
    return path


EXPECTED = [
    sentence("az"),
    sentence("a") + "and more & more",
    sentence("p"),
    sentence("b"),
]
TEXT = "\n\n".join(EXPECTED) + "\n"
PROSE = texts.Pages("prose", "1.0", FOLDER)
SOURCE = texts.TextSource("prose.txt", (PROSE,), hashlib.sha256(TEXT.encode()).hexdigest())


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_package_becomes_its_paragraphs_in_the_order_of_its_pages(tmp_path, compression):
    deb = tmp_path / "prose.deb"
    deb.write_bytes(package(compression=compression))
    (path,) = texts.build_texts(tmp_path / "new" / "folder", [deb], [SOURCE])
    assert path.read_bytes() == TEXT.encode()


def test_a_text_that_is_there_is_kept(tmp_path):
    (tmp_path / "prose.txt").write_bytes(TEXT.encode())
    assert texts.build_texts(tmp_path, [Path("missing.deb")], [SOURCE]) == [tmp_path / "prose.txt"]


def test_a_text_of_two_packages_as_documents(tmp_path, deb):
    verse = tmp_path / "verse.deb"
    verse.write_bytes(package(pages={"only.html": "<p>{b}</p><p>{txt}</p>"}, name="verse"))
    blocks = [*EXPECTED, sentence("txt")]  # what both have is there once
    lines = "".join(json.dumps({"text": block}) + "\n" for block in blocks)
    source = replace(
        SOURCE,
        file="prose.jsonl",
        pages=(PROSE, replace(PROSE, package="verse")),
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        size=None,
    )
    (path,) = texts.build_texts(tmp_path, [verse, deb], [source])
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == blocks


def test_a_long_text_is_thinned_evenly():
    page = "".join(f"<p>{sentence(f'{i:02d}')}</p>" for i in range(10))
    kept = [block[:2] for block in texts.compose([page], 3 * len(sentence("00")))]
    assert kept == ["00", "03", "06"]


def test_paragraphs_are_grouped_and_a_rest_is_left_out(monkeypatch):
    monkeypatch.setattr(texts, "_BLOCK", 2 * len(sentence("0")))
    page = "".join(f"<p>{sentence(str(i))}</p>" for i in range(5))
    pairs = [("0", "1"), ("2", "3")]
    assert texts.compose([page]) == ["\n\n".join(map(sentence, pair)) for pair in pairs]


def test_paragraphs_that_are_not_text_are_left_out():
    broken = b"<p>" + sentence("x").encode() + b"\xff</p>"
    hidden = "".join(f"<{tag}><p>{sentence('x')}</{tag}>" for tag in ("pre", "style", "head"))
    assert texts.compose([broken.decode("utf-8", "replace"), hidden]) == []


def test_apt_fetches_what_is_missing(tmp_path, monkeypatch):
    def apt(command, cwd, **options):
        assert command == ["apt-get", "download", "prose"]
        (cwd / "prose_1.0_all.deb").write_bytes(package())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(texts.subprocess, "run", apt)
    (path,) = texts.build_texts(tmp_path, sources=[SOURCE])
    assert path.read_text() == TEXT


def test_apt_failing_says_what_else_to_do(tmp_path, monkeypatch):
    def unable(command, **options):
        return subprocess.CompletedProcess(command, 100, stderr="W: old\nE: no such package\n")

    def missing(command, **options):
        raise FileNotFoundError

    for run, says in ((unable, r"E: no such package.*apt-get update.*--deb"), (missing, "--deb")):
        monkeypatch.setattr(texts.subprocess, "run", run)
        with pytest.raises(UserError, match=says):
            texts.build_texts(tmp_path, sources=[SOURCE])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no archive at all", "whole Debian package"),
        (package()[:-100], "data.tar.xz is cut short"),
        (package().replace(b"\xfd7zXZ", b"\xfd8zXZ"), "whole Debian package"),
        (ar({"debian-binary": b"2.0\n"}), "it has no control.tar"),
        (package("0.9", {"a.html": "<p>{a}"}), r"prose 0.9 gives another .* prose 1.0"),
        (package("1.0", {"a.html": "<p>{a}"}), "another version of Python"),
    ],
)
def test_a_wrong_package_is_one_line(tmp_path, content, says):
    deb = tmp_path / "prose.deb"
    deb.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        texts.build_texts(tmp_path / "out", [deb], [SOURCE])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_text_needs_its_package(tmp_path, deb):
    verse = replace(SOURCE, file="v.txt", pages=(replace(PROSE, package="verse"),))
    with pytest.raises(UserError, match="Debian package verse"):
        texts.build_texts(tmp_path, [deb], [SOURCE, verse])


def test_the_command(tmp_path, deb, monkeypatch, capsys):
    monkeypatch.setattr(texts, "SOURCES", (SOURCE,))
    with pytest.raises(SystemExit) as stop:
        texts.main([str(tmp_path), "--deb", str(tmp_path / "none.deb")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "none.deb" in error
    texts.main([str(tmp_path), "--deb", str(deb)])
    assert f"prose.txt: {len(TEXT)} bytes" in capsys.readouterr().out
