"""Programs: chains of kernel steps as plain data, planned once and run by one native call.

A program holds no addresses of tensors. Each step names its kernel, its number of work items and
its fields; a pointer field is a place: a buffer and an offset into it. Buffers have kinds:

- *call* buffers (inputs, parameters, outputs, saved tensors) whose addresses arrive with each
  call, in the order of ``Program.names``;
- *constants* (tap tables), owned by the program;
- the *arena*: scratch shared by all threads of one call, one arena per concurrent caller;
- *thread scratch*: a part of the arena that each thread has for itself.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from .cpu import runtime
from .cpu.runtime import Kernel

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""

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

    def words(self, scratch: dict[str, Place | int]) -> list[int]:
        """The fields as the kernel reads them: a pointer as (buffer, byte offset), integers."""
        fields = self.fields | scratch
        given, words = set(fields), []
        for name in self.kernel.fields:
            value = fields[name.rstrip("*")]
            given.discard(name.rstrip("*"))
            if isinstance(value, Place):
                words += [value.buffer, 4 * value.offset]
            else:
                words.append(int(value))
        if given:
            raise ValueError(f"{self.kernel.name} has no fields {sorted(given)}")
        return words


@dataclass
class Program:
    """Steps and their memory; built by :mod:`neocog.compiler`, then run any number of times."""

    names: tuple[str, ...]
    """The call buffers, in the order :meth:`run` takes their addresses."""
    steps: list[Step] = field(default_factory=list)
    work: int = 0
    """Multiply-adds of all steps: decides whether threads are worth waking."""
    _arena: int = 0
    _thread_scratch: list[tuple[Step, str, int]] = field(default_factory=list)
    _constants: list[np.ndarray] = field(default_factory=list)
    _constant_words: int = 0
    _built: dict[int, tuple] = field(default_factory=dict)

    def buffer(self, name: str) -> Place:
        """The call buffer called ``name``."""
        return Place(FIRST_CALL_BUFFER + self.names.index(name))

    def scratch(self, elements: int) -> Place:
        """``elements`` float32 of the arena, with slack behind them.

        The slack lets kernels read whole blocks of channels at the end of the last row.
        """
        place = Place(ARENA, self._arena)
        line = ALIGNMENT // 4
        self._arena += -(-(elements + SLACK) // line) * line
        return place

    def constant(self, values: list[int]) -> Place:
        """A table of int64 owned by the program."""
        place = Place(CONSTANTS, 2 * self._constant_words)
        self._constants.append(np.asarray(values, dtype=np.int64))
        self._constant_words += len(values)
        return place

    def step(self, kernel: Kernel, items: int, **fields: Place | int) -> Step:
        """Append a step; steps without work are dropped."""
        made = Step(kernel, items, fields)
        if items > 0:
            self.steps.append(made)
        return made

    def thread_scratch(self, step: Step, name: str, elements: int) -> None:
        """Give ``step`` ``elements`` float32 per thread: fields ``name`` and ``name_stride``."""
        self._thread_scratch.append((step, name, elements))

    def __str__(self) -> str:
        lines = [f"program({', '.join(self.names)}): {self.work} multiply-adds"]
        for s in self.steps:
            lines.append(f"  {s.kernel.name} x{s.items} " + _spell(s.fields, self.names))
        return "\n".join(lines)

    # ------------------------------------------------------------------------------- running

    def _table(self, threads: int) -> tuple:
        """(program words, arena bytes, constants, field tables) for a number of threads."""
        built = self._built.get(threads)
        if built is None:
            built = self._built[threads] = self._build(threads)
        return built

    def _build(self, threads: int) -> tuple:
        arena = self._arena
        line = ALIGNMENT // 4
        scratch: dict[int, dict[str, Place | int]] = {}
        for step, name, elements in self._thread_scratch:
            stride = -(-(elements + line) // line) * line
            scratch[id(step)] = {name: Place(ARENA, arena), f"{name}_stride": stride}
            arena += stride * threads
        tables = [np.asarray(s.words(scratch.get(id(s), {})), np.int64) for s in self.steps]
        omp = runtime.openmp()
        words = [len(self.steps), omp.parallel, omp.barrier, omp.thread_num, omp.num_threads]
        for step, table in zip(self.steps, tables, strict=True):
            words += [step.kernel.address, step.items, table.ctypes.data]
        constants = np.concatenate([*self._constants, np.zeros(1, np.int64)])
        program = np.asarray(words, dtype=np.int64)
        kind = ctypes.c_void_p * (FIRST_CALL_BUFFER + len(self.names))
        return (
            program.ctypes.data,
            4 * arena,
            constants.ctypes.data,
            kind,
            (program, tables, constants),
        )

    def run(self, *addresses: int, threads: int | None = None) -> None:
        """Run all steps; ``addresses`` are the call buffers', in the order of ``names``."""
        if not self.steps:
            return
        if threads is None:
            threads = 1 if self.work < SERIAL_WORK else runtime.thread_count()
        program, arena_bytes, constants, kind, _ = self._table(threads)
        bases = kind(constants, _arena_of_this_thread(arena_bytes), *addresses)
        runtime.launch(bases, program, threads)


def _spell(fields: dict[str, Place | int], names: tuple[str, ...]) -> str:
    kinds = ("constants", "arena", *names)
    return " ".join(
        f"{k}={kinds[v.buffer]}+{v.offset}" if isinstance(v, Place) else f"{k}={v}"
        for k, v in fields.items()
    )


_local = threading.local()


def _arena_of_this_thread(size: int) -> int:
    """The address of this thread's arena, grown to at least ``size`` bytes and then kept.

    A fresh allocation per call would pay for page faults each time. The arena is as large as the
    largest program this thread has run.
    """
    arena = getattr(_local, "arena", None)
    if arena is None or arena.numel() < size + ALIGNMENT:
        _local.arena = None  # free the old one before the new one is made
        arena = _local.arena = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    return -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT
