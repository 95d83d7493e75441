"""Explaining one number of a network: the window it comes from, the kernel, every product.

The network runs once, as it always does. What went into the chosen layer is taken from that run,
the number is computed again in float64 from its definition, and both are compared: an explanation
that does not lead to the network's own value says so (:attr:`Explanation.matches`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .activations import ACTIVATIONS
from .errors import InvalidProblem, Unsupported
from .geometry import Window
from .layer_words import activation_of
from .layers import Capture, LayerInfo, observe, size_text
from .problem import Act, Conv, Pool
from .reductions import REDUCTIONS
from .reference import divisor
from .sight import Beyond, Field

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Position = tuple[int, int]

# A float32 kernel and the exact sum may differ by this share of the largest value of the map ...
RELATIVE_TOLERANCE = 1e-5
# ... or, where large terms cancel to something small, by this share of the terms.
_CANCELLING_TOLERANCE = 2.0**-22


@dataclass(frozen=True)
class Taps:
    """Where a window lies on its map: the row of each of its rows, the column of each column.

    ``inside`` (KH, KW) are the cells on the map, ``padded`` those on it or on its padding: all,
    but for a pool's window that ceil mode lets hang over.
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    inside: Mask
    padded: Mask

    @classmethod
    def of(cls, problem: Conv | Pool, at: Position) -> Taps:
        """The window of output ``at`` = (y, x)."""
        rows, cols = (_positions(*axis) for axis in _axes(problem, at))
        inside = np.zeros((len(rows), len(cols)), dtype=bool)
        padded = inside.copy()
        on_rows, on_cols = (
            [k for k, _ in window.taps(o, n)] for window, o, n in _axes(problem, at)
        )
        inside[np.ix_(on_rows, on_cols)] = True
        padded_rows, padded_cols = (window.padded_taps(o, n) for window, o, n in _axes(problem, at))
        padded[np.ix_(padded_rows, padded_cols)] = True
        return cls(rows, cols, inside, padded)

    def cut(self, maps: Array) -> Array:
        """The window (C, KH, KW) of maps (C, H, W); zeros in the padding."""
        window = np.zeros((maps.shape[0], *self.inside.shape))
        ky, kx = np.nonzero(self.inside)
        window[:, ky, kx] = maps[:, np.array(self.rows)[ky], np.array(self.cols)[kx]]
        return window


@dataclass(frozen=True)
class ConvTrace:
    """One value of a convolution: ``activation(sum of window*kernel + bias + residual)``.

    ``channels`` are the input channels that output ``channel`` sees, all of them or its group's;
    ``window`` and ``kernel`` (len(channels), KH, KW). ``at`` is the value's (y, x).
    """

    at: Position
    taps: Taps
    channels: tuple[int, ...]
    window: Array
    kernel: Array
    bias: float | None
    residual: float | None
    activation: Act

    @property
    def products(self) -> Array:
        """``window * kernel``, (len(channels), KH, KW)."""
        return self.window * self.kernel

    @property
    def sums(self) -> Array:
        """The sum of the products of each input channel, (len(channels),)."""
        return self.products.sum(axis=(1, 2))

    @property
    def total(self) -> float:
        """The sum over all input channels."""
        return float(self.sums.sum())

    @property
    def pre_activation(self) -> float:
        """The total with bias and residual, before the activation."""
        return self.total + (self.bias or 0.0) + (self.residual or 0.0)

    @property
    def activated(self) -> float:
        """The value itself."""
        forward = ACTIVATIONS[self.activation.name].forward
        return float(forward(np.array(self.pre_activation), self.activation.slope))

    @property
    def magnitude(self) -> float:
        """The sum of the absolute values of all terms: what rounding errors grow with."""
        terms = float(np.abs(self.products).sum())
        return terms + abs(self.bias or 0.0) + abs(self.residual or 0.0)


@dataclass(frozen=True)
class PoolTrace:
    """One value of a pool: the largest of its window or the sum over ``divisor``.

    ``values`` (KH, KW) holds zeros in the padding. ``winner`` is the kernel index (ky, kx) of
    the largest value, None for a mean; ``divisor`` is None for a maximum.
    """

    problem: Pool
    at: Position
    taps: Taps
    values: Array
    winner: Position | None
    divisor: int | None
    result: float

    def position(self, cell: Position) -> Position:
        """Where a cell (ky, kx) of the window lies on the map, (y, x)."""
        return self.taps.rows[cell[0]], self.taps.cols[cell[1]]


