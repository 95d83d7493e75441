"""Programs: chains of kernel steps as plain data, planned once and run by one native call.

A program holds no addresses of tensors. Each step names its kernel, its number of work items and
its fields; a pointer field is a place: a buffer and an offset into it. Buffers have kinds:

- *call* buffers (inputs, parameters, outputs, saved tensors) whose addresses arrive with each
  call, in the order of ``Program.names``;
- *constants* (tap tables), owned by the program;
- the *arena*: scratch shared by all threads of one call, one arena per concurrent caller;
- *thread scratch*: a part of the arena that each thread has for itself;
- *parts* of call buffers, which serve as scratch while they hold nothing.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .cpu import driver, runtime
from .cpu.runtime import Kernel
from .lifetimes import Lent, Life, arrange
from .memory import POOL

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""

LINE = ALIGNMENT // 4
"""float32 of a cache line."""

SLACK = 80
"""float32 behind every scratch buffer: more than any register tile is wide."""

SERIAL_WORK = 100_000
"""Multiply-adds (or their like in moved elements) below which waking threads costs more."""


@dataclass(frozen=True)
class Place:
    """``offset`` float32 elements into buffer number ``buffer``."""

    buffer: int
    offset: int = 0

    def __add__(self, elements: int) -> Place:
        return Place(self.buffer, self.offset + elements)


CONSTANTS, ARENA, FIRST_CALL_BUFFER = 0, 1, 2


@dataclass
class Step:
    """One kernel over ``items`` pieces of work."""

    kernel: Kernel
    items: int
    fields: dict[str, Place | int]
    about: object = None
    """What it is a step of: see :attr:`Program.about`."""
    alongside: bool = False
    """Whether the next step may run at the same time: it does not touch what this one writes."""

    def words(self, homes: Mapping[int, Place]) -> list[int]:
        """The fields as the kernel reads them: a pointer as (buffer, byte offset), integers.

        ``homes``: where the buffers are that stand in others.
        """
        given, words = set(self.fields), []
        for name in self.kernel.fields:
            value = self.fields[name.rstrip("*")]
            given.discard(name.rstrip("*"))
            if isinstance(value, Place):
                place = homes.get(value.buffer, Place(value.buffer)) + value.offset
                words += [place.buffer, 4 * place.offset]
            else:
                words.append(int(value))
        if given:
            raise ValueError(f"{self.kernel.name} has no fields {sorted(given)}")
        return words


@dataclass(frozen=True)
class Scratch:
    """A buffer of the program's own, or a part of a call buffer that serves as such."""

    size: int
    """float32 elements, the slack behind them included."""
    section: int | None = None
    """The section in each of whose iterations it is made anew."""
    part: Place | None = None
    """Where it stands, if it is a part of a call buffer."""
    given: bool = False
    """Whether a part holds something at the start, not at the end."""
    each: bool = False
    """Whether every thread has one."""


