"""How far a student's residual stream is from its teacher's, behind chosen layers.

    loss = Σ_{b, t >= 1} mask[b, t] · mean_{(i, j)} d(P s_i[b, t-1], t_j[b, t-1])

s_i [B, T, D_student] is the stream behind layer i of the student, t_j [B, T, D_teacher] behind
layer j of the teacher, and d a distance at a position. Position t-1 is the one that predicts the
token t to be learnt, so these are the positions, and the count, of losses of logits, too.

P [D_teacher, D_student] exists where the widths differ. It is one for all layers, since all layers
of a model add to one stream; it is trained along, and is no part of the model that comes out.

Reference: Romero et al. 2014, arXiv:1412.6550; Jiao et al. 2019, arXiv:1909.10351; Muralidharan et
al. 2024, arXiv:2407.14679.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxopt_models.distill import losses
from jaxopt_models.distill.predictor import learnt_positions
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.ops import linear

HiddenKind = Literal["hidden_cosine", "hidden_mean_square"]

PROJECTION = "hidden_projection"  # P's place in a tree of parameters, beside the layers
_DISTANCES = {
    "hidden_cosine": losses.cosine_distance,
    "hidden_mean_square": losses.mean_square,
}


@dataclass(frozen=True)
class HiddenLoss:
    """One loss of residual streams.

    Attributes:
      kind: the distance, see `losses.cosine_distance` and `losses.mean_square`.
      layers: (student's, teacher's) pairs, from 0; None spreads them, see `spread`.
    """

    kind: HiddenKind
    layers: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(HiddenKind):
            known = ", ".join(get_args(HiddenKind))
            raise UserError(f"loss {self.kind!r} is unknown; choose {known}")

    @property
    def needs_teacher(self) -> bool:
        return True

    def between(self, student: ModelConfig, teacher: ModelConfig) -> "HiddenLoss":
        """With its layers named.

        Raises:
          UserError: for no layers, or one that a model does not have.
        """
        pairs = spread(student.num_layers, teacher.num_layers)
        pairs = pairs if self.layers is None else self.layers
        if not pairs:
            raise UserError(f"{self.kind} needs layers; name some, or leave them out")
        for own, taught in pairs:
            for whose, i, config in (("student", own, student), ("teacher", taught, teacher)):
                if not 0 <= i < config.num_layers:
                    raise UserError(
                        f"{self.kind} names layer {i} of the {whose}, which has 0 to "
                        f"{config.num_layers - 1}"
                    )
        return replace(self, layers=tuple(pairs))


def spread(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Pairs of layers that are as deep in each of two models of so many layers.

    As many as the shallower one has, and the last with the last: for 2 and 6 layers (0, 2), (1, 5).
    """
    count = min(student, teacher)
    return tuple(
        (round(k * student / count) - 1, round(k * teacher / count) - 1)
        for k in range(1, count + 1)
    )


def with_projection(params: Any, student: ModelConfig, teacher: ModelConfig, key: jax.Array) -> Any:
    """The student's parameters with P, if the widths differ: float32, orthonormal at first.

    So it keeps lengths and angles as far as a matrix of its shape can.
    """
    if student.hidden_size == teacher.hidden_size:
        return params
    shape = teacher.hidden_size, student.hidden_size
    weight = jax.nn.initializers.orthogonal()(key, shape, jnp.float32)
    return params | {PROJECTION: {"weight": weight}}


def without_projection(params: Any) -> Any:
    """The model alone."""
    return {name: part for name, part in params.items() if name != PROJECTION}


def summed_hidden_losses(
    terms: Sequence[HiddenLoss],
    params: Any,
    student: Mapping[int, jax.Array],
    teacher: Mapping[int, jax.Array],
    mask: jax.Array,
) -> jax.Array:
    """Each loss of the module's formula, float32 [len(terms)]. Gradients reach P and the student.

    Args:
      terms: with their layers, see `HiddenLoss.between`.
      params: the student's; P is taken from it, if it is there.
      student: streams by layer, [B, T, D_student].
      teacher: likewise, [B, T, D_teacher].
      mask: [B, T], 1 where a token is to be learnt; the first of a row never is.

    Raises:
      UserError: if widths differ and there is no P of theirs.
    """
    projection = params[PROJECTION]["weight"] if PROJECTION in params else None
    learnt = learnt_positions(mask)

    def one(term: HiddenLoss) -> jax.Array:
        assert term.layers is not None  # `between`
        # What is computed on the way is float32 and wide, and cheap to compute again.
        pair = jax.checkpoint(partial(_pair_sum, _DISTANCES[term.kind]))
        sums = [pair(student[i], teacher[j], projection, learnt) for i, j in term.layers]
        return jnp.mean(jnp.stack(sums))

    return jnp.stack([one(term) for term in terms])


def _pair_sum(
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    student: jax.Array,
    teacher: jax.Array,
    projection: Any,
    learnt: jax.Array,
) -> jax.Array:
    wanted = teacher.shape[-1], student.shape[-1]
    found = projection.shape if projection is not None else None
    if found not in (wanted, None) or (found is None and wanted[0] != wanted[1]):
        raise UserError(
            f"hidden states are {wanted[1]} wide in the student and {wanted[0]} in the teacher, "
            f"and {PROJECTION!r} is {found and list(found)}; add it by with_projection"
        )
    if projection is not None:
        student = linear(student, projection)
    return jnp.sum(learnt * distance(student, jax.lax.stop_gradient(teacher)))
