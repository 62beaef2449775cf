"""What a training run is, as users write it down.

    model: smollm2-135m
    recipe: nvfp4               # qat, qad: what it is quantized to, a preset or a file
    student: pruned/            # distill: who learns from the model
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

Everything but the model, and the recipe or the student, has a default.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
import yaml
from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    ValidationError,
    model_validator,
)

from jaxopt_models.distill.hidden import HiddenKind, HiddenLoss
from jaxopt_models.distill.logit_loss import LogitKind, LogitLoss
from jaxopt_models.documents import Learn
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import Remat
from jaxopt_models.qtensor import Gradient
from jaxopt_models.settings import Globs, Strict, explain, first_line, with_override
from jaxopt_models.sharding_rules import BATCH
from jaxopt_models.train.adapters import LINEARS, adapter_arrays
from jaxopt_models.train.leaves import ScaleMode
from jaxopt_models.train.objectives import QAD, QAT, Schedule, Term, logit_losses

Technique = Literal["qat", "qad", "distill"]


class Optimizer(Strict):
    """`learning_rate` is the highest: after `warmup`, a share of all steps, it falls to its `end`
    share, unless the schedule is "constant"."""

    name: Literal["adamw", "lion", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    end: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.95, ge=0, lt=1)

    def rate(self, steps: int) -> optax.Schedule:
        """Step -> learning rate, of a run of so many steps."""
        first = round(self.warmup * steps)
        rest, last = max(1, steps - first), self.end * self.learning_rate
        falls = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest, self.end),
            "linear": optax.linear_schedule(self.learning_rate, last, rest),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        if first == 0:
            return falls
        # Not from 0, where the first step would do nothing.
        rises = optax.linear_schedule(self.learning_rate / first, self.learning_rate, first - 1)
        return optax.join_schedules([rises if first > 1 else falls, falls], [first])

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """Of optax, for a run of so many steps."""
        rate = self.rate(steps)
        if self.name == "sgd":
            return optax.sgd(rate, momentum=self.b1 or None)
        make = optax.adamw if self.name == "adamw" else optax.lion
        return make(rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)


class WeightSchedule(Strict):
    """A weight that goes `from` one value `to` another and stays there: in so many steps, or in a
    share of the run's, by default all.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    start: float = Field(alias="from", ge=0)
    to: float = Field(ge=0)
    steps: StrictInt | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, le=1)
    kind: Literal["linear", "cosine"] = "linear"

    @model_validator(mode="after")
    def _one_length(self) -> "WeightSchedule":
        if self.steps is not None and self.share is not None:
            raise ValueError("give 'steps' or a 'share' of them, not both")
        return self

    def over(self, steps: int) -> Schedule:
        """Step -> weight, of a run of so many steps."""
        length = self.steps or max(1, round((self.share or 1.0) * steps))

        def weight(step: Any) -> jax.Array:
            done = jnp.minimum(step / length, 1.0)
            gone = done if self.kind == "linear" else 0.5 - 0.5 * jnp.cos(jnp.pi * done)
            return self.start + (self.to - self.start) * gone

        return weight


def _weight_form(value: Any) -> str:
    return "schedule" if isinstance(value, dict | WeightSchedule) else "number"


type Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[WeightSchedule, Tag("schedule")],
    Discriminator(_weight_form),
]


class LossChoice(Strict):
    """See `distill.losses`, and `distill.hidden` for losses of hidden states.

        {kind: forward_kl, temperature: 2.0, weight: {from: 1.0, to: 0.5, kind: cosine}}
        {kind: hidden_cosine, layers: {3: 6, 7: 14}, weight: {from: 1.0, to: 0.0, steps: 200}}

    Attributes:
      weight: a number, or a `WeightSchedule`.
      layers: for hidden states: the student's, and which of the teacher's each is to be like; None
        spreads all evenly.
    """

    kind: LogitKind | HiddenKind
    weight: Weight = 1.0
    temperature: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.5, gt=0, lt=1)
    top_k: StrictInt | None = Field(default=None, ge=1)
    layers: dict[int, StrictInt] | None = None

    @model_validator(mode="after")
    def _options_of_its_kind(self) -> "LossChoice":
        hidden = self.kind in get_args(HiddenKind)
        for name in ("temperature", "beta", "top_k") if hidden else ("layers",):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name!r} does not go with {self.kind}; remove it")
        return self

    def term(self, steps: int) -> Term:
        """In a run of so many steps."""
        weight = self.weight
        weight = weight.over(steps) if isinstance(weight, WeightSchedule) else weight
        if self.kind == "hidden_cosine" or self.kind == "hidden_mean_square":
            layers = None if self.layers is None else tuple(self.layers.items())
            return Term(HiddenLoss(self.kind, layers), weight)
        return Term(LogitLoss(self.kind, self.temperature, self.beta, self.top_k), weight)


