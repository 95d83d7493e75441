"""What every process of a race is, whatever it races: it reads requests, measures, and answers.

A request is one JSON object a line: ``{"do": "time", "seconds": 0.2}`` calls ``time(seconds=0.2)``
of a contender. An answer is ``{"ok": true, ...}``, or ``{"ok": false, "reason": "..."}``. The
process ends when stdin does. Whatever libraries print goes to stderr. Needs Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

Run = Callable[[], Any]
"""One call of what is measured."""

Mode = Callable[[], contextlib.AbstractContextManager[Any]]
"""PyTorch's mode in which something runs, as ``torch.inference_mode``."""

LONG_CALL = 0.25
"""Seconds from which on a call warms the caches for itself."""


class Answers(Protocol):
    """What :func:`serve` asks: an object with a method for each request."""

    mode: Mode


def seconds_of(run: Run) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_call(run: Run, seconds: float) -> dict[str, Any]:
    """The median call among those of about so many seconds, one at least, and how many there were.

    One that is not counted warms the caches, unless a call is as long as :data:`LONG_CALL`.
    """
    taken = seconds_of(run)
    if taken < LONG_CALL:  # else it counts, for it has warmed the caches for itself
        taken = seconds_of(run)
    calls = [taken, *(seconds_of(run) for _ in range(int(seconds / taken)))]
    return {"ms": 1e3 * statistics.median(calls), "calls": len(calls)}


def processor_peak(threads: int) -> float:
    """Multiply-adds per second of the processor in registers, on so many threads."""
    from .benchmark import peak_program
    from .target import host

    program, buffers, work = peak_program(host(), threads)
    addresses = [t.data_ptr() for t in buffers]
    run = functools.partial(program.run, *addresses, threads=threads)
    seconds_of(run)
    return work / seconds_of(run)


def resident(field: str) -> int:
    """Bytes of memory, from Linux: VmRSS, those now, or VmHWM, their peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """VmHWM starts anew from VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def serve(contender: Answers, requests: TextIO, answers: TextIO) -> None:
    """Answers one request after the other, until nobody asks any more."""
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        try:
            with contender.mode():
                answer = {"ok": True, **getattr(contender, name)(**request)}
        except Exception as error:  # whatever goes wrong in an engine is a row of the race
            answer = failed(error)
        print(json.dumps(answer), file=answers, flush=True)


def failed(error: Exception) -> dict[str, Any]:
    """The answer that says why there is none, in one line."""
    lines = str(error).strip().splitlines() or ["(no message)"]
    return {"ok": False, "reason": f"{type(error).__name__}: {lines[0]}"[:300]}


@contextlib.contextmanager
def answering() -> Iterator[TextIO]:
    """Our stdout for answers alone; what others print to it, in C too, goes to stderr.

    From now on the process ends with its parent.
    """
    _end_with_the_parent()
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        yield answers


def _end_with_the_parent() -> None:
    """Else a conductor that is killed would leave stopped processes behind for ever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
