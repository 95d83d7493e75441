"""Layers computed a few rows at a time, so that what lies between them never leaves the cache.

A chain of layers is computed in bands: so many rows of its last layer, and of each layer before it
as many new rows as these need. Only a band of each map in between is kept, with the rows that the
next band needs again. No row is computed twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .cpu import elementwise
from .geometry import Window
from .kernels import kernel
from .maps import Halo, Map, clear_halo, scratch_map
from .maps import row_of as row_of
from .problem import Conv
from .program import Place, Program
from .target import Target

Layer = TypeVar("Layer")

BANDED_BYTES = 1_000_000
"""Maps larger than this are computed in bands: a smaller one stays in the second-level cache."""

BAND_BYTES = 1_200_000
"""What is kept of all maps of a chain together: about as much as the second-level cache holds.

Half as much is no faster, and means twice as many steps for which threads wait for each other.
"""

STEP = 4
"""Bands have so many rows of the last layer, or a multiple: depthwise layers compute two rows at a
time, and two threads share them evenly."""


@dataclass(frozen=True)
class Rows:
    """New rows of a layer in a band, ``start`` <= row < ``stop``, and the input rows they read."""

    start: int
    stop: int
    first: int
    """The first input row, in the padding where negative."""
    count: int

    @classmethod
    def of(cls, window: Window, start: int, stop: int) -> Rows:
        """As a window along the rows reads them."""
        count = (stop - start - 1) * window.stride + window.span if stop > start else 0
        return cls(start, stop, start * window.stride - window.low, count)

    def conv(self, conv: Conv) -> Conv:
        """These rows of ``conv`` alone: on an input that has its padding."""
        return replace(conv, height=self.count, rows=replace(conv.rows, low=0, high=0))


def deal(layers: Sequence[Layer], linked: Callable[[Layer, Layer], bool]) -> list[list[Layer]]:
    """Runs of neighbours that are linked, each to the next; most layers stand alone."""
    chains: list[list[Layer]] = []
    for layer in layers:
        if chains and linked(chains[-1][-1], layer):
            chains[-1].append(layer)
        else:
            chains.append([layer])
    return chains


def bands(convs: Sequence[Conv], rows: int) -> list[list[Rows]]:
    """For each band of ``rows`` rows of the last layer, the new rows of all layers.

    Rows that no later layer reads, as between wide strides, are left out.
    """
    heights = [conv.out_shape[2] for conv in convs]
    done, made = [0] * len(convs), []
    for stop in range(rows, heights[-1] + rows, rows):
        band = [Rows.of(convs[-1].rows, done[-1], min(stop, heights[-1]))]
        for number in range(len(convs) - 2, -1, -1):
            reader, start = band[0], done[number]
            end = max(start, min(heights[number], reader.first + reader.count))
            end = end if reader.count else start
            start = min(end, max(start, reader.first))
            band.insert(0, Rows.of(convs[number].rows, start, end))
        made.append(band)
        done = [rows.stop for rows in band]
    return made


def slides(conv: Conv) -> bool:
    """Whether every window reads at least one row of its input: not padding alone."""
    return max(conv.rows.low, conv.rows.high) < conv.rows.span


def rows_of(convs: Sequence[Conv], elements: int) -> int:
    """How many rows of the last layer make bands that hold about so many elements: even bands."""
    height = convs[-1].out_shape[2]
    rows = STEP
    while rows < height and (_held(convs, rows + STEP) <= elements or not _slides(convs, rows)):
        rows += STEP
    even = -(-height // -(-height // rows))
    even += -even % STEP
    return even if _slides(convs, even) else rows


def _slides(convs: Sequence[Conv], rows: int) -> bool:
    """Whether what stays from a band to the next is moved to a place apart."""
    for layer in list(zip(*bands(convs, rows), strict=True))[1:]:
        read = [rows for rows in layer if rows.count]
        for before, after in itertools.pairwise(read):
            if before.first + before.count - after.first > after.first - before.first:
                return False
    return True


def _held(convs: Sequence[Conv], rows: int) -> int:
    """Elements of the bands of all inputs but the first, and of the result."""
    kept = capacities(bands(convs, rows))
    total = rows * convs[-1].out_shape[3] * convs[-1].out_channels
    return total + sum(
        count * conv.width * conv.in_channels for count, conv in zip(kept, convs[1:], strict=True)
    )


def capacities(found: Sequence[Sequence[Rows]]) -> list[int]:
    """The most input rows that each layer but the first reads in a band."""
    return [max(rows.count for rows in layer) for layer in list(zip(*found, strict=True))[1:]]


@dataclass
class _Kept:
    """The rows in memory between two layers."""

    map: Map
    corner: Place
    shape: tuple[int, int, int, int]
    """(1, channels, rows, columns) of its interior."""
    halo: Halo
    height: int
    """Rows of the whole map."""
    rows: Rows | None = None
    """What the reader reads now: row ``first`` stands first."""


def emit(
    p: Program,
    target: Target,
    convs: Sequence[Conv],
    halos: Sequence[Halo],
    start: Map,
    to: Map,
    layer: Callable[[int, Conv, Map, Map, int], None],
) -> None:
    """The steps of a chain of layers, from the map ``start`` to the map ``to``.

    ``halos``: what each layer reads around its input. ``start`` has that of the first. ``layer``
    emits the steps of one layer for some rows: (which, as a problem of its own, its input, its
    output, the first of the rows).
    """
    found = bands(convs, rows_of(convs, BAND_BYTES // 4))
    kept = [
        _keep(p, target, conv, halo, rows)
        for conv, halo, rows in zip(convs[1:], halos[1:], capacities(found), strict=True)
    ]
    for band in found:
        for prepare in (_slide, _clear):
            first = len(p.steps)
            for between, rows in zip(kept, band[1:], strict=True):
                prepare(p, target, between, rows)
            for step in p.steps[first:]:  # different maps; all before what follows
                step.alongside = step is not p.steps[-1]
        for number, (conv, rows) in enumerate(zip(convs, band, strict=True)):
            if rows.stop == rows.start:
                continue
            x = kept[number - 1].map if number else row_of(start, rows.first)
            last = number == len(kept)
            out = row_of(to, rows.start)
            if not last:
                out = row_of(kept[number].map, rows.start - band[number + 1].first)
            layer(number, rows.conv(conv), x, out, rows.start)


def _keep(p: Program, target: Target, conv: Conv, halo: Halo, rows: int) -> _Kept:
    sides = Halo(left=halo.left, right=halo.right)
    shape = (1, conv.in_channels, rows, conv.width)
    made, corner = scratch_map(p, shape, sides)
    clear_halo(p, target, made, corner, shape, sides)
    return _Kept(made, corner, shape, sides, conv.height)


def _slide(p: Program, target: Target, kept: _Kept, rows: Rows) -> None:
    """Move up the rows that are read again."""
    before = kept.rows
    if rows.stop == rows.start or before is None:
        return
    overlap = before.first + before.count - rows.first
    if overlap > 0:
        source = row_of(kept.map, rows.first - before.first)
        plan = elementwise.ElementwisePlan(target, kept.shape[1], "copy", ())
        # By halves of rows, for there may be one row only; each row counts as an image.
        parts = 2 if kept.shape[3] % 2 == 0 else 1
        cols = kept.shape[3] // parts
        to, source = (replace(m, image=m.row, row=cols * m.pixel) for m in (kept.map, source))
        p.step(
            kernel(plan), overlap * parts, rows=parts, cols=cols,
            **to.fields("out"), **source.fields("a"),
        )  # fmt: skip


def _clear(p: Program, target: Target, kept: _Kept, rows: Rows) -> None:
    """Zero the rows of padding that are read next, and were not moved."""
    if rows.stop == rows.start:
        return
    before, kept.rows = kept.rows, rows
    if before is None and rows.first < 0:
        _zero(p, target, kept, 0, -rows.first)
    beyond = rows.first + rows.count - kept.height
    if beyond > 0:
        _zero(p, target, kept, rows.count - beyond, beyond)


def _zero(p: Program, target: Target, kept: _Kept, row: int, count: int) -> None:
    halo = replace(kept.halo, top=count)
    shape = (1, kept.shape[1], 0, kept.shape[3])
    corner = kept.corner + row * kept.map.row
    clear_halo(p, target, kept.map, corner, shape, halo)
