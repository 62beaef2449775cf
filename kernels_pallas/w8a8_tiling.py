"""How a product of 8-bit matrices is cut into tiles, and which cut suits a shape."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kernels_pallas.hopper import SHARED_MEMORY

STEP = 128  # columns of a slot: a row is 128 bytes, the widest swizzle
_MOST_STAGES = 16
# Clocks of one processor on an H100: multiplications of 8 bits, bytes from the L2 cache, and bytes
# from memory if all processors read at once.
_PRODUCTS_A_CLOCK = 4096
_CACHE_A_CLOCK = 24
_MEMORY_A_CLOCK = 1820
_TILE_CLOCKS = 1500  # filling the ring, and writing the result


@dataclass(frozen=True)
class EightBitTiling:
    """How the work is cut.

    A CTA computes tiles of `tokens` rows of activations and `channels` rows of the weight. One of
    the two is `wgmma`'s left operand, whose rows its warpgroups share out in multiples of 64; the
    other, of at most 256 rows, is the right one and is read by all of them.

    Attributes:
      tokens: rows of activations in a tile.
      channels: rows of the weight in a tile.
      stages: slots of the ring, each 128 columns of both.
      warpgroups: those that multiply.
      weight_left: whether the weight is the left operand; the product is then transposed.
      cluster: CTAs side by side along the channels that share what they read of activations.
      width: tiles of tokens after which the walk takes the next channels.
    """

    tokens: int
    channels: int
    stages: int = 4
    warpgroups: int = 2
    weight_left: bool = True
    cluster: int = 1
    width: int = 16

    @property
    def left(self) -> int:
        """Rows of the left operand of one warpgroup."""
        return (self.channels if self.weight_left else self.tokens) // self.warpgroups

    @property
    def right(self) -> int:
        return self.tokens if self.weight_left else self.channels

    @property
    def piece(self) -> tuple[int, int]:
        """(tokens, channels) that a warpgroup writes at a time."""
        if self.weight_left:
            return math.gcd(self.tokens, 32), 64
        # Wide tiles need the room for a fourth stage.
        return 64, math.gcd(self.channels, 64 if self.channels <= 128 else 32)

    def shared_memory(self, blocked: bool) -> int:
        """Bytes of a CTA; each array begins at a multiple of 1024."""
        rings = self.stages * (self.tokens + self.channels) * STEP
        results = self.warpgroups * 2 * math.prod(self.piece) * 2
        token_scales = 4 * (self.stages if blocked else 2) * scale_places(self.tokens)
        channel_scales = 0 if blocked else 4 * 2 * scale_places(self.channels)
        barriers = 1024
        arrays = rings, results, token_scales, channel_scales, barriers
        return sum(-(-size // 1024) * 1024 for size in arrays)

    def fits(self, blocked: bool) -> bool:
        """Whether Hopper has the registers, the shared memory and the instructions for it.

        Args:
          blocked: whether scales change along K, so that sums are kept twice.
        """
        whole = self.left % 64 == 0 and 0 < self.left and self.right % 8 == 0
        whole = whole and self.tokens % 8 == 0 and self.piece[1] >= 16
        if blocked:  # a block of 128 channels has one scale
            whole = whole and (128 % self.channels == 0 or self.channels % 128 == 0)
        # Sums of each thread, of the 168 or more registers that it has left for them.
        sums = self.left // 64 * self.right // 2
        if blocked:  # those of one block, and the scales of tokens, if there is one for a column
            sums += min(self.right, 128) // 2 + (self.right // 4 if self.weight_left else 0)
        enough = sums <= {1: 160, 2: 192, 3: 128, 4: 64}.get(self.warpgroups, 0)
        shared = 64 % self.cluster == 0 and self.tokens // 8 % self.cluster == 0
        ring = self.stages >= 2 and self.shared_memory(blocked) <= SHARED_MEMORY
        return whole and self.right <= 256 and enough and shared and ring

    def deepest(self, blocked: bool) -> "EightBitTiling":
        """The same with as many stages as shared memory has room for."""
        fitting = (replace(self, stages=count) for count in range(_MOST_STAGES, 2, -1))
        return next((t for t in fitting if t.shared_memory(blocked) <= SHARED_MEMORY), self)


def scale_places(rows: int) -> int:
    """Entries kept free for the scales of `rows` rows: a copy has to begin at 128 bytes."""
    return -(-rows // 32) * 32


def tilings(m: int, n: int, k: int, blocked: bool = False) -> Iterator[EightBitTiling]:
    """Those worth trying for a product of [m, k] and [n, k]."""
    for candidate in _candidates():
        tiling = candidate.deepest(blocked)
        # A tile far larger than what there is to compute is never the best.
        useful = tiling.tokens < 2 * max(m, 64) and tiling.channels * tiling.cluster < 2 * max(
            n, 64
        )
        if useful and tiling.fits(blocked):
            yield tiling


def _candidates() -> Iterator[EightBitTiling]:
    for cluster in (1, 2):
        for tokens in (8, 16, 32, 64, 128, 256):
            for channels, warpgroups in ((64, 1), (128, 2), (256, 2)):
                yield EightBitTiling(
                    tokens, channels, warpgroups=warpgroups, weight_left=True, cluster=cluster
                )
        for tokens, warpgroups in ((64, 1), (128, 2), (256, 2)):
            for channels in (16, 32, 64, 96, 112, 128, 192, 224, 256):
                if tokens * channels > 128 * 256:  # leaves few registers
                    continue
                yield EightBitTiling(
                    tokens, channels, warpgroups=warpgroups, weight_left=False, cluster=cluster
                )


def default_tiling(
    m: int, n: int, k: int, processors: int, blocked: bool = False
) -> EightBitTiling:
    """The tiling that a roofline finds fastest.

    Of the busiest processor: the larger of its multiplications and what it reads through the cache,
    for each of its tiles; at least what reading the weight from memory takes. Among equals, the one
    whose processors have least to do. To 64 tokens only tiles with the weight on the left and no
    cluster are asked: on an H100 they were the fastest, and what makes them so is not in the
    roofline.
    """

    def cost(tiling: EightBitTiling) -> tuple[float, float, int]:
        m_tiles = math.ceil(m / tiling.tokens)
        n_tiles = math.ceil(n / (tiling.channels * tiling.cluster))
        clusters = min(processors // tiling.cluster, m_tiles * n_tiles)
        rounds = math.ceil(m_tiles * n_tiles / clusters)
        rows = max(tiling.tokens, 64) if not tiling.weight_left else tiling.tokens
        multiplying = rows * tiling.channels * k / _PRODUCTS_A_CLOCK
        if blocked:  # sums are moved and scaled meanwhile: less so if factors belong to rows
            multiplying *= 1.5 if tiling.weight_left or tiling.left > 64 else 1.3
        read = k * (tiling.channels + min(tiling.tokens, m) / tiling.cluster)
        busiest = rounds * (max(multiplying, read / _CACHE_A_CLOCK) + _TILE_CLOCKS)
        return max(busiest, n * k / _MEMORY_A_CLOCK), busiest, tiling.cluster

    few = m <= 64
    asked = (t for t in tilings(m, n, k, blocked) if not few or (t.weight_left and t.cluster == 1))
    return min(asked, key=cost)
