"""Lane by lane: what the packed words mean to the instructions that read them.

A second writing of what `fragments` makes a warp do, in NumPy, with the instruction's own table of
who holds what (PTX ISA, mma.m16n8k16). No GPU is needed to see that the packing fits it.
"""

import ml_dtypes
import numpy as np
import pytest

LANES = [(g, t) for g in range(8) for t in range(4)]


def bfloat16_pair(words: np.ndarray) -> np.ndarray:
    """uint32 [...] -> float64 [..., 2], lower half first."""
    halves = np.stack([words & 0xFFFF, words >> 16], -1).astype(np.uint16)
    return halves.view(ml_dtypes.bfloat16).astype(np.float64)


def rotated(word: np.uint32, by: int) -> np.uint32:
    return np.uint32((int(word) >> by | int(word) << (32 - by)) & 0xFFFFFFFF)


def e2m1_registers(word: np.uint32, scales: list[float]) -> np.ndarray:
    place = 0x81C081C0
    raw = [rotated(word, by) & np.uint32(place) for by in (0, 3, 6)]
    bits = int(word)
    last = (bits << 4 & 0x01800180) | (bits << 6 & 0x00400040) | (bits << 14 & 0x80008000)
    values = bfloat16_pair(np.array([*raw, last & 0xFFFFFFFF], np.uint32))
    assert np.all(np.isin(np.abs(values) * 2.0**126, [0, 0.5, 1, 1.5, 2, 3, 4, 6]))
    return values * np.array([scales[i % 2] for i in range(4)])[:, None]


def int4_registers(word: np.uint32) -> np.ndarray:
    shifted = np.array([word >> np.uint32(4 * i) for i in range(4)], np.uint32)
    return bfloat16_pair(shifted & np.uint32(0x000F000F) | np.uint32(0x43004300)) - 136


def scale_pair(kind: str, byte: int) -> float:
    """prmt and mad: the byte moved up, and added to."""
    moved = byte * 16 + (233 << 7) if kind == "nvfp4" else byte * 128
    return float(np.array([moved], np.uint16).view(ml_dtypes.bfloat16)[0])


def warp_step(kind, codes, scales, x, warp: int) -> np.ndarray:
    """Sums [16, 16] of one warp over its 128 columns of a step."""
    sums = np.zeros((2, 16, 8))
    for unit in range(2):
        for step in range(4):
            a, b = np.zeros((16, 16)), np.zeros((2, 16, 8))
            for lane, (g, t) in enumerate(LANES):
                word = codes[warp * 256 + unit * 128 + lane * 4 + step]
                if kind == "int4":
                    registers = int4_registers(word)
                else:
                    size, block = (
                        (32, 4 * unit + step) if kind == "nvfp4" else (16, 2 * unit + step // 2)
                    )
                    packed = scales[warp * size + g * (size // 8) + block // 2]
                    own = [int(packed) >> 8 * (2 * (block % 2) + half) & 255 for half in range(2)]
                    registers = e2m1_registers(word, [scale_pair(kind, byte) for byte in own])
                first = warp * 128 + unit * 64 + 16 * step
                for pair in range(2):
                    ks = [2 * t + 8 * pair, 2 * t + 8 * pair + 1]
                    for row in (g, g + 8):
                        a[row, ks] = x[row, first + 2 * t + 8 * pair : first + 2 * t + 8 * pair + 2]
                    for n in range(2):
                        b[n, ks, g] = registers[2 * pair + n]
            sums += a @ b
    if kind == "int4":  # by output column 2 t + e, of either eight
        for n in range(2):
            for t in range(4):
                pair = bfloat16_pair(scales[warp * 8 + 2 * t : warp * 8 + 2 * t + 2])
                sums[n][:, 2 * t : 2 * t + 2] *= pair[:, n]
    return np.concatenate(list(sums), axis=1)


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "mxfp4"])
def test_lanes_multiply_what_was_packed(weight, kind):
    packed, values = weight(kind, 16, 512, seed=3)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((16, 512)).astype(ml_dtypes.bfloat16).astype(np.float64)
    codes = np.asarray(packed.codes)[0].view(np.uint32)
    scales = np.asarray(packed.scales)[0].view(np.uint32)
    found = sum(warp_step(kind, codes, scales, x, warp) for warp in range(4))
    exact = x @ values.T
    difference = np.abs(found * float(packed.factor[0]) - exact)
    assert difference.max() <= 1e-12 * np.abs(exact).max()
