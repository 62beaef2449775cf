"""Rooms of the house: what is above knows what is below, and never the other way round."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import jaxopt_models
import kernels_pallas

HOUSE, KERNELS = (Path(package.__path__[0]) for package in (jaxopt_models, kernels_pallas))


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports wherever it does, by their dotted names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The package or module right under the house that a dotted name is in, if there is one."""
    house, _, rest = name.partition(".")
    first = rest.split(".")[0]
    there = (HOUSE / first).is_dir() or (HOUSE / f"{first}.py").is_file()
    return first if house == HOUSE.name and first and there else None


def test_no_room_is_above_itself():
    below: dict[str, set[str]] = {}
    for file in HOUSE.rglob("*.py"):
        own = file.relative_to(HOUSE).with_suffix("").parts[0]
        if own != "__init__":
            rooms = {room(name) for name in imported(file)} - {None, own}
            below.setdefault(own, set()).update(one for one in rooms if one is not None)
    order = list(TopologicalSorter(below).static_order())  # raises CycleError, with the cycle
    assert order.index("tree") < order.index("models") < order.index("train") < order.index("cli")


def test_kernels_know_nothing_of_the_house():
    for file in KERNELS.rglob("*.py"):
        assert not any(name.startswith(HOUSE.name) for name in imported(file)), file
