"""Which loss of next-token predictions, and its options."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax

from jaxopt_models.distill import losses
from jaxopt_models.distill.losses import TopK
from jaxopt_models.errors import UserError

LogitKind = Literal[
    "cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon", "total_variation"
]


@dataclass(frozen=True)
class LogitLoss:
    """One loss of next-token predictions.

    Attributes:
      kind: see `losses`.
      temperature: of both, for divergences.
      beta: share of the teacher in Jensen-Shannon's mixture.
      top_k: for the forward divergence: how many of the teacher's tokens are told apart; None is
        all that are known.
    """

    kind: LogitKind
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(LogitKind):
            raise UserError(
                f"loss {self.kind!r} is unknown; choose {', '.join(get_args(LogitKind))}"
            )
        if self.top_k is not None and self.kind != "forward_kl":
            raise UserError(f"top_k goes with forward_kl; {self.kind} needs all of the teacher")

    @property
    def needs_teacher(self) -> bool:
        return self.kind != "cross_entropy"

    @property
    def sums_over_tokens(self) -> bool:
        """Whether it is a sum of the parts of tokens, given `losses.log_total` of all."""
        return self.top_k is None

    def log_totals(
        self, student: jax.Array, teacher: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What `at` needs to know of all tokens; of some, their part of it, see `losses`."""
        if not self.needs_teacher:
            return losses.log_total(student), None
        if teacher is None:
            raise UserError(f"{self.kind} needs a teacher")
        own, its = (losses.log_total(logits, self.temperature) for logits in (student, teacher))
        return own, its

    def at(
        self,
        student: jax.Array,
        teacher: jax.Array | TopK | None,
        targets: jax.Array,
        totals: Any = None,
    ) -> jax.Array:
        """The loss at each position, float32 [...], of logits [..., V] and targets [...].

        With `log_totals` of all tokens, logits may be of some, and targets count from the first of
        these. A `TopK` is at this temperature, in any dtypes.
        """
        if self.kind == "cross_entropy":
            return losses.cross_entropy(student, targets, totals and totals[0])
        if teacher is None:
            raise UserError(f"{self.kind} needs a teacher")
        if isinstance(teacher, TopK):
            if self.kind != "forward_kl":
                raise UserError(
                    f"{self.kind} needs all of the teacher's logits, and only its most likely "
                    "tokens are known; choose forward_kl"
                )
            known = losses.widened(teacher)
            if self.top_k is not None:
                known = losses.narrowed(known, self.top_k)
            return losses.top_k_kl(student, known, self.temperature)
        if self.top_k is not None:
            known = losses.top_k(teacher, self.top_k, self.temperature)
            return losses.top_k_kl(student, known, self.temperature)
        if self.kind == "jensen_shannon":
            return losses.jensen_shannon(student, teacher, self.beta, self.temperature, totals)
        return getattr(losses, self.kind)(student, teacher, self.temperature, totals)
