"""Batch norm while training as the tests define it in float64, and how they run its programs.

The definitions are those of :mod:`neocog.cpu.batch_norm`'s docstring, and PyTorch's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import kernel_tools as kt
import numpy as np
import torch
from lying import Lying
from torch import Tensor

from neocog import norm_steps
from neocog.activations import ACTIVATIONS
from neocog.cpu import batch_norm as bn
from neocog.dtypes import FLOAT32
from neocog.maps import Halo
from neocog.problem import Act
from neocog.program import Program
from neocog.target import Target

MARGIN = 7.5
"""What stands around results before they are written, and afterwards."""

ROWS = (bn.MEAN, bn.RECIPROCAL, bn.SCALE, bn.SHIFT, bn.VARIANCE)

PIECEWISE = ["identity", "relu", "leaky_relu", "relu6"]
"""Activations that take whole numbers to whole numbers or quarters of them."""

DENSE, GAPS = (Halo(), 0), (Halo(1, 2, 3, 1), 5)
"""How maps lie: halo, and channels beside."""


def act_of(name: str) -> Act:
    return Act(name, 0.25 if ACTIVATIONS[name].takes_slope else 0.0)


# ---------------------------------------------------------------------------------- definitions


def per_channel(values: kt.Array) -> kt.Array:
    return values[:, None, None]


def statistics(
    y: kt.Array, weight: kt.Array | None, bias: kt.Array | None, eps: float,
    moments: tuple[kt.Array, kt.Array] | None = None,
) -> kt.Array:  # fmt: skip
    """The rows of :mod:`neocog.cpu.batch_norm`, of the batch or from given moments."""
    count = y.size // y.shape[1]
    mean, var = moments or (y.mean((0, 2, 3)), y.var((0, 2, 3)))
    s = 1 / np.sqrt(var + eps)
    scale = s if weight is None else weight * s
    shift = (0 if bias is None else bias) - mean * scale
    unbiased = var if moments else var * count / (count - 1)
    made = np.empty((bn.STATISTICS, len(mean)))
    made[list(ROWS)] = mean, s, scale, shift, unbiased
    return made


@dataclass
class Problem:
    """A batch norm to be differentiated, in numbers that float32 holds."""

    y: kt.Array
    g: kt.Array
    statistics: kt.Array
    act: Act = Act("identity")
    batch: bool = True
    residual: kt.Array | None = None
    """What is added before the activation; the activation is then undone by the result."""
    start: kt.Array | None = None
    """What stands in the residual's gradient and is added to."""

    @property
    def before(self) -> kt.Array:
        """What the activation takes."""
        scale, shift = (per_channel(self.statistics[row]) for row in (bn.SCALE, bn.SHIFT))
        return self.y * scale + shift + (0 if self.residual is None else self.residual)

    @property
    def z(self) -> kt.Array:
        return ACTIVATIONS[self.act.name].forward(self.before, self.act.slope)

    def gradients(self) -> dict[str, kt.Array]:
        """Of y (out), of weight and bias, and of the residual, by what they are called."""
        mean, s, scale = (self.statistics[row] for row in (bn.MEAN, bn.RECIPROCAL, bn.SCALE))
        distance = self.y - per_channel(mean)
        g = self.g * ACTIVATIONS[self.act.name].derivative(self.before, self.act.slope)
        found = {"gbias": g.sum((0, 2, 3)), "gweight": s * (g * distance).sum((0, 2, 3))}
        centred = g
        if self.batch:
            count = self.y.size // self.y.shape[1]
            centred = g - per_channel(found["gbias"] / count)
            centred = centred - distance * per_channel(s * found["gweight"] / count)
        found["out"] = per_channel(scale) * centred
        found["residual"] = g + (0 if self.start is None else self.start)
        return found

    def bounds(self) -> dict[str, kt.Array]:
        """How far float32 may be off."""
        mean, s, scale, shift = np.abs(self.statistics[:4])
        count, total = self.y.size // self.y.shape[1], (0, 2, 3)
        # An activation undone by its result is as wrong as that, which has its own roundings.
        y = np.abs(self.y)
        g = np.abs(self.g)
        if self.act.name not in PIECEWISE:
            g = g * (2 + y * per_channel(scale) + per_channel(shift))
        distance = y + per_channel(mean)
        slope = np.abs(self.gradients()["gweight"]) * s / count
        few = 16  # of each term, and of the result: sums themselves are taken in float64
        found = {"gbias": FLOAT32.error_bound(few, g.sum(total)),
                 "gweight": FLOAT32.error_bound(few, s * (g * distance).sum(total))}  # fmt: skip
        out = FLOAT32.error_bound(few, g)
        if self.batch:
            size = g + per_channel(g.sum(total) / count) + distance * per_channel(slope)
            out = FLOAT32.error_bound(few, size) + per_channel(found["gbias"] / count)
            out = out + distance * per_channel(found["gweight"] * s / count)
        found["out"] = per_channel(scale) * out
        found["residual"] = FLOAT32.error_bound(few, g + np.abs(self.gradients()["residual"]))
        return found


