"""English prose and code that every Python ships, for runs without a network and without a file."""

import ast
import functools
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jaxopt_models.errors import UserError

Split = Literal["calibration", "evaluation"]

_SHORTEST_DOCSTRING = 200  # characters; below this a docstring is a label rather than prose
# The evaluation text itself, and what some distributions split off or leave out: without these the
# text depends on the Python version alone.
_LEFT_OUT = {"ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtle", "turtledemo"}
_LEFT_OUT |= {"antigravity", "test", "this", "venv"}


@functools.cache
def builtin_text(split: Split = "calibration") -> str:
    """English prose and code that ships with CPython, so that it is there without a network.

    `"calibration"`: the longer docstrings of the standard library, about 0.9 million characters.
    `"evaluation"`: the language reference in `pydoc_data.topics`, about 0.5 million characters.
    The two share no paragraph longer than a heading. Both are read from source files and parsed,
    never imported, and are the same wherever the same version of Python runs.

    Raises:
      UserError: this Python comes without the standard library's source files.
    """
    library = Path(sysconfig.get_path("stdlib"))
    if split == "evaluation":
        return "\n\n".join(_reference_topics(library / "pydoc_data" / "topics.py"))
    docstrings = (text for path in _library_sources(library) for text in _docstrings(path))
    return "\n\n".join(dict.fromkeys(docstrings))


def _reference_topics(path: Path) -> list[str]:
    for node in _parse(path).body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
            return [topics[name].strip() for name in sorted(topics)]
    raise UserError(f"{path} defines no topics, so there is no built-in text; name a text file.")


def _library_sources(library: Path) -> Iterator[Path]:
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        if name.startswith("_"):
            continue
        module = library / f"{name}.py"
        files = [module] if module.is_file() else sorted((library / name).rglob("*.py"))
        for path in files:
            if not {"test", "tests"} & set(path.relative_to(library).parts):
                yield path


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= _SHORTEST_DOCSTRING:
                yield docstring.strip()


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"the built-in text needs {path}, which this Python does not have; name a text file."
        ) from error