class TeacherCache(Strict):
    """Where the teacher's most likely tokens of the text lie, see `distill.teacher_cache`.

    They are found by the first run and read by later ones, of whatever seed, recipe or student.

    Attributes:
      top_k: how many are kept.
    """

    directory: str
    top_k: StrictInt = Field(default=64, ge=1)

    def temperature(self, losses: Sequence[LogitLoss]) -> float:
        """That of all divergences.

        Raises:
          UserError: for losses that need more than is kept, none, or several temperatures.
        """
        taught = [loss for loss in losses if loss.needs_teacher]
        for loss in taught:
            if loss.kind != "forward_kl" or loss.top_k is None or loss.top_k > self.top_k:
                kind = loss.kind if loss.top_k is None else f"{loss.kind} of top_k {loss.top_k}"
                raise UserError(
                    f"{kind} needs more of the teacher than a teacher_cache of top_k {self.top_k} "
                    f"keeps; choose forward_kl with a top_k of at most {self.top_k}"
                )
        if len({loss.temperature for loss in taught}) != 1:
            raise UserError(
                "a teacher_cache has one temperature, and the losses that read the teacher have "
                f"{', '.join(f'{loss.temperature:g}' for loss in taught) or 'none'}"
            )
        return taught[0].temperature


class Evaluation(Strict):
    """What is measured of the model: windows of a text, every so many steps and at the end."""

    text: str = "builtin"
    windows: StrictInt = Field(default=16, ge=1)
    length: StrictInt = Field(default=512, ge=2)
    every: StrictInt | None = Field(default=None, ge=1)


class Calibration(Strict):
    """The text that the recipe is calibrated on, if it needs one."""

    text: str = "builtin"
    windows: StrictInt = Field(default=64, ge=1)
    length: StrictInt = Field(default=512, ge=2)


class Adapters(Strict):
    """See `adapters.with_adapters`; they stay beside their weights unless they are to `merge`."""

    rank: StrictInt = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    match: Globs = Field(default=LINEARS, min_length=1)
    merge: StrictBool = False


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
      mesh: sizes of the axes "data", "fsdp" and "model", see `sharding_rules`; those that are not
        named are 1. None at all is one device.
      keep: checkpoints.
    """

    model: str
    recipe: str | None = None
    student: str | None = None
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
    mesh: dict[Literal["data", "fsdp", "model"], StrictInt] = Field(default_factory=dict)
    evaluation: Evaluation = Evaluation()
    log: StrictInt = Field(default=10, ge=1)
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
        try:
            fields = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"run {file}: cannot be read ({first_line(error)})") from error
        if not isinstance(fields, dict):
            raise UserError(f"run {file}: expected keys such as 'model', found {fields!r}")
        for assignment in overrides:
            fields = with_override(fields, assignment, optional=cls.model_fields)
        try:
            return cls.of(fields)
        except UserError as error:
            raise UserError(f"run {file}: {error}") from error

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
        if technique == "distill":
            if self.student is None:
                raise UserError("distill needs a 'student', who learns from the model")
            if self.recipe is not None:
                raise UserError("distill trains an unquantized student; for a 'recipe' choose qad")
        elif self.recipe is None:
            raise UserError(f"{technique} needs a 'recipe', what the model is quantized to")
        elif self.student is not None:
            raise UserError(f"{technique} trains the model itself; a 'student' goes with distill")
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
