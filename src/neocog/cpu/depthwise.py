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

The gradient of a strided layer reads its input with a base dilation: its outputs fall into phases
(:class:`neocog.geometry.Phase`), each with some of the taps. A tile holds outputs of all phases, so
that each input is loaded once for all of them and outputs are written in order; R and MR are then
multiples of the number of phases.

It is made for: kernel size, stride, dilations, register tiles, epilogue, and whether the last
vector is partly empty. Channels and every stride of the maps arrive at run time: one kernel serves
all layers of a network that look alike.

Input: NHWC with its halo. Weights: [vector][tap][lanes], the taps of one pair of phases after those
of the other, as ``copy.pack_weights`` with NB = 1 brings them. Work items: images x groups of R
rows. (Pools go through :mod:`neocog.cpu.direct`.)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..steps import Bias, Step
from ..target import Target
from . import epilogue as ep
from .ahead import LARGE, Ahead, pays
from .lanes import I64, PTR, Emitter, Int
from .runtime import Kernel, compile_kernel
from .tiling import Reads, cover, even_sizes

HEIGHT = 2
"""R: more rows would read each input less often, but weights and sums fill the registers."""

KEPT_TAPS = 9
"""Weights of this many taps stay in registers, beside the sums."""

WIDE, NARROW_TILE = 28, 4
"""From rows of WIDE pixels on, tiles have NARROW_TILE at most. Such rows come from a distant cache,
which serves the few long runs of a narrow tile faster (up to 1.3 times, measured)."""

MOST_PHASES = 16
"""Pairs of phases that a tile holds at most: more would spill too many sums."""

Axes = tuple[int, int]
"""(rows, columns)."""


