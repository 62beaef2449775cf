"""AutoRound: which way each weight of a layer rounds, found by signed gradient descent.

For the matrices W of one decoder layer f, with scale s and local distance δ between grid values,

    minimise  mean (f(x; Ŵ) - y)²    over  V in [-1/2, 1/2]  and  m in [1/2, 1]
    Ŵ = s · round(W / s + V · δ),    s = scale of (m · amax)

x are the layer's inputs in the partly quantized model, y the outputs of the original layer. V has
an entry for each weight and starts at 0, m has one for each scale and starts at 1. Gradients pass
the rounding straight through; a step moves every V and m by the learning rate, up or down.

Reference: Cheng et al. 2023, arXiv:2309.05516.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import Scales
from jaxopt_models.quantize.tuned import (
    Matrix,
    RoundedMatrix,
    begin,
    dense_matrix,
    descend,
    gradient_of,
    round_matrix,
)

Arrays = dict[str, jax.Array]
Apply = Callable[[Any, Arrays, jax.Array], jax.Array]

_CHECKS = 4  # looks at the whole text after the first, evenly over the steps
_TINY = 2.0**-126


@struct.dataclass
class Losses:
    """Mean squared errors of the layer's output, weighted by token; float32.

    Attributes:
      nearest: [], on all windows, rounding to nearest under the given scales.
      best: [], on all windows, of what is returned; never above `nearest`.
      batches: [steps], on the minibatch of each step, before the step.
    """

    nearest: jax.Array
    best: jax.Array
    batches: jax.Array


@struct.dataclass
class _Text:
    """Layer inputs and wanted outputs, [windows, T, D], and token weights, [windows, T]."""

    inputs: jax.Array
    targets: jax.Array
    token_weights: jax.Array


def autoround(
    apply: Apply,
    context: Any,
    weights: Mapping[str, jax.Array],
    scales: Mapping[str, Scales],
    specs: Mapping[str, QuantSpec],
    inputs: jax.Array,
    targets: jax.Array,
    *,
    token_weights: jax.Array | None = None,
    steps: int = 200,
    batch: int = 8,
    learning_rate: float | None = None,
    seed: int = 0,
    tune_scales: bool = True,
) -> tuple[Arrays, dict[str, Scales], Losses]:
    """Grid values and scales of a layer's matrices that reproduce the layer's output best.

    The state before the first step, which rounds to nearest, and those after each quarter of the
    steps are compared on all windows and the best is returned: its loss on the given text is never
    above that of rounding to nearest. Scales keep their dtype: m moves in small steps and
    the scale follows when m · amax crosses to the next E4M3 or E8M0 number; an E8M0 scale, which
    knows factors of two only, is thus halved or left.

    Everything runs in one compiled call, compiled once for each `apply`, specs, counts and shapes.
    For layers of one kind to share it, pass the same function object each time (a `partial` or a
    closure made anew is another one) and everything that differs between layers in `context`.

    Args:
      apply: `(context, dense, x) -> y`, the layer on inputs [batch, T, D]. `dense` holds under each
        path of `weights` the array that the quantized matrix stands for, of that weight's shape and
        dtype; what the real leaf does to its input (smoothing, rotation, input quantizer, low-rank
        part) is up to `apply`.
      context: pytree of whatever else the layer reads.
      weights: matrices by path, [N, K], or [E, N, K] for experts, each with scales of its own.
      scales: what to start from, by path; experts' have a leading [E].
      specs: number format of each.
      inputs, targets: [windows, T, D].
      token_weights: [windows, T], weight of each token in the loss; None weights all alike.
      steps: 0 rounds to nearest.
      batch: windows in a minibatch; at most all.
      learning_rate: of the first step, from which it falls linearly to zero; None is 1 / steps,
        with which an offset can just reach half a step.
      seed: decides the order of windows, and nothing else is random.
      tune_scales: whether m is optimised beside V.

    Returns:
      (float32 grid values by path, scales by path with dtypes and global scales as given, losses).

    Raises:
      UserError: for paths or shapes that do not go together, or a count out of range.
    """
    _check(weights, scales, specs, inputs, targets, token_weights, steps, batch)
    if token_weights is None:
        token_weights = jnp.ones(inputs.shape[:2], jnp.float32)
    rate = 1 / max(steps, 1) if learning_rate is None else learning_rate
    best, losses = _optimize(
        apply,
        context,
        {path: Matrix(w, scales[path], specs[path]) for path, w in weights.items()},
        _Text(inputs, targets, token_weights.astype(jnp.float32)),
        jnp.float32(rate),
        jax.random.key(seed),
        steps=steps,
        batch=min(batch, inputs.shape[0]),
        tune_scales=tune_scales,
    )
    grids = {path: rounded.grid for path, rounded in best.items()}
    return grids, {path: rounded.scales for path, rounded in best.items()}, losses


def _check(weights, scales, specs, inputs, targets, token_weights, steps, batch) -> None:
    paths = [set(weights), set(scales), set(specs)]
    odd = sorted(set.union(*paths) - set.intersection(*paths))
    if odd:
        raise UserError(f"weights, scales and specs must each have an entry for {', '.join(odd)}")
    if inputs.ndim != 3 or inputs.shape[:2] != targets.shape[:2] or inputs.shape[0] == 0:
        raise UserError(
            f"inputs {list(inputs.shape)} and targets {list(targets.shape)} must both be "
            "[windows, T, D] with the same windows, at least one"
        )
    if token_weights is not None and token_weights.shape != inputs.shape[:2]:
        raise UserError(
            f"token_weights {list(token_weights.shape)} must be [windows, T] = "
            f"{list(inputs.shape[:2])}"
        )
    if steps < 0 or batch < 1:
        raise UserError(f"steps {steps} must be 0 or more and batch {batch} 1 or more")


@partial(jax.jit, static_argnames=("apply", "steps", "batch", "tune_scales"))
def _optimize(
    apply: Apply,
    context: Any,
    matrices: dict[str, Matrix],
    text: _Text,
    rate: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    batch: int,
    tune_scales: bool,
) -> tuple[dict[str, RoundedMatrix], Losses]:
    """One loop over steps + 1 states; the last, whose learning rate is 0, is only looked at."""
    layer = partial(apply, context)

    def batch_loss(dense: Arrays, rows: jax.Array) -> jax.Array:
        return _mean(*_error(layer, dense, text, rows, jnp.ones(rows.shape, jnp.float32)))

    def step(state, schedule):
        tuned, best, least = state
        index, rows, rate, is_check = schedule
        rounded = _over(round_matrix, matrices, tuned)
        dense = _over(dense_matrix, matrices, rounded)
        best, least = lax.cond(
            is_check, check, lambda *state: state[-2:], index, dense, rounded, best, least
        )
        loss, cotangents = jax.value_and_grad(batch_loss)(dense, rows)
        gradient = _over(gradient_of, matrices, tuned, rounded, cotangents)
        tuned = _over(partial(descend, rate=rate), matrices, tuned, gradient)
        return (tuned, best, least), (loss, least)

    def check(index, dense, rounded, best, least):
        loss = _whole_loss(layer, dense, text, batch)
        is_best = (index == 0) | (loss < least)  # a later loss that is NaN never wins
        pick = partial(jnp.where, is_best)
        return jax.tree.map(pick, rounded, best), pick(loss, least)

    tuned = {path: begin(matrix, tune_scales) for path, matrix in matrices.items()}
    best = {path: RoundedMatrix(tuned[path].offset, m.scales) for path, m in matrices.items()}
    schedule = _schedule(text.inputs.shape[0], steps, batch, rate, key)
    start = (tuned, best, jnp.float32(jnp.inf))
    (_, best, least), (losses, leasts) = lax.scan(step, start, schedule)
    return best, Losses(leasts[0], least, losses[:steps])


def _schedule(
    windows: int, steps: int, batch: int, rate: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Index of each state, its windows [states, batch], learning rate, and whether to check it.

    Windows come in shuffled passes, so that each is seen as often as any other.
    """
    states, last = np.arange(steps + 1), max(steps, 1)
    passes = -(-states.size * batch // windows)
    shuffle = jax.vmap(partial(jax.random.permutation, x=windows))
    rows = shuffle(jax.random.split(key, passes)).reshape(-1)[: states.size * batch]
    is_check = states * _CHECKS // last > (states - 1) * _CHECKS // last
    rates = rate * jnp.asarray(1 - states / last, jnp.float32)
    return jnp.asarray(states), rows.reshape(-1, batch), rates, jnp.asarray(is_check)


def _error(
    layer: Callable[[Arrays, jax.Array], jax.Array],
    dense: Arrays,
    text: _Text,
    rows: jax.Array,
    row_weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum over tokens of the mean squared error, and the sum of weights."""
    out = layer(dense, text.inputs[rows]).astype(jnp.float32)
    error = jnp.mean(jnp.square(out - text.targets[rows].astype(jnp.float32)), axis=-1)
    weights = text.token_weights[rows] * row_weights[:, None]
    return jnp.sum(error * weights), jnp.sum(weights)


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / jnp.maximum(weight, _TINY)


def _whole_loss(layer, dense: Arrays, text: _Text, batch: int) -> jax.Array:
    """Loss on all windows, `batch` at a time; the last batch is filled with rows of weight 0."""
    windows = text.inputs.shape[0]
    rows = np.arange(-(-windows // batch) * batch).reshape(-1, batch)
    valid = jnp.asarray(rows < windows, jnp.float32)

    def add(sums, chunk):
        return jax.tree.map(jnp.add, sums, _error(layer, dense, text, *chunk)), None

    chunks = (jnp.asarray(np.minimum(rows, windows - 1), jnp.int32), valid)
    sums, _ = lax.scan(add, (jnp.float32(0), jnp.float32(0)), chunks)
    return _mean(*sums)


def _over(function: Callable[..., Any], matrices: dict[str, Matrix], *others: Any) -> Any:
    """The function of each matrix and what belongs to it, by path; of each expert on its own."""
    return {
        path: (jax.vmap(function) if matrix.weight.ndim == 3 else function)(
            matrix, *(other[path] for other in others)
        )
        for path, matrix in matrices.items()
    }
