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

from jaxopt_models.elements import E4M3, Element, Levels, Minifloat, exponent_of, power_of_two
from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec
from jaxopt_models.numerics import (
    Scales,
    from_grid,
    real_scale,
    scales_from_amax,
    tile_expand,
    tile_reduce,
    to_grid,
)

Arrays = dict[str, jax.Array]
Apply = Callable[[Any, Arrays, jax.Array], jax.Array]

_HALF_STEP = 0.5
_MOST_SHRUNK = 0.5
# E4M3 scales lie up to an eighth apart, so that at the full rate blocks flip between two of them.
# Half of it left 0.47 of the nearest rounding's error on unseen text, the full rate 0.49, a quarter
# 0.47 (nvfp4, 100 steps, mean of three layers of SmolLM2-135M).
_E4M3_RATE = 0.5
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
class _Matrix:
    """A matrix [N, K], or a stack of them, with the scales it starts from."""

    weight: jax.Array
    scales: Scales
    spec: QuantSpec = struct.field(pytree_node=False)


@struct.dataclass
class _Rounded:
    """Grid values, float32 of the matrix's shape, and the scales they belong to."""

    grid: jax.Array
    scales: Scales


@struct.dataclass
class _Tuned:
    """What is optimised for one matrix, or its gradient.

    Attributes:
      offset: V, of the matrix's shape, in local grid steps.
      shrink: m, of the scale's shape; None where scales stay.
    """

    offset: jax.Array
    shrink: jax.Array | None


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
        {path: _Matrix(w, scales[path], specs[path]) for path, w in weights.items()},
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
    matrices: dict[str, _Matrix],
    text: _Text,
    rate: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    batch: int,
    tune_scales: bool,
) -> tuple[dict[str, _Rounded], Losses]:
    """One loop over steps + 1 states; the last, whose learning rate is 0, is only looked at."""
    layer = partial(apply, context)

    def batch_loss(dense: Arrays, rows: jax.Array) -> jax.Array:
        return _mean(*_error(layer, dense, text, rows, jnp.ones(rows.shape, jnp.float32)))

    def step(state, schedule):
        tuned, best, least = state
        index, rows, rate, is_check = schedule
        rounded = _over(_round, matrices, tuned)
        dense = _over(_dense, matrices, rounded)
        best, least = lax.cond(
            is_check, check, lambda *state: state[-2:], index, dense, rounded, best, least
        )
        loss, cotangents = jax.value_and_grad(batch_loss)(dense, rows)
        gradient = _over(_gradient, matrices, tuned, rounded, cotangents)
        tuned = _over(partial(_descend, rate=rate), matrices, tuned, gradient)
        return (tuned, best, least), (loss, least)

    def check(index, dense, rounded, best, least):
        loss = _whole_loss(layer, dense, text, batch)
        is_best = (index == 0) | (loss < least)  # a later loss that is NaN never wins
        pick = partial(jnp.where, is_best)
        return jax.tree.map(pick, rounded, best), pick(loss, least)

    tuned = {path: _start(matrix, tune_scales) for path, matrix in matrices.items()}
    best = {path: _Rounded(tuned[path].offset, m.scales) for path, m in matrices.items()}
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


def _over(function: Callable[..., Any], matrices: dict[str, _Matrix], *others: Any) -> Any:
    """The function of each matrix and what belongs to it, by path; of each expert on its own."""
    return {
        path: (jax.vmap(function) if matrix.weight.ndim == 3 else function)(
            matrix, *(other[path] for other in others)
        )
        for path, matrix in matrices.items()
    }


def _start(matrix: _Matrix, tune_scales: bool) -> _Tuned:
    shrink = jnp.ones(matrix.scales.scale.shape, jnp.float32) if tune_scales else None
    return _Tuned(jnp.zeros(matrix.weight.shape, jnp.float32), shrink)


def _round(matrix: _Matrix, tuned: _Tuned) -> _Rounded:
    """Nearest grid values of the weight moved by its offset, under the shrunk scales.

    Moving the weight, and not the quotient, leaves the rounding to `to_grid`.
    """
    scales = _shrink(matrix, tuned)
    scale, _, y = _in_steps(matrix, scales)
    offset = tuned.offset * _spacing(y, matrix.spec.element) * scale
    weight = matrix.weight.astype(jnp.float32) + offset
    return _Rounded(to_grid(weight, scales, matrix.spec), scales)


def _dense(matrix: _Matrix, rounded: _Rounded) -> jax.Array:
    return from_grid(rounded.grid, rounded.scales, matrix.spec).astype(matrix.weight.dtype)


