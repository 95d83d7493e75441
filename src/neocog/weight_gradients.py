"""The steps that sum a convolution's weight and bias gradients, inside a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import winograd_gradients
from .convolutions import Loops, Taps, Weights, is_depthwise
from .cpu import copy, weight_gradient
from .cpu.tiling import best_blocks
from .depthwise_gradients import depthwise_weight_gradient_steps
from .kernels import copy_kernel, kernel, serves_any_size
from .maps import Map
from .problem import Conv
from .program import Place, Program
from .target import Target
from .winograd_gradients import ITEMS, PartialSums

DIRECT_SHARE = 0.92
"""Share of the processor's peak that the direct sums reach on layers Winograd covers."""

SHORT = 64
"""Pixels of a sum where it has to round least."""

LONG_ROW, SHORT_ROW = 256, 32
"""Pixels of a row at most and at least, where all pixels of a batch are one list."""


def weight_gradient_steps(
    p: Program,
    target: Target,
    conv: Conv,
    x: Map,
    g: Map,
    needs: Sequence[str],
    exact: bool = False,
    gw: Place | None = None,
    gbias: Place | None = None,
) -> None:
    """The steps that sum the gradients of weight and bias, those of them that ``needs`` names.

    ``x`` needs the halo of ``conv``; ``g``, the gradient of its output, must be scratch: whole
    vectors are read behind its last channel. The gradients go to ``gw`` (contiguous, in PyTorch's
    order) and ``gbias``, by default the call buffers of these names. ``exact``: by the algorithm
    that rounds least, direct sums of few pixels each.
    """
    bias = "bias" in needs
    if "w" in needs:
        gw = gw or p.buffer("gw")
    if bias:
        gbias = gbias or p.buffer("gbias")
    if is_depthwise(conv):
        depthwise_weight_gradient_steps(p, target, conv, x, g, needs, gw, gbias)
        return
    direct = _direct_plan(target, conv, x, bias)
    winograd = "w" in needs and not exact and prefers_winograd(target, conv)
    if winograd and not serves_any_size(
        winograd_gradients.plan_of(target, conv, bias), lambda: _prepare(target, direct)
    ):
        made = winograd_gradients.winograd_sums(p, target, conv, x, g, bias)
        taps, channels = winograd_gradients.taps_of(target, conv)
    else:
        made, taps = _direct_sums(p, target, conv, x, g, ("w" in needs, bias, exact))
        channels = made.plan.channels
    p.work += conv.multiply_adds
    if "w" in needs:
        assert gw is not None
        _unpack(p, target, made, _weights(conv, made, gw), taps, conv.groups, channels)
    if made.bias is not None:
        sums = replace(made, place=made.bias, step=made.bias_step)
        w = Weights(p.buffer("gbias") if gbias is None else gbias, 1, 0, conv.out_channels
                    // conv.groups, 0, 0)  # fmt: skip
        _unpack(p, target, sums, w, [0], conv.groups, 1)


def _direct_plan(
    target: Target, conv: Conv, x: Map, bias: bool
) -> weight_gradient.WeightGradientPlan:
    """For maps of every size; see :func:`swaps`."""
    channels, out_channels = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    return weight_gradient.WeightGradientPlan(
        target, channels, out_channels, conv.cols.stride * x.pixel,
        best_blocks(target, out_channels), bias,
    )  # fmt: skip


def _prepare(target: Target, plan: weight_gradient.WeightGradientPlan) -> None:
    """Compile what sums of a Winograd layer need for maps of other sizes."""
    kernel(plan)
    for contiguous in (True, False):
        copy_kernel(copy.unpack_weights, target, plan.blocks, contiguous)


def prefers_winograd(target: Target, conv: Conv) -> bool:
    """Whether Winograd's kernel covers ``conv`` and is estimated to be faster than direct sums."""
    if not winograd_gradients.covers(conv) or not conv.multiply_adds:
        return False
    blocks = best_blocks(target, conv.out_channels)
    lanes = -(-conv.out_channels // (blocks * target.lanes)) * blocks * target.lanes
    direct = conv.multiply_adds * lanes / conv.out_channels / DIRECT_SHARE
    return winograd_gradients.cost(target, conv) < direct


def _weights(conv: Conv, made: PartialSums, place: Place) -> Weights:
    _, into, kh, kw = conv.weight_shape
    strides = (into * kh * kw, kh * kw, kw, 1)
    w = Weights.of(place, strides, conv)
    # Where inputs and gradients have changed their roles, so have the strides.
    swapped = made.plan.out_channels != conv.out_channels // conv.groups
    return replace(w, out=w.into, into=w.out) if swapped else w


def _direct_sums(
    p: Program, target: Target, conv: Conv, x: Map, g: Map, wanted: tuple[bool, bool, bool]
) -> tuple[PartialSums, list[int]]:
    """The step of the direct kernel, and the offset of each of its taps in the weight.

    ``wanted``: the gradient of the weight, that of the bias, the least rounding.
    """
    weight, bias, exact = wanted
    (rows,), (cols,) = conv.rows.phases(conv.height), conv.cols.phases(conv.width)
    phase = Taps(rows, cols)
    pairs = phase.pairs if weight else []
    channels, out_channels = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    loops = Loops.of(conv, phase, x, g)
    if not bias and swaps(target, conv):
        x, g, channels, out_channels = g, x, out_channels, channels
        loops = replace(loops, steps=loops.steps[::-1])
    loops, merged = _as_list(loops, SHORT if exact else LONG_ROW)
    plan = weight_gradient.WeightGradientPlan(
        target, channels, out_channels, loops.steps[0][2], best_blocks(target, out_channels), bias
    )
    blocks = conv.groups * plan.blocks_per_group
    loops, chunks, images, item_taps = _shares(plan, loops, merged, blocks, len(pairs))
    step, bias_step = blocks * len(pairs) * plan.channels * plan.width, blocks * plan.width
    made = PartialSums(
        plan, chunks, p.scratch(chunks * step, slack=0), step,
        p.scratch(chunks * bias_step, slack=0) if bias else None, bias_step,
    )  # fmt: skip
    fields: dict[str, Place | int] = {}
    if made.bias is not None:
        fields = {"bias": made.bias, "bias_step": bias_step}
    (x_image, x_row, _), (g_image, g_row, g_pixel) = loops.steps
    pixels = SHORT if exact else weight_gradient.BAND_PIXELS
    p.step(
        kernel(plan), weight_gradient.items(plan, len(pairs), item_taps, conv.groups, chunks),
        x=x.place, x_image=x_image, x_row=x_row, x_group=channels,
        taps=p.constant([y * x.row + ox * x.pixel for _, (y, ox) in pairs]), n_taps=len(pairs),
        grad=g.place, grad_image=g_image, grad_row=g_row, grad_pixel=g_pixel,
        partial=made.place, chunk_step=step, chunk_images=images, item_taps=item_taps,
        batch=loops.batch, rows=loops.rows, cols=loops.cols, groups=conv.groups,
        band=max(1, -(-pixels // max(1, loops.cols))), **fields,
    )  # fmt: skip
    _, _, kh, kw = conv.weight_shape
    return made, [y * kw + x for (y, x), _ in pairs]


def swaps(target: Target, conv: Conv) -> bool:
    """Whether inputs and gradients better change their roles: what is in the lanes fills them more.

    Only where each output reads one input, its own, and no lane would read behind the input.
    """
    windows = ((w.size, w.stride, w.low, w.high) for w in (conv.rows, conv.cols))
    if conv.groups != 1 or any(w != (1, 1, 0, 0) for w in windows):
        return False
    used = []
    for count in (conv.in_channels, conv.out_channels):
        width = best_blocks(target, count) * target.lanes
        used.append(count / (-(-count // width) * width))
    return used[0] == 1 and used[1] < 1


def _as_list(loops: Loops, most: int) -> tuple[Loops, bool]:
    """All pixels as one list where no map has gaps, cut into rows of a good length; whether so.

    Rows of 7 pixels would cost a part of the time in going from one to the next.
    """
    merged = loops.merged()
    # Images that stand in for pixels may be a step apart that depends on the size of the map.
    if merged.batch * merged.rows != 1 or merged.steps[0][2] != loops.steps[0][2]:
        return loops, False
    size = _divisor(merged.cols, most)
    if size < SHORT_ROW:
        return loops, False
    steps = tuple((0, size * pixel, pixel) for *_, pixel in merged.steps)
    return replace(merged, rows=merged.cols // size, cols=size, steps=steps), True


def _divisor(number: int, most: int) -> int:
    return next((d for d in range(min(number, most), 0, -1) if number % d == 0), 1)


def _shares(
    plan: weight_gradient.WeightGradientPlan, loops: Loops, merged: bool, blocks: int, taps: int
) -> tuple[Loops, int, int, int]:
    """(loops, chunks, images of a chunk, taps of a work item), for ``ITEMS`` work items if it can.

    Taps of one item share what they read; chunks are cheap while the sums are few.
    """
    item_taps = min(weight_gradient.most_taps(plan), -(-max(1, taps) // plan.taps) * plan.taps)
    groups = blocks // plan.blocks_per_group
    wanted = max(1, -(-ITEMS // weight_gradient.items(plan, taps, item_taps, groups, 1)))
    if merged:
        parts = _divisor(loops.rows, wanted)
        rows = loops.rows // parts
        steps = tuple((rows * row, row, pixel) for _, row, pixel in loops.steps)
        loops = replace(loops, batch=parts, rows=rows, steps=steps)
    chunks = max(1, min(loops.batch, wanted))
    images = -(-loops.batch // chunks)
    runs = min(-(-taps // plan.taps), -(-ITEMS // (chunks * blocks)))
    if runs > 1:
        item_taps = min(item_taps, -(-taps // (runs * plan.taps)) * plan.taps)
    return loops, chunks, images, item_taps


def _unpack(
    p: Program, target: Target, sums: PartialSums, w: Weights, taps: list[int], groups: int,
    channels: int,
) -> None:  # fmt: skip
    plan = sums.plan
    contiguous = w.into == len(taps) and taps == list(range(len(taps)))
    p.step(
        copy_kernel(copy.unpack_weights, target, plan.blocks, contiguous),
        groups * plan.blocks_per_group * (plan.blocks if contiguous else 1),
        w=w.place, w_out=w.out, w_in=w.into, group_step=w.group,
        packed=sums.place, chunks=sums.chunks, chunk_step=sums.step,
        taps=p.constant(taps), n_taps=len(taps), channels=channels,
        out_channels=plan.out_channels, blocks_per_group=plan.blocks_per_group,
    )  # fmt: skip
