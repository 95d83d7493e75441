"""The gradient of a strided convolution's input, where phases would be many and small.

A convolution with a base dilation falls apart into phases (:meth:`neocog.geometry.Window.phases`),
as many as the product of the base dilations, however small kernel and image are. From a few on it
takes two steps instead, whatever the stride:

    columns[pixel][tap][c] = sum over k of  g[pixel][k] * w[k][c][tap]      one matrix product
    out[position of the tap][c] += columns[pixel][tap][c]                   (``cpu/scatter``)

Where windows do not overlap, as in patch embeddings, the second step copies. What no window
reaches is cleared by the way, a row at a time. No step reads a halo, which makes this the way too
where taps lie so far apart that a halo would be out of proportion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from . import convolutions
from .convolutions import Weights, is_depthwise
from .cpu import copy, depthwise, elementwise, scatter
from .geometry import Window
from .kernels import copy_kernel, kernel
from .maps import FEW, Halo, Map, halo_of, too_far
from .problem import Add, Conv, Step
from .program import Place, Program
from .target import Target

FEW_PHASES = 4
"""Pairs of phases that take a step each, as those of stride 2."""

COLUMNS = 4
"""Columns may take so many times the memory of the result: where windows overlap more than that,
phases have many taps each and fill their steps."""


def prefers(conv: Conv, weights: Weights) -> bool:
    """Whether :func:`convolve` takes products first and adds them up afterwards.

    Not for weights whose columns are apart, but in channels_last: in neither of PyTorch's layouts.
    """
    phases, far = conv.rows.phase_count * conv.cols.phase_count, bool(too_far(conv))
    if is_depthwise(conv):
        return far or phases > depthwise.MOST_PHASES  # fewer fit one register tile
    if phases <= FEW_PHASES and not far:
        return False
    small = _columns(conv) <= COLUMNS * math.prod(conv.out_shape)
    return small and _as_rows(conv, weights) is not None


def halo(conv: Conv, weights: Weights) -> Halo:
    """What the steps of ``conv`` read around its input: nothing, or what phases reach."""
    return Halo() if prefers(conv, weights) else halo_of(conv)


def convolve(
    p: Program,
    target: Target,
    conv: Conv,
    x: Map,
    weights: Weights,
    out: Map,
    epilogue: tuple[Step, ...] = (),
    extra: Mapping[str, Place | int] = MappingProxyType({}),
    any_size: bool = True,
) -> None:
    """The steps of a convolution that :func:`prefers` accepts; as :func:`convolutions.convolve`.

    A residual has to be what stands in ``out``.
    """
    adds = Add() in epilogue
    if adds and (epilogue != (Add(),) or extra.get("residual") != out.place):
        raise ValueError(f"epilogue: only what stands in the output can be added\n{conv}")
    if is_depthwise(conv):
        _depthwise(p, target, conv, x, weights, out, adds)
    else:
        _by_columns(p, target, conv, x, weights, out, adds, any_size)
    p.work += math.prod(conv.out_shape)
    if epilogue and not adds:
        _, channels, height, width = conv.out_shape
        plan = elementwise.ElementwisePlan(target, channels, "copy", epilogue)
        fields = {**out.fields("a"), **out.fields("out"), **extra}
        p.step(kernel(plan), conv.batch * height, rows=height, cols=width, **fields)


def _columns(conv: Conv) -> int:
    """float32 elements of the columns."""
    pixels = conv.batch * conv.height * conv.width
    return pixels * conv.rows.size * conv.cols.size * conv.out_channels


def _by_columns(
    p: Program, target: Target, conv: Conv, x: Map, weights: Weights, out: Map, adds: bool,
    any_size: bool,
) -> None:  # fmt: skip
    channels, taps = conv.out_channels // conv.groups, conv.rows.size * conv.cols.size
    one = Window(1)
    product = replace(conv, out_channels=taps * conv.out_channels, rows=one, cols=one)
    columns = Map.dense(
        p.scratch(_columns(conv)), product.out_channels, conv.height, conv.width
    )  # fmt: skip
    rows = _rows_of(p, target, conv, weights)
    packed = p.scratch(convolutions.packed_elements(target, product))
    convolutions.pack(p, target, product, rows, packed)
    convolutions.convolve_packed(p, target, product, x, packed, columns, any_size=any_size)
    # The columns of one group: its taps in the order of memory, the channels of each together.
    line = conv.cols.size * channels
    starts, lines = _lines(
        conv.rows, conv.height, conv.out_shape[2],
        lambda y, k: y * columns.row + _stored(weights, conv.rows, k) * line,
    )  # fmt: skip
    runs = []
    for group in range(conv.groups):
        first = group * taps * channels
        runs += _runs(conv, weights, out.pixel, columns.pixel, channels, first, group * channels)
    _scatter(p, target, conv, columns, out, adds, (starts, lines, _joined(runs)))


def _scatter(
    p: Program, target: Target, conv: Conv, x: Map, out: Map, adds: bool,
    tables: tuple[list[int], list[int], list[tuple[int, int, int]]],
    **fields: Place | int,
) -> None:  # fmt: skip
    starts, lines, runs = tables
    _, _, height, width = conv.out_shape
    p.step(
        kernel(scatter.ScatterPlan(target, is_depthwise(conv))), conv.batch * height,
        x=x.place, x_image=x.image, out=out.place, out_image=out.image, out_row=out.row,
        rows=height, size=width * out.pixel, clear=int(not adds),
        starts=p.constant(starts), lines=p.constant(lines),
        runs=p.constant([number for run in runs for number in run]), n_runs=len(runs), **fields,
    )  # fmt: skip


def _depthwise(
    p: Program, target: Target, conv: Conv, x: Map, weights: Weights, out: Map, adds: bool
) -> None:
    dense = replace(
        conv, height=conv.rows.span, width=conv.cols.span,
        rows=Window(conv.rows.size, 1, conv.rows.dilation),
        cols=Window(conv.cols.size, 1, conv.cols.dilation),
    )  # fmt: skip
    packed = p.scratch(convolutions.packed_elements(target, dense))
    convolutions.pack(p, target, dense, weights, packed)
    reads = [(y, k) for _, y, k in _reads(conv.rows, conv.height, conv.out_shape[2])]
    starts, lines = _lines(conv.rows, conv.height, conv.out_shape[2], lambda y, k: y * x.row)
    size, lanes = conv.cols.size, target.lanes
    runs = [
        (o * out.pixel, i * x.pixel, k * lanes)
        for o, i, k in _reads(conv.cols, conv.width, conv.out_shape[3])
    ]
    _scatter(
        p, target, conv, x, out, adds, (starts, lines, runs), w=packed,
        w_line=p.constant([k * size * lanes for _, k in reads]), taps=conv.rows.size * size,
        channels=conv.out_channels,
    )  # fmt: skip
    p.work += conv.batch * conv.height * conv.width * conv.out_channels * conv.rows.size * size


# ------------------------------------------------------------------------------------- tables


def _reads(window: Window, n: int, out: int) -> list[tuple[int, int, int]]:
    """(output, input, tap) wherever an output reads an input, in order of the outputs."""
    found = []
    for i in range(n):
        for k in range(window.size):
            o, between = divmod(
                i * window.base_dilation + window.low - k * window.dilation, window.stride
            )
            if not between and 0 <= o < out:
                found.append((o, i, k))
    return sorted(found)


def _lines(
    window: Window, n: int, out: int, place: Callable[[int, int], int]
) -> tuple[list[int], list[int]]:
    """Where the lines of each output row begin, and what ``place(input, tap)`` says of each."""
    reads = _reads(window, n, out)
    starts, at = [], 0
    for row in range(out + 1):
        while at < len(reads) and reads[at][0] < row:
            at += 1
        starts.append(at)
    return starts, [place(i, k) for _, i, k in reads]


def _stored(weights: Weights, window: Window, tap: int) -> int:
    """The number of a tap in memory."""
    return window.size - 1 - tap if weights.flipped else tap


def _runs(
    conv: Conv, weights: Weights, pixel: int, column: int, channels: int, first: int, channel: int
) -> list[tuple[int, int, int]]:
    """(to, from, length) of every pixel that a row of one group's columns is added to."""
    return [
        (
            o * pixel + channel,
            i * column + first + _stored(weights, conv.cols, k) * channels,
            channels,
        )
        for o, i, k in _reads(conv.cols, conv.width, conv.out_shape[3])
    ]


