"""How ``neocog bench --networks`` looks: its tables, and its plot."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..architectures import ARCHITECTURES
from ..contenders import ENGINES
from ..diagnosis import cpu_name
from ..errors import InvalidProblem
from ..race import (
    COMPILE,
    FREEZE,
    Case,
    Race,
    Row,
    Settings,
    Standing,
    case_of,
    command_of,
    geometric_mean,
    standings,
)
from .shared import plain_table
from .terminal import SafeConsole

WIDTH = 150
"""Columns of a table that goes into a file or a pipe."""

NOTES = (
    "ms per call, median of the rounds; float32 [N, C, H, W] in, logits out; one process per "
    "engine, all but one of them stopped",
    "lead: the best peer's ms / neocog-freeze's; compile's lead: inductor's ms / neocog-compile's",
    "of the limit: the network's multiply-adds by definition at the peak measured in the same "
    "rounds, over neocog-freeze's ms; Winograd saves multiply-adds and may pass 100 %",
)

BAR, FRAME, WIDE = 0.26, 0.9, 7.2
"""Inches of the plot at :data:`DPI`: a bar's height, that of all else, the width."""
DPI = 140
REQUIRED, GOAL = 1.0, 1.2
COLOURS = {1: "#0b6e99", 16: "#c8553d"}
OTHER_COLOUR = "#7a7a7a"


RACED = ("digits", "vgg11", "resnet18", "resnet50", "mobilenet_v2")
"""Without a filter; the others take long, or show little more."""


def cases(batches: Sequence[int], threads: Sequence[int], filter: str) -> list[Case]:
    """Those whose name holds ``filter``, network by network."""
    found = [
        Case(name, batch, count)
        for name in (ARCHITECTURES if filter else RACED)
        for batch in batches
        for count in threads
    ]
    return [case for case in found if filter in str(case)]


def engines(names: str | None, known: Collection[str] = ENGINES) -> list[str]:
    """Names with commas between them, all without; InvalidProblem for an unknown one."""
    found = list(known) if names is None else list(dict.fromkeys(names.split(",")))
    for name in found:
        if name not in known:
            raise InvalidProblem(f"--engines {name}: expected some of {', '.join(known)}")
    return found


def wide_console(quiet: bool) -> Console:
    """A console for these tables, wide enough for them where it is no terminal."""
    console = SafeConsole(quiet=quiet)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def show_race(
    console: Console,
    cases: Sequence[Case],
    engines: Sequence[str],
    rounds: int,
    python: str,
    keep: Callable[[Sequence[Row]], None],
) -> list[Row]:
    """Runs the cases, shows each as it is done, and hands all rows so far to ``keep``."""
    rows: list[Row] = []
    table = race_table("networks, ms", [*engines, "lead", "of the limit", "compile's lead"])
    # No refreshing thread: it would disturb what is being measured.
    with Live(table, console=console, auto_refresh=False) as live:
        for _, group in groupby(cases, key=lambda case: case.network):
            with tempfile.TemporaryDirectory(prefix="neocog-race-") as folder:
                settings = Settings(Path(folder), rounds=rounds, command=command_of(python))
                race = Race(settings, engines)
                for number, case in enumerate(group):
                    new = race.run(case, cold_start=number == 0)
                    rows += new
                    keep(rows)
                    table.add_row(*_time_cells(new, engines))
                    live.refresh()
    if not console.is_terminal:  # there a live table ends without ending its line
        console.line()
    _show_the_rest(console, rows, engines)
    return rows


def _show_the_rest(console: Console, rows: Sequence[Row], engines: Sequence[str]) -> None:
    found = standings(rows)
    for title, ratios in (
        (f"best peer / {FREEZE}", [standing.lead for standing in found]),
        (f"inductor / {COMPILE}", [standing.compile_lead for standing in found]),
    ):
        mean = geometric_mean(ratios)
        if mean is not None:
            least = min(ratio for ratio in ratios if ratio is not None)
            console.print(f"{title}: geometric mean {mean:.2f}, least {least:.2f}")
    for row in rows:
        if row["what"] == "time" and row["failure"]:
            console.print(Text(f"{case_of(row)}: {row['engine']}: {row['failure']}"))
    console.line()
    console.print(_memory(rows, engines))
    console.print(_cold_starts(rows, engines))
    for note in (cpu_name(), *NOTES, *(f"{name}: {ENGINES[name].includes}" for name in engines)):
        console.print(Text(note, style="dim"))


