"""How near the kernels come to the processor's peak, and what PyTorch needs for the same.

:data:`CASES` is the table: blocks of known networks, one line each. All that computes a case is
measured in one run and by turns, the processor's peak too: clocks and neighbours change from one
second to the next, and then change for all of them alike. Every number is the median of its rounds.

The tensors hold small whole numbers, on which every order of summation gives the same result, so
that nothing is timed before it was compared with PyTorch by ``==``.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import resource
except ImportError:  # Windows does not count interruptions
    resource = None  # type: ignore[assignment]

from . import compiler, execution, functional, handback
from .cpu import peak
from .cpu.runtime import thread_count
from .errors import NeocogError
from .maps import NCHW, NHWC
from .problem import Act, Bias, Block, parse
from .program import Program
from .target import Target, host

SAMPLE = 1e-3
"""Seconds that one sample lasts at least: short calls are repeated."""

TRIES = 10
PAUSE = 1e-3
"""How often an interrupted sample is tried, and the seconds between: who has just slept is the
last to be interrupted again."""

PEAK_TRIPS = 20_000

Results = tuple[Tensor, ...]
Run = Callable[[], Any]
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, weight, bias) -> out."""

PEAK, PROGRAM, CALL = "peak", "program", "call"
TORCH = {NCHW: "torch contiguous", NHWC: "torch channels_last"}
"""Who is measured: the processor's peak, neocog's program, neocog called from Python, PyTorch."""


class WrongResult(NeocogError, ArithmeticError):
    """A kernel's result differs from PyTorch's."""


@dataclass(frozen=True)
class Case:
    """A block in one line (see :mod:`neocog.problem`), or its gradients."""

    line: str
    backward: bool = False

    @functools.cached_property
    def block(self) -> Block:
        """The problem that the line spells."""
        block = parse(self.line)
        assert isinstance(block, Block), f"{self.line}: not a block"
        return block

    @property
    def multiply_adds(self) -> int:
        """Of the convolution; its two gradients take as many each. Pools count nothing."""
        return self.block.conv.multiply_adds * (2 if self.backward else 1)

    def __str__(self) -> str:
        return f"backward of {self.line}" if self.backward else self.line


DIGITS_1 = "conv n{n} c1x28x28 k32 3x3 p1 | bias | relu | max 2x2"
DIGITS_2 = "conv n{n} c32x14x14 k64 3x3 p1 | bias | relu | max 2x2"

CASES: tuple[Case, ...] = (
    Case("conv n1 c1x28x28 k32 3x3 p1 | bias | relu"),
    Case("conv n1 c32x14x14 k64 3x3 p1 | bias | relu"),
    Case("conv n1 c3x224x224 k64 3x3 p1 | bias | relu"),
    Case("conv n1 c64x56x56 k64 3x3 p1 | bias | relu"),
    Case("conv n1 c128x28x28 k128 3x3 p1 | bias | relu"),
    Case("conv n1 c256x14x14 k256 3x3 p1 | bias | relu"),
    Case("conv n1 c512x7x7 k512 3x3 p1 | bias | relu"),
    Case("conv n1 c64x56x56 k256 1x1 | bias | relu"),
    Case("conv n1 c3x224x224 k64 7x7 s2 p3 | bias | relu"),
    Case("conv n1 c96x112x112 k96 3x3 p1 g96 | bias | relu"),
    # The network of `neocog train`, for one picture and for a batch.
    Case(DIGITS_1.format(n=1)),
    Case(DIGITS_2.format(n=1)),
    Case(DIGITS_1.format(n=64)),
    Case(DIGITS_2.format(n=64)),
    # Where a ResNet starts.
    Case("conv n1 c3x224x224 k64 7x7 s2 p3 | bias | relu | max 3x3 s2 p1"),
    Case("conv n1 c64x56x56 k64 3x3 p1 | bias | relu", backward=True),
    Case(DIGITS_1.format(n=64), backward=True),
    Case(DIGITS_2.format(n=64), backward=True),
)


# ----------------------------------------------------------------------------------- measuring


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets PyTorch, and so neocog, use ``count`` threads inside the ``with``."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Times:
    """Seconds of one call by contender, medians; and how many samples there were."""

    seconds: Mapping[str, float]
    samples: int
    disturbed: int
    """Samples that something else on the machine interrupted, as often as they were tried."""


