"""How the product of a 4-bit weight with few activations is cut; see `w4a16_decode`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kernels_pallas.four_bit import ROWS, STEP
from kernels_pallas.hopper import SHARED_MEMORY

MOST_ROWS = 16
PADDED = 72  # 64 sums and 8 that keep rows in different banks


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; see the module.

    Attributes:
      wn: warpgroups side by side along N.
      wk: warpgroups that share K; `wn · wk` is at most 4, for more have too few registers.
      split: CTAs that share K.
      depth: steps that are loaded ahead of their use.
    """

    wn: int
    wk: int
    split: int = 1
    depth: int = 2

    def steps(self, columns: int) -> int:
        """Steps of a warpgroup for each tile."""
        return columns // STEP // (self.split * self.wk)

    def shared_memory(self, rows: int, columns: int) -> int:
        activations = rows * columns // self.split * 2
        return activations + self.wn * self.wk**2 * rows * PADDED * 4 + 1024

    def fits(self, rows: int, tiles: int, columns: int) -> bool:
        parts = self.split * self.wk
        few = self.wn * self.wk <= 4
        even = tiles % self.wn == 0 and columns // STEP % parts == 0
        return few and even and self.shared_memory(rows, columns) <= SHARED_MEMORY


def tilings(rows: int, tiles: int, columns: int) -> Iterator[Tiling]:
    """Those worth trying, for activations [rows, columns] and `tiles` of 16 weight rows."""
    for split in (1, 2, 4, 7, 8, 14, 16, 28):
        for wn, wk in ((2, 2), (1, 4), (4, 1), (2, 1), (1, 2), (1, 1)):
            for depth in (2, 4):
                tiling = Tiling(wn, wk, split, depth)
                if tiling.fits(rows, tiles, columns):
                    yield tiling


def padded_rows(rows: int) -> int:
    """Rows of activations that the kernel works on."""
    return 8 if rows <= 8 else MOST_ROWS


def default_tiling(rows: int, tiles: int, columns: int, processors: int) -> Tiling | None:
    """The tiling whose busiest processor has least to do.

    Estimated in bytes: the weights that it reads, half the activations that it keeps, what its
    warpgroups add at the end of each tile, and partial sums of a split K. A processor with fewer
    than four warpgroups does not have enough loads under way. Loads that run further ahead than two
    steps help where there are few tiles. None if nothing fits: K is too long for shared memory, and
    has no suitable factor.
    """

    def cost(tiling: Tiling) -> float:
        groups = tiles // tiling.wn
        rounds = math.ceil(groups / max(1, min(processors // tiling.split, groups)))
        part = columns // tiling.split
        weights = rounds * tiling.wn * ROWS * part // 2
        # Two corrections as measured on an H100.
        if rows <= 8 and rounds >= 4 and tiling.wk == 4:
            weights *= 0.95
        if 1 < rounds < 4 and tiling.split == 1:
            weights *= 1.4
        adding = rounds * 512 * tiling.wk
        partial_sums = 0.0
        if tiling.split > 1:  # and another kernel to add them
            partial_sums = 65536 + 8 * tiling.split * rows * ROWS * tiles / processors
        if (rounds < 4) == (tiling.depth == 2):
            adding += 4096
        idle = 4 / (tiling.wn * tiling.wk)
        return weights * idle + rows * part + adding + partial_sums

    return min(tilings(rows, tiles, columns), key=cost, default=None)
