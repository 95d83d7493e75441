"""Where the time of a network goes: each layer of a frozen model, timed inside its program.

The program runs as it always does, with a reading of the clock behind each of its steps: a layer
finds the caches as the one before has left them. What the readings cost is a few hundred
nanoseconds a layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from .benchmark import peak_program, threads
from .cpu import clock
from .freezing import Frozen
from .kernels import copy_kernel
from .network import Layer, Linear, Node
from .program import Place, Program, Step
from .target import Target, host

BETWEEN = clock.LAST + 1
"""The slot for what is no step: waiting for the other threads, Python."""


@dataclass(frozen=True)
class LayerTime:
    """One layer, or one kind of step that belongs to none."""

    layer: str
    kernels: str
    seconds: float
    """Median over the calls; of all threads together, divided by their number."""
    multiply_adds: int
    share: float
    """Of the peak measured in between: over 1 where Winograd saves multiply-adds."""
    weight: str = ""
    """The name of its weights, by which a layer of the model is found; empty if it has none."""

    def plain(self) -> dict[str, Any]:
        """The row for a JSON file."""
        return {
            "layer": self.layer,
            "kernels": self.kernels,
            "us": 1e6 * self.seconds,
            "multiply_adds": self.multiply_adds,
            "share": self.share,
        }


@dataclass
class _Timed:
    """A program with clocks in it."""

    program: Program
    steps: list[Step]
    clocks: np.ndarray
    """[threads, slots] of int64."""

    @classmethod
    def of(cls, program: Program, target: Target, count: int) -> _Timed:
        steps = program.steps
        clocks = np.zeros((count, BETWEEN + 1 + len(steps)), np.int64)

        def reading(slot: int, items: int) -> Step:
            fields: dict[str, Place | int]
            fields = {"clocks": clocks.ctypes.data, "stride": clocks.shape[1], "slot": slot}
            return Step(copy_kernel(clock.emit, target), items, fields)

        made: list[Step] = []
        sections = []
        bounds = [*(s.first for s in program.sections[1:]), len(steps)]
        for section, stop in zip(program.sections, bounds, strict=True):
            sections.append(replace(section, first=len(made)))
            made.append(reading(BETWEEN, count))  # each thread: none counts from long ago
            for number in range(section.first, stop):
                made += [steps[number], reading(BETWEEN + 1 + number, 1)]
        return cls(replace(program, steps=made, sections=sections, _built={}), steps, clocks)

    @property
    def latest(self) -> int:
        """The clock at the last reading: some of them may have had nothing to do."""
        return int(self.clocks[:, clock.LAST].max())

    def cycles(self) -> np.ndarray:
        """Of each step since the last time asked, on average over the threads that counted."""
        counted = self.clocks[:, BETWEEN + 1 :]
        busy = np.maximum((counted > 0).sum(axis=0), 1)
        found = counted.sum(axis=0) / busy
        self.clocks[:, BETWEEN:] = 0
        return found


def layer_times(frozen: Frozen, x: Tensor, rounds: int, count: int) -> list[LayerTime]:
    """The layers of ``frozen(x)`` in order, on ``count`` threads."""
    plan = frozen.plan_for([x])
    target = host()
    natives = plan.natives
    timed = [_Timed.of(stage.program, target, count) for stage in natives]
    plain = [stage.program for stage in natives]
    try:
        for stage, one in zip(natives, timed, strict=True):
            stage.program = one.program
        with threads(count):
            seconds, peak = _measure(lambda: frozen(x), timed, rounds, count)
    finally:
        for stage, program in zip(natives, plain, strict=True):
            stage.program = program
    found = zip(timed, seconds, strict=True)
    return [row for one, taken in found for row in _rows(one.steps, taken, peak)]


def _measure(
    run: Callable[[], Any], programs: Sequence[_Timed], rounds: int, count: int
) -> tuple[list[np.ndarray], float]:
    """Seconds of the steps of each program, medians, and the peak in multiply-adds per second."""
    yardstick, buffers, work = peak_program(host(), count)
    addresses = [t.data_ptr() for t in buffers]
    found: list[list[np.ndarray]] = [[] for _ in programs]
    peaks = []
    for _ in range(3):
        run()
    for _ in range(rounds):
        start = time.perf_counter()
        yardstick.run(*addresses, threads=count)
        peaks.append(work / (time.perf_counter() - start))
        run()
        for program in programs:
            program.cycles()
        before = [program.latest for program in programs]
        start = time.perf_counter()
        run()
        run()
        wall = time.perf_counter() - start
        for number, program in enumerate(programs):
            rate = (program.latest - before[number]) / wall
            found[number].append(program.cycles() / rate / 2)
    medians = [np.median(np.stack(rows), axis=0) for rows in found]
    return medians, statistics.median(peaks)


def _rows(steps: Sequence[Step], seconds: np.ndarray, peak: float) -> list[LayerTime]:
    made: dict[Node, tuple[list[str], float]] = {}
    for step, taken in zip(steps, seconds, strict=True):
        assert isinstance(step.about, Node)
        kernels, total = made.get(step.about, ([], 0.0))
        made[step.about] = ([*kernels, step.kernel.name], total + float(taken))
    return [
        LayerTime(
            describe(node),
            " + ".join(dict.fromkeys(kernels)),
            total,
            node.multiply_adds,
            node.multiply_adds / total / peak if total else 0.0,
            node.op.weight if isinstance(node.op, Layer | Linear) else "",
        )
        for node, (kernels, total) in made.items()
    ]


def describe(node: Node) -> str:
    """A layer in one line."""
    match node.op:
        case Layer(block=block):
            return str(block)
        case Linear():
            batch, channels = node.inputs[0].shape
            return f"linear n{batch} c{channels} k{node.shape[1]}"
    shape = "x".join(map(str, node.shape[1:]))
    return f"{type(node.op).__name__.lower()} n{node.shape[0]} c{shape}"