def interleave(contenders: Mapping[str, Run], rounds: int, sample: float = SAMPLE) -> Times:
    """What a call of each contender takes: the median of ``rounds`` samples taken by turns.

    A sample is as many calls as last ``sample`` seconds together, after one that is not timed: it
    brings the contender's data back into the caches that the one before has filled with its own.
    A sample during which the system took a processor away from this process is tried again.
    """
    repeats = {name: _warm_up(run, sample) for name, run in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    disturbed = 0
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds, whole = _sample(run, repeats[name])
            taken[name].append(seconds / repeats[name])
            disturbed += not whole
    medians = {name: statistics.median(samples) for name, samples in taken.items()}
    return Times(medians, rounds * len(contenders), disturbed)


def _sample(run: Run, repeats: int) -> tuple[float, bool]:
    """The seconds of ``repeats`` calls, and whether nothing interrupted them."""
    tried = []
    for _ in range(TRIES):
        run()
        before = _interruptions()
        tried.append(_seconds(run, repeats))
        if _interruptions() == before:
            return tried[-1], True
        time.sleep(PAUSE)
    return min(tried), False


def _interruptions() -> int:
    """How often the system took a processor away from a thread of this process so far."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _warm_up(run: Run, sample: float) -> int:
    run()  # compiles, allocates
    repeats = 1
    while _seconds(run, repeats) < sample:
        repeats *= 2
    return repeats


def _seconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


@functools.cache
def peak_program(
    target: Target, items: int, trips: int = PEAK_TRIPS
) -> tuple[Program, tuple[Tensor, ...], int]:
    """The program that does multiply-adds and nothing else, its buffers, and how many it does.

    One work item for each thread. Call buffers: values, out.
    """
    program = Program(("values", "out"))
    places = {name: program.buffer(name) for name in program.names}
    program.step(peak.emit(target), items, **places, trips=trips)
    program.work = items * peak.multiply_adds(target, trips)
    buffers = (torch.rand(peak.values(target)), torch.empty(items * target.lanes))
    return program, buffers, program.work


# ------------------------------------------------------------------------------- who computes


def contenders(case: Case) -> dict[str, Callable[[], Results]]:
    """Everything that computes a case, by name; each call returns (out,) or (gx, gw, gbias).

    The program and the call from Python work on channels_last tensors with weights as torch.nn
    makes them, PyTorch on all tensors in either layout. PyTorch's activation works in place, as
    well-written code has it.
    """
    made = _backward(case.block) if case.backward else _forward(case.block)
    return dict(made)


def check(case: Case) -> None:
    """WrongResult if the contenders of a case do not all return the same numbers."""
    _check(case, contenders(case))


def _check(case: Case, found: Mapping[str, Callable[[], Results]]) -> None:
    expected = found[TORCH[NCHW]]()
    for name, run in found.items():
        for one, other in zip(run(), expected, strict=True):
            if not torch.equal(one, other):
                far = (one - other).abs().max().item()
                raise WrongResult(f"{case}: {name} differs from {TORCH[NCHW]} by up to {far:g}")


def _forward(block: Block) -> Iterator[tuple[str, Callable[[], Results]]]:
    x, w, b = _inputs(block)
    near = _in(NHWC, x)
    program = compiler.forward(block, NHWC, w.stride(), NHWC)
    out = torch.empty(block.out_shape, memory_format=torch.channels_last)
    yield PROGRAM, _running(program, (near, w, b, out), results=1)
    yield CALL, _computing(_ours(block), (near, w, b))
    for layout, name in TORCH.items():
        yield name, _computing(_eager(block), (_in(layout, x), _in(layout, w), b))


def _backward(block: Block) -> Iterator[tuple[str, Callable[[], Results]]]:
    x, w, b = _inputs(block)
    grad = whole_numbers(block.out_shape, 3, seed=3)
    needs = ("x", "w", "bias")
    near, near_grad = _in(NHWC, x), _in(NHWC, grad)
    out, winners, before = execution.conv_block(near, w, b, None, block, save=True)
    result = before if before.numel() else out
    program = compiler.backward(block, NHWC, NHWC, w.stride(), NHWC, NHWC, needs)
    gradients = (torch.empty_like(near), torch.empty_like(w), torch.empty_like(b))
    yield PROGRAM, _running(program, (near_grad, near, w, result, winners, *gradients), results=3)
    yield CALL, _differentiating(_ours(block), (near, w, b), near_grad)
    for layout, name in TORCH.items():
        tensors = (_in(layout, x), _in(layout, w), b)
        yield name, _differentiating(_eager(block), tensors, _in(layout, grad))


def _running(program: Program, buffers: tuple[Tensor, ...], results: int) -> Callable[[], Results]:
    addresses = tuple(t.data_ptr() for t in buffers)

    def run() -> Results:
        program.run(*addresses)
        return buffers[-results:]

    return run


def _computing(compute: Compute, tensors: Results) -> Callable[[], Results]:
    return lambda: (compute(*tensors),)


def _differentiating(compute: Compute, tensors: Results, grad: Tensor) -> Callable[[], Results]:
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    out = compute(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def whole_numbers(shape: tuple[int, ...], largest: int, seed: int) -> Tensor:
    """float32 whole numbers from -``largest`` to ``largest``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def _inputs(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(block.epilogue[0], Bias), f"{block}: expected a bias first"
    x, w = whole_numbers(block.in_shape, 3, seed=0), whole_numbers(block.conv.weight_shape, 2, 1)
    return x, w, whole_numbers((block.conv.out_channels,), 3, seed=2)


def _in(layout: str, t: Tensor) -> Tensor:
    """A copy in that layout, by its strides too where sizes of 1 leave them free."""
    return torch.empty(t.shape, memory_format=execution.FORMATS[layout]).copy_(t)


def _ours(block: Block) -> Compute:
    pool = block.pool.step if block.pool else None
    return functools.partial(functional.conv_block, **_window(block), activation="relu", pool=pool)


def _eager(block: Block) -> Compute:
    window, pool = _window(block), block.pool.step if block.pool else None
    assert [s for s in block.epilogue if s not in (Bias(), pool)] == [Act("relu")], block

    def compute(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, w, b, **window), inplace=True)
        return y if pool is None else handback.pool(y, pool)

    return compute


def _window(block: Block) -> dict[str, Any]:
    rows, cols = block.conv.rows, block.conv.cols
    assert (rows.low, cols.low) == (rows.high, cols.high), f"{block}: uneven padding"
    return {
        "stride": (rows.stride, cols.stride),
        "padding": (rows.low, cols.low),
        "dilation": (rows.dilation, cols.dilation),
        "groups": block.conv.groups,
    }


# ------------------------------------------------------------------------------------ the rows


@dataclass(frozen=True)
class Row:
    """One case measured, all contenders and the peak in the same rounds."""

    case: Case
    times: Times
    peak: float
    """Multiply-adds per second, of all threads together."""
    threads: int
    rounds: int

    @property
    def share(self) -> float:
        """Of the peak that the program reaches, 0..1."""
        return self.case.multiply_adds / self.times.seconds[PROGRAM] / self.peak

    @property
    def torch(self) -> float:
        """Seconds of PyTorch in the faster of its two layouts."""
        return min(self.times.seconds[name] for name in TORCH.values())

    @property
    def ratio(self) -> float:
        """How many times faster a call of neocog is than one of PyTorch."""
        return self.torch / self.times.seconds[CALL]

    def plain(self) -> dict[str, Any]:
        """The row for a JSON file; a multiply-add counts as 2 operations."""
        seconds = self.times.seconds
        row: dict[str, Any] = {
            "block": str(self.case),
            "gflops": 2e-9 * self.case.multiply_adds / seconds[PROGRAM],
            "peak_gflops": 2e-9 * self.peak,
            "share": self.share,
            "multiply_adds": self.case.multiply_adds,
        }
        for name in (PROGRAM, CALL, *TORCH.values()):
            row[f"{name.replace(' ', '_')}_ms"] = 1e3 * seconds[name]
        return row | {
            "torch_ms": 1e3 * self.torch,
            "ratio": self.ratio,
            "threads": self.threads,
            "rounds": self.rounds,
            "samples": self.times.samples,
            "disturbed": self.times.disturbed,
            "target": host().name,
        }


def measure(case: Case, rounds: int, sample: float = SAMPLE) -> Row:
    """Measure a case with the threads that PyTorch is set to; WrongResult if it goes wrong."""
    used = thread_count()
    found = contenders(case)
    _check(case, found)
    program, buffers, work = peak_program(host(), used)
    run_peak = functools.partial(program.run, *(t.data_ptr() for t in buffers), threads=used)
    times = interleave({PEAK: run_peak, **found}, rounds, sample)
    return Row(case, times, work / times.seconds[PEAK], used, rounds)