def _joined(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Runs that go on where another ended, as one."""
    found: list[tuple[int, int, int]] = []
    for to, at, length in sorted(runs, key=lambda run: run[1]):
        last = found[-1] if found else None
        if last and (last[0] + last[2], last[1] + last[2]) == (to, at):
            found[-1] = (last[0], last[1], last[2] + length)
        else:
            found.append((to, at, length))
    return found


# ------------------------------------------------------------------------------------- weights


def _as_rows(conv: Conv, weights: Weights) -> str | None:
    """How the weights of the product are found in these; None: they are too far apart.

    "there": of one input channel, taps and output channels are one stretch, the channels of a tap
    together, as in channels_last. "moved": they are brought into that order first, row by row.
    """
    channels, rows, cols = conv.out_channels // conv.groups, conv.rows.size, conv.cols.size
    there = ((channels, 1, weights.out), (rows, cols * channels, weights.rows),
             (cols, channels, weights.cols))  # fmt: skip
    if all(size == 1 or wanted == stride for size, wanted, stride in there):
        return "there"
    return "moved" if weights.cols == 1 or cols == 1 else None


def _rows_of(p: Program, target: Target, conv: Conv, weights: Weights) -> Weights:
    """The weights of the product: taps and output channels of each input channel in one stretch."""
    channels, depth = conv.out_channels // conv.groups, conv.in_channels
    rows, cols = conv.rows.size, conv.cols.size
    if _as_rows(conv, weights) == "there":
        place, into, group = weights.place, weights.into, weights.group
        return Weights(place, 1, into, group, 0, 0)
    into = rows * cols * channels
    group, place = depth // conv.groups * into, p.scratch(depth * into)
    transpose = channels > 1
    for number in range(conv.groups):
        p.step(
            copy_kernel(copy.pack, target, transpose, channels * (transpose and channels <= FEW)),
            depth // conv.groups * rows,
            x=weights.place + number * weights.group, x_image=weights.into, x_row=weights.rows,
            x_channel=weights.out, out=place + number * group, out_image=into,
            out_row=cols * channels, height=rows, width=cols, channels=channels,
            top=0, left=0, right=0, padded_height=rows,
        )  # fmt: skip
    return Weights(place, 1, into, group, 0, 0)