def whole_lines(elements: int) -> int:
    """As many float32 elements, filled up to whole cache lines."""
    return -(-elements // LINE) * LINE


@dataclass
class Section:
    """Consecutive steps that run ``iterations`` times, each on the next images of the batch."""

    first: int
    """The number of its first step."""
    iterations: int = 1
    buffer: int = ARENA
    """Memory of one iteration."""
    moves: list[tuple[int, Place, int]] = field(default_factory=list)
    """Virtual buffers: (number, where it starts, elements it moves on by per iteration)."""

    def private(self, threads: int) -> bool:
        """Whether each thread runs whole iterations by itself."""
        return self.iterations > 1 and self.iterations % threads == 0


@dataclass
class Program:
    """Steps and their memory; built by :mod:`neocog.compiler`, then run any number of times."""

    names: tuple[str, ...]
    """The call buffers, in the order :meth:`run` takes their addresses."""
    steps: list[Step] = field(default_factory=list)
    work: int = 0
    """Multiply-adds of all steps: decides whether threads are worth waking."""
    sections: list[Section] = field(default_factory=lambda: [Section(0)])
    about: object = None
    """What steps from now on belong to, for whoever shows the program."""
    _scratch: list[Scratch] = field(default_factory=list)
    _virtual: int = 0
    _thread_scratch: list[tuple[int, int, Step, str]] = field(default_factory=list)
    """(section, which scratch, whose, under which name)."""
    _constants: list[np.ndarray] = field(default_factory=list)
    _constant_words: int = 0
    _built: dict[int, tuple] = field(default_factory=dict)

    def buffer(self, name: str) -> Place:
        """The call buffer called ``name``."""
        return Place(FIRST_CALL_BUFFER + self.names.index(name))

    def section(self, iterations: int = 1) -> None:
        """Steps from now on belong to a new section."""
        last = self.sections[-1]
        if last.first == len(self.steps) and last.iterations == 1:
            self.sections.pop()  # nothing happened in it: it would only cost a barrier
        made = Section(len(self.steps), iterations)
        if iterations > 1:
            made.buffer = self._new_buffer()
        self.sections.append(made)

    def _new_buffer(self) -> int:
        self._virtual += 1
        return FIRST_CALL_BUFFER + len(self.names) + self._virtual - 1

    def moving(self, place: Place, elements: int) -> Place:
        """``place`` in the first iteration of this section, then ``elements`` further each time."""
        number = self._new_buffer()
        self.sections[-1].moves.append((number, place, elements))
        return Place(number)

    def scratch(self, elements: int, shared: bool = False, slack: int = SLACK) -> Place:
        """``elements`` float32 of scratch, with slack behind them.

        It lasts from the first to the last step that names it. The slack lets kernels read whole
        blocks of channels at the end of the last row. ``shared``: outlives an iteration of this
        section.
        """
        number = len(self.sections) - 1
        own = self.sections[number].iterations > 1 and not shared
        self._scratch.append(Scratch(whole_lines(elements + slack), number if own else None))
        return Place(-len(self._scratch))

    def lend(self, place: Place, elements: int, given: bool) -> Place:
        """A part of a call buffer, which serves as scratch as long as it holds nothing.

        ``given``: it holds something from the start on, and nothing behind the last step that names
        it. Else it is a result: it holds nothing before the first step that names it. Parts start
        and end with cache lines.
        """
        self._scratch.append(Scratch(elements, None, place, given))
        return Place(-len(self._scratch))

    def constant(self, values: list[int]) -> Place:
        """A table of int64 owned by the program."""
        place = Place(CONSTANTS, 2 * self._constant_words)
        self._constants.append(np.asarray(values, dtype=np.int64))
        self._constant_words += len(values)
        return place

    def step(self, kernel: Kernel, items: int, **fields: Place | int) -> Step:
        """Append a step; steps without work are dropped."""
        made = Step(kernel, items, fields, self.about)
        if items > 0:
            self.steps.append(made)
        return made

    def thread_scratch(self, step: Step, name: str, elements: int) -> None:
        """Give ``step`` ``elements`` float32 per thread: fields ``name`` and ``name_stride``.

        Nothing in it lasts. The steps of a section that runs several times share theirs, for
        threads may be at different ones.
        """
        number, size = len(self.sections) - 1, whole_lines(elements) + LINE
        shared = self.sections[number].iterations > 1
        at = next((i for n, i, *_ in self._thread_scratch if shared and n == number), None)
        if at is None:
            at = len(self._scratch)
            self._scratch.append(Scratch(size, each=True))
        self._scratch[at] = replace(self._scratch[at], size=max(size, self._scratch[at].size))
        self._thread_scratch.append((number, at, step, name))
        step.fields[name] = Place(-1 - at)

    def __str__(self) -> str:
        lines = [f"program({', '.join(self.names)}): {self.work} multiply-adds"]
        starts = {s.first: s for s in self.sections if s.iterations > 1}
        for number, s in enumerate(self.steps):
            if number in starts:
                lines.append(f"  {starts[number].iterations} times:")
            lines.append(f"  {s.kernel.name} x{s.items} " + _spell(s.fields, self.names))
        return "\n".join(lines)

    # ------------------------------------------------------------------------------- running

    def _table(self, threads: int) -> tuple:
        """(program words, arena bytes, constants, field tables) for a number of threads."""
        built = self._built.get(threads)
        if built is None:
            built = self._built[threads] = self._build(threads)
        return built

    def _homes(self, threads: int) -> tuple[dict[int, Place], dict[int | None, int]]:
        """Where each scratch buffer stands, and the size of each section's own and of the arena."""
        lives = self._lives(threads)
        numbered = [(-1 - i, s) for i, s in enumerate(self._scratch)]
        homes = {n: s.part for n, s in numbered if s.part is not None}
        sizes: dict[int | None, int] = {None: 0}
        starts_of, parts = self._parts([(place, lives[n]) for n, place in homes.items()])
        for section in dict.fromkeys(s.section for s in self._scratch):
            own = {n: lives[n] for n, s in numbered if s.section == section and s.part is None}
            lent = parts if section is None else Lent()
            starts, sizes[section] = arrange(list(own.values()), lent)
            memory = ARENA if section is None else self.sections[section].buffer
            for number, start in zip(own, starts, strict=True):
                homes[number] = Place(memory, start - lent.size)
                if start < lent.size:
                    buffer = max((b for b, first in starts_of.items() if first <= start),
                                 key=lambda b: starts_of[b])  # fmt: skip
                    homes[number] = Place(buffer, start - starts_of[buffer])
        return homes, sizes

    @staticmethod
    def _parts(parts: Sequence[tuple[Place, Life]]) -> tuple[dict[int, int], Lent]:
        """All call buffers with parts one behind the other: where each starts, and their use."""
        starts: dict[int, int] = {}
        used, end = [], 0
        for buffer in dict.fromkeys(place.buffer for place, _ in parts):
            starts[buffer] = end
            own = [(end + place.offset, life) for place, life in parts if place.buffer == buffer]
            end = max(at + life.size for at, life in own)
            wall = Life(LINE, -math.inf, math.inf)  # nothing stands in two buffers
            used += [*own, (end, wall)]
            end += wall.size
        return starts, Lent(end, used)

    def _lives(self, threads: int) -> dict[int, Life]:
        """When each scratch buffer is in use.

        Steps that run alongside each other happen in one moment; and so, for whoever outlives an
        iteration, do all steps of a section that has several.
        """
        moments = [0] * (len(self.steps) + 1)
        for i, step in enumerate(self.steps):
            moments[i + 1] = moments[i] + (not step.alongside)
        named: dict[int, list[int]] = {}
        bounds = [*(s.first for s in self.sections[1:]), len(self.steps)]
        for number, (section, stop) in enumerate(zip(self.sections, bounds, strict=True)):
            bases = {moving: place.buffer for moving, place, _ in section.moves}
            for i in range(section.first, stop):
                places = [p for p in self.steps[i].fields.values() if isinstance(p, Place)]
                for buffer in (bases.get(p.buffer, p.buffer) for p in places):
                    seen = named.setdefault(buffer, [])
                    seen.append(moments[i])
                    lasts = buffer < 0 and self._scratch[-1 - buffer].section != number
                    if section.iterations > 1 and lasts:
                        seen += moments[section.first], moments[stop - 1]
        lives = {}
        for number, scratch in enumerate(self._scratch):
            seen = named.get(-1 - number, [])
            first: float = min(seen, default=0)
            last: float = max(seen, default=-1)
            if scratch.part is not None:
                first, last = (-1, last) if scratch.given else (first, math.inf)
            size = scratch.size * (threads if scratch.each else 1)
            lives[-1 - number] = Life(size, first, last)
        return lives

    def _build(self, threads: int) -> tuple:
        homes, sizes = self._homes(threads)
        arena = sizes[None]
        for _, at, step, name in self._thread_scratch:
            step.fields[f"{name}_stride"] = self._scratch[at].size
        tables = [np.asarray(s.words(homes), np.int64) for s in self.steps]
        own = arena  # one section's own scratch is the next one's
        steps = np.asarray(
            [
                (s.kernel.address, s.items, table.ctypes.data, int(s.alongside))
                for s, table in zip(self.steps, tables, strict=True)
            ],
            np.int64,
        ).reshape(-1, len(driver.STEP))
        moves, words = [], []
        bounds = [*(s.first for s in self.sections[1:]), len(self.steps)]
        for number, (section, stop) in enumerate(zip(self.sections, bounds, strict=True)):
            private, size = section.private(threads), sizes.get(number, 0)
            arena = max(arena, own + size * (threads if private else 1))
            places = [(n, homes.get(p.buffer, Place(p.buffer)) + p.offset, by)
                      for n, p, by in section.moves]  # fmt: skip
            made = [(n, p.buffer, 4 * p.offset, 4 * by, 0) for n, p, by in places]
            if section.iterations > 1:
                made.append((section.buffer, ARENA, 4 * own, 0, 4 * size * private))
            moves.append(np.asarray(made, np.int64).reshape(-1, len(driver.MOVE)))
            words += [int(private), section.iterations, len(made), moves[-1].ctypes.data,
                      stop - section.first, steps[section.first :].ctypes.data]  # fmt: skip
        buffers = FIRST_CALL_BUFFER + len(self.names)
        omp, line = runtime.openmp(), 8 * whole_lines(buffers + self._virtual)
        head = [len(self.sections), omp.parallel, omp.barrier, omp.thread_num, omp.num_threads,
                buffers, self._virtual, 4 * arena, line]  # fmt: skip
        constants = np.concatenate([*self._constants, np.zeros(1, np.int64)])
        program = np.asarray(head + words, dtype=np.int64)
        kind = ctypes.c_void_p * buffers
        return (
            program.ctypes.data,
            4 * arena + line * threads,
            constants.ctypes.data,
            kind,
            (program, tables, steps, moves, constants),
        )

    def run(self, *addresses: int, fixed: Sequence[int] = (), threads: int | None = None) -> None:
        """Run all steps; ``addresses`` and ``fixed`` are the call buffers', in order of ``names``.

        ``fixed``: addresses of the last buffers as one sequence, for callers that have it ready.
        """
        if not self.steps:
            return
        if threads is None:
            threads = 1 if self.work < SERIAL_WORK else runtime.thread_count()
        program, arena_bytes, constants, kind, _ = self._table(threads)
        arena = _arena_of_this_thread(arena_bytes)
        start = -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        bases = kind(constants, start, *addresses, *fixed)
        driver.launch(bases, program, threads)


def _spell(fields: dict[str, Place | int], names: tuple[str, ...]) -> str:
    kinds = dict(enumerate(("constants", "arena", *names)))
    return " ".join(
        f"{k}={kinds.get(v.buffer, v.buffer)}+{v.offset}" if isinstance(v, Place) else f"{k}={v}"
        for k, v in fields.items()
    )


_local = threading.local()


def _arena_of_this_thread(size: int) -> Tensor:
    """This thread's arena, grown to at least ``size`` bytes, from :data:`ALIGNMENT` on, and kept.

    A fresh allocation per call would pay for page faults each time. The arena is as large as the
    largest program this thread has run.
    """
    arena = getattr(_local, "arena", None)
    if arena is None or arena.numel() < size + ALIGNMENT:
        _local.arena = None  # free the old one before the new one is made
        arena = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
        if POOL.holds:
            _local.arena = arena
    return arena


def held_memory() -> int:
    """Bytes that training holds in use or ready, and the arena of this thread."""
    arena = getattr(_local, "arena", None)
    return POOL.size + (0 if arena is None else arena.numel())


def free_memory() -> None:
    """Give back the memory that is held ready: of training, and this thread's scratch.

    The next step takes it anew, which costs it the time that fresh pages take.
    """
    POOL.clear()
    _local.arena = None
