"""What neocog finds on this machine, and whether its kernels work here."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch

from . import benchmark, compiler
from .cpu import runtime
from .handback import COVERED, HANDED_BACK
from .maps import NHWC
from .target import TARGETS, Target, host, host_features

SELF_TEST = "conv n4 c5x9x9 k19 3x3 p1 | bias | relu | max 2x2"
"""Channels that fill no vector, rows and columns left over, and enough work to wake threads."""


@dataclass(frozen=True)
class SelfTest:
    """Whether a block and its gradients came out as PyTorch's, number for number."""

    ok: bool
    block: str
    compile_ms: float | None
    """For both programs, kernels compiled before not counted; None if that failed."""
    message: str
    """Empty if ok."""


def self_test() -> SelfTest:
    """Compiles a small block and its gradients and compares the results with PyTorch's."""
    compile_ms = None
    try:
        block = benchmark.Case(SELF_TEST).block
        _, into, rows, cols = block.conv.weight_shape
        strides = (into * rows * cols, rows * cols, cols, 1)
        start = time.perf_counter()
        compiler.forward(block, NHWC, strides, NHWC)
        compiler.backward(block, NHWC, NHWC, strides, NHWC, NHWC, ("x", "w", "bias"))
        compile_ms = 1e3 * (time.perf_counter() - start)
        for backward in (False, True):
            benchmark.check(benchmark.Case(SELF_TEST, backward))
    except Exception as error:  # whatever it is, the diagnosis is to say it
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return SelfTest(False, SELF_TEST, compile_ms, message)
    return SelfTest(True, SELF_TEST, compile_ms, "")


def diagnosis() -> dict[str, Any]:
    """Everything ``neocog doctor`` says, plain enough for JSON; ``ok`` is the self test's."""
    chosen, test = host(), self_test()
    return {
        "ok": test.ok,
        "versions": versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {"name": cpu_name(), "llvm_name": llvm.get_host_cpu_name()},
        "target": {
            "name": chosen.name,
            "lanes": chosen.lanes,
            "bits": 32 * chosen.lanes,
            "reasons": {row.name: reason(row) for row in TARGETS},
        },
        "threads": runtime.threading_note(),
        "covered": dict(COVERED),
        "handed_back": dict(HANDED_BACK),
        "self_test": asdict(test),
    }


def versions() -> dict[str, str]:
    """Of neocog and what it stands on."""
    return {
        "neocog": metadata.version("neocog"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": torch.__version__,
        "llvmlite": metadata.version("llvmlite"),
        "llvm": ".".join(map(str, llvm.llvm_version_info)),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it, or its architecture."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def reason(row: Target) -> str:
    """Why a row of the table of targets was chosen, or was not."""
    if row is host():
        has = ", ".join(sorted(row.requires)) or "nothing"
        return f"chosen: the first row that this processor can run (needs {has})"
    missing = sorted(row.requires - host_features())
    if missing:
        return f"this processor has no {', '.join(missing)}"
    return f"would run too, but {host().name} comes first"
