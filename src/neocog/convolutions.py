"""The steps of a convolution and of its weight gradient, inside a program.

:func:`convolve` serves forward and backward: the gradient with respect to the input is a
convolution with a base dilation, which falls apart into phases, each a dense convolution of some
of the taps (:meth:`neocog.geometry.Window.phases`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from . import depthwise_steps
from .cpu import copy, direct, elementwise
from .cpu.tiling import all_sizes, best_blocks, cover, even_sizes, most_pixels
from .geometry import Phase
from .kernels import copy_kernel, kernel, serves_any_size
from .maps import Map, clear, residual_map
from .problem import Add, Block, Conv, Pool, Step
from .program import Place, Program
from .target import Target

PANEL = 1 << 17
"""float32 elements that stay in a core's second cache while others pass through it."""

CHUNK = 1 << 14
"""float32 elements of weights, or of input, that are worth one visit."""

SUMS = 1 << 14
"""float32 elements of the sums that wait in scratch while chunks are added."""

SHORT = 64
"""Products in a row that short sums add up before they are added themselves."""

NARROW = 4
"""An input is narrow if the output has more than this many times its channels."""

SHARING = 7
"""Tiles that use a chunk of weights before the next is worth fetching."""

ITEMS = 16
"""Work items a step is cut into at least, if it can be: enough for the threads to share."""

