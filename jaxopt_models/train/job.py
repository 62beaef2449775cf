"""What a run trains, as the run sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh, NamedSharding

from jaxopt_models.sharding_rules import rows_spec, splits_rows_alone
from jaxopt_models.train.loop import Evaluate, Step
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.step import Loss, TrainState, make_train_step


@dataclass(frozen=True)
class Job:
    """A state before its first step, and what is done with it.

    Attributes:
      state: see `step.start`.
      step: jitted.
      context: what the step reads besides the batch.
      measure: what trained parameters are worth, on text that is not trained on.
      best: of its metrics the one that is lowest where parameters are best.
      finish: makes of trained parameters what the run is for.
      save: writes it to a directory, with the run's last measurement.
      least_seconds: of a step, at the peak rate of the devices; None if that is not known.
    """

    state: TrainState
    step: Step
    context: Any
    measure: Evaluate
    best: str
    finish: Callable[[Any], Any]
    save: Callable[[Any, Mapping[str, Any]], None]
    least_seconds: float | None = None


def step_of(
    loss: Loss,
    settings: RunSettings,
    prepare: Callable[[Any], Any],
    mesh: Mesh | None = None,
    shardings: TrainState | None = None,
) -> Step:
    """The jitted step of a run.

    Args:
      loss: of a part of a batch; where `by_device` holds, of a device's rows of it.
      prepare: makes of parameters what the loss reads.
      mesh: the devices that train, None for a single one.
      shardings: where the arrays of the state lie, and stay; needed on a mesh.
    """
    return make_train_step(
        loss,
        settings.optimizer.transformation(settings.steps),
        parts=settings.parts,
        max_norm=settings.max_norm,
        prepare=prepare,
        shardings=shardings,
        rows=rows_of(mesh) if by_device(mesh) else None,
    )


def by_device(mesh: Mesh | None) -> bool:
    """Whether each device has all parameters, and finds the gradient of its own rows."""
    return mesh is not None and splits_rows_alone(mesh)


def rows_of(mesh: Mesh | None) -> NamedSharding | None:
    """How rows of a batch are spread."""
    return None if mesh is None else NamedSharding(mesh, rows_spec(mesh))
