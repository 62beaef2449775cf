"""What a candidate is worth once it has been taught a little: distillation of finalists.

    minimise  KL(original || candidate)    in a few steps, on text that nothing is scored on

by the very step of `train distill`. A candidate that loses more when it is cut may learn faster;
which one to keep is decided behind a short lesson. Reference: Muralidharan et al. 2024,
arXiv:2407.14679, where candidates are retrained on 1.8 billion tokens before one is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_models import data
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import Metrics, Reference, evaluate, reference
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.progress import Progress
from jaxopt_models.prune.damage import Damage
from jaxopt_models.prune.settings import Distill, PruneSettings
from jaxopt_models.train.leaves import cast
from jaxopt_models.train.loop import Pace, Step, fit
from jaxopt_models.train.model_job import context_of, first_state, make_step
from jaxopt_models.train.objectives import QAD
from jaxopt_models.train.rows import training_batches
from jaxopt_models.train.settings import RunSettings
from jaxopt_models.train.student import finished


@dataclass(frozen=True)
class School:
    """Where finalists learn: the original, text to learn from and text to be examined on.

    Attributes:
      settings: of each lesson.
      rows: int32 [N, T].
      context: the original's parameters, as the step reads them.
      exam: the original on the text that is scored on.
      steps: jitted, one for each architecture; candidates of equal shapes share one.
    """

    original: Model
    settings: RunSettings
    rows: np.ndarray
    context: Any
    exam: Reference
    progress: Progress
    steps: dict[ModelConfig, Step] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        original: Model,
        how: Distill,
        seed: int,
        rows: np.ndarray,
        batches: Sequence[Any],
        progress: Progress,
    ) -> "School":
        """
        Args:
          original: who teaches.
          how: lessons are given.
          seed: of the order of rows.
          rows: int32 [N, T], to learn from.
          batches: int32 [B, T] each, to be examined on.
        """
        fields: dict[str, Any] = {
            "model": original.source,
            "length": rows.shape[1],
            "batch": how.batch,
            "steps": how.steps,
            "seed": seed,
            "optimizer": {"learning_rate": how.learning_rate, "warmup": how.warmup},
            "dtype": original.config.dtype,
        }
        settings = RunSettings.of(fields)
        exam = reference(original.config, original.params, batches, progress)
        context = context_of(settings, QAD, original)
        return cls(original, settings, rows, context, exam, progress)

    def teach(self, config: ModelConfig, params: Any) -> Any:
        """Parameters behind the lesson, in the original's dtype.

        Raises:
          UserError: when steps in a row are not finite.
        """
        student = Model(config, cast(params, jnp.float32))
        if config not in self.steps:
            self.steps[config] = make_step(self.settings, QAD, self.original.config, config)
        steps = self.settings.steps
        state = fit(
            self.steps[config],
            first_state(self.settings, student),
            training_batches({"tokens": self.rows}, self.settings),
            self.context,
            Pace(steps, log=steps),
            progress=self.progress,
        )
        return finished(state.params, self.original.params, self.settings)

    def examine(self, config: ModelConfig, params: Any) -> Damage:
        """What a model has lost on the text that is scored on."""
        return damage_of(evaluate(config, params, self.exam.batches, self.exam, self.progress))


def damage_of(metrics: Metrics) -> Damage:
    """What was measured beside the original."""
    assert metrics.kl is not None and metrics.top1_agreement is not None  # with a reference
    return Damage(metrics.nll, metrics.kl, metrics.top1_agreement)


def rows_between(model: Model, text: str, count: int, length: int) -> np.ndarray:
    """int32 [N, length], what `data.token_batches` of the same numbers leaves of a text.

    Raises:
      UserError: if that is not one row.
    """
    tokenizer = data.tokenizer_of(model)
    ids, bos = data.tokenize(tokenizer, text), data.bos_of(tokenizer)
    body, stride = length - (bos is not None), len(ids) // count
    ends = [stride * (i + 1) for i in range(count - 1)] + [len(ids)]
    starts = [
        start
        for i, end in enumerate(ends)
        for start in range(stride * i + body, end - body + 1, body)
    ]
    if not starts:
        raise UserError(
            f"search.distill: the text has {len(ids)} tokens, and besides {count} windows of "
            f"{length} that candidates are scored on no row to learn from; use a longer text or "
            "fewer windows"
        )
    rows = np.stack([ids[start : start + body] for start in starts]).astype(np.int32)
    return rows if bos is None else np.insert(rows, 0, bos, axis=1)


def lesson_rows(model: Model, settings: PruneSettings) -> np.ndarray | None:
    """What finalists learn from under settings, `rows_between` of their text; None if they do not.

    Raises:
      UserError: for a text that cannot be read, or is too short for both.
    """
    if settings.search.distill is None:
        return None
    text = data.load_text(settings.text, "calibration")
    return rows_between(model, text, settings.windows, settings.length)