def _time_cells(rows: Sequence[Row], engines: Sequence[str]) -> list[str | Text]:
    (standing,) = standings(rows)
    return [
        str(standing.case),
        *(_time(standing, engine) for engine in engines),
        ratio_text(standing.lead),
        "-" if standing.share is None else f"{standing.share:.0%}",
        ratio_text(standing.compile_lead),
    ]


def _time(standing: Standing, engine: str) -> Text:
    if engine not in standing.ms:
        return Text("failed", style="red")
    text = milliseconds(standing.ms[engine])
    return Text(text, style="bold" if engine == standing.best_peer else "")


def milliseconds(ms: float) -> str:
    """At least three figures."""
    digits = next((d for limit, d in ((0.1, 4), (1, 3), (10, 2)) if ms < limit), 1)
    return f"{ms:.{digits}f}"


def ratio_text(ratio: float | None) -> Text:
    """Red where it is not what is required."""
    if ratio is None:
        return Text("-")
    return Text(f"{ratio:.2f}", style="" if ratio >= REQUIRED else "red")


def _memory(rows: Sequence[Row], engines: Sequence[str]) -> Table:
    title = "memory over the built network, MB: at its peak / afterwards (Winograd weights in it)"
    table = race_table(title, engines)
    found = [row for row in rows if row["what"] == "memory"]
    for case, group in groupby(found, key=case_of):
        cells = {row["engine"]: _megabytes(row) for row in group}
        table.add_row(str(case), *(cells.get(engine, "-") for engine in engines))
    return table


def _megabytes(row: Row) -> str:
    text = f"{row['peak_mb']:.0f} / {row['steady_mb']:.0f}"
    return text if row["winograd_mb"] is None else f"{text} ({row['winograd_mb']:.0f})"


def _cold_starts(rows: Sequence[Row], engines: Sequence[str]) -> Table:
    title = (
        "cold start, s: preparing a built or converted network and its first call (+ the import)"
    )
    table = race_table(title, engines)
    found = [row for row in rows if row["what"] == "cold start"]
    for (case, cache), group in groupby(found, key=lambda row: (case_of(row), row["cache"])):
        cells = {row["engine"]: _seconds(row) for row in group}
        name = f"{case}, {cache} cache"
        table.add_row(name, *(cells.get(engine, "-") for engine in engines))
    return table


def _seconds(row: Row) -> str:
    return f"{row['prepare_s'] + row['first_call_s']:.2f} (+{row['import_s']:.2f})"


def race_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table of cases, with a column for each engine and what follows from them."""
    table = plain_table(title, show_edge=False)
    table.add_column("network", overflow="fold")
    for name in columns:
        table.add_column(name.replace("-", " "), justify="right")
    return table


def plot(rows: Sequence[Row]) -> bytes:
    """How many times faster than the best peer ``neocog.freeze`` is, case by case: a PNG file."""
    # matplotlib takes half a second to import, which no other command should wait for
    from matplotlib.figure import Figure

    found = [(s, s.lead) for s in standings(rows) if s.lead is not None]
    figure = Figure(figsize=(WIDE, FRAME + BAR * len(found)), layout="constrained")
    axes = figure.subplots()
    inside: dict[str, Any] = {
        "xytext": (4, 0),
        "textcoords": "offset points",
        "va": "center",
        "color": "white",
    }
    for place, (standing, lead) in enumerate(found):
        axes.barh(place, lead, color=COLOURS.get(standing.case.batch, OTHER_COLOUR))
        text = f"{lead:.2f} over {standing.best_peer}"
        if standing.share is not None:
            text += f", {standing.share:.0%} of the limit"
        axes.annotate(text, (0, place), **inside)
    for value, style in ((REQUIRED, "-"), (GOAL, ":")):
        axes.axvline(value, color="black", linestyle=style, linewidth=0.8)
    axes.set_yticks(range(len(found)), [str(standing.case) for standing, _ in found])
    axes.invert_yaxis()
    axes.set(xlabel=f"time of the best peer / time of {FREEZE}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
