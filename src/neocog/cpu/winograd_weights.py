"""The weights of Winograd's convolution, transformed and in the order the products read them."""

from __future__ import annotations

from llvmlite import ir

from ..target import Target
from .lanes import I64, Emitter, Int
from .runtime import Kernel, compile_kernel
from .winograd_plan import WinogradPlan
from .winograd_transforms import apply, weight_matrix

WEIGHTS = ("w*", "w_out", "w_in", "taps*", "packed*")

NO_TAP = -(1 << 40)
"""Stands in the list of taps for those that a phase lacks."""


def pack_winograd(
    target: Target, channels: int, out_channels: int, m: int, kernel: int, stride: int
) -> Kernel:
    """U = G g G^T as [xi][register tile][phase][channel][NB x lanes], zeros behind the last output.

    ``w_out``, ``w_in``: strides of ``w``; ``taps``: for each phase the offsets in ``w`` of its
    r x r taps, row by row. Items: register tiles across the output channels x phases x input
    channels, channels fastest.
    """
    plan = WinogradPlan(target, channels, out_channels, m, kernel=kernel, stride=stride)
    e = Emitter(target, f"pack_{plan.name}")
    matrix, r = weight_matrix(m, plan.taps), plan.taps
    with e.kernel(WEIGHTS) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            group, place = e.divmod(number, plan.depth)
            phase, channel = e.divmod(place, channels)
            w = e.at(f.w, e.mul(channel, f.w_in))
            to = e.at(f.packed, e.mul(number, plan.width))
            offsets = [e.load(I64, f.taps, e.add(e.mul(phase, r * r), t)) for t in range(r * r)]

            def vector(j: Int) -> None:
                first = e.add(e.mul(group, plan.width), e.mul(j, e.lanes))
                left = e.sub(out_channels, first)
                start = e.at(w, e.mul(first, f.w_out))
                taps = []
                for offset in offsets:
                    there = e.b.select(e.equal(offset, NO_TAP), I64(0), left)
                    taps.append(e.gather(e.at(start, offset), f.w_out, e.lane_mask(there)))
                columns = [apply(e, matrix, taps[col::r]) for col in range(r)]
                for y, row in enumerate(zip(*columns, strict=True)):
                    for xi, value in enumerate(apply(e, matrix, row), start=y * plan.size):
                        plane = xi * plan.groups * plan.panel
                        e.vstore(value, e.at(to, e.mul(j, e.lanes)), plane)

            e.loop(0, plan.blocks, vector)

        e.loop(begin, end, item)
    return compile_kernel(e, WEIGHTS)
