"""From problems to programs: which kernels, on which memory, in which order.

Every function here takes a problem and the layouts of the tensors around it and returns a
:class:`~neocog.program.Program`. Nothing runs here. Inside a program activations are NHWC; a
convolution reads its input through a halo of zeros, so that no kernel knows about borders.

Kernels are kept by plan: a new batch size or image size finds all of them compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .cpu import copy, direct, pool, pool_backward, weight_gradient
from .cpu import epilogue as ep
from .cpu.runtime import Kernel
from .errors import Unsupported
from .geometry import Phase, Window
from .problem import Act, Add, Affine, Bias, Block, Conv, Pool, Pooling, Step
from .program import Place, Program
from .target import Target, host

NCHW, NHWC = "nchw", "nhwc"
"""Layouts at the border: PyTorch's contiguous and channels_last."""

KERNELS_KEPT = 512
PROGRAMS_KEPT = 256
WEIGHT_GRADIENT_ITEMS = 16
"""Work items a weight gradient is cut into at least, if the batch allows."""

EMITTERS: dict[type, Callable[[Any], Kernel]] = {
    direct.DirectPlan: direct.emit,
    pool.PoolPlan: pool.emit,
    pool_backward.PoolBackwardPlan: pool_backward.emit,
    weight_gradient.WeightGradientPlan: weight_gradient.emit,
}


@functools.lru_cache(KERNELS_KEPT)
def kernel(plan: Any) -> Kernel:
    """The compiled kernel of a plan."""
    return EMITTERS[type(plan)](plan)


@functools.lru_cache(KERNELS_KEPT)
def copy_kernel(kind: Callable[..., Kernel], *args: Any) -> Kernel:
    """A compiled copy kernel: ``kind`` is a function of :mod:`neocog.cpu.copy`."""
    return kind(*args)


@dataclass(frozen=True)
class Map:
    """An activation in NHWC: element (n, y, x, c) at ``place + n*image + y*row + x*pixel + c``."""

    place: Place
    image: int
    row: int
    pixel: int

    @classmethod
    def dense(cls, place: Place, channels: int, height: int, width: int) -> Map:
        """Without a halo."""
        return cls(place, height * width * channels, width * channels, channels)


@dataclass(frozen=True)
class Halo:
    """Rows and columns of zeros around a map."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    @property
    def empty(self) -> bool:
        """Whether there is none."""
        return not (self.top or self.bottom or self.left or self.right)


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


# ------------------------------------------------------------------------------- maps and halos


def halo_of(conv: Conv) -> Halo:
    """The halo that the taps of ``conv`` reach, which may be less than its padding."""
    top, bottom = _reach(conv.rows, conv.height)
    left, right = _reach(conv.cols, conv.width)
    return Halo(top, bottom, left, right)


def _reach(window: Window, n: int) -> tuple[int, int]:
    low = high = 0
    for phase in window.phases(n):
        offsets = [offset for _, offset in phase.taps]
        if phase.count and offsets:
            low = max(low, -min(offsets))
            high = max(high, phase.stride * (phase.count - 1) + max(offsets) - (n - 1))
    return low, high


def _scratch_map(p: Program, shape: Sequence[int], halo: Halo) -> tuple[Map, Place]:
    """A map in scratch with room for its halo, and the halo's corner."""
    batch, channels, height, width = shape
    row = (width + halo.left + halo.right) * channels
    image = (height + halo.top + halo.bottom) * row
    corner = p.scratch(batch * image)
    inside = corner + (halo.top * row + halo.left * channels)
    return Map(inside, image, row, channels), corner


def _read(
    p: Program,
    target: Target,
    place: Place,
    layout: str,
    shape: Sequence[int],
    halo: Halo = Halo(),
    own: bool = False,
) -> Map:
    """A tensor as NHWC with a halo: itself if it is that already (unless ``own``), else packed."""
    batch, channels, height, width = shape
    if layout == NHWC and halo.empty and not own:
        return Map.dense(place, channels, height, width)
    made, corner = _scratch_map(p, shape, halo)
    transpose = layout == NCHW and channels > 1
    if transpose:
        image, row, channel = channels * height * width, width, height * width
    else:
        image, row, channel = height * width * channels, width * channels, 1
    rows = height + halo.top + halo.bottom
    p.step(
        copy_kernel(copy.pack, target, transpose), batch * rows,
        x=place, x_image=image, x_row=row, x_channel=channel,
        out=corner, out_image=made.image, out_row=made.row,
        height=height, width=width, channels=channels,
        top=halo.top, left=halo.left, right=halo.right, padded_height=rows,
    )  # fmt: skip
    return made


