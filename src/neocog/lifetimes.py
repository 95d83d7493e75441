"""Where scratch stands: buffers that are never alive at the same time share memory.

The largest buffer chooses first, the smallest gap that it fits between those alive at the same
time: "greedy by size" of Pisarchyk and Lee, arXiv:2001.03288.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Life:
    """A buffer: how large it is, and its first and last moment. Units are the caller's."""

    size: int
    first: float
    last: float

    def meets(self, other: Life) -> bool:
        """Whether both are alive at some moment."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Lent:
    """Memory of somebody else, and what of it is in use when: (where, life)."""

    size: int = 0
    used: Sequence[tuple[int, Life]] = ()


def arrange(lives: Sequence[Life], lent: Lent) -> tuple[list[int], int]:
    """Where each buffer starts, and the size of all that is not lent.

    Lent memory is filled first. Positions below ``lent.size`` are in it, the others that far from
    the start of our own memory.
    """
    placed = list(lent.used)
    starts, end = [0] * len(lives), lent.size
    for number in sorted(range(len(lives)), key=lambda i: -lives[i].size):
        life = lives[number]
        taken = sorted((at, at + other.size) for at, other in placed if life.meets(other))
        start = _gap(life.size, 0, lent.size, [span for span in taken if span[0] < lent.size])
        if start is None:
            own = [span for span in taken if span[0] >= lent.size]
            start = _gap(life.size, lent.size, end, own)
        if start is None:
            start = max((stop for _, stop in taken), default=lent.size)
            start = max(start, lent.size)
        starts[number] = start
        placed.append((start, life))
        end = max(end, start + life.size)
    return starts, end - lent.size


def _gap(size: int, start: int, stop: int, taken: Iterable[tuple[int, int]]) -> int | None:
    """The start of the smallest gap between start and stop that ``size`` fits, if there is one."""
    found, room = None, stop - start + 1
    for first, last in [*taken, (stop, stop)]:
        if size <= first - start < room:
            found, room = start, first - start
        start = max(start, last)
    return found
