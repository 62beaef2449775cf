"""One step of training: gradients of a mean over everything that an update sees, guarded.

    g = Σ ∇ loss / Σ count    over the parts of a batch,    scaled to at most `max_norm`

A step whose loss or gradient is not finite changes nothing and is counted.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import compress
from operator import not_
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.extend.core import Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.sharding import place
from jaxopt_models.sharding_rules import batch_spec
from jaxopt_models.train.trainable import combine, partition


class Sums(NamedTuple):
    """What a loss finds of a part of a batch, float32 scalars.

    Attributes:
      total: Σ loss, of which the gradient is taken.
      count: what it is to be divided by; it has no gradient.
      others: further sums, divided by the same count, to be reported.
    """

    total: jax.Array
    count: jax.Array
    others: dict[str, jax.Array]


class Loss(Protocol):
    """(parameters, whatever else it reads, part of a batch, step) -> `Sums`."""

    def __call__(self, params: Any, context: Any, batch: Any, step: jax.Array) -> Sums: ...


@struct.dataclass
class TrainState:
    """All that a step changes, and what it keeps.

    Attributes:
      step: int32, updates so far, skipped ones included.
      trained: parameters that are updated, see `trainable.partition`.
      frozen: the others.
      optimizer: state of the optimizer.
      skipped: int32, steps that were skipped one after the other until now.
      all_skipped: int32, all of them.
    """

    step: jax.Array
    trained: Any
    frozen: Any
    optimizer: Any
    skipped: jax.Array
    all_skipped: jax.Array

    @property
    def params(self) -> Any:
        return combine(self.trained, self.frozen)


def start(
    params: Any,
    optimizer: optax.GradientTransformation,
    train: tuple[str, ...] = ("*",),
    freeze: tuple[str, ...] = (),
) -> TrainState:
    """The state before the first step; its arrays are copies, since steps take them over.

    Args:
      params: parameter tree; what is trained has to be float32.
      optimizer: any of optax.
      train, freeze: see `trainable.partition`.

    Raises:
      UserError: for an array to train that is narrower than float32, besides those of `partition`.
    """
    trained, frozen = partition(params, train, freeze)
    for path, array in tree.arrays_with_paths(trained):
        if array.dtype != jnp.float32:
            raise UserError(
                f"{path!r} is {array.dtype.name}, in which small updates vanish; cast what is "
                "trained to float32 and compute in the narrower dtype (config.dtype)"
            )
    trained, frozen = jax.tree.map(jnp.copy, (trained, frozen))
    mesh = _mesh_of(trained)
    everywhere = _everywhere(mesh)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(trained)
    state = optax.tree.map_params(
        optimizer,
        lambda array, parameter: place(array, parameter.sharding),
        state,
        trained,
        transform_non_params=everywhere,
    )
    step, skipped, all_skipped = (everywhere(jnp.zeros((), jnp.int32)) for _ in range(3))
    first = TrainState(step, trained, frozen, state, skipped, all_skipped)
    if mesh is not None:
        return first
    # Committed to the device, as what a step returns is; else its second call compiles it again.
    return place(first, jax.tree.map(lambda array: array.sharding, first))


def _mesh_of(trained: Any) -> Mesh | None:
    """The mesh that parameters are on, if they are."""
    meshes = (getattr(array.sharding, "mesh", None) for array in jax.tree.leaves(trained))
    return next((mesh for mesh in meshes if mesh is not None), None)


def _everywhere(mesh: Mesh | None) -> Callable[[jax.Array], jax.Array]:
    """Copies an array to every device of a mesh, if there is one."""
    if mesh is None:
        return lambda array: array
    return lambda array: place(array, NamedSharding(mesh, PartitionSpec()))


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    parts: int = 1,
    max_norm: float | None = None,
    prepare: Callable[[Any], Any] | None = None,
    shardings: TrainState | None = None,
    rows: NamedSharding | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted step: (state, context, batch) -> (state, metrics).

    The state's buffers are taken over. Where arrays lie decides where the step runs; on several
    devices, `shardings` keeps XLA from spreading out what is split.

    Args:
      loss: of a part of a batch, pure.
      optimizer: any of optax.
      parts: gradients of so many parts are accumulated; the batch's arrays are then
        [parts, B, ...], else [B, ...].
      max_norm: of the gradient, over all arrays; None leaves it.
      prepare: makes of parameters those that the loss reads, once for all parts and for what is
        computed again; see `leaves.computed`. None gives it the parameters themselves.
      shardings: a tree like the state, of its arrays and of gradients; None leaves them to XLA.
      rows: of a part of a batch, where every device holds all parameters: each then finds the
        gradient of its own rows, and they are added once a step, not in each part and in each piece
        of the logits. The loss sees a device's rows alone. None leaves it to XLA.

    Returns:
      The step. Its metrics are float32: "loss" and the loss's others, means over the batch;
      "count"; "gradient_norm", before it is scaled; "skipped", 1 if the step changed nothing.
    """

    places = None if shardings is None or rows is not None else shardings.trained
    summed = _gradients(loss, prepare, parts, places)
    if rows is not None:
        summed = _by_device(summed, rows, parts)

    def step(state: TrainState, context: Any, batch: Any) -> Any:
        gradient, sums = summed(state, context, batch)
        count = jnp.maximum(sums.count, 1.0)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.total)
        if max_norm is not None:
            factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, max_norm))
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        means = {"loss": sums.total / count} | {k: v / count for k, v in sums.others.items()}
        metrics = means | {"count": sums.count, "gradient_norm": norm}
        metrics |= {"skipped": (~finite).astype(jnp.float32)}
        return _updated(optimizer, state, gradient, finite), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _gradients(
    loss: Loss, prepare: Callable[[Any], Any] | None, parts: int, places: Any
) -> Callable[[TrainState, Any, Any], tuple[Any, Sums]]:
    """(state, context, batch) -> (gradient of the total, sums), both over all parts.

    Gradients lie where a tree of shardings, `places`, says, or where XLA puts them.
    """

    def of_batch(state: TrainState, context: Any, batch: Any) -> tuple[Any, Sums]:
        moved, whole, pull = _prepared(state, prepare)

        def of_part(part: Any) -> tuple[Any, Sums]:
            def total(moved: Any) -> tuple[jax.Array, Sums]:
                sums = loss(whole(moved), context, part, state.step)
                return sums.total, sums

            gradient, sums = jax.grad(total, has_aux=True)(moved)
            gradient = pull(gradient)
            if places is not None:
                gradient = lax.with_sharding_constraint(gradient, places)
            return gradient, sums

        if parts == 1:
            return of_part(batch)

        def one(carry: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, of_part(part)), None

        shapes = jax.eval_shape(of_part, jax.tree.map(lambda array: array[0], batch))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return lax.scan(one, zeros, batch)[0]

    return of_batch


