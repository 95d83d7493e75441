"""The training race: whole steps of training, and the memory they need, engine beside engine.

It is conducted as :mod:`neocog.race` is: one process per engine, all but one of them stopped, by
turns in one run. Memory and the first losses are measured beforehand, each engine in a process of
its own that is not timed. Losses are compared with PyTorch's in float64: that of the second step
tells whether the gradients of the first one were right.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from .race import Case, Child, Conductor, Failed, Row, Settings, case_of, geometric_mean
from .training_contenders import ENGINES, EXACT_MEMORY

NEOCOG = "neocog"

COMPARED = ("step_ms", "kept_bytes", "peak_bytes")
"""What neocog is compared by."""

STEPS, CHECKED = 3, 2
"""First steps whose losses are told, and those whose losses have to be right: the second one's are
if the gradients of the first step were. Later ones say less: behind batch norms, roundings grow
from step to step (PyTorch's own third loss of MobileNetV2 is off by 2e-3)."""

WRONG = 1e-3
"""|loss - reference| / |reference| from which on an engine does not compute the same."""


def command_of(python: str) -> tuple[str, ...]:
    """How an interpreter is asked to be a contender."""
    return (python, "-m", "neocog.training_contenders")


class TrainingRace(Conductor):
    """Runs cases one after the other."""

    measures_limit = NEOCOG

    def __init__(self, settings: Settings, engines: Sequence[str] = tuple(ENGINES)) -> None:
        super().__init__(settings, engines)
        self._references: dict[tuple[str, int], list[float]] = {}

    def run(self, case: Case) -> list[Row]:
        """A row per engine ("step"), and one of the processor's limit ("limit") if neocog ran."""
        failures: dict[str, str] = {}
        found: dict[str, Row] = {}
        for engine in self.engines:
            try:
                found[engine] = self._measure(engine, case)
            except Failed as failure:
                failures[engine] = str(failure)
        children: dict[str, Child] = {}
        with ExitStack() as stack:
            for engine in found:
                try:
                    child = stack.enter_context(self.child(engine, case))
                    found[engine] |= child.ask("prepare")
                    children[engine] = child
                except Failed as failure:
                    failures[engine] = str(failure)
            times, peaks = self.take_turns(children, failures)
        rows = []
        for engine in self.engines:
            if engine in failures:
                values = dict.fromkeys(COMPARED) | {"failure": failures[engine]}
            else:
                taken = times[engine]
                values = {"step_ms": statistics.median(taken), "min_ms": min(taken)}
                values |= found[engine] | {"failure": None}
            rows.append(_row("step", case, engine=engine, **values))
        if peaks:
            asked, peak = peaks[-1]["multiply_adds"], statistics.median(p["peak"] for p in peaks)
            rows.append(_row("limit", case, multiply_adds=asked, peak=peak))
        return rows

    def _measure(self, engine: str, case: Case) -> Row:
        """What a process of its own finds out about memory and losses; Failed if they are wrong."""
        with self.child(engine, case, EXACT_MEMORY) as child:
            child.ask("prepare")
            found = {**child.ask("kept"), **child.ask("peak"), **child.ask("losses", steps=STEPS)}
        expected = self._reference(case)
        pairs = zip(found["losses"][:CHECKED], expected, strict=True)
        errors = [abs(loss - right) / abs(right) for loss, right in pairs]
        if not all(error <= WRONG for error in errors):  # NaN is wrong, too
            raise Failed(f"losses: {found['losses']}, expected {expected}")
        return {**found, "error": max(errors)}

    def _reference(self, case: Case) -> list[float]:
        """The losses in float64, the same for all threads."""
        key = (case.network, case.batch)
        if key not in self._references:
            with self.child("eager", replace(case, threads=1)) as child:
                self._references[key] = child.ask("reference", steps=CHECKED)["losses"]
        return self._references[key]


def _row(what: str, case: Case, **values: Any) -> Row:
    where = {"network": case.network, "batch": case.batch, "threads": case.threads}
    return {"what": what, **where, **values}


# ------------------------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Standing:
    """What each engine needed in one case; who failed is not in it."""

    case: Case
    values: dict[str, dict[str, float]]
    """By what is compared, then by engine."""
    limit: float | None = None
    """Milliseconds for a step's multiply-adds by definition at the processor's peak."""

    @property
    def share(self) -> float | None:
        """Of that limit which neocog reaches; over 1 where Winograd saves enough."""
        taken = self.values["step_ms"].get(NEOCOG)
        return None if taken is None or self.limit is None else self.limit / taken

    def best_peer(self, what: str) -> str | None:
        """The engine but neocog that needs least of it."""
        peers = {engine: v for engine, v in self.values[what].items() if engine != NEOCOG}
        return min(peers, key=lambda engine: peers[engine], default=None)

    def lead(self, what: str) -> float | None:
        """How many times as much of it as neocog the best peer needs: above 1, neocog is better."""
        peer, values = self.best_peer(what), self.values[what]
        ours = values.get(NEOCOG)
        return None if peer is None or not ours else values[peer] / ours


def standings(rows: Sequence[Row]) -> list[Standing]:
    """One per case, in the order of the rows."""
    limits = {
        case_of(row): 1e3 * row["multiply_adds"] / row["peak"]
        for row in rows
        if row["what"] == "limit"
    }
    found = []
    for case, group in groupby((r for r in rows if r["what"] == "step"), key=case_of):
        steps = [row for row in group if row["failure"] is None]
        values = {what: {row["engine"]: row[what] for row in steps} for what in COMPARED}
        found.append(Standing(case, values, limits.get(case)))
    return found


def leads(rows: Sequence[Row]) -> list[Row]:
    """Rows that say how far neocog leads in each case ("lead") and on the whole ("mean")."""
    found = standings(rows)
    made = []
    for standing in found:
        each = {what: standing.lead(what) for what in COMPARED}
        peers = {what: standing.best_peer(what) for what in COMPARED}
        made.append(
            _row("lead", standing.case, best_peers=peers, **each, share_of_limit=standing.share)
        )
    means = {what: geometric_mean([s.lead(what) for s in found]) for what in COMPARED}
    return [*made, {"what": "mean", **means}]