@dataclass(frozen=True)
class DepthwisePlan:
    """Everything a depthwise kernel is specialised on."""

    target: Target
    rows: Reads
    cols: Reads
    heights: tuple[int, ...]
    """Rows of the register tiles: R, then what the last group of rows has, if less."""
    tiles: tuple[int, ...]
    """Pixels of the register tiles: one size, or two (``tiling.even_sizes`` times the phases)."""
    last: int
    """Pixels of the last tile of a row, if the phases' outputs are not equally many; else 0."""
    tail: bool
    """Whether the last vector of channels is partly empty."""
    large: bool
    """Whether the maps are larger than the second cache: memory is asked for ahead of time."""
    epilogue: tuple[Step, ...] = ()

    @property
    def name(self) -> str:
        """A name for the listing."""
        rows, cols = self.rows, self.cols
        kernel = f"{rows.size}x{cols.size}s{rows.stride}x{cols.stride}"
        if (rows.step, cols.step) != (1, 1):
            kernel += f"b{rows.step}x{cols.step}"
        tile = f"{self.heights[0]}x{self.tiles[0]}v{self.target.lanes}"
        return f"depthwise_{kernel}_{tile}{ep.spelled(self.epilogue)}"

    @property
    def order(self) -> list[tuple[int, int]]:
        """The taps (kh, kw) as the weights have them."""
        pairs = itertools.product(self.rows.phases, self.cols.phases)
        return [(kh, kw) for rows, cols in pairs for kh, _ in rows for kw, _ in cols]

    def cover(self, cols: int) -> tuple[int, int]:
        """How many whole tiles cover a row of ``cols`` outputs, and how many of the first size."""
        step = self.cols.step
        wide, tail = cover(-(-cols // step), tuple(size // step for size in self.tiles))
        count = wide + len(tail) - (self.last > 0)
        return count, min(wide, count)


def plan_for(
    target: Target,
    reads: tuple[Reads, Reads],
    size: Axes,
    channels: int,
    large: bool,
    epilogue: tuple[Step, ...],
) -> DepthwisePlan:
    """The plan for ``size`` outputs that read as ``reads`` say.

    ``large``: whether the maps have more than ``ahead.LARGE`` elements.
    """
    rows, cols = reads
    height = rows.step * max(1, HEIGHT // rows.step)
    height = height if size[0] > height else size[0]
    rest = size[0] % height
    most = _most_pixels(target, rows.size * cols.size, height, size[1])
    units = even_sizes(-(-size[1] // cols.step), max(1, most // cols.step))
    tiles = tuple(unit * cols.step for unit in units)
    short = -size[1] % cols.step
    return DepthwisePlan(
        target=target,
        rows=rows,
        cols=cols,
        heights=(height, rest) if rest else (height,),
        tiles=tiles,
        last=tiles[-1] - short if short else 0,
        tail=channels % target.lanes > 0,
        large=large,
        epilogue=epilogue,
    )


def plans_for_any_size(
    target: Target, reads: tuple[Reads, Reads], channels: int, epilogue: tuple[Step, ...]
) -> tuple[DepthwisePlan, DepthwisePlan]:
    """Plans that serve maps of every size between them: of HEIGHT rows at a time, and of one.

    Only where there is one phase. The rest of a row has tiles of one pixel.
    """
    rows, cols = reads
    pixels = _most_pixels(target, rows.size * cols.size, HEIGHT, WIDE)
    tiles = (pixels, 1) if pixels > 1 else (1,)
    large = pays(LARGE + 1, rows.stride, cols.stride)
    pair, single = (
        DepthwisePlan(
            target, rows, cols, (height,), tiles, 0, channels % target.lanes > 0, large, epilogue
        )
        for height in (HEIGHT, 1)
    )
    return pair, single


def serves(reads: tuple[Reads, Reads]) -> bool:
    """Whether tiles of all phases are small enough, and there is anything to read."""
    rows, cols = reads
    return rows.step * cols.step <= MOST_PHASES and rows.size * cols.size > 0


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
    larger size; the plan's last one comes behind them.
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
    widths = [*plan.tiles, *([plan.last] if plan.last else [])]
    functions = {
        h: {n: _tile_function(e, plan, h, n) for n in dict.fromkeys(widths)} for h in plan.heights
    }
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, _):
        e.loop(begin, end, lambda item: _item(e, plan, functions, f, item))
    return compile_kernel(e, names)


def _item(e: Emitter, plan: DepthwisePlan, functions, f: SimpleNamespace, item) -> None:
    """One group of rows."""
    image, group = e.divmod(item, f.groups)

    def start(name: str, rows: int = plan.heights[0]) -> ir.Value:
        at_image = e.mul(image, getattr(f, f"{name}_image"))
        at_row = e.mul(e.mul(group, rows), getattr(f, f"{name}_row"))
        return e.at(getattr(f, name), e.add(at_image, at_row))

    # With one group only, its height need not be a multiple of the phases.
    maps = {"x": start("x", plan.heights[0] // plan.rows.step * plan.rows.stride)}
    maps["out"] = start("out")
    if ep.adds_residual(plan.epilogue):
        maps["residual"] = start("residual")

    def tiles_of(height: int) -> None:
        def run(size: int, pixel: Int) -> None:
            args = [f.w, f.channels]
            for name, pointer in maps.items():
                step = pixel
                if name == "x":
                    unit = pixel if plan.cols.step == 1 else e.divmod(pixel, plan.cols.step)[0]
                    step = e.mul(plan.cols.stride, unit)
                stride = getattr(f, f"{name}_pixel")
                args += [e.at(pointer, e.mul(step, stride)), getattr(f, f"{name}_row"), stride]
            args += [getattr(f, name) for name in ep.parameters(plan.epilogue)]
            e.b.call(functions[height][size], args)

        wide = e.mul(f.wide, plan.tiles[0])
        whole = e.add(wide, e.mul(e.sub(f.tiles, f.wide), plan.tiles[-1]))
        starts = [I64(0), wide, whole]
        for size, first, stop in zip(plan.tiles, starts, starts[1:], strict=False):
            e.loop(first, stop, lambda at, size=size: run(size, at), step=size)
        if plan.last:
            run(plan.last, whole)

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
        self.row_taps, self.col_taps = plan.rows.reached(height), plan.cols.reached(n)
        # Row pointers and column offsets stay in integer registers: a load adds two of them.
        self.rows = {i: e.at(a.x, e.mul(a.x_row, i)) for i in self.row_taps}
        self.cols = {j: e.mul(a.x_pixel, j) for j in self.col_taps}
        self.ahead = self._ahead() if plan.large else []

    def _ahead(self) -> list[Ahead]:
        """Of the next group of rows, what this one does not read, and what it writes."""
        e, plan, a = self.e, self.plan, self.a
        below, step = max(self.row_taps, default=-1) + 1, plan.rows.step
        rows = range(below, below + self.height // step * plan.rows.stride)
        pixels = self.pixels // plan.cols.step * plan.cols.stride
        read = [e.at(a.x, e.mul(a.x_row, i)) for i in rows]
        written = [e.at(a.out, e.mul(a.out_row, self.height + r)) for r in range(self.height)]
        return [Ahead(e, read, pixels), Ahead(e, written, self.pixels, write=True)]

    def vector(self, c: Int, mask: ir.Value | None) -> None:
        """All rows and pixels of the tile for the channels from ``c`` on."""
        e, plan, a = self.e, self.plan, self.a
        order = plan.order
        w = e.at(a.w, e.mul(c, len(order)))
        weights = {tap: e.vload(w, t * e.lanes) for t, tap in enumerate(order)}
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

    def _sums(self, sums: list[ir.Value], weights: Mapping[Axes, ir.Value], c: Int, mask) -> list:
        e = self.e
        for turn, (i, row_taps) in enumerate(self.row_taps.items()):
            for ahead in self.ahead:
                ahead.ask(c, turn, len(self.row_taps))
            row = e.at(self.rows[i], c)
            for j, col_taps in self.col_taps.items():
                x = e.vload(row, self.cols[j], mask)
                for r, kh in row_taps:
                    for p, kw in col_taps:
                        at = r * self.pixels + p
                        sums[at] = e.fma(x, weights[kh, kw], sums[at])
        return sums
