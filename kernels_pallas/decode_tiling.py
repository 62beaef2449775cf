"""How the product of a 4-bit weight with few activations is cut; see `w4a16_decode`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kernels_pallas.four_bit import ROWS, STEP, FourBit
from kernels_pallas.hopper import SHARED_MEMORY

MOST_ROWS = 16
PADDED = 72  # 64 sums and 8 that keep rows in different banks


@dataclass(frozen=True)
class Sizes:
    """What is multiplied.

    Few activations are laid out in `folds` parts of K, one below the other, so that memory is read
    in whole blocks of 8 rows: [m, K] as [m · folds, K / folds].

    Attributes:
      m: rows of activations, 1 to 16.
      tiles: of 16 weight rows.
      columns: of the weight, K with its padding.
      folds: parts of K; 1 leaves activations as they are.
    """

    m: int
    tiles: int
    columns: int
    folds: int = 1

    @property
    def rows(self) -> int:
        """Rows that the kernel works on."""
        return 8 if self.m <= 8 else MOST_ROWS

    @property
    def folded(self) -> bool:
        return self.folds > 1

    @property
    def width(self) -> int:
        """Columns of them."""
        return self.columns // self.folds

    @property
    def spread(self) -> int:
        """Rows that together are one of activations: row r has the part r % spread of K."""
        return 8 if self.folded and self.m == 1 else self.folds

    def kept(self, split: int) -> int:
        """Columns that a CTA keeps: its part of K, or all where folds leave few of them."""
        return self.width if self.folded else self.columns // split


def sizes_of(m: int, weight: FourBit) -> Sizes:
    """Of a product of m rows; they are folded as often as 8 rows allow."""
    # One row may have any number of parts. Those of more must begin at a power of two, so that
    # lanes can add them; and padding would have to be written into every part.
    counts = range(8, 1, -1) if m == 1 else [n for n in (4, 2) if n * m <= 8]
    whole = weight.shape[1] == weight.columns
    for folds in counts if whole else ():
        room = 16 * weight.columns // folds <= SHARED_MEMORY // 2
        if room and weight.columns // STEP % folds == 0:
            return Sizes(m, weight.tiles, weight.columns, folds)
    return Sizes(m, weight.tiles, weight.columns)


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

    def shared_memory(self, sizes: Sizes) -> int:
        sums = self.wn * self.wk**2 * PADDED * 4
        return sizes.rows * (sizes.kept(self.split) * 2 + sums) + 1024

    def fits(self, sizes: Sizes) -> bool:
        parts = self.split * self.wk
        few = self.wn * self.wk <= 4
        even = sizes.tiles % self.wn == 0 and sizes.columns // STEP % parts == 0
        return few and even and self.shared_memory(sizes) <= SHARED_MEMORY


def tilings(sizes: Sizes) -> Iterator[Tiling]:
    """Those worth trying."""
    for split in (1, 2, 4, 7, 8, 14, 16, 28):
        for wn, wk in ((2, 2), (1, 4), (4, 1), (2, 1), (1, 2), (1, 1)):
            for depth in (2, 4):
                tiling = Tiling(wn, wk, split, depth)
                if tiling.fits(sizes):
                    yield tiling


def default_tiling(sizes: Sizes, processors: int) -> Tiling | None:
    """The tiling whose busiest processor has least to do.

    Estimated in bytes: the weights that it reads, half the activations that it keeps, what its
    warpgroups add at the end of each tile, and partial sums of a split K. A processor with fewer
    than four warpgroups does not have enough loads under way. Loads that run further ahead than two
    steps help where there are few tiles. None if nothing fits: K is too long for shared memory, and
    has no suitable factor.
    """

    def cost(tiling: Tiling) -> float:
        groups = sizes.tiles // tiling.wn
        rounds = math.ceil(groups / max(1, min(processors // tiling.split, groups)))
        weights = rounds * tiling.wn * ROWS * (sizes.columns // tiling.split) // 2
        # Two corrections as measured on an H100.
        if sizes.rows <= 8 and rounds >= 4 and tiling.wk == 4:
            weights *= 0.95
        if 1 < rounds < 4 and tiling.split == 1:
            weights *= 1.4
        adding = rounds * 512 * tiling.wk
        partial_sums = 0.0
        if tiling.split > 1:  # and another kernel to add them
            partial_sums = 65536 + 8 * tiling.split * sizes.rows * ROWS * sizes.tiles / processors
        if (rounds < 4) == (tiling.depth == 2):
            adding += 4096
        idle = 4 / (tiling.wn * tiling.wk)
        return weights * idle + sizes.rows * sizes.kept(tiling.split) + adding + partial_sums

    return min(tilings(sizes), key=cost, default=None)
