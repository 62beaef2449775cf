"""Attention of few queries over a long cache, reading each key and value that they see once.

The queries that share a key, R = T · H / G of them, are rows of one product with it: 64 for the
tensor cores, the real ones first. A CTA, of one warpgroup, goes through its share of a head's tiles
of 128 slots, while the next ones are loaded:

    S = Q Kᵀ, masked by position    P = 2^(S - max)    O += P V

(Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Several CTAs share
a head ("Flash-Decoding", Dao et al. 2023); `attention_parts` adds up what they leave, in order.

Tiles behind a row's last position, or before its window, are not read: time follows what is filled,
not the cache's capacity.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention_parts import add_parts
from kernels_pallas.hopper import rounded, tiled_memory

TILE = 128  # slots
MOST_QUERIES = 64  # of a key: the rows of one wgmma
HEAD_DIMS = (64, 128)
_STAGES = 2  # tiles under way
_MOST_PARTS = 16  # of a head
_HIDDEN = -1e30  # a score that is not seen; finite, so that differences are
_LOG2_E = math.log2(math.e)


def has_kernel(query: jax.Array, key: jax.Array) -> bool:
    """Whether bfloat16 queries are few enough, heads of 64 or 128, slots a multiple of 8."""
    length, heads, dim = query.shape[1:]
    groups, slots = key.shape[1:3]
    few = 0 < heads // groups * length <= MOST_QUERIES
    typed = query.dtype == key.dtype == jnp.bfloat16
    return typed and few and dim in HEAD_DIMS and slots % 8 == 0 and query.size > 0


@partial(
    jax.jit,
    static_argnames=("scale", "window", "softcap", "processors", "parts", "interpret"),
)
def attention_kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    processors: int = 132,
    parts: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`softmax(scale · q kᵀ + mask) v`; see `attention.cached_attention`.

    Weights are rounded to bfloat16 before they are divided by their sum, not after.

    Args:
      query: bfloat16 [B, T, H, d].
      key, value: bfloat16 [B, G, S, d].
      positions: int32 [B, T].
      processors: streaming multiprocessors of the device; static.
      parts: CTAs that share a head; None takes as many as keep all processors busy; static.
      interpret: runs in Pallas's interpreter, on any device; static.

    Raises:
      ValueError: for arrays without a kernel.
    """
    if not has_kernel(query, key):
        raise ValueError(
            f"no kernel for queries {query.dtype}{query.shape} and keys {key.dtype}{key.shape}; "
            f"needed are bfloat16, at most {MOST_QUERIES} queries of a key, heads of "
            f"{' or '.join(map(str, HEAD_DIMS))}, a multiple of 8 slots"
        )
    batch, length, heads, dim = query.shape
    groups, slots = key.shape[1:3]
    sharing = heads // groups
    tiles = -(-slots // TILE)
    parts = parts or max(1, min(processors // (batch * groups), _MOST_PARTS))
    parts = min(parts, tiles)
    plan = _Plan(groups, sharing * length, slots, dim, parts, scale, window, softcap, interpret)

    by_key = jnp.moveaxis(query.reshape(batch, length, groups, sharing, dim), 1, 3)
    rows = by_key.reshape(batch * groups, plan.queries, dim)
    height = MOST_QUERIES if interpret else rounded(plan.queries, 8)
    # The hardware reads zeros outside of an array.
    rows = jnp.pad(rows, ((0, 0), (0, height - plan.queries), (0, 0)))
    cached = [array.reshape(batch * groups, slots, dim) for array in (key, value)]
    if interpret:
        cached = [jnp.pad(array, ((0, 0), (0, tiles * TILE - slots), (0, 0))) for array in cached]
    limits = jnp.tile(positions, (1, sharing))
    limits = jnp.pad(limits, ((0, 0), (0, MOST_QUERIES - plan.queries)))
    mixed, most, sums = _kernel(plan, batch)(rows, *cached, limits, _span(plan, positions))

    total = add_parts(mixed, most, sums, plan.queries, interpret=interpret)
    return jnp.moveaxis(total.reshape(by_key.shape), 3, 1).reshape(query.shape)


@dataclass(frozen=True)
class _Plan:
    """Sizes of one call; `queries` read a key."""

    groups: int
    queries: int
    slots: int
    dim: int
    parts: int
    scale: float
    window: int | None
    softcap: float | None
    interpret: bool

    @property
    def written(self) -> int:
        """Rows of results: copies take multiples of 16 bytes."""
        return -(-self.queries // 8) * 8


class _Refs(NamedTuple):
    queries: Any
    keys: Any
    values: Any
    limits: Any
    span: Any
    mixed: Any
    most: Any
    sums: Any
    own_queries: Any
    own_keys: Any
    own_values: Any
    weights: Any
    own_mixed: Any
    own_most: Any
    own_sums: Any
    queries_ready: Any
    keys_ready: Any
    values_ready: Any


def _span(plan: _Plan, positions: jax.Array) -> jax.Array:
    """First tile that a row of the batch sees, and how many it does: int32 [B, 2]."""
    last = jnp.minimum(jnp.max(positions, axis=1), plan.slots - 1) // TILE
    first = jnp.zeros_like(last)
    if plan.window is not None:
        first = jnp.maximum(jnp.min(positions, axis=1) - plan.window + 1, 0) // TILE
    return jnp.stack([first, last - first + 1], axis=1)


def _kernel(plan: _Plan, batch: int):
    """(queries, keys, values, limits, span) -> sums, maxima and sums of weights of each part."""
    heads, dim = batch * plan.groups, plan.dim
    statistics = jax.ShapeDtypeStruct((heads, plan.parts, plan.written), jnp.float32)
    return plgpu.kernel(
        lambda *refs: _body(plan, _Refs(*refs)),
        out_type=(
            jax.ShapeDtypeStruct((heads, plan.parts, plan.written, dim), jnp.float32),
            statistics,
            statistics,
        ),
        scratch_types=(
            tiled_memory((MOST_QUERIES, dim), jnp.bfloat16),
            tiled_memory((_STAGES, TILE, dim), jnp.bfloat16),
            tiled_memory((_STAGES, TILE, dim), jnp.bfloat16),
            tiled_memory((MOST_QUERIES, TILE), jnp.bfloat16),
            plgpu.SMEM((MOST_QUERIES, dim), jnp.float32),
            plgpu.SMEM((MOST_QUERIES,), jnp.float32),
            plgpu.SMEM((MOST_QUERIES,), jnp.float32),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=1, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=_STAGES),
        ),
        grid=(heads, plan.parts),
        grid_names=("head", "part"),
        num_threads=1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _body(plan: _Plan, refs: _Refs) -> None:
    head, part = lax.axis_index("head"), lax.axis_index("part")
    row = head // plan.groups  # of the batch
    each = (refs.span[row, 1] + plan.parts - 1) // plan.parts
    count = lax.max(lax.min(each, refs.span[row, 1] - part * each), 0)
    first = refs.span[row, 0] + part * each

    def fetch(turn: Any) -> None:
        slot, place = lax.rem(turn, _STAGES), pl.ds((first + turn) * TILE, TILE)
        keys, values = refs.keys.at[head, place], refs.values.at[head, place]
        plgpu.copy_gmem_to_smem(keys, refs.own_keys.at[slot], refs.keys_ready.at[slot])
        plgpu.copy_gmem_to_smem(values, refs.own_values.at[slot], refs.values_ready.at[slot])

    # Traced, since only such a slice may go beyond the array.
    source = refs.queries.at[head, pl.ds(lax.min(part, 0) * MOST_QUERIES, MOST_QUERIES)]
    plgpu.copy_gmem_to_smem(source, refs.own_queries, refs.queries_ready)
    for turn in range(_STAGES):
        pl.when(turn < count)(partial(fetch, jnp.int32(turn)))
    limits = _rows(plan, refs.limits.at[row])
    plgpu.barrier_wait(refs.queries_ready)

    def one_tile(turn, carry):
        carry = _one_tile(plan, refs, first + turn, lax.rem(turn, _STAGES), limits, carry)
        pl.when(turn + _STAGES < count)(partial(fetch, turn + _STAGES))
        return carry

    shape = (MOST_QUERIES, plan.dim)
    carry = jnp.zeros(shape), jnp.full(shape[:1], _HIDDEN), jnp.zeros(shape[:1])
    if not plan.interpret:
        layouts = plgpu.Layout.WGMMA, *2 * [plgpu.Layout.WGMMA.reduce(1)]
        carry = tuple(map(plgpu.layout_cast, carry, layouts))
    results = lax.fori_loop(0, count, one_tile, carry)
    _store(plan, refs, head, part, results)


def _one_tile(plan: _Plan, refs: _Refs, tile: Any, slot: Any, limits: jax.Array, carry: Any) -> Any:
    """(sum of weighted values, maxima, sums of weights), one tile further."""
    mixed, most, sums = carry
    plgpu.barrier_wait(refs.keys_ready.at[slot])
    scores = _product(refs.own_queries, refs.own_keys.at[slot].T, (MOST_QUERIES, TILE))
    scores = _masked(plan, scores, tile, limits)
    higher = jnp.maximum(most, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, scores.shape, (0,)))
    refs.weights[...] = weights.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_wait(refs.values_ready.at[slot])
    added = _product(refs.weights, refs.own_values.at[slot], mixed.shape)
    decay = jnp.exp2(most - higher)
    mixed = mixed * lax.broadcast_in_dim(decay, mixed.shape, (0,)) + added
    return mixed, higher, sums * decay + jnp.sum(weights, axis=1)


def _product(left: Any, right: Any, shape: tuple[int, int]) -> jax.Array:
    def scoped(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, left, right)
        return sums[...]

    accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(scoped, accumulator(shape, jnp.float32))


def _masked(plan: _Plan, scores: jax.Array, tile: Any, limits: jax.Array) -> jax.Array:
    """Scores as powers of 2 take them."""
    if plan.softcap is None:
        scores = scores * (plan.scale * _LOG2_E)
    else:  # c · tanh(s / c)
        powers = jnp.exp2(scores * (2 * plan.scale / plan.softcap * _LOG2_E))
        scores = (plan.softcap * _LOG2_E) * (1.0 - 2.0 / (powers + 1.0))
    layout = {} if plan.interpret else {"layout": plgpu.Layout.WGMMA}
    slots = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, **layout) + tile * TILE
    last = lax.broadcast_in_dim(limits, scores.shape, (0,))
    seen = slots <= last
    if plan.window is not None:
        seen = seen & (slots > last - plan.window)
    return jnp.where(seen, scores, _HIDDEN)


def _rows(plan: _Plan, ref: Any) -> jax.Array:
    """One number for each row of scores."""
    if plan.interpret:
        return ref[...]
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _store(plan: _Plan, refs: _Refs, head: Any, part: Any, results: Any) -> None:
    own = refs.own_mixed, refs.own_most, refs.own_sums
    for ref, result in zip(own, results, strict=True):
        ref[...] = result
    plgpu.commit_smem()
    rows = pl.ds(0, plan.written)
    for source, target in zip(own, (refs.mixed, refs.most, refs.sums), strict=True):
        plgpu.copy_smem_to_gmem(source.at[rows], target.at[head, part])
    plgpu.wait_smem_to_gmem(0)
