"""The steps that sum a convolution's weight and bias gradients, inside a program."""

from __future__ import annotations

from collections.abc import Sequence

from .convolutions import Taps, Weights, is_depthwise
from .cpu import copy, weight_gradient
from .cpu.tiling import blocks_for
from .depthwise_gradients import depthwise_weight_gradient_steps
from .kernels import copy_kernel, kernel
from .maps import Map
from .problem import Conv
from .program import Place, Program
from .target import Target

WEIGHT_GRADIENT_ITEMS = 16
"""Work items a weight gradient is cut into at least, if the batch allows."""


def weight_gradient_steps(
    p: Program, target: Target, conv: Conv, x: Map, g: Map, needs: Sequence[str],
    exact: bool = False, gw: Place | None = None, gbias: Place | None = None,
) -> None:  # fmt: skip
    """The steps that sum the gradients of weight and bias into the call buffers gw and gbias.

    ``x`` needs the halo of ``conv``; ``g``, the gradient of its output, must be scratch: whole
    vectors are read behind its last channel.
    """
    if "w" in needs:
        gw = gw or p.buffer("gw")
    if "bias" in needs:
        gbias = gbias or p.buffer("gbias")
    if is_depthwise(conv):
        depthwise_weight_gradient_steps(p, target, conv, x, g, needs, gw, gbias)
        return
    (rows,), (cols,) = conv.rows.phases(conv.height), conv.cols.phases(conv.width)
    pairs = Taps(rows, cols).pairs
    channels, out_channels = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    plan = weight_gradient.WeightGradientPlan(
        target, channels, out_channels, cols.stride * x.pixel,
        blocks_for(target, out_channels), "bias" in needs,
    )  # fmt: skip
    blocks = conv.groups * plan.blocks_per_group
    tiles = weight_gradient.items(plan, len(pairs), conv.groups, 1)
    chunks = max(1, min(conv.batch, -(-WEIGHT_GRADIENT_ITEMS // tiles)))
    images = -(-conv.batch // chunks)
    chunk_step = blocks * len(pairs) * plan.channels * plan.width
    partial = p.scratch(chunks * chunk_step)
    fields: dict[str, Place | int] = {}
    if plan.bias:
        fields = {"bias": p.scratch(chunks * blocks * plan.width), "bias_step": blocks * plan.width}
    p.step(
        kernel(plan), tiles * chunks,
        x=x.place, x_image=x.image, x_row=rows.stride * x.row, x_group=channels,
        taps=p.constant([y * x.row + ox * x.pixel for _, (y, ox) in pairs]), n_taps=len(pairs),
        grad=g.place, grad_image=g.image, grad_row=g.row, grad_pixel=g.pixel,
        partial=partial, chunk_step=chunk_step, chunk_images=images,
        batch=conv.batch, rows=rows.count, cols=cols.count, groups=conv.groups,
        band=max(1, -(-weight_gradient.BAND_PIXELS // max(1, cols.count))), **fields,
    )  # fmt: skip
    p.work += conv.multiply_adds
    if "w" in needs:
        _, into, kh, kw = conv.weight_shape
        strides = (into * kh * kw, kh * kw, kw, 1)
        w = Weights.of(gw or p.buffer("gw"), strides, conv)
        taps = [w.tap(conv, *t) for t, _ in pairs]
        _unpack(p, target, plan, w, taps, partial, (chunks, chunk_step), conv.groups, channels)
    if plan.bias:
        w = Weights(gbias or p.buffer("gbias"), 1, 0, out_channels, 0, 0)
        _unpack(p, target, plan, w, [0], fields["bias"], (chunks, fields["bias_step"]),
                conv.groups, 1)  # fmt: skip


def _unpack(p, target, plan, w: Weights, taps, partial, chunks, groups, channels) -> None:
    p.step(
        copy_kernel(copy.unpack_weights, target, plan.blocks), groups * plan.blocks_per_group,
        w=w.place, w_out=w.out, w_in=w.into, group_step=w.group,
        packed=partial, chunks=chunks[0], chunk_step=chunks[1],
        taps=p.constant(taps), n_taps=len(taps), channels=channels,
        out_channels=plan.out_channels, blocks_per_group=plan.blocks_per_group,
    )  # fmt: skip
