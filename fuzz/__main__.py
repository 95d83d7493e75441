"""``make fuzz``: random programs in child processes, findings shrunk to one line each."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .child import Answer, ended
from .drawing import draw, source_of
from .program import Case
from .shrinking import shrink

DEADLY = {"crashes", "hangs"}
"""Findings that take their process with them."""

LIFETIME = 150
"""Cases after which a child is replaced: Dynamo and generated code leave things behind."""


class Child:
    """A process that answers cases."""

    def __init__(self, engine: str, timeout: float, apart: bool = False):
        self.timeout, self.apart, self.answered = timeout, apart, 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "fuzz.child", "--engine", engine]
        command += ["--apart", "--timeout", str(timeout)] if apart else []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            cwd=Path(__file__).parents[1], env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        self.alive = True

    def ask(self, case: Case) -> Answer:
        """What becomes of the case; if this child does not survive it, how it ended."""
        assert self._process.stdin and self._process.stdout
        # The first answer of a process takes PyTorch's import as well; a fork has its own clock.
        timer = threading.Timer(2 * self.timeout + 60, self._process.kill)
        timer.start()
        started = time.monotonic()
        try:
            self._process.stdin.write(f"{case}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        timer.cancel()
        self.answered += 1
        if line:
            found: Answer = json.loads(line)
            self.alive = self.apart or not found["spoilt"]
            return found
        self.alive = False
        status = self._process.wait()
        took = time.monotonic() - started
        if took > 2 * self.timeout:
            return ended("hangs", f"more than {took:.0f} s")
        return ended("crashes", f"exit status {status}: {self._last_words()}")

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        native = [i for i, text in enumerate(lines) if text.startswith(("Fatal", "Current thread"))]
        here = [text.strip() for text in lines[native[0] if native else -3 :] if text.strip()]
        return " / ".join(text for text in here if "neocog" in text or text.startswith("Fatal"))[
            :300
        ]

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


@dataclass
class Found:
    """A finding, as small as it became."""

    index: int
    case: Case
    answer: Answer
    others: list[int] = field(default_factory=list)
    """Cases that have the same kind of finding and contain all that this one needs."""

    @property
    def kinds(self) -> set[str]:
        """What kind of finding it is."""
        return {signature(finding) for finding in self.answer["findings"]}

    def explains(self, case: Case, answer: Answer) -> bool:
        """Whether another case is likely to fail for the same reason."""
        needed = Counter(name for name, _ in self.case.steps)
        there = Counter(name for name, _ in case.steps)
        shown = {signature(finding) for finding in answer["findings"]}
        return bool(self.kinds & shown) and case.mode == self.case.mode and needed <= there


def signature(finding: Any) -> str:
    """What makes two findings the same: the kind, and of an error its type and place."""
    kind, where, detail = finding
    return f"{kind} {where} {detail.split(':')[0]}" if kind == "raises" else kind


class Campaign:
    """Workers that share one list of cases."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.lock = threading.Lock()
        self.indices: Iterator[int] = iter(range(asked.first, asked.first + asked.cases))
        self.end = time.monotonic() + asked.seconds
        self.found: list[Found] = []
        self.ran, self.invalid = Counter[str](), Counter[str]()
        self.seconds = 0.0

    def work(self) -> None:
        """Run cases until there are none left."""
        child = self._child()
        while (index := self._next()) is not None:
            if not child.alive or child.answered >= LIFETIME:
                child.end()
                child = self._child()
            case = draw(self.asked.seed, index)
            started = time.monotonic()
            answer = child.ask(case)
            with self.lock:
                self.seconds += time.monotonic() - started
                self.ran[case.mode] += 1
                self.invalid[answer["invalid"]] += bool(answer["invalid"])
                known = [f for f in self.found if f.explains(case, answer)]
                for f in known[:1]:
                    f.others.append(index)
            if answer["findings"] and not known:
                self._report(index, case, answer)
        child.end()

    def _next(self) -> int | None:
        with self.lock:
            return None if time.monotonic() > self.end else next(self.indices, None)

    def _report(self, index: int, case: Case, answer: Answer) -> None:
        smaller, again = (case, answer) if self.asked.no_shrink else self._smallest(case, answer)
        if self._pytorchs_own(smaller, again):
            with self.lock:
                self.invalid["PyTorch's own end"] += 1
            print(f"case {index}: PyTorch ends the process by itself: {smaller}", flush=True)
            return
        found = Found(index, smaller, again)
        with self.lock:
            self.found.append(found)
            print(f"case {index}: {len(smaller.steps)} steps, {smaller.mode}", flush=True)
            for kind, where, detail in again["findings"][:4]:
                print(f"  {kind}: {where}: {detail}")
            print(f"  python -m fuzz --case '{smaller}'", flush=True)

    def _smallest(self, case: Case, answer: Answer) -> tuple[Case, Answer]:
        """A smaller case, which fails by itself in a process of its own."""
        wanted = {signature(f) for f in answer["findings"]}
        deadly = bool(wanted & DEADLY)
        child, best = self._child(deadly), answer

        def holds(smaller: Case) -> bool:
            nonlocal child, best
            if not child.alive or child.answered >= LIFETIME:
                child.end()
                child = self._child(deadly)
            got = child.ask(smaller)
            same = bool(wanted & {signature(f) for f in got["findings"]})
            best = got if same else best
            return same

        try:
            if not holds(case):
                alone = [(k, w, f"{d} (only after other cases)") for k, w, d in answer["findings"]]
                return case, {**answer, "findings": alone}
            return shrink(case, holds, self.asked.attempts), best
        finally:
            child.end()

    def _pytorchs_own(self, case: Case, answer: Answer) -> bool:
        """Whether a process that runs the case with PyTorch alone ends too."""
        if not DEADLY & {signature(f) for f in answer["findings"]}:
            return False
        child = Child("eager", self.asked.timeout, apart=True)
        try:
            return bool(DEADLY & {signature(f) for f in child.ask(case)["findings"]})
        finally:
            child.end()

    def _child(self, apart: bool = False) -> Child:
        return Child(self.asked.engine, self.asked.timeout, apart)

    def summary(self) -> str:
        """What was run and found."""
        total = sum(self.ran.values())
        modes = ", ".join(f"{count} {mode}" for mode, count in self.ran.most_common())
        refused = sum(self.invalid.values())
        lines = [
            f"{total} programs ({modes}), {refused} of them refused by PyTorch itself, "
            f"{total / max(self.seconds, 1e-9):.1f} a second and process; seed {self.asked.seed}"
        ]
        lines += [
            f"  refused, {count}: {reason[:100]}"
            for reason, count in self.invalid.most_common(5)
            if count
        ]
        lines += [
            f"  case {f.index} and {len(f.others)} more: {', '.join(sorted(f.kinds))}: "
            f"{' '.join(name for name, _ in f.case.steps)}"
            for f in sorted(self.found, key=lambda f: -len(f.others))
        ]
        lines.append(f"{len(self.found)} kinds of findings" if self.found else "nothing found")
        return "\n".join(lines)


def show(case: Case, engine: str) -> int:
    """Run one case in this process and say everything about it."""
    from .child import answer

    print(case, "", source_of(case), sep="\n", flush=True)
    found = answer(str(case), engine)
    for kind, where, detail in found["findings"]:
        print(f"{kind}: {where}: {detail}")
    print(found["invalid"] or ("" if found["findings"] else "nothing found"))
    return int(bool(found["findings"]))


def main() -> int:
    """The command; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=1e9, help="no new case after that time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", default="neocog", help="eager, aot_eager: PyTorch by itself")
    parser.add_argument("--timeout", type=float, default=60, help="seconds of a case")
    parser.add_argument("--attempts", type=int, default=150, help="cases tried to shrink one")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--case", help="run this one line")
    parser.add_argument("--index", type=int, help="run this one case of the seed")
    asked = parser.parse_args()
    if asked.case is not None:
        return show(Case.parse(asked.case), asked.engine)
    if asked.index is not None:
        return show(draw(asked.seed, asked.index), asked.engine)
    campaign = Campaign(asked)
    workers = [threading.Thread(target=campaign.work) for _ in range(asked.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(campaign.summary())
    return int(bool(campaign.found))


if __name__ == "__main__":
    sys.exit(main())
