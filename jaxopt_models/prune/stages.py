"""What a run has finished, on disk, so that a killed one goes on where it stopped.

DIR/NAME.json    a finished piece of work, JSON values: scores of a round, times of parts
DIR/NAME.npz     arrays
DIR/NAME/        a model, as `native.save` writes it

Each appears under its name when it is complete, with what it depends on beside it: the model, the
texts, the settings that decide about it. Floats are kept exactly, so that a run that was resumed
ends as one that was not interrupted.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import tree
from jaxopt_models.checkpoint import native
from jaxopt_models.errors import UserError
from jaxopt_models.files import write_arrays, write_json
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.settings import first_difference

# Name of a piece of work and what does it -> its JSON value, remembered or new.
Remember = Callable[[str, Callable[[], Any]], Any]

_HEADER = "of"


def at_once(name: str, make: Callable[[], Any]) -> Any:
    """The `Remember` that remembers nothing."""
    return make()


def run_of(model: Model, **texts: Sequence[Any] | None) -> dict[str, Any]:
    """JSON values that tell a run of one model and some texts from others; it reads the weights."""
    found: dict[str, Any] = {"jax": jax.__version__, "config": model.config.to_json()}
    found["model"] = tree.checksum(jax.tree.leaves(model.params))
    for name, batches in texts.items():
        arrays = (np.asarray(batch, np.int32) for batch in (() if batches is None else batches))
        found[name] = tree.fingerprints(arrays)
    return found


class Stages:
    """Finished pieces of work of one run.

    Args:
      directory: is made with the first of them; None keeps nothing.
      run: JSON values that equal runs have in common.
    """

    def __init__(self, directory: Path | None = None, run: Mapping[str, Any] | None = None):
        self.directory = None if directory is None else Path(directory).expanduser()
        self._run = dict(run or {})

    def remember(self, **of: Any) -> Remember:
        """For JSON values that depend on the run and on `of`, JSON values, too.

        Raises:
          UserError: by what it gives, for a piece of work of another run, or a damaged one.
        """

        def remembered(name: str, make: Callable[[], Any]) -> Any:
            path = self._path(f"{name}.json")
            if path is None:
                return _plain(make())
            header = _plain(self._run | of)
            if path.exists():
                try:
                    entry = json.loads(path.read_text(encoding="utf-8"))
                    theirs, value = entry[_HEADER], entry["value"]
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise self._damaged(path, error) from error
                self._check(path, theirs, header)
                return value
            value = _plain(make())
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {_HEADER: header, "value": value})
            return value

        return remembered

    def arrays(self, name: str, make: Callable[[], Any], like: Any, **of: Any) -> Any:
        """A tree of arrays with the structure of `like`, whose leaves may be abstract; raises what
        `remember` does."""
        path = self._path(f"{name}.npz")
        if path is None:
            return make()
        header = _plain(self._run | of)
        if path.exists():
            try:
                with path.open("rb") as raw, np.load(raw) as file:
                    theirs = json.loads(str(file[_HEADER]))
                    flat = [file[str(i)] for i in range(len(file.files) - 1)]
                found = jax.tree.unflatten(jax.tree.structure(like), map(jnp.asarray, flat))
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                raise self._damaged(path, error) from error
            self._check(path, theirs, header)
            return found
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {str(i): a for i, a in enumerate(jax.tree.leaves(made))}
        arrays |= {_HEADER: json.dumps(header)}
        write_arrays(path, arrays)
        return made

    def model(
        self, name: str, make: Callable[[], tuple[ModelConfig, Any, Any]], **of: Any
    ) -> tuple[ModelConfig, Any, Any]:
        """(config, params, JSON value) of a model; raises what `remember` does."""
        path = self._path(name)
        if path is None:
            config, params, value = make()
            return config, params, _plain(value)
        header = _plain(self._run | of)
        if path.exists():
            said = native.read_metadata(path)["report"]
            self._check(path, said[_HEADER], header)
            found = native.restore(path)
            return found.config, found.params, said["value"]
        config, params, value = make()
        native.save(path, config, params, report={_HEADER: header, "value": value})
        return config, params, _plain(value)

    def _path(self, name: str) -> Path | None:
        words = re.sub(r"[^a-z0-9.]+", "-", name.lower())
        return None if self.directory is None else self.directory / words

    def _damaged(self, path: Path, error: Exception) -> UserError:
        return UserError(f"{path} is damaged ({error}); remove {self.directory} to begin anew")

    def _check(self, path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        name = first_difference(theirs, ours)
        if name is not None:
            raise UserError(
                f"{path} was made with another {name}; go on with the same, or remove "
                f"{self.directory} to begin anew"
            )


def remove(directory: Path) -> None:
    """Removes the pieces of a run that has ended."""
    shutil.rmtree(directory, ignore_errors=True)


def _plain(value: Any) -> Any:
    """In JSON's own types, as it will be read back."""
    return json.loads(json.dumps(value))
