"""The texts that benches measure and train on, rebuilt from Debian packages.

    python -m jaxopt_models.bench.texts DIR [--train] [--deb FILE ...]

`DIR/calib.txt` is technical prose (debian-handbook), `DIR/eval.txt` political prose (anarchism, an
FAQ), and `DIR/train.jsonl`, with `--train`, four manuals. All packages are free, come with every
Debian mirror and are of those that the point releases of Debian 12 have left alone, so a machine
without a model hub can have the texts, byte for byte the same: their SHA-256 is checked. Nothing is
unpacked to disk.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from jaxopt_models.bench.debian_package import Package
from jaxopt_models.errors import UserError

_SHORTEST_PARAGRAPH = 120  # characters; shorter ones are captions and menus
_BLOCK = 6000  # characters that paragraphs are grouped to, at least


@dataclass(frozen=True)
class Pages:
    """HTML pages of a Debian package: those below `folder`."""

    package: str
    version: str
    folder: str


@dataclass(frozen=True)
class TextSource:
    """A text and what it is made from.

    Attributes:
      file: what it is called: a .txt, or a .jsonl of documents, `{"text": block}` a line.
      pages: in this order.
      sha256: of the file.
      size: bytes that are kept, about; None keeps all.
    """

    file: str
    pages: tuple[Pages, ...]
    sha256: str
    size: int | None = 450_000


CALIBRATION = TextSource(
    "calib.txt",
    (Pages("debian-handbook", "11.20220922", "usr/share/doc/debian-handbook/html/en-US"),),
    "51a5a544967ea1562d8c6fd803fb4541a1748349daf07563b2849fae4c8b3b47",
)
EVALUATION = TextSource(
    "eval.txt",
    (Pages("anarchism", "15.3-3", "usr/share/doc/anarchism/html"),),
    "1317396dacbc4f79263dee55ee9bf6a87f66d845552f7f9b9daf2c33d2a3518c",
)
TRAINING = TextSource(
    "train.jsonl",
    (
        Pages("debian-policy", "4.6.2.0", "usr/share/doc/debian-policy/policy.html"),
        Pages("lilypond-doc-html", "2.24.1-2", "usr/share/doc/lilypond/html/Documentation"),
        Pages("octave-doc", "7.3.0-2", "usr/share/doc/octave/octave.html"),
        Pages("r-doc-html", "4.2.2.20221110-2", "usr/share/R/doc/manual"),
    ),
    "915bc79733d27f94a5ca710d5a238dac5af193b778cd00ddc4a2303834d10332",
    size=None,
)
SOURCES = (CALIBRATION, EVALUATION)


def build_texts(
    directory: Path, debs: Sequence[Path] = (), sources: Sequence[TextSource] = SOURCES
) -> list[Path]:
    """Writes each source's text into `directory`; one that is there already is kept.

    Args:
      directory: created if missing.
      debs: package files; without any, `apt-get download` fetches what is needed.
      sources: what to make.

    Returns:
      The paths of the texts, in the order of `sources`.

    Raises:
      UserError: a package is missing, damaged or of another version, or a text comes out different.
    """
    targets = [directory / source.file for source in sources]
    wanted = [s for s, t in zip(sources, targets, strict=True) if not _is_there(t, s.sha256)]
    if not wanted:
        return targets
    with tempfile.TemporaryDirectory() as scratch:
        names = [pages.package for source in wanted for pages in source.pages]
        files = debs or _download(names, Path(scratch))
        packages = [Package.read(file) for file in files]
    for source in wanted:
        _write(directory / source.file, _checked_text(source, packages))
    return targets


def compose(pages: Iterable[str], size: int | None = None) -> list[str]:
    """Blocks of prose from the paragraphs of HTML pages, of about `size` bytes, taken evenly.

    Long paragraphs, each once, are grouped in order into blocks; of `n` blocks those numbered
    `floor(i n / k)`, `i < k`, stay, with `k` such that about so many bytes remain.
    """
    paragraphs = (" ".join(text.split()) for page in pages for text in _Paragraphs.of(page))
    kept = [
        p
        for p in paragraphs
        if len(p) >= _SHORTEST_PARAGRAPH and "\N{REPLACEMENT CHARACTER}" not in p
    ]
    blocks = list(_blocks(dict.fromkeys(kept)))
    if size is None or not blocks:
        return blocks
    share = size / sum(len(block.encode()) for block in blocks)
    count = min(len(blocks), max(1, round(len(blocks) * share)))
    return [blocks[i * len(blocks) // count] for i in range(count)]


def _blocks(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined by blank lines to at least `_BLOCK` characters; a rest is left out."""
    block: list[str] = []
    length = 0
    for paragraph in paragraphs:
        block.append(paragraph)
        length += len(paragraph)
        if length >= _BLOCK:
            yield "\n\n".join(block)
            block, length = [], 0