@dataclass(frozen=True)
class Explanation:
    """Where the value of ``layer`` at output ``channel``, row and column ``at`` comes from.

    ``pool`` is None for a layer without one, ``conv`` for a pool alone. In a fused block ``conv``
    is the value that won the pool, or the largest of those that a mean is made of.
    ``seen`` are the rows ``[y0, y1)`` and columns ``[x0, x1)`` of the network's input, of ``size``
    (height, width), that the value may depend on, None where that cannot be told. An end above
    ``size`` goes on from 0 (:meth:`neocog.geometry.ReceptiveField.interval`).
    ``explained`` is the float64 result, ``network`` what the network computed; they may be
    ``allowed`` apart.
    """

    layer: LayerInfo
    channel: int
    at: Position
    seen: tuple[Position, Position] | None
    size: Position
    conv: ConvTrace | None
    pool: PoolTrace | None
    explained: float
    network: float
    allowed: float

    @property
    def difference(self) -> float:
        """How far apart both values are; 0 if both are NaN or the same infinity."""
        if math.isnan(self.explained) and math.isnan(self.network):
            return 0.0
        return 0.0 if self.explained == self.network else abs(self.explained - self.network)

    @property
    def matches(self) -> bool:
        """Whether the explanation leads to the network's value."""
        return self.difference <= self.allowed  # False for a NaN on one side only


def explain_value(
    model: nn.Module, x: Tensor, layer: int | str, channel: int, at: Position
) -> Explanation:
    """Explains one output value of a convolution, a pool or a fused block of both.

    Args:
        model: any module; it runs once, in evaluation mode and without gradients.
        x: one input (C, H, W) or a batch of one (1, C, H, W), as the model takes it.
        layer: its position among the layers that :func:`neocog.layers.describe` lists, counted
            from 1, or its module's name.
        channel: the output channel, counted from 0.
        at: (y, x) on the layer's output, counted from 0.

    Raises:
        InvalidProblem: no such layer, channel or position; the message names the valid range.
        InvalidModel: the model cannot take ``x``.
        Unsupported: a convolution padded with anything but zeros.
    """
    if x.ndim == 3:
        x = x[None]
    if x.ndim != 4 or x.shape[0] != 1:
        raise InvalidProblem(
            f"x must be one input of shape (C, H, W) or (1, C, H, W), got {tuple(x.shape)}"
        )
    layers, found = observe(model, x, lambda index, name: layer in (index, name))
    if found is None or not found.info.explainable:
        raise InvalidProblem(_no_such_layer(layer, found, layers))
    _check_place(found.info, channel, at)
    conv, pool = _trace(found, channel, at)
    explained = pool.result if pool is not None else conv.activated if conv is not None else 0.0
    return Explanation(
        layer=found.info,
        channel=channel,
        at=at,
        seen=_seen(found.info, at, x.shape[-2:]),
        size=(x.shape[-2], x.shape[-1]),
        conv=conv,
        pool=pool,
        explained=explained,
        network=float(found.output[0, channel, at[0], at[1]]),
        allowed=_allowed(found.output[0, channel], conv, pool),
    )


def _trace(found: Capture, channel: int, at: Position) -> tuple[ConvTrace | None, PoolTrace | None]:
    first, last = found.info.stages[0].problem, found.info.stages[-1].problem
    if isinstance(first, Pool):
        return None, _pool_trace(first, at, _maps(found.x)[channel])
    assert isinstance(first, Conv)
    if not isinstance(last, Pool):
        return _conv_trace(found, first, channel, at), None
    # Only the values in the pool's window are computed; the rest of the map stays zero.
    values = np.zeros(first.out_shape[2:])
    taps = Taps.of(last, at)
    cells = [(y, x) for y in taps.rows for x in taps.cols if _is_on(values, y, x)]
    traces = {cell: _conv_trace(found, first, channel, cell) for cell in cells}
    for cell, trace in traces.items():
        values[cell] = trace.activated
    pool = _pool_trace(last, at, values)
    if pool.winner is not None:
        return traces[pool.position(pool.winner)], pool
    return max(traces.values(), key=lambda trace: trace.activated, default=None), pool


def _conv_trace(found: Capture, conv: Conv, channel: int, at: Position) -> ConvTrace:
    module = found.module
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise Unsupported(
            f"layer {found.info.index} ({found.info.name}) is padded with "
            f"padding_mode={module.padding_mode!r}; explain knows zeros only"
        )
    per_group = conv.in_channels // conv.groups
    start = channel // (conv.out_channels // conv.groups) * per_group
    channels = range(start, start + per_group)
    taps = Taps.of(conv, at)
    # attributes and not parameters: a parametrised weight is computed when it is asked for
    weight, bias, residual = module.weight, getattr(module, "bias", None), found.residual
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return ConvTrace(
        at=at,
        taps=taps,
        channels=tuple(channels),
        window=taps.cut(_maps(found.x)[channels.start : channels.stop]),
        kernel=weight.detach()[channel].cpu().double().numpy(),
        bias=None if bias is None else float(bias.detach()[channel]),
        residual=None if residual is None else float(residual[0, channel, at[0], at[1]]),
        activation=activation_of(module),
    )


def _pool_trace(pool: Pool, at: Position, plane: Array) -> PoolTrace:
    taps = Taps.of(pool, at)
    row = REDUCTIONS[pool.kind]
    values = taps.cut(plane[None])[0]
    total, winner = np.array(row.init), None
    for ky, kx in zip(*np.nonzero(taps.inside), strict=True):
        value = values[ky, kx]
        if row.improves is not None and (winner is None or row.improves(total, value)):
            winner = (int(ky), int(kx))
        total = row.combine(total, value)
    over = None if row.selects else divisor(pool, *at)
    result = float(row.finish(total, 1 if over is None else over))
    return PoolTrace(pool, at, taps, values, winner, over, result)


def _maps(x: Tensor) -> Array:
    return x[0].detach().cpu().double().numpy()


def _axes(problem: Conv | Pool, at: Position) -> tuple[tuple[Window, int, int], ...]:
    return (problem.rows, at[0], problem.height), (problem.cols, at[1], problem.width)


def _positions(window: Window, o: int, n: int) -> tuple[int, ...]:
    (phase,) = window.phases(n)  # base dilation 1: every output has the same taps
    return tuple(phase.stride * o + offset for _, offset in phase.taps)


def _is_on(plane: Array, y: int, x: int) -> bool:
    return 0 <= y < plane.shape[0] and 0 <= x < plane.shape[1]


def _seen(info: LayerInfo, at: Position, size: Iterable[int]) -> tuple[Position, Position] | None:
    height, width = size
    sight = info.stages[-1].sight
    if isinstance(sight, Field):
        return sight.rows.interval(at[0], height), sight.cols.interval(at[1], width)
    return ((0, height), (0, width)) if sight is Beyond.ALL else None


def _allowed(network_map: Tensor, conv: ConvTrace | None, pool: PoolTrace | None) -> float:
    finite = network_map[network_map.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    terms = conv.magnitude if conv is not None else 0.0
    if conv is None and pool is not None and pool.divisor is not None:
        terms = float(np.abs(pool.values).sum()) / abs(pool.divisor)
    terms = terms if math.isfinite(terms) else 0.0
    return max(RELATIVE_TOLERANCE * largest, _CANCELLING_TOLERANCE * terms)


def _check_place(info: LayerInfo, channel: int, at: Position) -> None:
    channels, height, width = info.out_shape
    where = f"layer {info.index} ({info.name}) gives {size_text(info.out_shape)}"
    if not 0 <= channel < channels:
        raise InvalidProblem(f"channel must be 0 to {channels - 1}, got {channel}: {where}")
    if not 0 <= at[0] < height:
        raise InvalidProblem(f"row must be 0 to {height - 1}, got {at[0]}: {where}")
    if not 0 <= at[1] < width:
        raise InvalidProblem(f"column must be 0 to {width - 1}, got {at[1]}: {where}")


def _no_such_layer(layer: int | str, found: Capture | None, layers: list[LayerInfo]) -> str:
    able = ", ".join(f"{info.index} ({info.name})" for info in layers if info.explainable)
    able = f"convolutions and pools are: {able}" if able else "it has no convolution and no pool"
    if found is not None:
        info = found.info
        return f"layer {info.index} ({info.name}, {info.what}) has no windows to explain; {able}"
    return f"layer must be 1 to {len(layers)} or a module's name, got {layer!r}; {able}"