# -------------------------------------------------------------------------------------- running


def run(p: Program, tensors: dict[str, Tensor], threads: int) -> None:
    """First on NaN, then on the tensors: what the first run leaves in scratch must not matter."""
    spoilt = [torch.full_like(t, math.nan) for t in tensors.values()]
    for values in (spoilt, list(tensors.values())):
        p.run(*(t.data_ptr() for t in values), threads=threads)


def vector(values: kt.Array) -> Tensor:
    """With NaN behind it."""
    return kt.tensor(np.r_[values, [math.nan] * 16])


def result(elements: int) -> Tensor:
    return torch.full((elements + 32,), MARGIN)


def made_in(buffer: Tensor, elements: int) -> kt.Array:
    """What was written to a :func:`result`; nothing was behind it."""
    assert (buffer[elements:] == MARGIN).all(), "written behind a vector"
    return buffer[:elements].numpy().astype(np.float64)


def rows_of(target: Target, channels: int, values: kt.Array) -> kt.Array:
    return values.reshape(bn.STATISTICS, bn.row_of(target, channels))[:, :channels]


def our_statistics(
    target: Target, y: kt.Array, weight: kt.Array | None = None, bias: kt.Array | None = None,
    eps: float = 1e-3, lies: tuple[Halo, int] = DENSE, threads: int = 1,
    moments: tuple[kt.Array, kt.Array] | None = None,
) -> kt.Array:  # fmt: skip
    """The rows of statistics of the batch, or from given moments."""
    channels, lying = y.shape[1], Lying(y.shape, *lies)
    given = {n: v for n, v in (("weight", weight), ("bias", bias)) if v is not None}
    p = Program(("y", "mean", "variance", *given, "statistics"))
    parameters = {name: p.buffer(name) for name in given}
    place = p.buffer("statistics")
    if moments is None:
        shape = y.shape
        norm_steps.batch_statistics(p, target, lying.map(p.buffer("y")), shape, eps, parameters,
                                    place)  # fmt: skip
    else:
        pair = {name: p.buffer(name) for name in ("mean", "variance")}
        norm_steps.given_statistics(p, target, channels, eps, pair, parameters, place)
    mean, var = moments or (np.zeros(0), np.zeros(0))
    elements = norm_steps.statistics_elements(target, channels)
    tensors = {"y": lying.filled(y, math.nan), "mean": vector(mean), "variance": vector(var)}
    tensors |= {name: vector(value) for name, value in given.items()}
    tensors["statistics"] = result(elements)
    run(p, tensors, threads)
    return rows_of(target, channels, made_in(tensors["statistics"], elements))


@dataclass
class Wanted:
    """Which gradients are asked for, and how maps lie."""

    out: bool = True
    vectors: tuple[str, ...] = ("gweight", "gbias")
    residual: str = ""
    reads_z: bool = False
    lies: dict[str, tuple[Halo, int]] = field(default_factory=dict)
    threads: int = 1
    in_place: bool = False
    """Whether the gradient of y goes where that of z was, and not to a map of its own."""


def our_gradients(target: Target, problem: Problem, wanted: Wanted) -> dict[str, kt.Array]:
    """By name; nothing around them was written."""
    shape, channels = problem.y.shape, problem.y.shape[1]
    reads = ("g", "y", *(["z"] if wanted.reads_z else []))
    own = wanted.out and not wanted.in_place
    writes = (*(["out"] if own else []), *(["residual"] if wanted.residual else []))
    lying = {name: Lying(shape, *wanted.lies.get(name, DENSE)) for name in (*reads, *writes)}
    p = Program((*lying, "statistics", *wanted.vectors))
    maps = {name: m.map(p.buffer(name)) for name, m in lying.items()}
    if wanted.in_place:
        maps["out"] = maps["g"]
    norm_steps.norm_gradient(
        p, target, shape, problem.act, maps, p.buffer("statistics"), problem.batch,
        {name: p.buffer(name) for name in wanted.vectors}, wanted.residual,
    )  # fmt: skip
    tensors = {name: lying[name].filled(getattr(problem, name), math.nan) for name in reads}
    for name in writes:
        tensors[name] = torch.full(lying[name].sizes, MARGIN)
    if wanted.residual == "add":
        lying["residual"].interior(tensors["residual"]).copy_(kt.tensor(problem.start))
    rows = np.full((bn.STATISTICS, bn.row_of(target, channels)), math.nan)
    rows[:, :channels] = problem.statistics
    tensors["statistics"] = vector(rows.reshape(-1))
    tensors |= {name: result(channels) for name in wanted.vectors}
    run(p, tensors, wanted.threads)
    made = {name: made_in(tensors[name], channels) for name in wanted.vectors}
    for name in writes:
        inside = lying[name].interior(tensors[name])
        made[name] = inside.numpy().astype(np.float64)
        inside.fill_(MARGIN)
        assert (tensors[name] == MARGIN).all(), f"written around {name}\n{p}"
    if wanted.in_place:
        made["out"] = lying["g"].interior(tensors["g"]).numpy().astype(np.float64)
    return made
