"""The steps of a depthwise convolution inside a program, channels in the lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from .cpu import depthwise
from .cpu.ahead import pays
from .cpu.tiling import Reads
from .kernels import kernel, serves_any_size
from .maps import Map, residual_map, row_of
from .problem import Conv, Step
from .program import Place, Program
from .target import Target


def covers(conv: Conv) -> bool:
    """Whether these kernels do a depthwise ``conv``, whose pool is left out."""
    (rows, _), (cols, _) = _reads(conv)
    return conv.batch > 0 and depthwise.serves((rows, cols))


def convolve(
    p: Program,
    target: Target,
    conv: Conv,
    x: Map,
    packed: Place,
    out: Map,
    epilogue: tuple[Step, ...],
    extra: Mapping[str, Place | int],
    prepare: Callable[[], object],
) -> bool:
    """The steps, as ``convolutions.convolve_packed``; False where another kernel has to make them.

    That is where :func:`covers` says so, and where several phases are computed for maps of many
    sizes: then ``prepare`` has compiled that kernel.
    """
    if not covers(conv):
        return False
    (rows, top), (cols, left) = _reads(conv)
    *_, height, width = conv.out_shape
    plan = _plan(target, conv, epilogue)
    if rows.step * cols.step > 1 and serves_any_size(plan, prepare):
        return False
    parts = [(plan, 0, height)]
    if rows.step == cols.step == 1:
        pair, single = depthwise.plans_for_any_size(
            target, (rows, cols), conv.out_channels, epilogue
        )
        if serves_any_size(plan, lambda: (kernel(pair), kernel(single))):
            even = height - height % depthwise.HEIGHT
            parts = [(pair, 0, even), (single, even, height - even)]
    x = replace(x, place=x.place + (top * x.row + left * x.pixel))
    for plan, first, count in parts:
        groups, (tiles, wide) = -(-count // plan.heights[0]), plan.cover(width)
        maps = {"x": row_of(x, first * rows.stride), "out": row_of(out, first)}
        if "residual" in extra:
            maps["residual"] = row_of(residual_map(extra), first)
        places = {name: place for m, at in maps.items() for name, place in at.fields(m).items()}
        step = p.step(
            kernel(plan), conv.batch * groups, **{**extra, **places}, w=packed,
            channels=conv.out_channels, groups=groups, tiles=tiles, wide=wide,
        )  # fmt: skip
        step.alongside = count < height and first == 0  # they write different rows
    p.work += conv.multiply_adds
    return True


def _plan(target: Target, conv: Conv, epilogue: tuple[Step, ...]) -> depthwise.DepthwisePlan:
    """For maps of this size."""
    (rows, _), (cols, _) = _reads(conv)
    *_, height, width = conv.out_shape
    elements = math.prod(conv.in_shape) + math.prod(conv.out_shape)
    large = pays(elements, rows.stride, cols.stride)
    return depthwise.plan_for(
        target, (rows, cols), (height, width), conv.out_channels, large, epilogue
    )


def _reads(conv: Conv) -> tuple[tuple[Reads, int], tuple[Reads, int]]:
    return Reads.of(conv.rows.phases(conv.height)), Reads.of(conv.cols.phases(conv.width))
