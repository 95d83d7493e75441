"""Memory asked for ahead of time: the rows that the next work touches, while this one computes.

A tile of a depthwise layer reads and writes short pieces of several rows, vector by vector, in an
order that the processor does not foresee. So each tile asks for the memory beneath it, in the rows
that the next group of rows is the first to touch. Lines are asked for in the order in which they
lie, whose continuation the processor guesses, and into the second cache: few loads into the first
can be under way. Together that makes layers of 30 MB up to twice as fast (measured), and still
helps where the third cache holds the maps; where the second one does it would cost up to a tenth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from .lanes import Emitter, Int

LARGE = 1 << 19
"""float32 elements of maps that a core's second cache does not hold."""

LINE = 16
"""float32 elements of a cache line."""

WIDEST_STRIDE = 4
"""Beyond it most of the memory beneath a tile is not read: its lines are as many as stride**2."""


def pays(elements: int, *strides: int) -> bool:
    """Whether maps of so many ``elements`` that windows with ``strides`` read are asked for."""
    return elements > LARGE and max(strides) <= WIDEST_STRIDE


@dataclass(frozen=True)
class Ahead:
    """What the tiles of one function ask for: one run of dense pixels in each of some rows."""

    e: Emitter
    rows: Sequence[ir.Value]
    pixels: int
    write: bool = False
    """Whether the rows are written instead of read."""

    def ask(self, c: Int, turn: int, turns: int) -> None:
        """The share of the vector of channels from ``c`` on, and of it a turn's share."""
        e = self.e
        lines = [(row, at) for row in self.rows for at in range(0, self.pixels * e.lanes, LINE)]
        for row, at in lines[turn * len(lines) // turns : (turn + 1) * len(lines) // turns]:
            place = e.at(row, e.mul(c, self.pixels))
            e.prefetch(place, at, near=False, write=self.write)
