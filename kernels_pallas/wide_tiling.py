"""How the product of a 4-bit weight with many activations is cut; see `w4a16_wide`."""

from collections.abc import Iterator
from dataclasses import dataclass

from kernels_pallas.four_bit import ROWS, STEP
from kernels_pallas.hopper import SHARED_MEMORY
from kernels_pallas.wide_fragments import UNIT


@dataclass(frozen=True)
class WideTiling:
    """How the work is cut; see the module.

    Attributes:
      tokens: rows of activations in a tile, a multiple of 8 up to 256.
      warpgroups: those that multiply, 1 to 4.
      across: times 64 weight rows for each of them.
      split: CTAs that share K.
      stages: slots of the ring.
      span: units of 64 columns in a slot: 1, 2, 4 or 8.
      depth: units that are loaded ahead of their use.
      in_flight: products, 0 or 1, that are not waited for while the next codes are widened.
      width: tiles of weight rows after which the walk takes the next activations.
    """

    tokens: int
    warpgroups: int = 4
    across: int = 1
    split: int = 1
    stages: int = 4
    span: int = 4
    depth: int = 2
    in_flight: int = 0
    width: int = 16

    @property
    def weight_rows(self) -> int:
        return 64 * self.across * self.warpgroups

    def shared_memory(self) -> int:
        ring = self.stages * self.span * self.tokens * UNIT * 2
        result = self.tokens * self.weight_rows * 2 if self.split == 1 else 0
        return ring + result + 2048

    def fits(self, tiles: int, columns: int) -> bool:
        """Whether it is one for `tiles` of 16 weight rows; sums must fit a thread's registers."""
        sums = self.across * self.tokens // 2
        return (
            self.shared_memory() <= SHARED_MEMORY
            and columns // STEP % self.split == 0
            and tiles >= 4 * self.across
            and sums <= (128 if self.warpgroups < 3 else 64 if self.warpgroups == 3 else 32)
        )


def wide_tilings(m: int, tiles: int, columns: int) -> Iterator[WideTiling]:
    """Those worth trying, for activations [m, columns] and `tiles` of 16 weight rows."""
    shapes = ((32, 4, 1), (64, 4, 1), (64, 2, 1), (64, 1, 1), (128, 2, 1), (128, 2, 2), (256, 2, 1))
    for tokens, warpgroups, across in shapes:
        if tokens > 64 and tokens >= 2 * m:
            continue
        for split in (1, 2, 4, 7, 8) if m <= 256 else (1,):
            for span, width in ((1, 8), (1, 16)) if tokens > 128 else ((4, 16), (2, 16)):
                for in_flight in (1, 0) if tokens > 64 else (0,):
                    sizes = {"split": split, "span": span, "in_flight": in_flight, "width": width}
                    tiling = WideTiling(tokens, warpgroups, across, **sizes)
                    if tiling.fits(tiles, columns):
                        yield tiling


def default_wide_tiling(m: int, tiles: int, columns: int, processors: int) -> WideTiling | None:
    """The tiling that needs least time by a coarse estimate; None if nothing fits.

    Estimated for the busiest processor, in cycles: products at the tensor cores' rate, or the
    reading of the weight where that takes longer; for a split K, also the sum that follows.
    """

    def cost(tiling: WideTiling) -> float:
        m_tiles = -(-m // tiling.tokens)
        work = m_tiles * -(-tiles * ROWS // tiling.weight_rows)
        rounds = -(-work // max(1, processors // tiling.split))
        part = columns // tiling.split
        # One warpgroup alone leaves the tensor cores idle while it widens, and a tile of few
        # tokens while products begin and end; two products a step are one after the other.
        busy = {1: 0.4, 2: 0.8, 3: 0.9, 4: 1.0}[tiling.warpgroups]
        busy *= min(1.0, tiling.tokens / 128)
        if m >= 512 and tiling.tokens == 128:
            busy *= 0.75  # 0.71 of the rate of 256 tokens, measured with M = 2048, 57344 x 8192
        busy /= tiling.across**0.2
        products = tiling.tokens * tiling.weight_rows * part / (2048 * busy)
        reading = tiling.weight_rows * part / 2 / (13 * {1: 0.4, 2: 0.7}.get(tiling.warpgroups, 1))
        adding = 4000 + 8 * tiling.split * m * tiles * ROWS / 1500 if tiling.split > 1 else 0
        return rounds * (max(products, reading) + 1000) + adding

    return min(wide_tilings(m, tiles, columns), key=cost, default=None)