class _Paragraphs(HTMLParser):
    """Collects running text: what is in <p> or <div class="para">, up to the next block element."""

    _HIDING = {"head", "pre", "script", "style", "table"}
    _CLOSED_BY_END = {"blockquote", "div", "h1", "h2", "h3", "h4", "li", "ol", "p", "ul"}
    _CLOSED_BY_START = _CLOSED_BY_END | _HIDING | {"dd", "dl", "dt", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[str] | None = None
        self._hidden = 0

    @classmethod
    def of(cls, page: str) -> list[str]:
        parser = cls()
        parser.feed(page)
        parser._close()
        return parser.found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._CLOSED_BY_START:
            self._close()
        if tag in self._HIDING:
            self._hidden += 1
        elif tag == "p" or (tag == "div" and ("class", "para") in attrs):
            self._open = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self._CLOSED_BY_END:
            self._close()
        elif tag in self._HIDING and self._hidden:
            self._hidden -= 1

    def handle_data(self, data: str) -> None:
        if self._open is not None and not self._hidden:
            self._open.append(data)

    def _close(self) -> None:
        if self._open:
            self.found.append("".join(self._open))
        self._open = None


def _checked_text(source: TextSource, packages: Sequence[Package]) -> str:
    found = [(pages, _package(source, pages, packages)) for pages in source.pages]
    html = (page for pages, package in found for page in package.pages(pages.folder))
    text = _written(source, compose(html, source.size))
    if hashlib.sha256(text.encode()).hexdigest() != source.sha256:
        named = " with ".join(f"{package.name} {package.version}" for _, package in found)
        other = [pages for pages, package in found if pages.version != package.version]
        reason = (
            f"give the .deb of {' and '.join(f'{p.package} {p.version}' for p in other)}"
            if other
            else "this Python's HTML parser reads it differently; use another version of Python"
        )
        raise UserError(f"{named} gives another {source.file} than expected: {reason}")
    return text


def _package(source: TextSource, pages: Pages, packages: Iterable[Package]) -> Package:
    package = next((p for p in packages if p.name == pages.package), None)
    if package is None:
        raise UserError(
            f"{source.file} is made from the Debian package {pages.package}, which none of the "
            "files is; give its .deb too"
        )
    return package


def _written(source: TextSource, blocks: Iterable[str]) -> str:
    if source.file.endswith(".jsonl"):
        return "".join(json.dumps({"text": block}, ensure_ascii=False) + "\n" for block in blocks)
    return "\n\n".join(blocks) + "\n"


def _download(packages: Sequence[str], folder: Path) -> list[Path]:
    remedy = "run `apt-get update`, or give package files with --deb"
    try:
        done = subprocess.run(
            ["apt-get", "download", *packages], cwd=folder, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise UserError(
            "there is no apt-get here to fetch Debian packages with; give the files of "
            f"{' and '.join(packages)} with --deb"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"apt-get cannot download {' and '.join(packages)} ({reason}); {remedy}")
    return sorted(folder.glob("*.deb"))


def _is_there(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a mistake is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxopt_models.bench.texts",
        description="Make calib.txt and eval.txt for `jaxopt-models bench`.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--train", action="store_true", help="make train.jsonl, too")
    parser.add_argument(
        "--deb", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="package files, instead of fetching them with apt-get",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        sources = (*SOURCES, TRAINING) if options.train else SOURCES
        for path in build_texts(options.directory, options.deb, sources):
            print(f"{path}: {path.stat().st_size} bytes, as expected")
    except UserError as error:
        print(f"texts: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
