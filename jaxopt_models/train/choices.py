"""Parts of a run's settings: what each says, and what is made of it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    model_validator,
)

from jaxopt_models.distill.hidden import HiddenKind, HiddenLoss
from jaxopt_models.distill.logit_loss import LogitKind, LogitLoss
from jaxopt_models.errors import UserError
from jaxopt_models.settings import Globs, Strict
from jaxopt_models.train.adapters import LINEARS
from jaxopt_models.train.objectives import Schedule, Term


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


# Which options of a head go with which kind, besides its decay.
_HEAD_OPTIONS = {
    "eagle3": ("vocabulary", "layers", "intermediate_size", "steps", "count"),
    "mtp": ("steps", "count"),
    "medusa": ("steps",),
    "dflash": ("layers", "intermediate_size", "depth", "block", "anchors", "mask_token"),
}


class DraftHead(Strict):
    """What guesses for the model, see `speculative.eagle3`, `.mtp`, `.medusa` and `.dflash`.

    Attributes:
      kind: one head that is run for each token ahead, EAGLE-3 or MTP; Medusa heads, one of `steps`
        for each; or a DFlash head, which says a block of them at once.
      vocabulary: how many tokens it may say, those that the text has most of; None is all.
      layers: of the model, whose residual streams it reads; None spreads some over the model.
      intermediate_size: of its feed-forward networks; None is the model's.
      steps: ahead of the text that are trained; what each counts for, of the one before, is its
        `decay`.
      count: tokens of a guess of an EAGLE-3 or MTP head, as it is saved.
      depth: layers of a DFlash head.
      block: places of its blocks: the last token, and those that it says.
      anchors: places of a row, at most, that blocks are trained from in a step.
      mask_token: stands in a block where a token is to be said; None is a token that the text has
        least of, the last of equals.
    """

    kind: Literal["eagle3", "mtp", "medusa", "dflash"] = "eagle3"
    vocabulary: StrictInt | None = Field(default=None, ge=1)
    layers: tuple[StrictInt, ...] | None = Field(default=None, min_length=1)
    intermediate_size: StrictInt | None = Field(default=None, ge=1)
    steps: StrictInt = Field(default=5, ge=1)
    decay: float = Field(default=0.8, gt=0, le=1)
    count: StrictInt = Field(default=5, ge=1)
    depth: StrictInt = Field(default=5, ge=1)
    block: StrictInt = Field(default=16, ge=2)
    anchors: StrictInt = Field(default=64, ge=1)
    mask_token: StrictInt | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _options_of_its_kind(self) -> "DraftHead":
        for name, field in type(self).model_fields.items():
            allowed = name in ("kind", "decay", *_HEAD_OPTIONS[self.kind])
            if not allowed and getattr(self, name) != field.default:
                raise ValueError(f"{name!r} does not go with {self.kind}; remove it")
        return self

    @property
    def ahead(self) -> int:
        """Tokens of which it learns what they will be."""
        return self.block - 1 if self.kind == "dflash" else self.steps


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
