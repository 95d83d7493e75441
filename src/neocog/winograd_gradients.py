"""The steps of a Winograd weight gradient inside a program: which it covers, its cost."""

from __future__ import annotations

from dataclasses import dataclass

from . import winograd_steps
from .cpu.tiling import TiledPlan
from .cpu.winograd_gradient import WinogradGradientPlan, items
from .cpu.winograd_weights import NO_TAP
from .kernels import kernel
from .maps import Map
from .problem import Conv
from .program import Place, Program
from .target import Target

ITEMS = 16
"""Work items a weight gradient is cut into at least, if it can be."""

SIDES = {2: 4, 3: 4, 4: 3}
"""Taps along a side of the kernel -> m, outputs along a side of a tile.

With 4 taps m = 4 would round four times as much and be hardly faster.
"""

PRODUCTS_SHARE = 0.95
"""Of the peak that the matrix products reach on data in the caches."""

TRANSFORM_SLOTS = 10.0
"""Multiply-adds at peak in the time to transform one element of V or Y."""

SUMS_SLOTS = 6.0
"""The same for one element of D: stored or added to, read again, transformed."""


MIN_CHANNELS = 3
"""Fewer input channels take as long: their few products wait for their own sums."""


@dataclass(frozen=True)
class PartialSums:
    """The gradients of weight and bias in scratch, by chunks, in the order of packed weights."""

    plan: TiledPlan | WinogradGradientPlan
    chunks: int
    place: Place
    step: int
    """Elements from one chunk to the next."""
    bias: Place | None = None
    bias_step: int = 0


def covers(conv: Conv) -> bool:
    """Whether these kernels do ``conv``: 3x3, with stride 2 also 5x5 and 7x7; any padding.

    One group, no dilation.
    """
    return winograd_steps.covers(conv)


def side(conv: Conv) -> int:
    """m, outputs along a side of a tile."""
    return SIDES[-(-conv.rows.size // conv.rows.stride)]


def plan_of(target: Target, conv: Conv, bias: bool) -> WinogradGradientPlan:
    """The plan of the kernel for ``conv``, or for the convolution of its folded input."""
    whole = winograd_steps.plan_of(target, conv, m=side(conv))
    folded = winograd_steps.folds(conv)
    channels, kernel, stride = (
        (whole.depth, whole.taps, 1) if folded else (whole.channels, whole.kernel, whole.stride)
    )
    return WinogradGradientPlan(
        target, channels, conv.out_channels, whole.m, whole.tails, bias, kernel, stride
    )


def taps_of(target: Target, conv: Conv) -> tuple[list[int], int]:
    """(offsets in the weight of what the partial sums hold, channels that follow each).

    Folded, each channel of each tap has its own offset, or ``NO_TAP``.
    """
    size, channels = conv.rows.size, conv.in_channels
    if not winograd_steps.folds(conv):
        return list(range(size**2)), channels
    whole = winograd_steps.plan_of(target, conv, m=side(conv))
    found = []
    for tap in range(whole.taps**2):
        for odd in whole.phases:
            y, x = (2 * i + o for i, o in zip(divmod(tap, whole.taps), odd, strict=True))
            inside = max(y, x) < size
            found += [c * size**2 + y * size + x if inside else NO_TAP for c in range(channels)]
    return found, 1


def chunks_of(plan: WinogradGradientPlan, tiles: int) -> tuple[int, int]:
    """(chunks, tiles of each): whole blocks, enough for ``ITEMS`` work items if there are.

    Two at least where one work item would do all: for a second thread.
    """
    alone = items(plan, 1)
    blocks = -(-tiles // plan.block)
    if blocks == alone == 1 and tiles > 1:
        return 2, -(-tiles // 2)
    wanted = max(1, min(blocks, -(-ITEMS // alone)))
    size = -(-blocks // wanted) * plan.block
    return -(-tiles // size), size


def cost(target: Target, conv: Conv) -> float:
    """The time of :func:`winograd_sums` on one thread, in multiply-adds at the processor's peak.

    To be compared with the multiply-adds of the direct sums over their share of the peak. Padding
    to whole vectors and tiles counts. The constants are fitted to measured layers.
    """
    plan, tiles = plan_of(target, conv, False), _tiles(target, conv)
    planes, width = plan.tiles(1).planes, plan.blocks_per_group * plan.width
    whole = winograd_steps.plan_of(target, conv, m=side(conv))
    channels = max(whole.channels, MIN_CHANNELS // len(whole.phases))
    products = winograd_steps.products_of(whole, conv) * channels * width
    rows = sum(plan.tiles(depth).v_row for depth in plan.depths)
    elements = rows * plan.blocks_per_group + width * len(plan.depths)
    transforms = tiles * planes * elements * TRANSFORM_SLOTS
    chunks, _ = chunks_of(plan, tiles)
    sums = chunks * planes * plan.tiles(plan.channels).depth * width * SUMS_SLOTS
    return products / PRODUCTS_SHARE + transforms + sums


def _tiles(target: Target, conv: Conv) -> int:
    return winograd_steps.tiles_of(winograd_steps.plan_of(target, conv, m=side(conv)), conv)


def winograd_sums(
    p: Program, target: Target, conv: Conv, x: Map, g: Map, bias: bool
) -> PartialSums:
    """The steps that sum the gradients of a convolution that :func:`covers` accepts.

    ``x`` needs the halo of ``conv``, unless it is folded; whole vectors of ``g`` are read behind
    its last channel.
    """
    plan, tiles = plan_of(target, conv, bias), _tiles(target, conv)
    whole, folded = winograd_steps.plan_of(target, conv, m=side(conv)), winograd_steps.folds(conv)
    chunks, size = chunks_of(plan, tiles)
    blocks = plan.blocks_per_group
    step, bias_step = blocks * plan.kernel**2 * plan.channels * plan.width, blocks * plan.width
    if folded:
        x = winograd_steps.fold(p, target, whole, conv, x, 0)
    else:
        corner = x.place + (-conv.rows.low * x.row - conv.cols.low * x.pixel)
        x = Map(corner, x.image, x.row, x.pixel)
    made = PartialSums(
        plan, chunks, p.scratch(chunks * step, slack=0), step,
        p.scratch(chunks * bias_step, slack=0) if bias else None, bias_step,
    )  # fmt: skip
    fields: dict[str, Place | int] = {}
    if made.bias is not None:
        fields = {"bias": made.bias, "bias_step": bias_step}
    done = p.step(
        kernel(plan), items(plan, chunks), **winograd_steps.grid_of(whole, conv),
        **x.fields("x"), **g.fields("grad"),
        partial=made.place, chunk_step=step, chunk_tiles=size, **fields,
    )  # fmt: skip
    p.thread_scratch(done, "scratch", plan.scratch)
    return made
