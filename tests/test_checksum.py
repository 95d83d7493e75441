"""The checksum kernel: a change of any element changes the sum of its chunk, and no other."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_tools import ROWS

from neocog.cpu import checksum
from neocog.kernels import kernel
from neocog.program import Program

SIZES = [0, 1, 5, 127, 128, 129, 1000, checksum.CHUNK - 1, checksum.CHUNK, checksum.CHUNK + 1,
         2 * checksum.CHUNK + 77, 3 * checksum.CHUNK]  # fmt: skip


def sums(x: np.ndarray, target) -> np.ndarray:
    """The checksums of float32 memory; one word behind them must stay as it is."""
    items = -(-x.size // checksum.CHUNK)
    p = Program(("x", "out"))
    p.step(kernel(checksum.ChecksumPlan(target)), items, x=p.buffer("x"), elements=x.size,
           out=p.buffer("out"))  # fmt: skip
    out = np.full(items + 1, -77, dtype=np.int64)
    p.run(x.ctypes.data, out.ctypes.data)
    assert out[-1] == -77
    return out[:-1].copy()


@pytest.mark.parametrize("target", ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("size", SIZES)
def test_one_changed_element(size, target):
    """At the ends, around blocks, chunks and the tail, in its lowest and in its sign bit."""
    whole = np.random.default_rng(size).standard_normal(size + 40).astype(np.float32)
    x = whole[:size]
    before = sums(x, target)
    edges = [0, 1, 15, 16, 127, 128, size // 2, checksum.CHUNK - 1, checksum.CHUNK, size - 17,
             size - 16, size - 2, size - 1]  # fmt: skip
    for place in {p for p in edges if 0 <= p < size}:
        for bit in (0, 31):
            bits = x.view(np.uint32)
            bits[place] ^= np.uint32(1 << bit)
            after = sums(x, target)
            bits[place] ^= np.uint32(1 << bit)
            changed = np.flatnonzero(after != before)
            assert changed.tolist() == [place // checksum.CHUNK], (place, bit)
    assert np.array_equal(sums(x, target), before)
    whole[size:] = np.nan
    assert np.array_equal(sums(x, target), before), "what lies behind does not count"


@pytest.mark.parametrize("target", ROWS, ids=lambda t: t.name)
def test_order_matters(target):
    """Two elements exchanged, in one lane, in two lanes and in two blocks."""
    x = np.arange(1, 1001, dtype=np.float32)
    before = sums(x, target)
    for a, b in ((0, 1), (0, 16), (3, 128 + 3), (0, 512), (990, 999)):
        y = x.copy()
        y[[a, b]] = y[[b, a]]
        assert not np.array_equal(sums(y, target), before), (a, b)