def _gradient(matrix: _Matrix, tuned: _Tuned, rounded: _Rounded, cotangent: jax.Array) -> _Tuned:
    """Gradient at `tuned` of a loss that has the gradient `cotangent` at the dense matrix Ŵ.

    With y = W / s and g = round(y + V δ), the rounding taken for the identity inside the range:
        dŴ/dV = s δ                 inside, else 0
        dŴ/dm = (g - y) ds/dm       inside, else (g - zero point) ds/dm
    The rounding of a scale to its dtype is taken for the identity as well, so that ds/dm is the
    scale at m = 1.
    """
    element, cotangent = matrix.spec.element, cotangent.astype(jnp.float32)
    scale, zero, y = _in_steps(matrix, rounded.scales)
    spacing = _spacing(y, element)
    moved, reach = y + tuned.offset * spacing, _HALF_STEP * spacing
    inside = (moved >= element.lowest - reach) & (moved <= element.largest + reach)
    offset = jnp.where(inside, cotangent * scale * spacing, 0.0)
    if tuned.shrink is None:
        return _Tuned(offset, None)
    error = rounded.grid - jnp.where(inside, y, zero)
    tile = matrix.spec.tile(y.shape)
    by_scale = tile_reduce(cotangent * error, tile, jnp.sum)
    return _Tuned(offset, by_scale * real_scale(matrix.scales, matrix.spec))


def _descend(matrix: _Matrix, tuned: _Tuned, gradient: _Tuned, rate: jax.Array) -> _Tuned:
    """A step of signed gradient descent, kept in bounds."""
    offset = tuned.offset - rate * jnp.sign(gradient.offset)
    offset = jnp.clip(offset, -_HALF_STEP, _HALF_STEP)
    if tuned.shrink is None or gradient.shrink is None:
        return _Tuned(offset, None)
    rate = rate * _E4M3_RATE if matrix.spec.two_level else rate
    shrink = tuned.shrink - rate * jnp.sign(gradient.shrink)
    return _Tuned(offset, jnp.clip(shrink, _MOST_SHRUNK, 1.0))


def _in_steps(matrix: _Matrix, scales: Scales) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(scale, zero point, weight in units of the grid), each float32 [N, K]."""
    shape = matrix.weight.shape
    expand = partial(tile_expand, tile=matrix.spec.tile(shape), shape=shape)
    scale = expand(real_scale(scales, matrix.spec))
    zero = jnp.zeros_like(scale)
    if scales.zero_point is not None:
        zero = expand(scales.zero_point.astype(jnp.float32))
    return scale, zero, matrix.weight.astype(jnp.float32) / scale + zero


def _shrink(matrix: _Matrix, tuned: _Tuned) -> Scales:
    """Scales of the shrunk amax.

    An entry that has not moved keeps its given scale bit for bit, and the global scale, which other
    matrices may share, stays. A zero point stays too: both ends of its range shrink alike.
    """
    given, spec = matrix.scales, matrix.spec
    if tuned.shrink is None:
        return given
    overall = None
    if given.global_scale is not None:
        overall = given.global_scale * spec.element.largest * E4M3.largest
    new = scales_from_amax(tuned.shrink * _amax(matrix), spec, overall)
    still = tuned.shrink == 1
    inverse = None
    if given.inverse is not None and new.inverse is not None:
        inverse = jnp.where(still, given.inverse, new.inverse)
    scale = jnp.where(still, given.scale, new.scale)
    return Scales(scale, given.global_scale, given.zero_point, inverse)


def _amax(matrix: _Matrix) -> jax.Array:
    """A magnitude of each tile whose scale is the given one.

    It is what the given scale maps to the largest grid value, except under an E8M0 scale that is
    the rule's for the tile's own amax: then that, so that a tile which barely needs its scale is
    the first to leave it.
    """
    spec, weight = matrix.spec, matrix.weight.astype(jnp.float32)
    scale = real_scale(matrix.scales, spec)
    covered = scale * spec.element.largest
    if not spec.power_of_two:
        return covered
    own = tile_reduce(jnp.abs(weight), spec.tile(weight.shape))
    return jnp.where(real_scale(scales_from_amax(own, spec), spec) == scale, own, covered)


def _spacing(y: jax.Array, element: Element) -> jax.Array:
    """Distance between the grid values on either side of `y`."""
    y = jnp.clip(y, element.lowest, element.largest)
    if isinstance(element, Minifloat):
        exponent = jnp.maximum(exponent_of(y), element.min_exponent)
        return power_of_two(exponent - element.mantissa)
    if isinstance(element, Levels):
        gaps = jnp.asarray(np.diff(np.asarray(element.table)), jnp.float32)
        above = (y > level for level in element.table[1:-1])
        return gaps[sum((a.astype(jnp.int32) for a in above), jnp.int32(0))]
    return jnp.ones_like(y)
