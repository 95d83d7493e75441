"""How ``neocog bench --training`` looks: its tables, and its plot."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..diagnosis import cpu_name
from ..race import Case, Row, Settings, case_of
from ..training_contenders import ENGINES, WORKLOADS
from ..training_race import (
    COMPARED,
    NEOCOG,
    Standing,
    TrainingRace,
    command_of,
    leads,
    standings,
)
from .race_view import DPI, GOAL, REQUIRED, WIDE, milliseconds, race_table, ratio_text

NOTES = (
    "step ms: zero_grad, forward, cross entropy, backward, SGD; median of the rounds; one process "
    "per engine, all but one of them stopped",
    "kept MB: the tensors that autograd keeps between forward and backward, each storage once, "
    "parameters and buffers left out; the pictures count for everybody",
    "peak MB: growth of resident memory during a step, less the gradients",
    "lead: the best peer's value / neocog's, for each of them",
    "of the limit: the step's multiply-adds by definition at the peak of the processor measured in "
    "the same rounds, over neocog's ms",
)

TITLES = {"step_ms": "step ms", "kept_bytes": "kept MB", "peak_bytes": "peak MB"}
NAMES = {"step_ms": "time", "kept_bytes": "kept", "peak_bytes": "peak"}
COLOURS = {"step_ms": "#0b6e99", "kept_bytes": "#c8553d", "peak_bytes": "#7a7a7a"}
BAR, FRAME = 0.24, 1.0
"""Inches of the plot: a bar's height, that of all else."""

UNSEEN = 0.02
"""Share of what is kept from which on it is said that the hooks do not see all of it."""


def cases(batches: Sequence[int] | None, threads: Sequence[int], filter: str) -> list[Case]:
    """Those whose name holds ``filter``, network by network; ``None``: each one's own batches."""
    found = [
        Case(name, batch, count)
        for name, workload in WORKLOADS.items()
        for batch in (workload.batches if batches is None else batches)
        for count in threads
    ]
    return [case for case in found if filter in str(case)]


def show_training(
    console: Console,
    cases: Sequence[Case],
    engines: Sequence[str],
    rounds: int,
    python: str,
    keep: Callable[[Sequence[Row]], None],
) -> list[Row]:
    """Runs the cases, shows each as it is done, and hands all rows so far to ``keep``."""
    rows: list[Row] = []
    table = race_table("training", ["of one step", *engines, "lead", "of the limit"])
    with tempfile.TemporaryDirectory(prefix="neocog-training-") as folder:
        race = TrainingRace(Settings(Path(folder), rounds, command=command_of(python)), engines)
        # No refreshing thread: it would disturb what is being measured.
        with Live(table, console=console, auto_refresh=False) as live:
            for case in cases:
                new = race.run(case)
                rows += new
                keep([*rows, *leads(rows)])
                _add(table, standings(new)[0], engines)
                live.refresh()
    if not console.is_terminal:  # there a live table ends without ending its line
        console.line()
    found = leads(rows)
    _show_the_rest(console, rows, found[-1], engines)
    return [*rows, *found]


def _add(table: Table, standing: Standing, engines: Sequence[str]) -> None:
    share = "-" if standing.share is None else f"{standing.share:.0%}"
    for number, what in enumerate(COMPARED):
        cells = (_value(standing, what, engine) for engine in engines)
        case = "" if number else str(standing.case)
        rest = "" if number else share
        table.add_row(case, TITLES[what], *cells, ratio_text(standing.lead(what)), rest)


def _value(standing: Standing, what: str, engine: str) -> Text:
    value = standing.values[what].get(engine)
    if value is None:
        return Text("failed", style="red")
    text = milliseconds(value) if what == "step_ms" else f"{1e-6 * value:.1f}"
    return Text(text, style="bold" if engine == standing.best_peer(what) else "")


def _show_the_rest(
    console: Console, rows: Sequence[Row], mean: Row, engines: Sequence[str]
) -> None:
    for what in COMPARED:
        if mean[what] is not None:
            console.print(f"{NAMES[what]}, best peer / {NEOCOG}: geometric mean {mean[what]:.2f}")
    for row in (row for row in rows if row["what"] == "step"):
        who = f"{case_of(row)}: {row['engine']}"
        if row["failure"]:
            console.print(Text(f"{who}: {row['failure']}"))
        elif row["allocated_bytes"] > (1 + UNSEEN) * row["kept_bytes"]:
            more = f"{1e-6 * row['allocated_bytes']:.1f} MB"
            console.print(
                Text(f"{who}: its forward pass leaves {more} allocated, not all of it seen")
            )
    console.line()
    for note in (cpu_name(), *NOTES, *(f"{name}: {ENGINES[name].includes}" for name in engines)):
        console.print(Text(note, style="dim"))


def plot(rows: Sequence[Row]) -> bytes:
    """How much more time and memory than neocog the best peer needs, case by case: a PNG file."""
    # matplotlib takes half a second to import, which no other command should wait for
    from matplotlib.figure import Figure

    found = standings(rows)
    height = FRAME + BAR * (len(COMPARED) + 1) * len(found)
    figure = Figure(figsize=(WIDE, height), layout="constrained")
    axes = figure.subplots()
    beside: dict[str, Any] = {
        "xytext": (4, 0),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": "small",
    }
    for number, standing in enumerate(found):
        for row, what in enumerate(COMPARED):
            lead, place = standing.lead(what), number * (len(COMPARED) + 1) + row
            if lead is not None:
                axes.barh(place, lead, height=0.9, color=COLOURS[what])
                text = f"{NAMES[what]}: {lead:.2f} over {standing.best_peer(what)}"
                axes.annotate(text, (lead, place), **beside)
    axes.margins(x=0.8)  # room for the words
    for value, style in ((REQUIRED, "-"), (GOAL, ":")):
        axes.axvline(value, color="black", linestyle=style, linewidth=0.8)
    places = [number * (len(COMPARED) + 1) + 1 for number in range(len(found))]
    axes.set_yticks(places, [str(standing.case).replace(", ", ",\n", 1) for standing in found])
    axes.invert_yaxis()
    axes.set(xlabel=f"of a step of training: the best peer's value / {NEOCOG}'s")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
