"""What calibration remembers of the input of a linear: a pytree, updated batch by batch.

    totals = empty(wanted, width, batches)
    totals = update(totals, x, index)             after each batch, inside jit
    statistics = finished(totals)                 sums become means

For a stack of experts every field but the histogram has a leading axis [E].
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct

# Histogram of log2|x|: sixteenths of an octave from 2^-32 to 2^32; the ends take what lies beyond.
LOWEST, HIGHEST, BINS_AN_OCTAVE = -32, 32, 16
BINS = (HIGHEST - LOWEST) * BINS_AN_OCTAVE
_WIDE = 1024  # columns from which mirroring half of a product pays for putting it together


@dataclass(frozen=True)
class Wanted:
    """What to remember of one input; static.

    Attributes:
      second_moment: E[x xᵀ], [K, K] — up to a factor the Hessian of the layer's squared error.
      histogram: of log2|x|.
      sample: rows to keep, in all; 0 keeps none.
      rotate: block of the Hadamard transform that the input goes through first; 0 is none.
    """

    second_moment: bool = False
    histogram: bool = False
    sample: int = 0
    rotate: int = 0


@struct.dataclass
class InputStatistics:
    """Of the rows x[T, K] that reach a linear; float32.

    Attributes:
      count: [], rows seen.
      amax: [], max |x|.
      channel_amax: [K], max |x_k|.
      channel_abs: [K], mean |x_k|.
      second_moment: [K, K], mean of x xᵀ; None if it was not wanted.
      histogram: [BINS], counts of |x| (of all experts together); None likewise.
      sample: [S, K], rows taken evenly; None likewise.
      lost: [K, K], what rounding has taken from the sum of second moments so far; None when
        finished.
    """

    count: jax.Array
    amax: jax.Array
    channel_amax: jax.Array
    channel_abs: jax.Array
    second_moment: jax.Array | None = None
    histogram: jax.Array | None = None
    sample: jax.Array | None = None
    lost: jax.Array | None = None


def empty(wanted: Wanted, width: int, batches: int, experts: int = 0) -> InputStatistics:
    """Totals of nothing, for inputs [.., width] that will come in so many batches."""
    lead = (experts,) if experts else ()

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros((*lead, *shape), jnp.float32)

    rows = -(-wanted.sample // batches) * batches
    return InputStatistics(
        count=zeros(),
        amax=zeros(),
        channel_amax=zeros(width),
        channel_abs=zeros(width),
        second_moment=zeros(width, width) if wanted.second_moment else None,
        histogram=jnp.zeros((BINS,), jnp.float32) if wanted.histogram else None,
        sample=zeros(rows, width) if rows else None,
        lost=zeros(width, width) if wanted.second_moment else None,
    )


def update(
    totals: InputStatistics,
    x: jax.Array,
    index: jax.Array,
    batches: int,
    group_sizes: jax.Array | None = None,
) -> InputStatistics:
    """Adds a batch of rows.

    Second moments are multiplied in full float32 and summed with the rounding error carried along
    (Neumaier 1974), so that the total does not depend on how the text was cut into batches beyond
    the last bit.

    Args:
      totals: from `empty` or the batch before.
      x: [..., K]; for experts [rows, K], sorted by expert.
      index: int32, which of the `batches` this is.
      group_sizes: int32 [E], rows of each expert; None for one matrix.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if group_sizes is None:
        part = _of_rows(x, totals, batches)
    else:
        part = _of_experts(x, group_sizes, totals, batches)
    second_moment, lost = totals.second_moment, totals.lost
    if second_moment is not None and lost is not None and part.second_moment is not None:
        second_moment, lost = _compensated(second_moment, lost, part.second_moment)
    sample = totals.sample
    if sample is not None and part.sample is not None:
        start = index * (sample.shape[-2] // batches)
        sample = jax.lax.dynamic_update_slice_in_dim(sample, part.sample, start, sample.ndim - 2)
    return InputStatistics(
        count=totals.count + part.count,
        amax=jnp.maximum(totals.amax, part.amax),
        channel_amax=jnp.maximum(totals.channel_amax, part.channel_amax),
        channel_abs=totals.channel_abs + part.channel_abs,
        second_moment=second_moment,
        histogram=None if totals.histogram is None else totals.histogram + _histogram(x),
        sample=sample,
        lost=lost,
    )


def finished(totals: InputStatistics) -> InputStatistics:
    """Means in place of sums; of an expert without rows, zeros."""
    count = jnp.maximum(totals.count, 1.0)
    second_moment = totals.second_moment
    if second_moment is not None and totals.lost is not None:
        second_moment = (second_moment + totals.lost) / count[..., None, None]
    return replace(
        totals,
        channel_abs=totals.channel_abs / count[..., None],
        second_moment=second_moment,
        lost=None,
    )


def _of_rows(x: jax.Array, totals: InputStatistics, batches: int) -> InputStatistics:
    """Sums over the rows of one batch, with its share of the sample, in the fields of `totals`."""
    magnitude = jnp.abs(x)
    channel_amax = jnp.max(magnitude, axis=0)
    part = InputStatistics(
        count=jnp.float32(x.shape[0]),
        amax=jnp.max(channel_amax),
        channel_amax=channel_amax,
        channel_abs=jnp.sum(magnitude, axis=0),
    )
    if totals.second_moment is not None:
        part = replace(part, second_moment=_gram(x))
    if totals.sample is not None:
        rows = _evenly(jnp.int32(x.shape[0]), totals.sample.shape[-2] // batches)
        part = replace(part, sample=x[rows])
    return part


def _gram(x: jax.Array) -> jax.Array:
    """xᵀ x of rows [T, K]. Of wide rows, what lies off the diagonal is computed once and mirrored,
    which leaves down to half of the operations."""
    width = x.shape[1]
    if width < _WIDE:
        return jnp.matmul(x.T, x, precision="highest")
    left, right = x[:, : width // 2], x[:, width // 2 :]
    across = jnp.matmul(left.T, right, precision="highest")
    upper = jnp.concatenate([_gram(left), across], axis=1)
    lower = jnp.concatenate([across.T, _gram(right)], axis=1)
    return jnp.concatenate([upper, lower])


def _of_experts(
    x: jax.Array, group_sizes: jax.Array, totals: InputStatistics, batches: int
) -> InputStatistics:
    """The same for each expert's group of rows."""
    experts = group_sizes.shape[0]
    owner = jnp.repeat(jnp.arange(experts), group_sizes, total_repeat_length=x.shape[0])
    magnitude = jnp.abs(x)
    # A maximum over no rows would be -inf.
    channel_amax = jnp.maximum(jax.ops.segment_max(magnitude, owner, experts), 0.0)
    part = InputStatistics(
        count=group_sizes.astype(jnp.float32),
        amax=jnp.max(channel_amax, axis=-1),
        channel_amax=channel_amax,
        channel_abs=jax.ops.segment_sum(magnitude, owner, experts),
    )
    if totals.second_moment is not None:
        part = replace(part, second_moment=_grouped_gram(x, group_sizes))
    if totals.sample is not None:
        starts = jnp.cumsum(group_sizes) - group_sizes
        each = totals.sample.shape[-2] // batches
        inside = jax.vmap(lambda n: _evenly(n, each))(group_sizes)
        rows = x[jnp.minimum(starts[:, None] + inside, x.shape[0] - 1)]
        part = replace(part, sample=jnp.where((group_sizes > 0)[:, None, None], rows, 0.0))
    return part


def _grouped_gram(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Σ x xᵀ over each group of rows: [E, K, K]."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        x, x, group_sizes, numbers, precision="highest", preferred_element_type=jnp.float32
    )


def _evenly(size: jax.Array, count: int) -> jax.Array:
    """`count` row numbers spread over 0..size-1, int32."""
    middles = (2 * jnp.arange(count, dtype=jnp.float32) + 1) / (2 * count)
    rows = (middles * size.astype(jnp.float32)).astype(jnp.int32)
    return jnp.clip(rows, 0, jnp.maximum(size - 1, 0))


def _histogram(x: jax.Array) -> jax.Array:
    bins = jnp.floor((jnp.log2(jnp.abs(x)) - LOWEST) * BINS_AN_OCTAVE)
    index = jnp.clip(bins, 0, BINS - 1).astype(jnp.int32)
    return jnp.zeros((BINS,), jnp.float32).at[index.reshape(-1)].add(1.0)


def _compensated(total: jax.Array, lost: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rounded sum, everything that rounding has lost): Neumaier's summation, elementwise."""
    rounded = jax.lax.optimization_barrier(total + part)
    larger = jnp.abs(total) >= jnp.abs(part)
    big, small = jnp.where(larger, total, part), jnp.where(larger, part, total)
    return rounded, lost + (jax.lax.optimization_barrier(big - rounded) + small)