def _written(p: Program, place: Place, layout: str, shape: Sequence[int]) -> Map:
    """The map a kernel writes for an output tensor: the tensor itself, or scratch."""
    _, channels, height, width = shape
    if layout == NHWC or channels == 1:
        return Map.dense(place, channels, height, width)
    return _scratch_map(p, shape, Halo())[0]


def _deliver(p: Program, target: Target, m: Map, place: Place, layout: str, shape) -> None:
    """Bring a written map to its output tensor, if it was scratch."""
    batch, channels, height, width = shape
    if layout == NHWC or channels == 1:
        return
    p.step(
        copy_kernel(copy.transpose, target), batch * height,
        x=m.place, x_image=m.image, x_row=m.row,
        out=place, out_image=channels * height * width, out_row=width,
        out_channel=height * width, height=height, width=width, channels=channels,
    )  # fmt: skip


# --------------------------------------------------------------------------------- convolutions


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
        blocks=direct.blocks_for(target, conv.out_channels // groups),
        epilogue=epilogue,
        depthwise=depthwise,
        winners=winners,
    )


def _convolve(
    p: Program,
    target: Target,
    conv: Conv,
    x: Map,
    weights: Weights,
    out: Map,
    epilogue: tuple[Step, ...] = (),
    winners: Map | None = None,
    **extra: Place | int,
) -> None:
    """The steps of one convolution with its epilogue, phase by phase."""
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
        if isinstance(epilogue[-1] if epilogue else None, Pooling):
            rows, fields = fields["pool_rows"], fields | _winner_fields(winners)
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
        if "pool_rows" in fields:
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
    p.step(
        copy_kernel(copy.pack_weights, target, plan.blocks), groups * plan.blocks_per_group,
        w=weights.place, w_out=weights.out, w_in=weights.into, group_step=weights.group,
        packed=packed, chunks=1, chunk_step=0, taps=p.constant(taps), n_taps=len(taps),
        channels=plan.channels, out_channels=plan.out_channels,
        blocks_per_group=plan.blocks_per_group,
    )  # fmt: skip


@functools.lru_cache(PROGRAMS_KEPT)
def forward(
    block: Block,
    x_layout: str,
    w_strides: tuple[int, int, int, int],
    out_layout: str,
    save: bool = False,
    target: Target | None = None,
) -> Program:
    """The program of a block's forward pass.

    Call buffers: x, w, the parameters and residual (NHWC) that the epilogue names, out, and with
    ``save`` what the backward pass needs: winners (max pool) or before (the NHWC map before a mean
    pool, if there is an activation). Unsupported for what no kernel covers.
    """
    ep.check_supported(block.epilogue)
    target, conv, pooled = target or host(), block.conv, block.pool
    params = ep.parameters(block.epilogue)
    extras = [*params, *(["residual"] if ep.adds_residual(block.epilogue) else [])]
    p = Program(("x", "w", *extras, "out", *saved_names(block, save)))
    x = _read(p, target, p.buffer("x"), x_layout, conv.in_shape, halo_of(conv))
    out = _written(p, p.buffer("out"), out_layout, block.out_shape)
    fields: dict[str, Place | int] = {name: p.buffer(name) for name in params}
    if "residual" in extras:
        residual = Map.dense(p.buffer("residual"), *block.conv_shape[1:])
        fields |= {"residual": residual.place, "residual_image": residual.image,
                   "residual_row": residual.row, "residual_pixel": residual.pixel}  # fmt: skip
    weights = Weights.of(p.buffer("w"), w_strides, conv)
    epilogue, winners = block.epilogue, None
    if "before" in p.names:
        before = Map.dense(p.buffer("before"), *block.conv_shape[1:])
        _convolve(p, target, conv, x, weights, before, epilogue[:-1], **fields)
        _pool(p, target, pooled, before, out, None)
    else:
        if pooled is not None:
            fields |= {"pool_rows": pooled.out_shape[2], "pool_cols": pooled.out_shape[3]}
        if "winners" in p.names:
            winners = Map.dense(p.buffer("winners"), *block.out_shape[1:])
        _convolve(p, target, conv, x, weights, out, epilogue, winners, **fields)
    _deliver(p, target, out, p.buffer("out"), out_layout, block.out_shape)
    return p


