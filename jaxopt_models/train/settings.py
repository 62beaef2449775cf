"""What a training run is, as users write it down.

    model: smollm2-135m
    recipe: nvfp4               # qat, qad: what it is quantized to, a preset or a file
    student: pruned/            # distill: who learns from the model; qad: if not the model itself
    head: {vocabulary: 16384}   # draft: what guesses for the model
    text: builtin               # or a file, or hf:NAME
    packing: stream             # or documents, of which each attends to itself only
    learn: all                  # or assistant, in conversations
    length: 512
    batch: 8                    # rows of a step, in `parts` parts
    steps: 400
    optimizer: {name: adamw, learning_rate: 1.0e-5, schedule: cosine, warmup: 0.05}
    adapters: {rank: 16, alpha: 32}   # trained alone, beside frozen weights (LoRA, QLoRA)
    losses: [{kind: forward_kl}]
    teacher_cache: {directory: teacher, top_k: 64}  # if the teacher is to run once, not each step
    evaluation: {text: builtin, windows: 16, every: 100}

Everything but the model, and the recipe or the student, has a default. A model that is quantized is
named by its checkpoint, to train what guesses for it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
)

from jaxopt_models.distill.logit_loss import LogitLoss
from jaxopt_models.documents import Learn
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import Remat
from jaxopt_models.qtensor import Gradient
from jaxopt_models.settings import Globs, Strict, explain, read_settings
from jaxopt_models.sharding_rules import BATCH
from jaxopt_models.train.adapters import adapter_arrays
from jaxopt_models.train.choices import (
    Adapters,
    Calibration,
    DraftHead,
    Evaluation,
    LossChoice,
    Optimizer,
    TeacherCache,
)
from jaxopt_models.train.leaves import ScaleMode
from jaxopt_models.train.objectives import QAD, QAT, Term, logit_losses

Technique = Literal["qat", "qad", "distill", "draft"]


class RunSettings(Strict):
    """See the module's docstring.

    Attributes:
      scales, gradient: see `leaves.fake_quantized`.
      begin: masters are the "original" weights, or the values that they were "quantized" to.
      packing: of rows: the text as one "stream", or its "documents", see `documents`.
      parts: of a batch, whose gradients are accumulated.
      adapters: are trained beside frozen weights, codes of the recipe or the student's floats; None
        trains the weights.
      train, freeze: see `trainable.partition`. To `train` nothing in particular is to train all, or
        adapters alone; what it matches is trained besides them.
      dtype: of computation; what is trained is float32.
      remat: see `transformer.Remat`.
      scan_layers: whether layers that are alike are compiled once and run in a loop, which takes a
        copy of their weights, or each is compiled.
      mesh: sizes of the axes "data", "fsdp" and "model", see `sharding_rules`; those that are not
        named are 1. None at all is one device.
      log, save: every so many steps.
      tensorboard: whether metrics are written for it, too.
      keep: checkpoints.
    """

    model: str
    recipe: str | None = None
    student: str | None = None
    head: DraftHead | None = None
    scales: ScaleMode = "dynamic"
    gradient: Gradient = "identity"
    begin: Literal["original", "quantized"] = "original"
    calibration: Calibration = Calibration()
    text: str = "builtin"
    packing: Literal["stream", "documents"] = "stream"
    learn: Learn = "all"
    length: StrictInt = Field(default=512, ge=2)
    batch: StrictInt = Field(default=8, ge=1)
    parts: StrictInt = Field(default=1, ge=1)
    steps: StrictInt = Field(default=200, ge=1)
    seed: StrictInt = Field(default=0, ge=0)
    optimizer: Optimizer = Optimizer()
    max_norm: float | None = Field(default=1.0, gt=0)
    losses: tuple[LossChoice, ...] = ()
    teacher_cache: TeacherCache | None = None
    adapters: Adapters | None = None
    train: Globs = ()
    freeze: Globs = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan_layers: StrictBool = True
    mesh: dict[Literal["data", "fsdp", "model"], StrictInt] = Field(default_factory=dict)
    evaluation: Evaluation = Evaluation()
    log: StrictInt = Field(default=10, ge=1)
    tensorboard: StrictBool = False
    save: StrictInt = Field(default=100, ge=1)
    keep: StrictInt = Field(default=2, ge=1)
    keep_best: StrictBool = True

    @classmethod
    def load(cls, file: str | Path, overrides: Sequence[str] = ()) -> "RunSettings":
        """Reads a YAML file.

        Args:
          overrides: "dotted.key=value" with YAML values.

        Raises:
          UserError: for a missing file, YAML that does not parse, an unknown key or a wrong value.
        """
        return read_settings(cls, file, overrides, kind="run", whole="run", key="model")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "RunSettings":
        """The settings with these fields.

        Raises:
          UserError: for an unknown key or a wrong value.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise UserError(explain(error, "run")) from error

    def terms(self, technique: Technique) -> tuple[Term, ...]:
        """The losses, or the technique's own."""
        if self.losses:
            return tuple(choice.term(self.steps) for choice in self.losses)
        if technique != "qat" and self.teacher_cache is not None:
            return (Term(LogitLoss("forward_kl", top_k=self.teacher_cache.top_k)),)
        return QAT if technique == "qat" else QAD

    @property
    def trained(self) -> tuple[str, ...]:
        """Globs on the arrays that are trained, unless `freeze` matches them."""
        own = () if self.adapters is None else adapter_arrays(self.adapters.match)
        return (*own, *self.train) or ("*",)

    def check(self, technique: Technique) -> None:
        """Refuses settings that do not go with a technique.

        Raises:
          UserError: for the first of them.
        """
        if technique == "draft":
            self._check_draft()
        elif self.head is not None:
            raise UserError(
                f"a 'head' guesses for a model and goes with draft, not with {technique}"
            )
        elif technique == "distill":
            if self.student is None:
                raise UserError("distill needs a 'student', who learns from the model")
            if self.recipe is not None:
                raise UserError("distill trains an unquantized student; for a 'recipe' choose qad")
        elif self.recipe is None:
            raise UserError(f"{technique} needs a 'recipe', what the model is quantized to")
        elif self.student is not None and technique == "qat":
            raise UserError("qat has no teacher to name a 'student' beside; it is the model itself")
        if technique == "qad" and not any(t.loss.needs_teacher for t in self.terms(technique)):
            raise UserError("none of the losses reads the teacher; choose qat, or another loss")
        for name in ("scales", "gradient", "begin") if self.adapters is not None else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(
                    f"{name!r} is of weights that are trained, and adapters learn beside frozen "
                    "ones; leave out one of them"
                )
        if self.teacher_cache is not None:
            self.teacher_cache.temperature(logit_losses(self.terms(technique)))
        self._check_rows()

    def _check_draft(self) -> None:
        """A head stands beside a model that stays as it is."""
        for name in ("recipe", "student", "adapters", "teacher_cache"):
            if getattr(self, name) is not None:
                raise UserError(f"draft trains a head for a model that stays; leave out {name!r}")
        if len(logit_losses(self.terms("draft"))) != len(self.terms("draft")):
            raise UserError("draft is trained for next tokens; hidden states go with distill")

    def _check_rows(self) -> None:
        if self.learn == "assistant" and self.packing != "documents":
            raise UserError("learning what the assistant says needs packing: documents")
        if self.batch % self.parts:
            raise UserError(f"a batch of {self.batch} rows has no {self.parts} equal parts")
        rows, shares = self.batch // self.parts, math.prod(self.mesh.get(a, 1) for a in BATCH)
        if rows % max(shares, 1):
            raise UserError(
                f"{rows} rows, of a part of a batch, cannot be shared by the {shares} devices of "
                f"mesh {self.mesh} that split them; make the batch a multiple"
            )
