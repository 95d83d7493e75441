"""Machine code and threads: LLVM modules become functions, steps run in torch's OpenMP pool.

Threads: one ``GOMP_parallel`` region per program, opened from compiled code, in the libgomp that
torch itself loaded, so that neocog and torch share one pool and ``torch.set_num_threads`` holds
for both. Where torch brings no GNU OpenMP (macOS, Windows), and in a forked child (libgomp hangs
there when its parent used threads), programs run on the calling thread; :func:`threading_note`
says which.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from ..target import Target, host
from .lanes import I32, I64, KERNEL_TYPE, PTR, VOID, Emitter

CODEGEN_LEVEL = 2
"""LLVM code generation level; 0 spills registers (1.7 times slower kernels)."""

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

_compile_lock = threading.Lock()  # LLVM contexts are not shared between threads at the same time


@dataclass(frozen=True, eq=False)
class Kernel:
    """One compiled kernel: its address, the fields its steps pass, and its IR for who wants it."""

    name: str
    fields: tuple[str, ...]
    address: int
    engine: object
    """Owns the machine code; it lives as long as the kernel does."""
    llvm_ir: str

    def assembly(self, target: Target) -> str:
        """The kernel's machine code as text, compiled anew (for inspection)."""
        machine = _machine(target)
        return machine.emit_assembly(_parse(self.llvm_ir, machine))


def _machine(target: Target) -> llvm.TargetMachine:
    cpu, features = target.cpu, target.features
    if not cpu and target is host() and target.requires:
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(
        cpu=cpu, features=features, opt=CODEGEN_LEVEL, jit=True, codemodel="jitdefault"
    )


def _parse(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    module = llvm.parse_assembly(text)
    module.triple = llvm.get_process_triple()
    module.data_layout = str(machine.target_data)
    module.verify()
    return module


def compile_kernel(emitter: Emitter, fields: tuple[str, ...]) -> Kernel:
    """Machine code for the emitter's module.

    No IR optimisation pipeline runs: the emitters write what they mean, and code generation
    alone gives equally fast kernels.
    """
    text = str(emitter.module)
    with _compile_lock:
        machine = _machine(emitter.target)
        module = _parse(text, machine)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        address = engine.get_function_address(emitter.name)
    return Kernel(emitter.name, fields, address, engine, text)


# -------------------------------------------------------------------------------------- threads


@dataclass(frozen=True)
class OpenMP:
    """Addresses of the OpenMP entry points that the driver calls; all 0 where there are none."""

    parallel: int = 0
    barrier: int = 0
    thread_num: int = 0
    num_threads: int = 0


@functools.cache
def openmp() -> OpenMP:
    """The GNU OpenMP runtime that torch loaded, if it did."""
    path = _libgomp()
    if path is None:
        return OpenMP()
    lib = ctypes.CDLL(path)
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    return OpenMP(*(ctypes.cast(getattr(lib, n), ctypes.c_void_p).value or 0 for n in names))


def _libgomp() -> str | None:
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
    # Another library may bring its own libgomp; torch's pool is the one to share.
    torch_root = os.path.dirname(os.path.realpath(torch.__file__))
    ours = sorted(paths, key=lambda p: (not os.path.realpath(p).startswith(torch_root), p))
    return ours[0] if ours else None


_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def thread_count() -> int:
    """Threads a program may use now: ``torch.get_num_threads()``, or 1 where it must be serial."""
    return 1 if _forked or not openmp().parallel else torch.get_num_threads()


def threading_note() -> str:
    """One line for ``neocog doctor``."""
    if _forked:
        return "serial: this process was forked, and GNU OpenMP hangs in a forked child"
    if not openmp().parallel:
        return "serial: torch brings no GNU OpenMP here"
    return f"torch's OpenMP pool, {torch.get_num_threads()} threads (torch.set_num_threads)"


# --------------------------------------------------------------------------------------- driver

STEP_WORDS = 3
"""A step in the program table: kernel address, work items, address of its fields."""
HEADER_WORDS = 5
"""The program table's head: the number of steps, then the addresses of :class:`OpenMP`."""


@functools.cache
def _driver() -> tuple[Callable[..., None], Kernel]:
    """The compiled ``launch(bases, program, threads)`` that runs a program table, and its owner.

    Every thread walks all steps, does its contiguous share of each step's items and waits at a
    barrier between steps. With one thread there is no region and no barrier.
    """
    e = Emitter(host(), "launch")
    with e.function("region", [PTR]) as (region, (context,)):
        # The team may be smaller than asked for: inside another region, or under a thread limit.
        program, count = e.load(PTR, context, 1), ir.FunctionType(I32, [])
        number, threads = (e.call_address(e.load(I64, program, slot), count) for slot in (3, 4))
        _walk(e, context, e.b.sext(threads, I64), e.b.sext(number, I64), parallel=True)
    with e.function("alone", [PTR]) as (alone, (context,)):
        _walk(e, context, I64(1), I64(0), parallel=False)
    with e.function("launch", [PTR, PTR, I64], internal=False) as (_, (bases, program, threads)):
        context = e.stack(2)
        for slot, value in enumerate((bases, program)):
            e.b.store(value, e.at_byte(context, 8 * slot))

        def fork() -> None:
            kind = ir.FunctionType(VOID, [PTR, PTR, I32, I32])
            work = [region, context, e.b.trunc(threads, I32), I32(0)]
            e.call_address(e.load(I64, program, 1), kind, work)

        e.choose(e.less(1, threads), fork, lambda: e.b.call(alone, [context]) and None)
    kernel = compile_kernel(e, ())
    launch = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
        kernel.address
    )
    return launch, kernel


def _walk(e: Emitter, context, threads, thread, parallel: bool) -> None:
    bases, program = e.load(PTR, context, 0), e.load(PTR, context, 1)

    def step(number) -> None:
        record = e.at_byte(program, e.mul(e.add(e.mul(number, STEP_WORDS), HEADER_WORDS), 8))
        items = e.load(I64, record, 1)
        begin = e.divmod(e.mul(items, thread), threads)[0]
        end = e.divmod(e.mul(items, e.add(thread, 1)), threads)[0]
        work = [bases, e.load(PTR, record, 2), begin, end, thread]
        kernel = e.load(I64, record, 0)
        e.choose(e.less(begin, end), lambda: e.call_address(kernel, KERNEL_TYPE, work) and None)
        if parallel:
            e.call_address(e.load(I64, program, 2), ir.FunctionType(VOID, []))

    e.loop(0, e.load(I64, program, 0), step)


def launch(bases: object, program: int, threads: int) -> None:
    """Run the program table at address ``program`` on the buffers in ``bases`` (a ctypes array)."""
    _driver()[0](bases, program, threads)