def saved_names(block: Block, save: bool = True) -> tuple[str, ...]:
    """What a block's forward pass stores for its backward pass besides its output."""
    pooled, act = block.pool, ep.activation_of(block.epilogue)
    if not save or pooled is None:
        return ()
    if pooled.kind == "max":
        return ("winners",)
    return ("before",) if act.name != "identity" else ()


@functools.lru_cache(PROGRAMS_KEPT)
def backward(
    block: Block,
    grad_layout: str,
    x_layout: str,
    w_strides: tuple[int, int, int, int],
    gx_layout: str,
    result_layout: str,
    needs: tuple[str, ...],
    target: Target | None = None,
) -> Program:
    """The program of a block's backward pass.

    ``needs``: which of x, w, bias, residual get a gradient. Call buffers: grad, x, w, result (the
    activation's, see :func:`saved_names`), winners, and gx, gw (contiguous), gbias, gresidual
    (NHWC) as needed.
    """
    check_trainable(block)
    target, conv, pooled = target or host(), block.conv, block.pool
    act = ep.activation_of(block.epilogue)
    names = ["grad", "x", "w", "result", "winners", *(f"g{n}" for n in needs)]
    p = Program(tuple(names))
    adjoint = conv.grad_input() if "x" in needs else None
    halo = halo_of(adjoint) if adjoint else Halo()
    if pooled is None and act.name == "identity":
        # Its own copy: the weight gradient reads whole vectors, also behind the last channel.
        g = _read(p, target, p.buffer("grad"), grad_layout, block.conv_shape, halo, own=True)
    else:
        g = _undo_epilogue(p, target, block, act, (grad_layout, result_layout), halo)
    if adjoint:
        out = _written(p, p.buffer("gx"), gx_layout, conv.in_shape)
        weights = Weights.of(p.buffer("w"), w_strides, conv).adjoint()
        _convolve(p, target, adjoint, g, weights, out)
        _deliver(p, target, out, p.buffer("gx"), gx_layout, conv.in_shape)
    if "w" in needs or "bias" in needs:
        x = _read(p, target, p.buffer("x"), x_layout, conv.in_shape, halo_of(conv))
        _weight_gradient(p, target, conv, x, g, needs)
    if "residual" in needs:
        _copy_out(p, target, g, p.buffer("gresidual"), block.conv_shape)
    return p


def check_trainable(block: Block) -> None:
    """Unsupported for epilogues whose gradients no kernel computes."""
    ep.check_supported(block.epilogue)
    kinds = [type(step) for step in block.epilogue]
    if Affine in kinds:
        raise Unsupported("the gradient of an affine step: no kernel yet")
    if Act in kinds and Bias in kinds[kinds.index(Act) :]:
        raise Unsupported("the gradient of a bias added after the activation: no kernel yet")
    if Act in kinds and Add in kinds[kinds.index(Act) :]:
        raise Unsupported("the gradient of a residual added after the activation: no kernel yet")


def _undo_epilogue(p, target: Target, block: Block, act: Act, layouts, halo: Halo) -> Map:
    """The gradient of the convolution's output, with a halo, from the block's."""
    conv, pooled = block.conv, block.pool
    grad = _read(p, target, p.buffer("grad"), layouts[0], block.out_shape)
    g, corner = _scratch_map(p, block.conv_shape, halo)
    _, channels, height, width = block.conv_shape
    if not halo.empty:
        p.step(
            copy_kernel(copy.border, target), conv.batch,
            out=corner, out_image=g.image, out_row=g.row, height=height,
            top=halo.top, bottom=halo.bottom, left=halo.left * channels,
            right=halo.right * channels, width_elements=width * channels,
        )  # fmt: skip
    pooling = pooled.step if pooled else None
    _unpool(p, target, pooling, act, block.conv_shape, block.out_shape, grad, g, layouts[1])
    return g


