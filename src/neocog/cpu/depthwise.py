"""Depthwise convolution: one channel per group in and out, channels in the lanes.

    out[y][x][c] = epilogue(sum over kh, kw of  in[y*SY + kh*DY][x*SX + kw*DX][c] * w[kh][kw][c])

Nine multiply-adds per output leave no time to load an input for each of them. The register tile
holds R output rows x MR pixels of one vector of channels; every input vector that it needs is
loaded once and multiplied with all taps that reach it from within the tile:

    for v in vectors of channels:
        for each input row i and column j under the tile:
            x = in[i][j][v]
            for (r, kh) with r*SY + kh*DY == i:  for (p, kw) with p*SX + kw*DX == j:
                acc[r][p] += x * w[kh][kw][v]

It is made for: kernel size, stride, dilation, register tiles, epilogue, and whether the last vector
is partly empty. Channels and every stride of the maps arrive at run time: one kernel serves all
layers of a network that look alike.

Input: NHWC with its halo. Weights: [vector][tap][lanes], as ``copy.pack_weights`` with NB = 1
brings them. Work items: images x groups of R rows. (Pools and gradients of strided layers go
through :mod:`neocog.cpu.direct`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..problem import Conv
from ..steps import Bias, Step
from ..target import Target
from . import epilogue as ep
from .lanes import I64, PTR, Emitter, Int
from .runtime import Kernel, compile_kernel
from .tiling import even_sizes

HEIGHT = 2
"""R: more rows would read each input less often, but weights and sums fill the registers."""

KEPT_TAPS = 9
"""Weights of this many taps stay in registers, beside the sums."""

WIDE, NARROW_TILE = 28, 4
"""From rows of WIDE pixels on, tiles have NARROW_TILE at most. Such rows come from a distant cache,
which serves the few long runs of a narrow tile faster (up to 1.3 times, measured)."""

Axes = tuple[int, int]
"""(rows, columns)."""


@dataclass(frozen=True)
class DepthwisePlan:
    """Everything a depthwise kernel is specialised on."""

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
    epilogue: tuple[Step, ...] = ()

    @property
    def name(self) -> str:
        """A name for the listing."""
        kernel = f"{self.size[0]}x{self.size[1]}s{self.stride[0]}x{self.stride[1]}"
        tile = f"{self.heights[0]}x{self.tiles[0]}v{self.target.lanes}"
        return f"depthwise_{kernel}_{tile}{ep.spelled(self.epilogue)}"


def plan_for(target: Target, conv: Conv, size: Axes, epilogue: tuple[Step, ...]) -> DepthwisePlan:
    """The plan for a depthwise ``conv`` without base dilation and with outputs of ``size``."""
    height, taps = min(HEIGHT, size[0]), conv.rows.size * conv.cols.size
    rest = size[0] % height
    return DepthwisePlan(
        target=target,
        size=(conv.rows.size, conv.cols.size),
        stride=(conv.rows.stride, conv.cols.stride),
        dilation=(conv.rows.dilation, conv.cols.dilation),
        heights=(height, rest) if rest else (height,),
        tiles=even_sizes(size[1], _most_pixels(target, taps, height, size[1])),
        tail=conv.out_channels % target.lanes > 0,
        epilogue=epilogue,
    )


def _most_pixels(target: Target, taps: int, height: int, cols: int) -> int:
    """MR for tiles of ``height`` rows: their sums fit the registers, as do few weights."""
    limit, sums = target.pixels(1), max(blocks * pixels for blocks, pixels in target.tiles)
    if taps <= KEPT_TAPS:
        limit = max(2 * height, min(limit, sums - taps))
    limit = max(1, limit // height)
    return min(limit, NARROW_TILE) if cols >= WIDE else limit


def fields(plan: DepthwisePlan) -> tuple[str, ...]:
    """What a step of this plan passes. Offsets and strides count in elements.

    ``groups`` of R rows make an image; ``tiles`` cover a row, the first ``wide`` of them of the
    larger size.
    """
    names = [
        "x*", "x_image", "x_row", "x_pixel", "w*", "out*", "out_image", "out_row", "out_pixel",
        "channels", "groups", "tiles", "wide",
    ]  # fmt: skip
    names += [f"{p}*" for p in ep.parameters(plan.epilogue)]
    if ep.adds_residual(plan.epilogue):
        names += ["residual*", "residual_image", "residual_row", "residual_pixel"]
    return tuple(names)


def emit(plan: DepthwisePlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    functions = {h: [_tile_function(e, plan, h, n) for n in plan.tiles] for h in plan.heights}
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, _):
        e.loop(begin, end, lambda item: _item(e, plan, functions, f, item))
    return compile_kernel(e, names)


def _item(e: Emitter, plan: DepthwisePlan, functions, f: SimpleNamespace, item) -> None:
    """One group of rows."""
    image, group = e.divmod(item, f.groups)
    row = e.mul(group, plan.heights[0])

    def start(name: str, stride: int = 1) -> ir.Value:
        at_image = e.mul(image, getattr(f, f"{name}_image"))
        at_row = e.mul(e.mul(row, stride), getattr(f, f"{name}_row"))
        return e.at(getattr(f, name), e.add(at_image, at_row))

    maps = {"x": start("x", plan.stride[0]), "out": start("out")}
    if ep.adds_residual(plan.epilogue):
        maps["residual"] = start("residual")

    def tiles_of(height: int) -> None:
        def run(function: ir.Function, pixel: Int) -> None:
            args = [f.w, f.channels]
            for name, pointer in maps.items():
                step = e.mul(plan.stride[1], pixel) if name == "x" else pixel
                stride = getattr(f, f"{name}_pixel")
                args += [e.at(pointer, e.mul(step, stride)), getattr(f, f"{name}_row"), stride]
            args += [getattr(f, name) for name in ep.parameters(plan.epilogue)]
            e.b.call(function, args)

        wide = e.mul(f.wide, plan.tiles[0])
        sizes = [(plan.tiles[0], I64(0), wide)]
        if len(plan.tiles) == 2:
            rest = e.mul(e.sub(f.tiles, f.wide), plan.tiles[1])
            sizes.append((plan.tiles[1], wide, e.add(wide, rest)))
        for function, (size, first, stop) in zip(functions[height], sizes, strict=True):
            e.loop(first, stop, lambda at, fn=function: run(fn, at), step=size)

    whole, last = plan.heights[0], plan.heights[-1]
    if whole == last:
        tiles_of(whole)
        return
    ends = e.equal(e.add(group, 1), f.groups)
    e.choose(ends, lambda: tiles_of(last), lambda: tiles_of(whole))


def _tile_function(e: Emitter, plan: DepthwisePlan, height: int, pixels: int) -> ir.Function:
    """tile(w, channels, (pointer, row, pixel) of x, out and residual, parameters...)."""
    names = ["w", "channels"]
    for name in ("x", "out", *(("residual",) if ep.adds_residual(plan.epilogue) else ())):
        names += [name, f"{name}_row", f"{name}_pixel"]
    names += ep.parameters(plan.epilogue)
    integers = ("channels", "_row", "_pixel")
    kinds = [I64 if name.endswith(integers) else PTR for name in names]
    with e.function(f"tile_{height}x{pixels}", kinds) as (fn, args):
        a = SimpleNamespace(**dict(zip(names, args, strict=True)))
        grid = _Grid(e, plan, a, height, pixels)
        whole: Int = a.channels
        if plan.tail:
            rest = e.divmod(a.channels, e.lanes)[1]
            whole = e.sub(a.channels, rest)
            e.loop(0, whole, lambda c: grid.vector(c, None), step=e.lanes)
            grid.vector(whole, e.lane_mask(rest))
        else:
            e.loop(0, whole, lambda c: grid.vector(c, None), step=e.lanes)
    return fn


class _Grid:
    """The register tile of one function: its inputs' places and its sums, vector by vector."""

    def __init__(self, e: Emitter, plan: DepthwisePlan, a: SimpleNamespace, height: int, n: int):
        self.e, self.plan, self.a, self.height, self.pixels = e, plan, a, height, n
        self.row_taps = _reached(height, plan.size[0], plan.stride[0], plan.dilation[0])
        self.col_taps = _reached(n, plan.size[1], plan.stride[1], plan.dilation[1])
        # Row pointers and column offsets stay in integer registers: a load adds two of them.
        self.rows = {i: e.at(a.x, e.mul(a.x_row, i)) for i in self.row_taps}
        self.cols = {j: e.mul(a.x_pixel, j) for j in self.col_taps}

    def vector(self, c: Int, mask: ir.Value | None) -> None:
        """All rows and pixels of the tile for the channels from ``c`` on."""
        e, plan, a = self.e, self.plan, self.a
        taps = plan.size[0] * plan.size[1]
        w = e.at(a.w, e.mul(c, taps))
        weights = [e.vload(w, t * e.lanes) for t in range(taps)]
        pointers = {name: e.at(getattr(a, name), c) for name in ep.parameters(plan.epilogue)}
        values = SimpleNamespace(**pointers)
        steps, start = plan.epilogue, e.zero
        if steps and isinstance(steps[0], Bias):
            start, steps = e.vload(values.bias, 0, mask), steps[1:]
        sums = self._sums([start] * (self.height * self.pixels), weights, c, mask)
        places = [(r, p) for r in range(self.height) for p in range(self.pixels)]

        def place(name: str, i: int) -> ir.Value:
            r, p = places[i]
            row, pixel = getattr(a, f"{name}_row"), getattr(a, f"{name}_pixel")
            return e.at(e.at(getattr(a, name), c), e.add(e.mul(row, r), e.mul(pixel, p)))

        def residual(i: int) -> ir.Value:
            return e.vload(place("residual", i), 0, mask)

        per_channel = ep.load_parameters(e, steps, values, 0, mask)
        for i, value in enumerate(ep.finish(e, steps, sums, per_channel, residual)):
            e.vstore(value, place("out", i), 0, mask)

    def _sums(self, sums: list[ir.Value], weights: Sequence[ir.Value], c: Int, mask) -> list:
        e, width = self.e, self.plan.size[1]
        for i, row_taps in self.row_taps.items():
            row = e.at(self.rows[i], c)
            for j, col_taps in self.col_taps.items():
                x = e.vload(row, self.cols[j], mask)
                for r, kh in row_taps:
                    for p, kw in col_taps:
                        at = r * self.pixels + p
                        sums[at] = e.fma(x, weights[kh * width + kw], sums[at])
        return sums


def _reached(count: int, size: int, stride: int, dilation: int) -> dict[int, list[tuple[int, int]]]:
    """Input position -> the (output, tap) pairs that read it, for ``count`` outputs of a tile."""
    found: dict[int, list[tuple[int, int]]] = {}
    for output in range(count):
        for tap in range(size):
            found.setdefault(output * stride + tap * dilation, []).append((output, tap))
    return dict(sorted(found.items()))
