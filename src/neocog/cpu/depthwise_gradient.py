"""The gradient of a depthwise convolution with respect to its weights: channels in the lanes.

    dw[kh][kw][c] = sum over images, y, x of  in[y*SY + kh*DY][x*SX + kw*DX][c] * grad[y][x][c]

Nothing is shared between channels, so that the time goes into loading the two maps. A register tile
holds R rows x MR pixels of the gradient of one vector of channels and the sums of all taps; every
input vector beneath it is loaded once:

    for v in vectors of channels:
        for each input column j and row i under the tile:
            x = in[i][j][v]
            for (r, kh) with r*SY + kh*DY == i:  for (p, kw) with p*SX + kw*DX == j:
                sum[kh][kw] += x * grad[r][p][v]

Channels are the inner loop, as in :mod:`neocog.cpu.depthwise`: both maps are read as they lie in
memory. The sums wait in a cache between two tiles. Kernels with more taps than registers are cut
into pieces, which pass over the tile one after the other.

Work items: chunks of groups of R rows, counted over all images, x parts of the channels. Each
chunk has partial results of its own, added in order afterwards (``copy.unpack_weights``): the
result has the same bits on any number of threads.

Partial results: [chunk][vector][tap][lanes], the taps piece by piece; bias [chunk][vector][lanes].
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

from llvmlite import ir

from ..problem import Conv
from ..target import Target
from .ahead import LARGE, Ahead, pays
from .lanes import I64, PTR, Emitter, Int
from .runtime import Kernel, compile_kernel
from .tiling import Reads, even_sizes

HEIGHT = 2
"""R: two rows share most of the input beneath them."""

WIDTH = 4
"""MR at most. Wider tiles load and store the sums less often, but wait longer for memory (up to 1.7
times, measured)."""

Axes = tuple[int, int]
"""(rows, columns)."""


@dataclass(frozen=True)
class Piece:
    """Some taps of the kernel: ``size`` of them from tap ``first`` on."""

    first: Axes
    size: Axes

    @property
    def taps(self) -> list[Axes]:
        """(kh, kw) in the order of its sums."""
        (kh, kw), (rows, cols) = self.first, self.size
        return [(kh + i, kw + j) for i in range(rows) for j in range(cols)]


@dataclass(frozen=True)
class DepthwiseGradientPlan:
    """Everything the kernel is specialised on."""

    target: Target
    size: Axes
    stride: Axes
    dilation: Axes
    heights: tuple[int, ...]
    """Rows of the register tiles: R, then what the last group of rows has, if less."""
    tiles: tuple[int, ...]
    """Pixels of the register tiles: one size, or two neighbouring ones (``tiling.even_sizes``)."""
    tail: bool
    """Whether the last vector of channels is partly empty."""
    bias: bool
    """Whether the gradient of the bias is summed too."""
    large: bool
    """Whether the maps are larger than the second cache: memory is asked for ahead of time."""

    @property
    def name(self) -> str:
        """A name for the listing."""
        kernel = f"{self.size[0]}x{self.size[1]}s{self.stride[0]}x{self.stride[1]}"
        tile = f"{self.heights[0]}x{self.tiles[0]}v{self.target.lanes}"
        return f"depthwise_gradient_{kernel}_{tile}{'+bias' if self.bias else ''}"

    @property
    def pieces(self) -> list[Piece]:
        """The kernel in pieces whose sums fit the registers."""
        rows, cols = _piece_size(self.target, self.size)
        return [
            Piece((kh, kw), (min(rows, self.size[0] - kh), min(cols, self.size[1] - kw)))
            for kh in range(0, self.size[0], rows)
            for kw in range(0, self.size[1], cols)
        ]

    @property
    def order(self) -> list[Axes]:
        """The taps (kh, kw) as the partial results have them."""
        return [tap for piece in self.pieces for tap in piece.taps]


def _piece_size(target: Target, size: Axes) -> Axes:
    sums = _sums(target)
    cols = min(size[1], sums)
    return max(1, min(size[0], sums // cols)), cols


def _sums(target: Target) -> int:
    return max(blocks * pixels for blocks, pixels in target.tiles)


def plan_for(target: Target, conv: Conv, bias: bool) -> DepthwiseGradientPlan:
    """The plan for a depthwise ``conv`` without base dilation."""
    *_, rows, cols = conv.out_shape
    taps_high, taps_wide = _piece_size(target, (conv.rows.size, conv.cols.size))
    # What each row more keeps: the gradients that the columns of taps reach.
    fits = (taps_high + HEIGHT) * taps_wide <= _sums(target) * 5 // 4
    height = min(HEIGHT if fits else 1, rows)
    rest = rows % height
    return DepthwiseGradientPlan(
        target=target,
        size=(conv.rows.size, conv.cols.size),
        stride=(conv.rows.stride, conv.cols.stride),
        dilation=(conv.rows.dilation, conv.cols.dilation),
        heights=(height, rest) if rest else (height,),
        tiles=even_sizes(cols, WIDTH),
        tail=conv.out_channels % target.lanes > 0,
        bias=bias,
        large=pays(
            math.prod(conv.in_shape) + math.prod(conv.out_shape), conv.rows.stride, conv.cols.stride
        ),
    )


def for_any_size(plan: DepthwiseGradientPlan) -> DepthwiseGradientPlan:
    """The plan that does the same for maps of every size: a row at a time, the rest in pixels."""
    large = pays(LARGE + 1, *plan.stride)
    return replace(plan, heights=(1,), tiles=(WIDTH, 1), large=large)


def fields(plan: DepthwiseGradientPlan) -> tuple[str, ...]:
    """What a step of this plan passes. Offsets, strides and channels count in elements.

    ``groups`` of R rows make an image, of which there are ``batch``; ``chunk_groups`` make a chunk,
    ``part`` channels a part, of which there are ``parts``; ``tiles`` cover a row, the first
    ``wide`` of them of the larger size.
    """
    names = (
        "x*", "x_image", "x_row", "x_pixel", "grad*", "grad_image", "grad_row", "grad_pixel",
        "partial*", "chunk_step", "chunk_groups", "groups", "batch", "channels", "part", "parts",
        "tiles", "wide",
    )  # fmt: skip
    return names + (("bias*", "bias_step") if plan.bias else ())


def emit(plan: DepthwiseGradientPlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    functions = _Functions(e, plan)
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, _):
        e.loop(begin, end, lambda item: _item(e, plan, functions, f, item))
    return compile_kernel(e, names)


def _item(
    e: Emitter, plan: DepthwiseGradientPlan, functions: _Functions, f: SimpleNamespace, item: Int
) -> None:
    """One part of the channels in one chunk of the groups of rows."""
    chunk, part = e.divmod(item, f.parts)
    channel = e.mul(part, f.part)
    count = e.min(e.sub(f.channels, channel), f.part)
    padded = e.mul(e.divmod(e.add(count, e.lanes - 1), e.lanes)[0], e.lanes)
    taps = plan.size[0] * plan.size[1]
    sums = e.at(f.partial, e.add(e.mul(chunk, f.chunk_step), e.mul(channel, taps)))
    e.zero_fill(sums, e.mul(padded, taps))
    results = [sums]
    if plan.bias:
        results.append(e.at(f.bias, e.add(e.mul(chunk, f.bias_step), channel)))
        e.zero_fill(results[1], padded)
    x, grad = e.at(f.x, channel), e.at(f.grad, channel)

    def visit(number: Int) -> None:
        image, group = e.divmod(number, f.groups)
        row = e.mul(group, plan.heights[0])
        x_row = e.mul(row, plan.stride[0])
        x_here = e.at(x, e.add(e.mul(image, f.x_image), e.mul(x_row, f.x_row)))
        grad_here = e.at(grad, e.add(e.mul(image, f.grad_image), e.mul(row, f.grad_row)))

        def tiles_of(height: int) -> None:
            def run(size: int, pixel: Int) -> None:
                x_pixel = e.mul(e.mul(pixel, plan.stride[1]), f.x_pixel)
                args = [e.at(x_here, x_pixel), e.at(grad_here, e.mul(pixel, f.grad_pixel))]
                strides = [f.x_row, f.x_pixel, f.grad_row, f.grad_pixel]
                functions.call((height, size), [*args, *results], [count, *strides])

            wide = e.mul(f.wide, plan.tiles[0])
            stop = e.add(wide, e.mul(e.sub(f.tiles, f.wide), plan.tiles[-1]))
            bounds = [I64(0), wide, stop]
            for size, first, last in zip(plan.tiles, bounds, bounds[1:], strict=False):
                e.loop(first, last, lambda at, size=size: run(size, at), step=size)

        whole, last = plan.heights[0], plan.heights[-1]
        if whole == last:
            tiles_of(whole)
            return
        ends = e.equal(e.add(group, 1), f.groups)
        e.choose(ends, lambda: tiles_of(last), lambda: tiles_of(whole))

    first = e.mul(chunk, f.chunk_groups)
    total = e.mul(f.batch, f.groups)
    e.loop(first, e.min(e.add(first, f.chunk_groups), total), visit)


class _Functions:
    """One function per register tile and size of a piece; equal ones are compiled once."""

    def __init__(self, e: Emitter, plan: DepthwiseGradientPlan):
        self.e, self.plan = e, plan
        kinds = dict.fromkeys((piece.size, first) for piece, first in self.pieces)
        self.made = {
            (tile, *kind): self._tile(tile, *kind)
            for tile in itertools.product(plan.heights, plan.tiles)
            for kind in kinds
        }

    @property
    def pieces(self) -> list[tuple[Piece, bool]]:
        """Each piece, and whether it is the first one: the bias is summed with it."""
        return [(piece, n == 0) for n, piece in enumerate(self.plan.pieces)]

    def call(self, tile: Axes, pointers: list[ir.Value], integers: list[ir.Value]) -> None:
        """Add one tile to the sums: (x, grad, sums, bias), (channels, strides)."""
        e, plan, done = self.e, self.plan, 0
        x, grad, sums, *bias = pointers
        _, x_row, x_pixel, *_ = integers
        for piece, first in self.pieces:
            kh, kw = piece.first
            down, right = e.mul(x_row, kh * plan.dilation[0]), e.mul(x_pixel, kw * plan.dilation[1])
            args = [x if first else e.at(x, e.add(down, right)), grad, e.at(sums, done * e.lanes)]
            args += bias if first else []
            e.b.call(self.made[tile, piece.size, first], [*args, *integers])
            done += len(piece.taps)

    def _tile(self, size: Axes, piece: Axes, first: bool) -> ir.Function:
        e, plan = self.e, self.plan
        name = f"tile_{size[0]}x{size[1]}_{piece[0]}x{piece[1]}{'_first' if first else ''}"
        pointers = ["x", "grad", "sums", *(["bias"] if first and plan.bias else [])]
        integers = ["channels", "x_row", "x_pixel", "grad_row", "grad_pixel"]
        kinds = [PTR] * len(pointers) + [I64] * len(integers)
        with e.function(name, kinds) as (fn, args):
            a = SimpleNamespace(**dict(zip([*pointers, *integers], args, strict=True)))
            tile = _Tile(e, plan, a, size, piece, first and plan.large)
            whole: Int = a.channels
            if plan.tail:  # all parts but the last have whole vectors
                rest = e.divmod(a.channels, e.lanes)[1]
                whole = e.sub(a.channels, rest)
            e.loop(0, whole, lambda c: tile.vector(c, None), step=e.lanes)
            if plan.tail:
                e.choose(e.less(0, rest), lambda: tile.vector(whole, e.lane_mask(rest)))
        return fn


class _Tile:
    """The register tile of one function."""

    def __init__(
        self,
        e: Emitter,
        plan: DepthwiseGradientPlan,
        a: SimpleNamespace,
        tile: Axes,
        piece: Axes,
        asks: bool,
    ):
        self.e, self.a, self.piece = e, a, piece
        self.stride_of_sums = plan.size[0] * plan.size[1]
        self.row_taps, self.col_taps = (
            Reads((tuple((k, k * dilation) for k in range(taps)),), stride).reached(outputs)
            for outputs, taps, stride, dilation in zip(
                tile, piece, plan.stride, plan.dilation, strict=True
            )
        )
        # Row pointers and column offsets stay in integer registers: a load adds two of them.
        self.rows = {i: e.at(a.x, e.mul(a.x_row, i)) for i in self.row_taps}
        self.cols = {j: e.mul(a.x_pixel, j) for j in self.col_taps}
        self.grad_rows = [e.at(a.grad, e.mul(a.grad_row, r)) for r in range(tile[0])]
        self.grad_cols = [e.mul(a.grad_pixel, p) for p in range(tile[1])]
        self.ahead: list[Ahead] = []
        if asks:
            (height, width), (down, right) = tile, plan.stride
            below = (height - 1) * down + (plan.size[0] - 1) * plan.dilation[0] + 1
            x_rows = [e.at(a.x, e.mul(a.x_row, below + i)) for i in range(height * down)]
            grad_rows = [e.at(a.grad, e.mul(a.grad_row, height + r)) for r in range(height)]
            self.ahead = [Ahead(e, x_rows, width * right), Ahead(e, grad_rows, width)]

    def vector(self, c: Int, mask: ir.Value | None) -> None:
        """Add all rows and pixels of the tile for the channels from ``c`` on."""
        e, bias = self.e, getattr(self.a, "bias", None)
        to = e.at(self.a.sums, e.mul(c, self.stride_of_sums))
        count = self.piece[0] * self.piece[1]
        sums = [e.vload(to, t * e.lanes) for t in range(count)]
        total = None if bias is None else e.vload(e.at(bias, c))
        grads: dict[Axes, ir.Value] = {}

        def grad(r: int, p: int) -> ir.Value:
            nonlocal total
            if (r, p) not in grads:
                value = e.vload(e.at(self.grad_rows[r], c), self.grad_cols[p], mask)
                grads[r, p] = value
                total = None if total is None else e.b.fadd(total, value)
            return grads[r, p]

        for turn, (j, col_taps) in enumerate(self.col_taps.items()):
            for ahead in self.ahead:
                ahead.ask(c, turn, len(self.col_taps))
            for i, row_taps in self.row_taps.items():
                x = e.vload(e.at(self.rows[i], c), self.cols[j], mask)
                for r, kh in row_taps:
                    for p, kw in col_taps:
                        at = kh * self.piece[1] + kw
                        sums[at] = e.fma(x, grad(r, p), sums[at])
        for t, value in enumerate(sums):
            e.vstore(value, to, t * e.lanes)
        if total is not None:
            e.vstore(total, e.at(bias, c))
