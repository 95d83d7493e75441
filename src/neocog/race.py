"""The race: neocog beside the engines a user could pick instead, each in a process of its own.

Several OpenMP runtimes in one process, or in several that compute at once, poison each other:
their idle threads spin. Here a conductor holds all children of a case but one stopped (SIGSTOP),
lets them take turns in rounds, and waits a moment before each turn. A result is checked against
PyTorch's in float64 before it is timed. What goes wrong in a child becomes a row that says why.

Needs Linux, and for the peers a Python with ``benchmarks/peers.txt`` and neocog in it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .contenders import ENGINES, Task
from .errors import NeocogError

FREEZE, COMPILE, INDUCTOR = "neocog-freeze", "neocog-compile", "inductor"

WRONG = 1e-3
"""max|error| / max|reference| from which on a result is wrong, and its time means nothing."""

Row = dict[str, Any]


def command_of(python: str) -> tuple[str, ...]:
    """How an interpreter is asked to be a contender."""
    return (python, "-m", "neocog.contenders")


class Failed(NeocogError):
    """A child died, gave no answer in time, or answered that it failed."""


@dataclass(frozen=True)
class Case:
    """One network with one batch size on so many threads."""

    network: str
    batch: int
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.network}, batch {self.batch}, {threads}"


@dataclass(frozen=True)
class Settings:
    """How the race is run."""

    folder: Path
    """For converted networks, references, caches and logs; empty at the start."""
    rounds: int = 7
    sample: float = 0.2
    """Seconds of each turn, if a call does not take longer."""
    pause: float = 0.05
    """Seconds before each turn."""
    timeout: float = 900
    """Seconds for one answer."""
    goodbye: float = 5
    """Seconds for a process to end by itself."""
    command: Sequence[str] = command_of(sys.executable)


class Child:
    """A process that computes one task, stopped unless it is asked something.

    A context manager: at its end the process is gone, whatever happened.
    """

    def __init__(
        self, task: Task, settings: Settings, environment: Mapping[str, str] | None = None
    ) -> None:
        self.task = task
        self.settings = settings
        self.log = settings.folder / f"{task.engine}.log"
        caches = settings.folder / "caches" / task.engine
        surroundings = os.environ | {
            "OMP_NUM_THREADS": str(task.threads),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "NEOCOG_CACHE_DIR": str(caches / "neocog"),
            **(environment or {}),
        }
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    [*settings.command, *task.arguments()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=surroundings,
                )
            except OSError as error:
                raise Failed(f"starting it: {error}") from None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it may hold a request that nobody has read
            self.process.stdin.close()
        self.process.send_signal(signal.SIGCONT)
        self._end()
        self.process.stdout.close()

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """The answer to one request; Failed if there is none, or none in time."""
        request = json.dumps({"do": do, **more})
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.write(f"{request}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._death(do)) from None
        ready, _, _ = select.select([self.process.stdout], [], [], self.settings.timeout)
        if not ready:
            self.process.kill()
            raise Failed(f"{do}: no answer within {self.settings.timeout:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(self._death(do))
        self.process.send_signal(signal.SIGSTOP)
        try:
            answer = json.loads(line)
        except ValueError:
            raise Failed(f"{do}: answered {line.decode(errors='replace').strip()!r}") from None
        if not answer.pop("ok"):
            raise Failed(f"{do}: {answer['reason']}")
        return answer

    def _end(self) -> int:
        """The exit code of a process that is about to end, or has to."""
        try:
            return self.process.wait(self.settings.goodbye)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _death(self, do: str) -> str:
        code = self._end()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{do}: the process ended with {how}: {lines[-1] if lines else 'it said nothing'}"


class Conductor:
    """Lets engines take turns: what every race has in common.

    Attributes:
        measures_limit: the engine whose process also measures the processor's peak.
    """

    measures_limit = FREEZE

    def __init__(self, settings: Settings, engines: Sequence[str]) -> None:
        self.settings = settings
        self.engines = tuple(engines)

    def child(self, engine: str, case: Case, environment: Mapping[str, str] | None = None) -> Child:
        """A new process for one engine, with so much more in its environment."""
        task = Task(engine, case.network, case.batch, case.threads, self.settings.folder)
        return Child(task, self.settings, environment)

    def take_turns(
        self, children: dict[str, Child], failures: dict[str, str]
    ) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
        """Milliseconds of each engine in each round, and the processor's peak in each."""
        taken: dict[str, list[float]] = {engine: [] for engine in children}
        peaks = []
        for _ in range(self.settings.rounds):
            sample = self.settings.sample
            for engine, answer in self.each(children, failures, "time", seconds=sample):
                taken[engine].append(answer["ms"])
            if self.measures_limit in children:
                with suppress(Failed):
                    peaks.append(children[self.measures_limit].ask("limit"))
        return taken, peaks

    def each(
        self, children: dict[str, Child], failures: dict[str, str], do: str, **more: Any
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Asks one child after the other; who fails is left out from then on."""
        for engine, child in list(children.items()):
            time.sleep(self.settings.pause)
            try:
                yield engine, child.ask(do, **more)
            except Failed as failure:
                failures[engine] = str(failure)
                del children[engine]


class Race(Conductor):
    """Runs cases one after the other."""

    def __init__(self, settings: Settings, engines: Sequence[str] = tuple(ENGINES)) -> None:
        super().__init__(settings, engines)
        self._once: dict[tuple[str, ...], str | None] = {}

    def run(self, case: Case, cold_start: bool = False) -> list[Row]:
        """The rows of one case: time, memory and, if asked for, cold start of each engine.

        For the cold start to be one, no case of this network may have been run before.
        """
        rows = []
        failures: dict[str, str] = {}
        children: dict[str, Child] = {}
        errors: dict[str, float] = {}
        with ExitStack() as stack:
            for engine in self.engines:
                try:
                    self._write_files(engine, case)
                    child = stack.enter_context(self.child(engine, case))
                    prepared = child.ask("prepare")
                    errors[engine] = _right(child.ask("check")["error"])
                    children[engine] = child
                except Failed as failure:
                    failures[engine] = str(failure)
                    continue
                if cold_start:
                    rows.append(_row("cold start", case, engine, cache="empty", **prepared))
            times, peaks = self.take_turns(children, failures)
            # Who cannot tell has a time all the same.
            memory = dict(self.each(dict(children), {}, "memory"))
        for engine, answer in memory.items():
            rows.append(_row("memory", case, engine, **answer))
        if peaks:
            asked, peak = peaks[-1]["multiply_adds"], statistics.median(p["peak"] for p in peaks)
            rows.append(_row("limit", case, FREEZE, multiply_adds=asked, peak=peak))
        if cold_start:
            rows += self._warm_starts(case, children)
        return [*self._times(case, times, errors, failures), *rows]

    def _write_files(self, engine: str, case: Case) -> None:
        """The float64 result and the engine's own file, each once for all threads."""
        self._do_once("eager", case, "reference")
        if engine in ENGINES and ENGINES[engine].convert is not None:
            self._do_once(engine, case, "convert")

    def _do_once(self, engine: str, case: Case, do: str) -> None:
        key = (engine, case.network, str(case.batch), do)
        if key not in self._once:
            self._once[key] = None
            try:
                with self.child(engine, case) as child:
                    child.ask(do)
            except Failed as failure:
                self._once[key] = str(failure)
        reason = self._once[key]
        if reason is not None:
            raise Failed(reason)

    def _warm_starts(self, case: Case, children: dict[str, Child]) -> Iterator[Row]:
        """New processes that find what the first ones left on disk."""
        for engine in children:
            try:
                with self.child(engine, case) as child:
                    yield _row("cold start", case, engine, cache="warm", **child.ask("prepare"))
            except Failed:  # it has a time, and failed only the second time
                continue

    def _times(
        self,
        case: Case,
        times: dict[str, list[float]],
        errors: dict[str, float],
        failures: dict[str, str],
    ) -> Iterator[Row]:
        for engine in self.engines:
            found: Row
            if engine in failures:
                found = {"ms": None, "min_ms": None, "error": None, "failure": failures[engine]}
            else:
                ms, least = statistics.median(times[engine]), min(times[engine])
                found = {"ms": ms, "min_ms": least, "error": errors[engine], "failure": None}
            yield _row("time", case, engine, **found)


def _row(what: str, case: Case, engine: str, **values: Any) -> Row:
    return {
        "what": what,
        "network": case.network,
        "batch": case.batch,
        "threads": case.threads,
        "engine": engine,
        **values,
    }


def _right(error: float) -> float:
    if not error <= WRONG:
        raise Failed(f"check: the result is off by {error:.1e} of the largest, a wrong one")
    return error


# ------------------------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Standing:
    """Who needed how many milliseconds in one case; who failed is not in it."""

    case: Case
    ms: dict[str, float]
    limit: float | None = None
    """Milliseconds for the network's multiply-adds by definition at the processor's peak."""

    @property
    def share(self) -> float | None:
        """Of that limit which ``neocog.freeze`` reaches; over 1 where Winograd saves enough."""
        taken = self.ms.get(FREEZE)
        return None if taken is None or self.limit is None else self.limit / taken

    @property
    def best_peer(self) -> str | None:
        """The fastest engine that is not neocog's."""
        peers = [engine for engine in self.ms if engine not in (FREEZE, COMPILE)]
        return min(peers, key=lambda engine: self.ms[engine], default=None)

    @property
    def lead(self) -> float | None:
        """How many times faster than the best peer ``neocog.freeze`` is."""
        return self._ratio(self.best_peer, FREEZE)

    @property
    def compile_lead(self) -> float | None:
        """How many times faster than Inductor ``torch.compile(backend="neocog")`` is."""
        return self._ratio(INDUCTOR, COMPILE)

    def _ratio(self, peer: str | None, ours: str) -> float | None:
        if peer not in self.ms or ours not in self.ms:
            return None
        return self.ms[peer] / self.ms[ours]


def case_of(row: Row) -> Case:
    """The case that a row is about."""
    return Case(row["network"], row["batch"], row["threads"])


def standings(rows: Sequence[Row]) -> list[Standing]:
    """One per case, in the order of the rows."""
    times = [row for row in rows if row["what"] == "time"]
    limits = {
        case_of(row): 1e3 * row["multiply_adds"] / row["peak"]
        for row in rows
        if row["what"] == "limit"
    }
    return [
        Standing(
            case,
            {row["engine"]: row["ms"] for row in group if row["ms"] is not None},
            limits.get(case),
        )
        for case, group in groupby(times, key=case_of)
    ]


def geometric_mean(ratios: Sequence[float | None]) -> float | None:
    """Of those that there are; None if there are none."""
    found = [ratio for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(found) if found else None
