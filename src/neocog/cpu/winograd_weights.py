"""The weights of Winograd's convolution, transformed and in the order the products read them."""

from __future__ import annotations

from llvmlite import ir

from ..target import Target
from .lanes import I64, Emitter, Int
from .runtime import Kernel, compile_kernel
from .winograd import WinogradPlan
from .winograd_transforms import TAPS, apply, weight_matrix

WEIGHTS = ("w*", "w_out", "w_in", "taps*", "packed*")


def pack_winograd(target: Target, channels: int, out_channels: int, m: int) -> Kernel:
    """U = G g G^T as [xi][register tile][channel][NB x lanes], zeros beyond the last channel.

    ``w_out``, ``w_in``: strides of ``w``; ``taps``: the offsets of the nine taps in it, row by row.
    Items: register tiles across the output channels x input channels, channels fastest.
    """
    plan = WinogradPlan(target, channels, out_channels, m)
    e = Emitter(target, f"pack_winograd{m}_c{channels}k{out_channels}")
    matrix = weight_matrix(m)
    with e.kernel(WEIGHTS) as (f, begin, end, _):
        offsets = [e.load(I64, f.taps, t) for t in range(TAPS**2)]

        def item(number: ir.Value) -> None:
            group, channel = e.divmod(number, channels)
            w = e.at(f.w, e.mul(channel, f.w_in))
            to = e.at(f.packed, e.mul(number, plan.width))

            def vector(j: Int) -> None:
                first = e.add(e.mul(group, plan.width), e.mul(j, e.lanes))
                mask = e.lane_mask(e.sub(out_channels, first))
                start = e.at(w, e.mul(first, f.w_out))
                taps = [e.gather(e.at(start, offset), f.w_out, mask) for offset in offsets]
                columns = [apply(e, matrix, taps[col::TAPS]) for col in range(TAPS)]
                for y, row in enumerate(zip(*columns, strict=True)):
                    for xi, value in enumerate(apply(e, matrix, row), start=y * plan.size):
                        plane = xi * plan.groups * plan.panel
                        e.vstore(value, e.at(to, e.mul(j, e.lanes)), plane)

            e.loop(0, plan.blocks, vector)

        e.loop(begin, end, item)
    return compile_kernel(e, WEIGHTS)