def _by_device(of_batch: Callable[..., Any], rows: NamedSharding, parts: int) -> Callable[..., Any]:
    """What each device finds of its own rows, added up over devices at the end."""
    whole = PartitionSpec()

    def of_all(*arguments: Any) -> Any:
        return lax.psum(of_batch(*arguments), rows.spec[0])

    specs = (whole, whole, batch_spec(rows.spec, parts))
    return jax.shard_map(of_all, mesh=rows.mesh, in_specs=specs, out_specs=whole, check_vma=False)


def _prepared(
    state: TrainState, prepare: Callable[[Any], Any] | None
) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """(arrays to differentiate by, what makes the loss's parameters of them, what takes their
    gradient to what is trained)."""
    if prepare is None:
        return state.trained, lambda moved: combine(moved, state.frozen), lambda gradient: gradient

    def read(trained: Any) -> Any:
        return prepare(combine(trained, state.frozen))

    structure, moves = _moving(read, state.trained)

    def apart(trained: Any) -> tuple[list[Any], list[Any]]:
        arrays = jax.tree.leaves(read(trained))
        return list(compress(arrays, moves)), list(compress(arrays, map(not_, moves)))

    moved, pull, fixed = jax.vjp(apart, state.trained, has_aux=True)

    def whole(moved: Any) -> Any:
        ours, others = iter(moved), iter(fixed)
        return jax.tree.unflatten(structure, [next(ours if own else others) for own in moves])

    return moved, whole, lambda gradient: pull(gradient)[0]


def _moving(function: Callable[[Any], Any], argument: Any) -> tuple[Any, list[bool]]:
    """(structure of the result; of each of its arrays, whether it is a float and depends on the
    argument)."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(argument)
    moved = set(closed.jaxpr.invars)
    for equation in closed.jaxpr.eqns:
        if not moved.isdisjoint(v for v in equation.invars if isinstance(v, Var)):
            moved.update(equation.outvars)
    arrays, structure = jax.tree.flatten(shapes)
    return structure, [
        isinstance(out, Var) and out in moved and jnp.issubdtype(array.dtype, jnp.floating)
        for out, array in zip(closed.jaxpr.outvars, arrays, strict=True)
    ]


def _updated(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: Any, finite: jax.Array
) -> TrainState:
    """The state after a step, which counts but changes nothing unless all was finite."""
    with jax.numpy_dtype_promotion("standard"):
        updates, after = optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
    trained, after = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (trained, after),
        (state.trained, state.optimizer),
    )
    skipped = (~finite).astype(jnp.int32)
    return replace(
        state,
        step=state.step + 1,
        trained=trained,
        optimizer=after,
        skipped=(state.skipped + 1) * skipped,
        all_skipped=state.all_skipped + skipped,
    )
