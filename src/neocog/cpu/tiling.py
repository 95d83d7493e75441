"""How a convolution is cut into register tiles: output channels into blocks, pixels into tiles.

A register tile holds NB vectors of output channels x up to MR pixels (``Target.tiles``). Where a
kernel is made for one width, a row is covered by tiles of two neighbouring sizes, as even as it can
be: 16 pixels with MR = 7 are 6 + 5 + 5, not 7 + 7 + 2, because a narrow tile keeps the multipliers
waiting for its own sums. A kernel for every width has MR and its binary fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..geometry import Phase
from ..target import Target

LATENCY = 10
"""Multiply-adds under way at once on two units of latency 5: smaller tiles take as long as this."""


FEW_CHANNELS = 8
"""Input channels whose products stand in one straight run of code."""


def blocks_for(target: Target, out_channels: int) -> int:
    """NB: as large as the target allows, then evened out over the blocks."""
    vectors = -(-out_channels // target.lanes)
    count = -(-vectors // target.max_blocks)
    return -(-vectors // count)


def best_blocks(target: Target, out_channels: int) -> int:
    """NB that takes least time, padded channels included; of equals the largest.

    A tile of m pixels takes as long per input channel as its multiply-adds, its loads (m inputs and
    NB weights) or the latency of one sum, whichever is most.
    """
    vectors = -(-out_channels // target.lanes)

    def cost(blocks: int) -> tuple[float, int]:
        pixels = target.pixels(blocks)
        tile = max(pixels * blocks, pixels + blocks, LATENCY)
        return -(-vectors // blocks) * tile / pixels, -blocks

    return min((blocks for blocks, _ in target.tiles if blocks <= vectors), key=cost)


def most_pixels(target: Target, blocks: int, channels: int) -> int:
    """MR for tiles of NB = ``blocks`` that sum over ``channels`` input channels per tap.

    With few channels the loop over taps is so short that the code generator loads all of its inputs
    ahead: a larger tile would then spill its sums.
    """
    limit = target.pixels(blocks)
    return limit - limit // 8 if channels <= FEW_CHANNELS else limit


def even_sizes(pixels: int, limit: int) -> tuple[int, ...]:
    """The sizes of the tiles that cover ``pixels`` evenly, none above ``limit``: (a,), (a, a-1)."""
    size = -(-pixels // -(-pixels // limit)) if pixels else 1
    return (size,) if pixels % size == 0 else (size, size - 1)


def all_sizes(limit: int) -> tuple[int, ...]:
    """Sizes that cover any number of pixels: ``limit``, then its binary fractions down to 1."""
    sizes = [limit]
    while sizes[-1] > 1:
        half = sizes[-1] // 2 if sizes[-1] % 2 == 0 else 1 << ((sizes[-1] - 1).bit_length() - 1)
        sizes.append(half)
    return tuple(sizes)


def cover(pixels: int, sizes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """(tiles of the first size, sizes of the tiles that follow) which add up to ``pixels``.

    ValueError if they cannot: ``all_sizes``, and (size, 1), cover every number of pixels,
    ``even_sizes`` their own and one less.
    """
    if len(sizes) > 2 or sizes[1:] == (1,):
        wide, rest = divmod(pixels, sizes[0])
        tail: list[int] = []
        for size in sizes[1:]:
            tail += [size] * ((rest - sum(tail)) // size)
        return wide, tuple(tail)
    count = -(-pixels // sizes[0])
    wide = pixels - count * (sizes[0] - 1)
    narrow = (sizes[0] - 1,) * (count - wide) if sizes[0] > 1 else ()
    if wide < 0 or not set(narrow) <= set(sizes):
        raise ValueError(f"pixels: {pixels} are no sum of tiles of {sizes}")
    return wide, narrow


@dataclass(frozen=True)
class Reads:
    """Which inputs the outputs along one axis read, whatever the size of that axis.

    Output ``o`` reads input ``o // step * stride + offset`` through ``tap``, for each (tap, offset)
    of phase ``o % step``. The least offset is 0.
    """

    phases: tuple[tuple[tuple[int, int], ...], ...]
    stride: int

    @classmethod
    def of(cls, phases: Sequence[Phase]) -> tuple[Reads, int]:
        """Those of a window's phases, and the input that stands at offset 0."""
        origin = min((offset for phase in phases for _, offset in phase.taps), default=0)
        taps = (tuple((tap, at - origin) for tap, at in phase.taps) for phase in phases)
        return cls(tuple(taps), phases[0].stride), origin

    @property
    def step(self) -> int:
        """The number of phases."""
        return len(self.phases)

    @property
    def size(self) -> int:
        """The number of taps."""
        return sum(map(len, self.phases))

    def reached(self, count: int) -> dict[int, list[tuple[int, int]]]:
        """Input -> the (output, tap) pairs that read it, for the first ``count`` outputs."""
        found: dict[int, list[tuple[int, int]]] = {}
        for output in range(count):
            start, phase = divmod(output, self.step)
            for tap, offset in self.phases[phase]:
                found.setdefault(start * self.stride + offset, []).append((output, tap))
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class TiledPlan:
    """What every convolution kernel is specialised on, whatever it sums."""

    target: Target
    channels: int
    """Input channels per group (1 when depthwise)."""
    out_channels: int
    """Output channels per group (all of them when depthwise)."""
    pixel_step: int
    """Input elements between the windows of neighbouring output pixels."""
    blocks: int
    """NB, vectors of output channels per block."""

    @property
    def width(self) -> int:
        """Output channels per block."""
        return self.blocks * self.target.lanes

    @property
    def blocks_per_group(self) -> int:
        """How many blocks cover the output channels of one group."""
        return -(-self.out_channels // self.width)
