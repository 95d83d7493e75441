"""The steps of a convolution and of its weight gradient, inside a program.

:func:`convolve` serves forward and backward: the gradient with respect to the input is a
convolution with a base dilation, which falls apart into phases, each a dense convolution of some
of the taps (:meth:`neocog.geometry.Window.phases`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .cpu import copy, direct, weight_gradient
from .cpu.tiling import blocks_for
from .geometry import Phase
from .kernels import copy_kernel, kernel
from .maps import Map
from .problem import Block, Conv, Step
from .program import Place, Program
from .target import Target

WEIGHT_GRADIENT_ITEMS = 16
"""Work items a weight gradient is cut into at least, if the batch allows."""


@dataclass(frozen=True)
class Weights:
    """A weight tensor as a kernel of output x input channels x taps reads it, by strides."""

    place: Place
    out: int
    into: int
    group: int
    rows: int
    cols: int
    flipped: bool = False
    """The adjoint reads the kernel backwards: its tap k is tap size-1-k."""

    @classmethod
    def of(cls, place: Place, strides: Sequence[int], conv: Conv) -> Weights:
        """Weight (K, C/groups, KH, KW) of ``conv``."""
        out, into, rows, cols = strides
        return cls(place, out, into, conv.out_channels // conv.groups * out, rows, cols)

    def adjoint(self) -> Weights:
        """The same tensor as the gradient with respect to the input reads it."""
        return Weights(self.place, self.into, self.out, self.group, self.rows, self.cols, True)

    def tap(self, conv: Conv, kh: int, kw: int) -> int:
        """The offset of a tap."""
        if self.flipped:
            kh, kw = conv.rows.size - 1 - kh, conv.cols.size - 1 - kw
        return kh * self.rows + kw * self.cols


@dataclass(frozen=True)
class _Taps:
    """One pair of phases: where its outputs stand and what they read."""

    rows: Phase
    cols: Phase

    @property
    def pairs(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """((kh, kw), (row offset, column offset)) in kernel order."""
        return [((kh, kw), (y, x)) for kh, y in self.rows.taps for kw, x in self.cols.taps]


def is_depthwise(conv: Conv) -> bool:
    """One channel per group, in and out: channels can stay in the lanes."""
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


def direct_plan(
    target: Target, conv: Conv, stride: int, epilogue: tuple[Step, ...], winners: bool
) -> direct.DirectPlan:
    """The direct kernel for one phase of a convolution; ``stride`` along a row, in pixels."""
    depthwise = is_depthwise(conv)
    groups = 1 if depthwise else conv.groups
    return direct.DirectPlan(
        target=target,
        channels=1 if depthwise else conv.in_channels // groups,
        out_channels=conv.out_channels // groups,
        pixel_step=stride * conv.in_channels,
        blocks=blocks_for(target, conv.out_channels // groups),
        epilogue=epilogue,
        depthwise=depthwise,
        winners=winners,
    )


def convolve(
    p: Program,
    target: Target,
    conv: Conv,
    x: Map,
    weights: Weights,
    out: Map,
    epilogue: tuple[Step, ...] = (),
    winners: Map | None = None,
    extra: Mapping[str, Place | int] = MappingProxyType({}),
) -> None:
    """The steps of one convolution with its epilogue, phase by phase.

    ``extra``: the places of the epilogue's parameters and residual.
    """
    pooled = Block(conv, epilogue).pool
    phases = [
        _Taps(r, c) for r in conv.rows.phases(conv.height) for c in conv.cols.phases(conv.width)
    ]
    groups = 1 if is_depthwise(conv) else conv.groups
    plan = direct_plan(target, conv, phases[0].cols.stride, epilogue, winners is not None)
    blocks = groups * plan.blocks_per_group
    order = [tap for phase in phases for tap, _ in phase.pairs]
    tap_size = plan.channels * plan.width
    packed = p.scratch(blocks * len(order) * tap_size)
    _pack_weights(p, target, plan, weights, [weights.tap(conv, *t) for t in order], packed, groups)
    done = 0
    for phase in phases:
        offsets = [y * x.row + ox * x.pixel for _, (y, ox) in phase.pairs]
        rows, fields = phase.rows.count, dict(extra)
        if pooled is not None:
            _, _, rows, pool_cols = pooled.out_shape
            fields |= {"pool_rows": rows, "pool_cols": pool_cols, **_winner_fields(winners)}
        step = p.step(
            kernel(plan), blocks * conv.batch * rows,
            x=x.place, x_image=x.image, x_row=phase.rows.stride * x.row, x_group=plan.channels,
            w=packed + done * tap_size, w_block=len(order) * tap_size,
            taps=p.constant(offsets), n_taps=len(offsets),
            out=out.place + (phase.rows.start * out.row + phase.cols.start * out.pixel),
            out_image=out.image, out_row=phase.rows.step * out.row,
            out_pixel=phase.cols.step * out.pixel,
            batch=conv.batch, rows=phase.rows.count, cols=phase.cols.count, **fields,
        )  # fmt: skip
        if pooled is not None:
            ring = direct.scratch_rows(plan) * phase.cols.count * plan.width
            p.thread_scratch(step, "scratch", ring)
        done += len(offsets)
    p.work += conv.multiply_adds


def _winner_fields(winners: Map | None) -> dict[str, Place | int]:
    if winners is None:
        return {}
    return {
        "winners": winners.place,
        "winners_image": winners.image,
        "winners_row": winners.row,
        "winners_pixel": winners.pixel,
    }


def _pack_weights(p, target, plan, weights: Weights, taps, packed: Place, groups: int) -> None:
    # In a depthwise layer each output channel is a group of its own.
    out = weights.group if plan.depthwise else weights.out
    contiguous = weights.into == len(taps) and taps == list(range(len(taps)))
    p.step(
        copy_kernel(copy.pack_weights, target, plan.blocks, contiguous),
        groups * plan.blocks_per_group,
        w=weights.place, w_out=out, w_in=weights.into, group_step=weights.group,
        packed=packed, chunks=1, chunk_step=0, taps=p.constant(taps), n_taps=len(taps),
        channels=plan.channels, out_channels=plan.out_channels,
        blocks_per_group=plan.blocks_per_group,
    )  # fmt: skip


def weight_gradient_steps(
    p: Program, target: Target, conv: Conv, x: Map, g: Map, needs: Sequence[str]
) -> None:
    """The steps that sum the gradients of weight and bias into the call buffers gw and gbias.

    ``x`` needs the halo of ``conv``; ``g``, the gradient of its output, must be scratch: whole
    vectors are read behind its last channel.
    """
    (rows,), (cols,) = conv.rows.phases(conv.height), conv.cols.phases(conv.width)
    pairs = _Taps(rows, cols).pairs
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
        w = Weights.of(p.buffer("gw"), strides, conv)
        taps = [w.tap(conv, *t) for t, _ in pairs]
        _unpack(p, target, plan, w, taps, partial, (chunks, chunk_step), conv.groups, channels)
    if plan.bias:
        w = Weights(p.buffer("gbias"), 1, 0, out_channels, 0, 0)
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
