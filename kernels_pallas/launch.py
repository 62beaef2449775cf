"""Kernels that start while the one before them ends, and fetch their weights meanwhile.

Between two small kernels a GPU stands still for microseconds: one drains, the next is launched and
waits for its first bytes. With programmatic dependent launch (CUDA C++ Programming Guide, 4.5) the
second one starts when every CTA of the first has called `begin`, and only waits in its own `begin`
until the first has written everything. All that it does before is to ask the L2 cache for weights,
a hint that cannot return anything old.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels_pallas import instructions as ptx


def begin(interpret: bool, soon: Sequence[Any] = ()) -> None:
    """Has to come before a kernel reads or writes anything in global memory.

    Args:
      interpret: under the interpreter kernels run one after another, and this does nothing.
      soon: contiguous parts of global memory, whole 16 bytes each, for the L2 cache.
    """
    if interpret:
        return
    plgpu.griddepcontrol_launch_dependents()
    for ref in soon:
        _into_cache(ref)
    plgpu.griddepcontrol_wait()
    _fence()


def _into_cache(ref: Any) -> None:
    size = ref.size * jnp.dtype(ref.dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def prefetch(_, ref):
        base, warp, lane = ptx.base_and_lane(ref)
        others = arith.ori(warp, lane)
        text = (
            "{ .reg .pred p; setp.eq.u32 p,$1,0; "
            f"@p cp.async.bulk.prefetch.L2.global [$0], {size}; }}"
        )
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [base, others], text, "l,r", has_side_effects=True)

    prefetch(ref)  # pyright: ignore[reportCallIssue]: the context is inserted


def _fence() -> None:
    """Keeps a compiler from reading memory before the wait, which does not tell it not to."""

    @plgpu.inline_mgpu()
    def fence(_):
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], "", "~{memory}", has_side_effects=True)

    fence()  # pyright: ignore[reportCallIssue]: the context is inserted
