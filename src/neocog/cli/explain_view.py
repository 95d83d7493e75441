"""How ``neocog explain`` looks: the pool's window, the convolution's, and the sum written out.

A window is drawn as a grid with the row and column of each cell on its map. Padding is ``·``, a
pool's winner stands in brackets, so that nothing rests on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from ..activations import ACTIVATIONS
from ..foreign import shown
from ..layers import size_text
from ..tracing import ConvTrace, Explanation, PoolTrace, Taps

Array = NDArray[np.float64]

FEW_CHANNELS = 4  # input channels that are drawn unless --all is given
_LARGEST = 12  # products that are listed where a window is too wide to draw


@dataclass(frozen=True)
class Look:
    """The columns of the terminal, whether to draw every channel, and the mark for padding."""

    width: int
    show_all: bool = False
    padding: str = "·"


def explain_view(found: Explanation, look: Look) -> RenderableType:
    """Everything ``neocog explain`` prints."""
    parts: list[RenderableType] = [*_headline(found)]
    if found.pool is not None:
        parts += [Text(), *_pool_part(found, found.pool, look)]
    if found.conv is not None:
        parts += [Text(), *_conv_part(found, found.conv, look)]
    parts += [Text(), check_line(found)]
    return Group(*parts)


def check_line(found: Explanation) -> Text:
    """``check: explained 0.4321, network 0.4321, difference 1.2e-08 (ok)``."""
    line = Text("check: ", style="bold")
    line.append(f"explained {found.explained:.6g}, network {found.network:.6g}, ", style="not bold")
    line.append(f"difference {found.difference:.1e} ", style="not bold")
    if found.matches:
        return line.append("(ok)", style="green")
    return line.append("(NOT OK)", style="red")


def _headline(found: Explanation) -> Iterator[Text]:
    info = found.layer
    channels, height, width = info.out_shape
    title = Text(f"layer {info.index} ({shown(info.name)}): ", style="bold")
    yield title.append(info.what, style="not bold")
    yield Text(
        f"channel {found.channel} of {channels}, row {found.at[0]} and column {found.at[1]} "
        f"of {height}x{width}"
    )
    if found.seen is None:
        yield Text("which pixels of the input it sees cannot be told", style="dim")
    else:
        rows, cols = map(_seen, ("row", "column"), found.seen, found.size)
        yield Text(f"sees {rows}, {cols} of the input")


def _seen(axis: str, seen: tuple[int, int], size: int) -> str:
    first, stop = seen
    if stop <= size:
        return _span(axis, range(first, stop))
    around = range(stop - size)
    return f"{_span(axis, range(first, size))} and, around the edge, {_span(axis, around)}"


def _span(axis: str, indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"{axis} {indices[0]}"
    return f"{axis}s {indices[0]} to {indices[-1]}" if len(indices) else f"no {axis}"


# The pool


def _pool_part(found: Explanation, pool: PoolTrace, look: Look) -> Iterator[RenderableType]:
    of = "activations" if found.conv is not None else "inputs"
    yield _rule(
        "pool", f"{_where(pool.taps)} of the {pool.problem.height}x{pool.problem.width} {of}"
    )
    number = Numbers(pool.values)
    yield from _indented(_grid(pool.values, pool.taps, number, look, winner=pool.winner))
    yield Text()
    if pool.winner is not None:
        y, x = pool.position(pool.winner)
        yield Text(f"  largest: {number(pool.result).strip()} at row {y}, column {x}")
    elif pool.divisor is not None:
        total = float(pool.values.sum())
        yield Text(f"  mean: sum {total:.5g} / {pool.divisor} = {pool.result:.5g}")
        yield Text(f"  divisor {pool.divisor}: {_divisor_words(pool)}", style="dim")
    yield from _padding_note(pool.taps, "never wins" if pool.divisor is None else "adds 0", look)


def _divisor_words(pool: PoolTrace) -> str:
    if pool.problem.divisor_override is not None:
        return "divisor_override"
    if not pool.problem.count_include_pad:
        return "the cells on the input, padding is not counted"
    if pool.divisor != pool.values.size:
        return "the cells on the input or its padding, none beyond (ceil mode)"
    return "the cells of the window" + ("" if pool.taps.inside.all() else ", padding is counted")


# The convolution


def _conv_part(found: Explanation, conv: ConvTrace, look: Look) -> Iterator[RenderableType]:
    of = size_text(found.layer.in_shape)
    title = "convolution"
    if found.pool is not None:
        which = "the winner" if found.pool.winner is not None else "the largest of them"
        title = f"convolution at row {conv.at[0]}, column {conv.at[1]}: {which}"
    yield _rule(title, f"{_where(conv.taps)} of the {of} input")
    shown = _ranked(conv, look.show_all)
    for place in shown:
        yield Text()
        yield from _channel(conv, place, look)
    yield from _padding_note(conv.taps, "counts as 0", look)
    yield Text()
    yield from _ledger(found, conv, shown)


def _ranked(conv: ConvTrace, show_all: bool) -> list[int]:
    """Which of the input channels to draw: all in order, or the few that add most, those first."""
    places = list(range(len(conv.channels)))
    if show_all or len(places) <= FEW_CHANNELS:
        return places
    size = np.nan_to_num(np.abs(conv.sums), nan=math.inf)
    return sorted(places, key=lambda place: -size[place])[:FEW_CHANNELS]


def _channel(conv: ConvTrace, place: int, look: Look) -> Iterator[Text]:
    total = float(conv.sums[place])
    title = Text(f"  input channel {conv.channels[place]}", style="bold")
    yield title.append(f"   adds {Numbers(conv.sums)(total).strip()}", style="not bold")
    everywhere = replace(conv.taps, inside=np.ones_like(conv.taps.inside))
    window, kernel, products = conv.window[place], conv.kernel[place], conv.products[place]
    drawn = {
        "window": _grid(window, conv.taps, Numbers(window), look),
        "kernel": _grid(kernel, everywhere, Numbers(kernel), look, labels=False),
        "products": _grid(products, conv.taps, Numbers(products), look, labels=False, signs=True),
    }
    titled = [_titled(title, grid) for title, grid in drawn.items()]
    if all(grid[0].cell_len + 2 <= look.width for grid in titled):
        yield from _side_by_side(list(zip(" x=", titled, strict=True)), look.width)
    else:
        yield from _largest_products(conv, place)


def _largest_products(conv: ConvTrace, place: int) -> Iterator[Text]:
    products = conv.products[place]
    order = np.argsort(-np.abs(products), axis=None)[:_LARGEST]
    arrays = (conv.window[place], conv.kernel[place], products)
    window, kernel, product = (Numbers(array) for array in arrays)
    for ky, kx in zip(*np.unravel_index(order, products.shape), strict=True):
        where = f"row {conv.taps.rows[ky]:>3}, column {conv.taps.cols[kx]:>3}"
        terms = f"{window(arrays[0][ky, kx])} x {kernel(arrays[1][ky, kx])}"
        yield Text(f"  {where}: {terms} = {product(products[ky, kx])}")
    if products.size > _LARGEST:
        yield Text(
            f"  the {_LARGEST} largest of {products.size} products; the window is too wide to draw",
            style="dim",
        )


def _ledger(found: Explanation, conv: ConvTrace, shown: Sequence[int]) -> Iterator[Text]:
    rows: list[tuple[str, float]] = [
        (f"input channel {conv.channels[place]}", float(conv.sums[place])) for place in shown
    ]
    hidden = len(conv.channels) - len(shown)
    if hidden:
        rest = float(np.delete(conv.sums, list(shown)).sum())
        rows.append((f"{hidden} more input channels, hidden (--all shows them)", rest))
    if conv.bias is not None:
        rows.append((f"bias of channel {found.channel}", conv.bias))
    if conv.residual is not None:
        rows.append(("residual added", conv.residual))
    results = [("sum", conv.pre_activation)]
    act = conv.activation
    if act.name != "identity":
        results.append((f"{act}: {ACTIVATIONS[act.name].formula}", conv.activated))
    if found.pool is not None:
        pool = found.pool
        word = "largest" if pool.divisor is None else "mean"
        results.append((f"{word} of the pool's window", pool.result))
    number = Numbers(np.array([value for _, value in rows + results]))
    size = max(len(label) for label, _ in rows + results)
    for place, (label, value) in enumerate(rows):
        yield Text(f"  {' ' if place == 0 else '+'} {label:<{size}}  {number(value)}")
    yield Text(f"    {'':<{size}}  {'-' * number.width}", style="dim")
    for place, (label, value) in enumerate(results):
        last = place == len(results) - 1
        yield Text(f"  = {label:<{size}}  {number(value)}", style="bold" if last else "")


# Grids and numbers


class Numbers:
    """Writes numbers of one array alike: as many decimals as its largest needs, right-aligned."""

    def __init__(self, values: Array) -> None:
        finite = np.abs(values[np.isfinite(values)])
        largest = float(finite.max()) if finite.size else 0.0
        self._write: Callable[[float], str] = _writer(largest, bool((finite % 1 == 0).all()))
        self.width = max((len(self._write(value)) for value in values.flat), default=1)

    def __call__(self, value: float) -> str:
        """The number, at least ``width`` characters wide."""
        return self._write(value).rjust(self.width)


def _writer(largest: float, whole: bool) -> Callable[[float], str]:
    if largest >= 1e6 or 0 < largest < 1e-4:
        return lambda value: f"{value:.2e}"
    if whole:
        return lambda value: f"{value:z.0f}"
    # 3 decimals from 0.1 to 10, fewer above, more below: about four digits of the largest
    magnitude = math.floor(math.log10(largest))
    decimals = 3 - max(magnitude, 0) - min(magnitude + 1, 0)
    return lambda value: f"{value:z.{max(decimals, 0)}f}"


def _grid(
    values: Array,
    taps: Taps,
    number: Numbers,
    look: Look,
    *,
    winner: tuple[int, int] | None = None,
    labels: bool = True,
    signs: bool = False,
) -> list[Text]:
    """Lines of equal width; ``labels``: with the row and column of each cell on its map.

    ``signs`` colours positive and negative numbers. Only a grid with a winner has room for the
    bracket behind a cell.
    """
    cell = max([number.width, *(len(str(col)) for col in taps.cols if labels)])
    behind = "" if winner is None else " "
    margin = max(len(str(row)) for row in taps.rows) if labels else 0
    edge = "|" if labels else ""
    heads = [f" {col if labels else '':>{cell}}{behind}" for col in taps.cols]
    lines = [Text(" " * (margin + len(edge)) + "".join(heads), style="dim")]
    for ky, row in enumerate(taps.rows):
        line = Text(f"{row:>{margin}}{edge}" if labels else "", style="dim")
        for kx in range(len(taps.cols)):
            value = float(values[ky, kx])
            if not taps.inside[ky, kx]:
                mark = look.padding if taps.padded[ky, kx] else ""
                line.append(f" {mark:>{cell}}{behind}", style="dim")
            elif (ky, kx) == winner:
                line.append(f"[{number(value):>{cell}}]", style="not dim bold reverse")
            else:
                line.append(f" {number(value):>{cell}}{behind}", style=_style(value, signs))
        lines.append(line)
    return lines


def _style(value: float, signs: bool) -> str:
    if not signs or value == 0:
        return "not dim"
    return "not dim red" if value < 0 else "not dim green"


def _titled(title: str, grid: list[Text]) -> list[Text]:
    width = max(grid[0].cell_len, len(title) + 1)
    for line in grid:
        line.pad_right(width - line.cell_len)
    return [Text(f" {title}".ljust(width), style="italic"), *grid]


def _side_by_side(grids: Sequence[tuple[str, list[Text]]], width: int) -> Iterator[Text]:
    """The grids, each after its sign, in as many rows as the terminal asks for."""
    rows: list[list[tuple[str, list[Text]]]] = [[]]
    for sign, grid in grids:
        if sum(3 + other[0].cell_len for _, other in rows[-1]) + 2 + grid[0].cell_len > width:
            rows.append([])
        rows[-1].append((sign, grid))
    for row in rows:
        height = len(row[0][1])
        for place in range(height):
            if place == 1 and not any(grid[place].plain.strip() for _, grid in row):
                continue  # a line for the columns' numbers that none of these grids has
            line = Text()
            for column, (sign, grid) in enumerate(row):
                shown = sign if place == 2 + (height - 2) // 2 else ""
                line.append(f"{shown:>2}" if column else f"{shown:<2}", style="bold")
                line.append(grid[place])
            yield line


def _indented(lines: Iterable[Text]) -> Iterator[Text]:
    for line in lines:
        yield Text("  ").append(line)


def _where(taps: Taps) -> str:
    return f"{_listed('row', taps.rows)}, {_listed('column', taps.cols)}"


def _listed(axis: str, indices: Sequence[int]) -> str:
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    return _span(axis, indices) + (f" in steps of {step}" if step > 1 else "")


def _padding_note(taps: Taps, what: str, look: Look) -> Iterator[Text]:
    if not taps.inside.all():
        yield Text(f"  {look.padding} padding, {what}", style="dim")


def _rule(title: str, more: str) -> RenderableType:
    return Group(
        Rule(Text(title, style="bold"), align="left", style="dim"), Text(f"  {more}", style="dim")
    )
