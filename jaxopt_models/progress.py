"""How long loops show where they are: the library takes a wrapper, the command line gives one."""

from collections.abc import Callable, Iterable
from typing import Any

# What is being done, or what says so anew at each item.
Description = str | Callable[[], str]
# Called as progress(items, description) and iterated over, like `tqdm.tqdm`.
Progress = Callable[[Iterable[Any], Description], Iterable[Any]]


def silent(items: Iterable[Any], description: Description) -> Iterable[Any]:
    """The progress display that shows nothing."""
    return items
