"""The steps of batch norms while training, inside a program: statistics, and the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .cpu import batch_norm as bn
from .kernels import kernel
from .maps import Map
from .problem import Act
from .program import Place, Program
from .target import Target

SCALE, SHIFT = bn.SCALE, bn.SHIFT
"""The statistics that a pass over the map multiplies by, and adds."""

MEAN, VARIANCE = bn.MEAN, bn.VARIANCE
"""The statistics that running ones follow."""

STATISTICS = bn.STATISTICS
"""How many statistics there are of a layer."""

LINE = 16
"""Pixels to a line, where they need not be those of a row: few enough to round little."""

ITEMS = 64
"""Work items at most: each leaves sums that have to be added up."""

Shape = Sequence[int]


def statistics_elements(target: Target, channels: int) -> int:
    """float32 elements of the statistics of one layer."""
    return bn.STATISTICS * bn.row_of(target, channels)


def statistic(target: Target, channels: int, place: Place, row: int) -> Place:
    """Where one of the statistics stands, a vector per channel."""
    return place + row * bn.row_of(target, channels)


def batch_statistics(
    p: Program, target: Target, y: Map, shape: Shape, eps: float,
    parameters: Mapping[str, Place], statistics: Place,
) -> None:  # fmt: skip
    """Statistics of the batch. ``parameters``: places of weight and bias, if there are any."""
    channels = shape[1]
    parts = _parts(_lines(shape, {"y": y})[0])
    sums = p.scratch(parts * bn.sums_elements(bn.row_of(target, channels)))
    _pass(p, bn.MomentsPlan(target, channels), shape, {"y": y}, sums=sums)
    _finish(p, target, channels, eps, parameters, statistics,
            {"first": y.place, "sums": sums, "parts": parts, "count": _pixels(shape)})  # fmt: skip


def given_statistics(
    p: Program, target: Target, channels: int, eps: float, given: Mapping[str, Place],
    parameters: Mapping[str, Place], statistics: Place,
) -> None:  # fmt: skip
    """Statistics from running ones; ``given``: the places of mean and variance."""
    _finish(p, target, channels, eps, parameters, statistics, given)


def _finish(p, target, channels, eps, parameters, statistics, given) -> None:
    batch = "sums" in given
    plan = bn.StatisticsPlan(
        target, channels, eps, batch, "weight" in parameters, "bias" in parameters
    )
    vectors = bn.row_of(target, channels) // target.lanes
    p.step(kernel(plan), vectors, statistics=statistics, **given, **parameters)


def norm_gradient(
    p: Program, target: Target, shape: Shape, act: Act, maps: Mapping[str, Map],
    statistics: Place, batch: bool, gradients: Mapping[str, Place], residual: str = "",
) -> None:  # fmt: skip
    """The gradient of y from that of z = act(norm(y) [+ residual]).

    Args:
        p: the program.
        target: what it runs on.
        shape: of all maps.
        act: the activation.
        maps: g (of z), y, z itself if the activation is to be undone by it, out (the gradient of y,
            if it is wanted) and residual (if its gradient is).
        statistics: of :func:`batch_statistics`.
        batch: whether these are the batch's own.
        gradients: places of gweight and gbias, as they are wanted.
        residual: what becomes of the map ``residual``: "write" or "add".
    """
    channels, reads_z = shape[1], "z" in maps and act.name != "identity"
    row = bn.row_of(target, channels)
    coefficients = p.scratch(bn.COEFFICIENTS * row)
    plan = bn.NormGradientPlan(target, channels, act, True, reads_z)
    parts = _parts(_lines(shape, {name: maps[name] for name in plan.maps})[0])
    sums = p.scratch(parts * bn.sums_elements(row))
    _pass(p, plan, shape, maps, statistics=statistics, sums=sums)
    finish = bn.CoefficientsPlan(target, channels, batch, "gweight" in gradients,
                                 "gbias" in gradients)  # fmt: skip
    p.step(
        kernel(finish), row // target.lanes,
        sums=sums, parts=parts, count=_pixels(shape), statistics=statistics,
        coefficients=coefficients, **gradients,
    )  # fmt: skip
    if "out" in maps:
        plan = bn.NormGradientPlan(target, channels, act, False, reads_z, residual)
        _pass(p, plan, shape, maps, statistics=statistics, coefficients=coefficients)


def _pass(
    p: Program, plan: bn.MomentsPlan | bn.NormGradientPlan, shape: Shape,
    maps: Mapping[str, Map], **fields: Place | int,
) -> None:  # fmt: skip
    """One pass over the maps of a plan."""
    lines, used = _lines(shape, {name: maps[name] for name in plan.maps})
    for name, m in used.items():
        fields |= m.fields(name)
    p.step(kernel(plan), _parts(lines), **lines, **fields)
    p.work += shape[1] * _pixels(shape)


def _pixels(shape: Shape) -> int:
    return shape[0] * shape[2] * shape[3]


def _parts(lines: Mapping[str, int]) -> int:
    return -(-lines["lines"] // lines["item_lines"])


def _lines(shape: Shape, maps: Mapping[str, Map]) -> tuple[dict[str, int], dict[str, Map]]:
    """How pixels are shared out, and the maps with the strides of lines.

    Where no map has a gap between pixels, all of them are one row, cut into even lines.
    """
    batch, _, height, width = shape
    lines, rows, cols, last = batch * height, height, width, width
    every = maps.values()
    if all(m.row == width * m.pixel and m.image == height * m.row for m in every):
        pixels = _pixels(shape)
        lines = rows = -(-pixels // LINE)
        cols, last = LINE, pixels - (lines - 1) * LINE
        maps = {name: replace(m, image=0, row=LINE * m.pixel) for name, m in maps.items()}
    item = -(-lines // min(lines, ITEMS))
    fields = {"lines": lines, "item_lines": item, "rows": rows, "cols": cols, "last_cols": last}
    return fields, dict(maps)
