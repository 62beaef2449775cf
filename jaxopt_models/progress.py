"""How long loops show where they are: the library takes a wrapper, the command line gives one."""

from collections.abc import Callable, Iterable
from typing import Any

# Called as progress(items, description) and iterated over, like `tqdm.tqdm`.
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def silent(items: Iterable[Any], description: str) -> Iterable[Any]:
    """The progress display that shows nothing."""
    return items
