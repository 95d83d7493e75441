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
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import llvmlite.binding as llvm
import torch

from ..target import Target, host
from . import code_cache, forks
from .lanes import Emitter

CODEGEN_LEVEL = 2
"""LLVM code generation level; 0 spills registers (1.7 times slower kernels)."""

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()


@dataclass(frozen=True, eq=False)
class Kernel:
    """One compiled kernel: its address, the fields its steps pass, and its IR for who wants it."""

    name: str
    fields: tuple[str, ...]
    address: int
    owner: object
    """Owns the machine code; it lives as long as the kernel does."""
    code: bytes
    """The object file it was loaded from; empty in kernels of :func:`cached`."""
    write_ir: Callable[[], str]
    """Writes :attr:`llvm_ir`."""

    @property
    def llvm_ir(self) -> str:
        """The kernel's LLVM IR as text (built anew where the machine code came from disk)."""
        return self.write_ir()

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
    # A context of its own: what LLVM keeps in one (types, constants) goes with the module.
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = llvm.get_process_triple()
    module.data_layout = str(machine.target_data)
    return module


@functools.cache
def _jit() -> llvm.LLJIT:
    """The linker that all kernels share; each is a library of its own, which can be let go."""
    return llvm.create_lljit_compiler(_machine(host()))


_library_number = itertools.count()


def _link(name: str, code: bytes) -> tuple[int, object]:
    """The address of symbol ``name`` of an object file, and what keeps it loaded."""
    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    tracker = library.export_symbol(name).link(_jit(), f"kernel{next(_library_number)}")
    return tracker[name], tracker


def compile_kernel(emitter: Emitter, fields: tuple[str, ...]) -> Kernel:
    """Machine code for the emitter's module.

    No IR optimisation pipeline runs: the emitters write what they mean, and code generation
    alone gives equally fast kernels.
    """
    text = str(emitter.module)
    machine = _machine(emitter.target)
    # Parsing checks the syntax, not what verify() does: a wrong type would end the process.
    module = _parse(text, machine)
    module.verify()
    code = machine.emit_object(module)
    address, owner = _link(emitter.name, code)
    return Kernel(emitter.name, fields, address, owner, code, lambda: text)


STACK = 16 << 20
"""Bytes of stack for compiling: emitters and LLVM recurse, in whatever thread asks for a kernel."""

Made = TypeVar("Made")

_deep = threading.local()
_starting = forks.lock()


def on_deep_stack(work: Callable[[], Made]) -> Made:
    """``work()``, in a thread of its own unless this is one with a deep stack already.

    Threads may have as little as 64 KiB (``threading.stack_size``), and PyTorch lives there.
    """
    if threading.current_thread() is threading.main_thread() or hasattr(_deep, "here"):
        return work()
    result: Future[Made] = Future()

    def run() -> None:
        _deep.here = True
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="neocog-compile", daemon=True)
    with _starting:  # the size is the whole process's
        before = threading.stack_size(STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


def cached(emit: Callable[..., Kernel], *args: Any) -> Kernel:
    """The kernel that ``emit(*args)`` compiles, from disk if it was compiled before."""
    return on_deep_stack(lambda: _cached(emit, *args))


def _cached(emit: Callable[..., Kernel], *args: Any) -> Kernel:
    key = code_cache.key(emit, args, f"O{CODEGEN_LEVEL}")
    entry = None if key is None else code_cache.load(key)
    if entry is None:
        kernel = emit(*args)
        if key is not None:
            code_cache.store(key, code_cache.Entry(kernel.name, kernel.fields, kernel.code))
        # Text and object file are larger than the machine code; few ask for them.
        return replace(kernel, code=b"", write_ir=lambda: emit(*args).llvm_ir)
    address, owner = _link(entry.name, entry.code)
    return Kernel(entry.name, entry.fields, address, owner, b"", lambda: emit(*args).llvm_ir)


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


def thread_count() -> int:
    """Threads a program may use now: ``torch.get_num_threads()``, or 1 where it must be serial."""
    return 1 if forks.generation() or not openmp().parallel else torch.get_num_threads()


def threading_note() -> str:
    """One line for ``neocog doctor``."""
    if forks.generation():
        return "serial: this process was forked, and GNU OpenMP hangs in a forked child"
    if not openmp().parallel:
        return "serial: torch brings no GNU OpenMP here"
    return f"torch's OpenMP pool, {torch.get_num_threads()} threads (torch.set_num_threads)"