PARTS = 2
"""Parts of its pixels that a layer is done in, one after the other: two threads get one each."""


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
class Taps:
    """One pair of phases: where its outputs stand and what they read."""

    rows: Phase
    cols: Phase

    @property
    def pairs(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """((kh, kw), (row offset, column offset)) in kernel order."""
        return [((kh, kw), (y, x)) for kh, y in self.rows.taps for kw, x in self.cols.taps]


@dataclass(frozen=True)
class Loops:
    """The loops over the outputs of a phase, and what a step of each is in every map."""

    batch: int
    rows: int
    cols: int
    steps: tuple[tuple[int, int, int], ...]
    """(image, row, pixel) in elements: of the input, of the output, of the residual."""

    @classmethod
    def of(cls, conv: Conv, phase: Taps, x: Map, *written: Map) -> Loops:
        """As the maps lie."""
        rows, cols = phase.rows, phase.cols
        steps = [(x.image, rows.stride * x.row, cols.stride * x.pixel)]
        steps += [(m.image, rows.step * m.row, cols.step * m.pixel) for m in written]
        return cls(conv.batch, rows.count, cols.count, tuple(steps))

    def merged(self) -> Loops:
        """The same outputs in fewer, longer rows, where no map has a gap between two of them.

        Tiles end with their row: rows of 7 pixels, or of 1, would waste much of them. All pixels
        of a 1x1 convolution on dense maps are one row; of a linear layer, all images are.
        """
        found: list[tuple[int, tuple[int, ...]]] = []
        counts = (self.batch, self.rows, self.cols)
        for count, *steps in reversed(list(zip(counts, *self.steps, strict=True))):
            inner = found[-1] if found else None
            if count == 1:
                continue
            if inner and all(s == inner[0] * t for s, t in zip(steps, inner[1], strict=True)):
                found[-1] = (count * inner[0], inner[1])
            else:
                found.append((count, tuple(steps)))
        while len(found) < 3:
            found.append((1, tuple(s[2] for s in self.steps)))
        (cols, _), (rows, _), (batch, _) = found
        steps = zip(*(step for _, step in reversed(found)), strict=True)
        return Loops(batch, rows, cols, tuple((a, b, c) for a, b, c in steps))

    def fields(self) -> dict[str, Place | int]:
        """What a direct kernel wants to know."""
        fields: dict[str, Place | int] = {"batch": self.batch, "rows": self.rows}
        for name, (image, row, pixel) in zip(("x", "out", "residual"), self.steps, strict=False):
            fields |= {f"{name}_image": image, f"{name}_row": row, f"{name}_pixel": pixel}
        del fields["x_pixel"]  # the plan's
        return fields


def is_depthwise(conv: Conv) -> bool:
    """One channel per group, in and out: channels can stay in the lanes."""
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


def plan_of(
    target: Target, conv: Conv, epilogue: tuple[Step, ...] = (), winners: bool = False
) -> direct.DirectPlan:
    """The plan of the direct kernel for ``conv`` that serves maps of every size."""
    x = Map.dense(Place(0), *conv.in_shape[1:])
    loops = [Loops.of(conv, phase, x) for phase in _phases(conv)]
    return _plan(target, conv, loops, epilogue, winners, any_size=True)


def _plan(
    target: Target,
    conv: Conv,
    loops: Sequence[Loops],
    epilogue: tuple[Step, ...],
    winners: bool,
    any_size: bool,
) -> direct.DirectPlan:
    """The plan that serves all phases of ``conv``, looped over as ``loops`` say."""
    lanewise, pooled = is_depthwise(conv), Block(conv, epilogue).pool
    groups = _groups(conv)
    channels, out_channels = conv.in_channels // groups, conv.out_channels // groups
    if lanewise:
        channels = 1
    blocks = 1 if lanewise else best_blocks(target, out_channels)
    width = blocks * target.lanes
    sizes = all_sizes(most_pixels(target, blocks, target.lanes if lanewise else channels))
    many = True
    if not any_size:
        sizes = even_sizes(max(one.cols for one in loops), sizes[0])
        if len(loops) > 1 and sizes[0] > 1:  # phases may differ by a pixel
            sizes = (sizes[0], sizes[0] - 1)
        tiles = max(one.batch * one.rows * -(-one.cols // sizes[0]) for one in loops)
        many = tiles >= SHARING
    chunk = 0
    panel = max(len(p.pairs) for p in _phases(conv)) * channels * width
    if panel > PANEL and pooled is None and channels % direct.UNROLL == 0:
        chunk = _chunk(channels, width, CHUNK if many else PANEL)
    return direct.DirectPlan(
        target=target,
        channels=channels,
        out_channels=out_channels,
        pixel_step=loops[0].steps[0][2],
        blocks=blocks,
        tiles=sizes,
        epilogue=epilogue,
        depthwise=lanewise,
        winners=winners,
        chunk=chunk,
    )


def _chunk(channels: int, width: int, elements: int) -> int:
    """Input channels per chunk: chunks of about equal size, none much above ``elements``."""
    count = -(-channels * width // elements)
    return -(-channels // (count * direct.UNROLL)) * direct.UNROLL


def shortens(conv: Conv, epilogue: tuple[Step, ...] = ()) -> bool:
    """Whether the sums of ``conv`` are long, and can be cut short."""
    channels = conv.in_channels // conv.groups
    long = channels * conv.rows.size * conv.cols.size > 2 * SHORT
    return long and channels % direct.UNROLL == 0 and Block(conv, epilogue).pool is None


def packed_elements(target: Target, conv: Conv) -> int:
    """float32 elements of the packed weights of ``conv``."""
    plan = plan_of(target, conv)
    taps = sum(len(phase.pairs) for phase in _phases(conv))
    return _groups(conv) * plan.blocks_per_group * taps * plan.channels * plan.width


def pack(p: Program, target: Target, conv: Conv, weights: Weights, packed: Place) -> None:
    """The step that brings weights into the order the kernel of ``conv`` reads.

    The order depends on the target, the channels and the windows of ``conv``; on no other size, nor
    on the epilogue or the maps: weights that do not change are packed once.
    """
    taps = [weights.tap(conv, *tap) for phase in _phases(conv) for tap, _ in phase.pairs]
    _pack_weights(p, target, plan_of(target, conv), weights, taps, packed, _groups(conv))


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
    """The steps of one convolution on weights that may change: pack them, then compute."""
    packed = p.scratch(packed_elements(target, conv))
    pack(p, target, conv, weights, packed)
    convolve_packed(p, target, conv, x, packed, out, epilogue, winners, extra, any_size=True)


def convolve_packed(
    p: Program,
    target: Target,
    conv: Conv,
    x: Map,
    packed: Place,
    out: Map,
    epilogue: tuple[Step, ...] = (),
    winners: Map | None = None,
    extra: Mapping[str, Place | int] = MappingProxyType({}),
    any_size: bool = False,
    plane: int = 0,
    short: bool = False,
) -> None:
    """The steps of one convolution with its epilogue, phase by phase, on packed weights.

    ``extra``: the places of the epilogue's parameters and residual, which may be the output's.
    ``any_size``: with kernels that serve maps of every size, instead of faster ones that are
    compiled for widths like this one. ``plane``: elements between the channels of ``x``, where they
    are planes (NCHW, for few channels); each channel of a tap then counts as a tap of its own.
    ``short``: where :func:`shortens` allows, sums of at most ``SHORT`` products are added up, which
    rounds less than one long sum.
    """
    pooled, phases = Block(conv, epilogue).pool, _phases(conv)
    if plane and is_depthwise(conv):
        raise ValueError(f"plane: a depthwise layer reads neighbouring channels at once\n{conv}")
    if is_depthwise(conv) and pooled is None and not any_size and conv.batch:
        made = depthwise_steps.convolve(
            p, target, conv, x, packed, out, epilogue, extra,
            lambda: kernel(plan_of(target, conv, epilogue)),
        )  # fmt: skip
        if made:
            return
        any_size = depthwise_steps.covers(conv)
    residual = {"residual": residual_map(extra)} if "residual" in extra else {}
    maps = (x, out, *residual.values())
    kind = (epilogue, winners is not None, bool(plane), short)
    plan, loops = _planned(target, conv, maps, kind, any_size)
    if not any_size:
        whole, other = _planned(target, conv, maps, kind, True)
        if serves_any_size(plan, lambda: _prepare(target, conv, whole)):
            plan, loops = whole, other
    channels = conv.in_channels // _groups(conv) if not plan.depthwise else 1
    blocks, tap_size = _groups(conv) * plan.blocks_per_group, plan.channels * plan.width
    planes = [c * plane for c in range(channels // plan.channels)]
    taps, done = sum(len(phase.pairs) for phase in phases) * len(planes), 0
    empty = _leave_empty(p, target, conv, phases, out, epilogue, extra)
    for phase, loop in zip(phases, loops, strict=True):
        if empty and not phase.pairs:
            continue
        offsets = [y * x.row + ox * x.pixel + c for _, (y, ox) in phase.pairs for c in planes]
        fields = {
            "x": x.place, "x_group": channels * (plane or 1),
            "w": packed + done * tap_size, "w_block": taps * tap_size,
            "taps": p.constant(offsets), "n_taps": len(offsets),
            **extra, **_starts(phase, out=out, **residual),
            **loop.fields(), **_tile_fields(p, plan.tiles, loop.cols),
        }  # fmt: skip
        if pooled is not None:
            fields |= {"cols": loop.cols}
            fields |= winners.fields("winners") if winners is not None else {}
            _pooled_step(p, plan, fields, blocks, pooled)
        else:
            _share_out(p, plan, fields, blocks, taps)
        done += len(offsets)
    p.work += conv.multiply_adds


def _planned(
    target: Target, conv: Conv, maps: Sequence[Map],
    kind: tuple[tuple[Step, ...], bool, bool, bool], any_size: bool,
) -> tuple[direct.DirectPlan, list[Loops]]:  # fmt: skip
    """The plan of a direct convolution, and the loops of its phases over the maps it touches.

    ``kind``: the epilogue, whether winners are kept, planes read, sums cut short.
    """
    epilogue, winners, planes, short = kind
    loops = [Loops.of(conv, phase, *maps) for phase in _phases(conv)]
    if Block(conv, epilogue).pool is None and len(loops) == 1:
        merged = loops[0].merged()
        # Images that stand in for pixels are a step apart that depends on the size of the map.
        loops = loops if any_size and merged.steps[0][2] != loops[0].steps[0][2] else [merged]
    plan = _plan(target, conv, loops, epilogue, winners, any_size)
    if planes:
        plan = replace(plan, channels=1, chunk=0)
    elif short:
        plan = replace(plan, chunk=min(plan.channels, SHORT))
    return plan, loops


def _prepare(target: Target, conv: Conv, plan: direct.DirectPlan) -> None:
    """Compile what a layer may need for maps of other sizes."""
    kernel(plan)
    kernel(elementwise.ElementwisePlan(target, conv.in_channels, "copy"))  # in bands


def _leave_empty(
    p: Program, target: Target, conv: Conv, phases: Sequence[Taps], out: Map,
    epilogue: tuple[Step, ...], extra: Mapping[str, Place | int],
) -> bool:  # fmt: skip
    """Whether phases without taps need no step: nothing is added there, or all is cleared here."""
    if all(phase.pairs for phase in phases):
        return False
    if epilogue == (Add(),) and extra.get("residual") == out.place:
        return True
    if epilogue or out.pixel != conv.out_channels:
        return False
    clear(p, target, out, conv.out_shape)
    return True


def _tile_fields(p: Program, sizes: tuple[int, ...], cols: int) -> dict[str, Place | int]:
    """How a row of ``cols`` pixels falls into tiles."""
    wide, tail = cover(cols, sizes)
    entries, start = [], wide * sizes[0]
    for size in tail:
        entries += [start, sizes.index(size)]
        start += size
    return {"tiles": wide + len(tail), "wide": wide, "tail": p.constant(entries)}


def _starts(phase: Taps, **maps: Map) -> dict[str, Place | int]:
    """The places of a phase's first output in the maps."""
    row, col = phase.rows.start, phase.cols.start
    return {name: m.place + (row * m.row + col * m.pixel) for name, m in maps.items()}


def _pooled_step(
    p: Program, plan: direct.DirectPlan, fields: dict[str, Any], blocks: int, pooled: Pool
) -> None:
    _, _, rows, cols = pooled.out_shape
    items = blocks * pooled.batch * rows
    step = p.step(kernel(plan), items, pool_rows=rows, pool_cols=cols, **fields)
    p.thread_scratch(step, "scratch", direct.scratch_rows(plan) * fields["cols"] * plan.width)


def _share_out(
    p: Program, plan: direct.DirectPlan, fields: dict[str, Any], blocks: int, taps: int
) -> None:
    """The step of an unpooled convolution: how many tiles make a work item, and in what order."""
    total = fields["batch"] * fields["rows"] * fields["tiles"]
    if plan.chunk:  # as many as use a chunk well, but items for several threads
        most, least = max(1, SUMS // (plan.tiles[0] * plan.width)), SHARING
    else:
        most, least = max(1, min(8, CHUNK // (plan.tiles[0] * plan.channels))), 1
    small = blocks * taps * plan.channels * plan.width <= PANEL
    # Reading a narrow input once per block costs less than writing all blocks' outputs in turn.
    narrow = NARROW * plan.channels < plan.out_channels
    together = blocks if small and not (narrow or plan.chunk) and total >= ITEMS else 1
    blocks //= together
    runs = max(-(-total // most), min(total // least, -(-ITEMS // blocks)), 1)
    run = max(1, -(-total // runs))
    # Where each thread has pixels of its own, it reads what it wrote itself a layer before.
    parts = PARTS if small and not plan.chunk else 1
    part_tiles = max(1, -(-total // parts))
    runs = -(-part_tiles // run)
    run = -(-part_tiles // runs)
    fields |= {"run": run, "runs": runs, "part": blocks * runs, "part_tiles": part_tiles}
    if not plan.chunk:
        fields["blocks"] = together
    step = p.step(kernel(plan), parts * blocks * runs if total else 0, **fields)
    if plan.chunk:
        p.thread_scratch(step, "sums", run * plan.tiles[0] * plan.width)


def _phases(conv: Conv) -> list[Taps]:
    rows, cols = conv.rows.phases(conv.height), conv.cols.phases(conv.width)
    return [Taps(r, c) for r in rows for c in cols]


def _groups(conv: Conv) -> int:
    return 1 if is_depthwise(conv) else conv.groups


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
