"""States of a run on disk: the last few and the best one, written while training goes on.

    DIR/000000120/    an Orbax checkpoint: every array of the state by its path, metrics, and what
                      the run was (its signature)

A directory appears under its name when it is complete, so that a kill loses no more than the steps
since the last one.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.settings import first_difference
from jaxopt_models.train.step import TrainState

_POLICIES = ocp.training.preservation_policies


class Checkpoints:
    """Use it as a context: leaving it waits for what is being written.

    In a distributed run every process makes one, with one file system among them.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        best: str | None = None,
        signature: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes the directory if there is none.

        Args:
          directory: of this run alone.
          keep: how many of the last ones are kept.
          best: a metric; the checkpoint where it was lowest is kept, too.
          signature: JSON values that tell this run from others; a state is restored only into a run
            with the same.
        """
        self.directory = Path(directory).expanduser().resolve()
        self._signature = dict(signature or {})
        self._best = best
        policies: list[Any] = [_POLICIES.LatestN(n=keep)]
        if best is not None:
            # Sorted downwards, and the last is kept.
            policies.append(
                _POLICIES.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        policy: Any = _POLICIES.AnyPreservationPolicy(policies)
        self._checkpointer = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=policy,
            cleanup_tmp_directories=True,
        )
        self._writing: Any = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Those that can be restored, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Begins to write a state; its arrays may be taken over by the next step at once.

        Args:
          state: whose step names the checkpoint.
          metrics: what was measured of it, if it was; finite.
        """
        step, arrays = int(state.step), dict(tree.arrays_with_paths(state))
        if step in self.steps:
            return
        if metrics is not None and not all(map(math.isfinite, metrics.values())):
            metrics = None  # no candidate for the best
        if metrics is not None and self._best is not None and self._best not in metrics:
            raise UserError(
                f"the best checkpoint is chosen by {self._best!r}, and measured were "
                f"{', '.join(metrics)}; choose one of these"
            )
        described = {path: _described(array) for path, array in arrays.items()}
        custom: Any = {"signature": self._signature, "arrays": described}
        if jax.default_backend() == "cpu":  # where writing reads the very memory of the array
            arrays = jax.tree.map(jnp.copy, arrays)
        self._writing = self._checkpointer.save_async(
            step,
            arrays,
            force=True,
            metrics=None if metrics is None else dict(metrics),
            custom_metadata=custom,
        )

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """A state, its arrays where those of `like` are.

        Args:
          like: a state of the same run, as `start` makes it, on any mesh.
          step: of the state; None is the last.

        Raises:
          UserError: if there is none, if it is of another run, or if its arrays are others.
        """
        if self._writing is not None:  # which `steps` has already
            self._writing.result()
        if not self.steps or step not in (None, *self.steps):
            have = f"has steps {', '.join(map(str, self.steps))}" if self.steps else "is empty"
            raise UserError(f"{self.directory} {have}; there is nothing to resume at {step}")
        step = self.steps[-1] if step is None else step
        metadata = self._checkpointer.metadata(step).custom_metadata
        assert isinstance(metadata, dict)  # `save` wrote it
        wanted = dict(tree.arrays_with_paths(like))
        self._compare(step, metadata, wanted)
        abstract = {
            path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for path, array in wanted.items()
        }
        arrays = self._checkpointer.load(step, abstract)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in wanted])

    def _compare(self, step: int, metadata: dict[str, Any], wanted: dict[str, jax.Array]) -> None:
        theirs = metadata["signature"]
        name = first_difference(theirs, self._signature)
        if name is not None:
            raise UserError(
                f"{self.directory} holds a run whose {name} is {theirs.get(name)!r}, and this one "
                f"has {self._signature.get(name)!r}; choose another directory, or the same settings"
            )
        known = metadata["arrays"]
        for path in {**known, **wanted}:
            found = known.get(path)
            now = wanted.get(path)
            if now is None or found != _described(now):
                described = "nothing" if now is None else f"{now.dtype.name}{list(now.shape)}"
                raise UserError(
                    f"{self.directory / str(step)} holds {found} for {path!r}, and this run has "
                    f"{described}; resume with the model, optimizer and leaves it began with"
                )


def _described(array: jax.Array) -> list[Any]:
    return [array.dtype.name, list(array.shape)]