def _unpool(
    p: Program,
    target: Target,
    pooling: Pooling | None,
    act: Act,
    shape: Sequence[int],
    pooled_shape: Sequence[int],
    grad: Map,
    out: Map,
    result_layout: str = NHWC,
) -> None:
    batch, channels, height, width = shape
    _, _, rows, cols = pooled_shape
    plan = pool_backward.PoolBackwardPlan(target, channels, act, pooling)
    fields: dict[str, Place | int] = {}
    if plan.reads_result:
        of = pooled_shape if plan.result_per_window else shape
        result = _read(p, target, p.buffer("result"), result_layout, of)
        fields |= {"result": result.place, "result_image": result.image,
                   "result_row": result.row, "result_pixel": result.pixel}  # fmt: skip
    if pooling and plan.selects:
        fields |= {"winners": p.buffer("winners"), "winners_row": cols * channels,
                   "winners_pixel": channels}  # fmt: skip
    p.step(
        kernel(plan), pool_backward.items(plan, batch, rows),
        grad=grad.place, grad_image=grad.image, grad_row=grad.row, grad_pixel=grad.pixel,
        rows=rows, cols=cols, out=out.place, out_image=out.image, out_row=out.row,
        out_pixel=out.pixel, height=height, width=width, **fields,
    )  # fmt: skip
    p.work += batch * channels * height * width


def _weight_gradient(p: Program, target: Target, conv: Conv, x: Map, g: Map, needs) -> None:
    (rows,), (cols,) = conv.rows.phases(conv.height), conv.cols.phases(conv.width)
    pairs = _Taps(rows, cols).pairs
    channels, out_channels = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    plan = weight_gradient.WeightGradientPlan(
        target, channels, out_channels, cols.stride * x.pixel,
        direct.blocks_for(target, out_channels), "bias" in needs,
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


def _copy_out(p: Program, target: Target, m: Map, place: Place, shape: Sequence[int]) -> None:
    """Copy the interior of a map to a dense NHWC tensor."""
    batch, channels, height, width = shape
    out = Map.dense(place, channels, height, width)
    p.step(
        copy_kernel(copy.pack, target, False), batch * height,
        x=m.place, x_image=m.image, x_row=m.row, x_channel=1,
        out=out.place, out_image=out.image, out_row=out.row,
        height=height, width=width, channels=channels,
        top=0, left=0, right=0, padded_height=height,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- pools


def _pool(p: Program, target: Target, problem: Pool, x: Map, out: Map, winners: Place | None):
    _, channels, rows, cols = problem.out_shape
    fields: dict[str, Place | int] = {}
    if winners is not None:
        fields = {"winners": winners, "winners_row": cols * channels, "winners_pixel": channels}
    p.step(
        kernel(pool.PoolPlan(target, problem.step, channels, winners is not None)),
        problem.batch * rows,
        x=x.place, x_image=x.image, x_row=x.row, x_pixel=x.pixel,
        height=problem.height, width=problem.width,
        out=out.place, out_image=out.image, out_row=out.row, out_pixel=out.pixel,
        rows=rows, cols=cols, **fields,
    )  # fmt: skip
    p.work += problem.batch * channels * problem.height * problem.width


@functools.lru_cache(PROGRAMS_KEPT)
def pool_forward(
    problem: Pool, x_layout: str, out_layout: str, save: bool, target: Target | None = None
) -> Program:
    """The program of a pooling layer. Call buffers: x, out, and winners if ``save`` (max)."""
    target = target or host()
    keeps = save and problem.kind == "max"
    p = Program(("x", "out", *(("winners",) if keeps else ())))
    x = _read(p, target, p.buffer("x"), x_layout, problem.in_shape)
    out = _written(p, p.buffer("out"), out_layout, problem.out_shape)
    _pool(p, target, problem, x, out, p.buffer("winners") if keeps else None)
    _deliver(p, target, out, p.buffer("out"), out_layout, problem.out_shape)
    return p


@functools.lru_cache(PROGRAMS_KEPT)
def pool_backward_program(
    problem: Pool, grad_layout: str, gx_layout: str, target: Target | None = None
) -> Program:
    """The program of a pooling layer's gradient. Call buffers: grad, winners, gx."""
    target = target or host()
    p = Program(("grad", "winners", "gx"))
    grad = _read(p, target, p.buffer("grad"), grad_layout, problem.out_shape)
    out = _written(p, p.buffer("gx"), gx_layout, problem.in_shape)
    act = Act("identity")
    _unpool(p, target, problem.step, act, problem.in_shape, problem.out_shape, grad, out)
    _deliver(p, target, out, p.buffer("gx"), gx_layout, problem.in_shape)
    return p
