"""How ``neocog bench`` and ``neocog doctor`` look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import benchmark, network_benchmark
from ..benchmark import CALL, PROGRAM, Case, Row
from ..diagnosis import cpu_name
from ..network_benchmark import ARCHITECTURE, NetworkCase, NetworkRow
from ..target import host
from .shared import plain_table
from .terminal import SafeConsole

WIDTH = 132
"""Columns of a table that goes into a file or a pipe."""

Cells = Sequence[str | Text]
Measured = TypeVar("Measured", Row, NetworkRow)

BLOCK_NOTES = (
    "ms, GFLOP/s, share: all steps of neocog's program on channels_last tensors (the copy of the "
    "input into its halo, the packing of the weights, the kernels); 2 operations for each "
    "multiply-add, those on padding included, and none for biases, activations and pools",
    "peak: independent multiply-adds in registers, measured in the same rounds",
    "call ms: neocog.functional.conv_block from Python on the same tensors, the allocation of its "
    "result included (backward: torch.autograd.grad for input, weight and bias)",
    "PyTorch ms: the same in eager mode, activation in place, in the faster of contiguous and "
    "channels_last",
    "ratio: PyTorch ms / call ms",
)
NETWORK_NOTES = (
    "neocog and PyTorch eager, each in the faster of contiguous and channels_last",
    "training step: forward, loss, backward, SGD",
    "ratio: PyTorch ms / neocog ms",
)


def what_can_be_measured() -> str:
    """What ``neocog bench`` says if it is not told what to measure."""
    return (
        f"neocog bench --blocks   {len(benchmark.CASES)} blocks: their share of the processor's "
        "peak, and PyTorch's time\n"
        f"neocog bench --network  {ARCHITECTURE}, inference and training step, and PyTorch's time\n"
        "neocog bench --networks well-known networks, and the times of other engines\n"
        "neocog bench --layers   the same networks, layer by layer\n"
        "neocog bench --training steps of training and their memory, beside PyTorch and Inductor\n"
        "neocog bench --help     all options"
    )


def wide_console(quiet: bool) -> Console:
    """A console for tables, wide enough for them where it is no terminal."""
    console = SafeConsole(quiet=quiet)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def show_blocks(console: Console, cases: Sequence[Case], rounds: int) -> list[Row]:
    """Measures blocks and shows each as it is done."""
    columns = ("ms", "GFLOP/s", "peak", "share", "call ms", "PyTorch ms", "ratio")
    table = _table("blocks", "block", columns)
    measured = (benchmark.measure(case, rounds) for case in cases)
    rows = _show(console, table, _block_cells, measured)
    console.print(_notes(BLOCK_NOTES, rows))
    return rows


def show_network(console: Console, cases: Sequence[NetworkCase], rounds: int) -> list[NetworkRow]:
    """Measures the network and shows each case as it is done."""
    table = _table(ARCHITECTURE, "task", ("neocog ms", "PyTorch ms", "ratio"))
    measured = (network_benchmark.measure_network(case, rounds) for case in cases)
    rows = _show(console, table, _network_cells, measured)
    console.print(_notes(NETWORK_NOTES, rows))
    return rows


def _show(
    console: Console,
    table: Table,
    cells: Callable[[Measured], Cells],
    rows: Iterable[Measured],
) -> list[Measured]:
    found = []
    # No refreshing thread: it would disturb what is being measured.
    with Live(table, console=console, auto_refresh=False) as live:
        for row in rows:
            found.append(row)
            table.add_row(*cells(row))
            live.refresh()
    if not console.is_terminal:  # there a live table ends without ending its line
        console.line()
    return found


def _block_cells(row: Row) -> Cells:
    plain, seconds = row.plain(), row.times.seconds
    return (
        Text(str(row.case)),
        _milliseconds(seconds[PROGRAM]),
        f"{plain['gflops']:.1f}",
        f"{plain['peak_gflops']:.1f}",
        f"{100 * row.share:.0f} %",
        _milliseconds(seconds[CALL]),
        _milliseconds(row.torch),
        f"{row.ratio:.2f}",
    )


def _network_cells(row: NetworkRow) -> Cells:
    times = (_milliseconds(row.neocog), _milliseconds(row.torch))
    return (Text(str(row.case)), *times, f"{row.ratio:.2f}")


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = plain_table(title, show_edge=False)
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    digits = next((d for limit, d in ((0.1, 4), (1, 3), (100, 2)) if ms < limit), 1)
    return f"{ms:.{digits}f}"


def _notes(notes: Sequence[str], rows: Sequence[Row] | Sequence[NetworkRow]) -> Text:
    first = rows[0]
    samples = sum(row.times.samples for row in rows)
    disturbed = sum(row.times.disturbed for row in rows)
    lines = [
        f"{cpu_name()}, {host().name}, {first.threads} thread{'s' * (first.threads > 1)}; "
        f"medians of {first.rounds} round{'s' * (first.rounds > 1)} in which all take turns",
        *notes,
    ]
    if disturbed:
        lines.append(
            f"busy machine: {disturbed} of {samples} samples were interrupted by something else "
            "as often as they were tried"
        )
    return Text("\n".join(lines) + "\n", style="dim")


def diagnosis_view(found: dict[str, Any]) -> RenderableType:
    """Everything ``neocog doctor`` prints of :func:`neocog.diagnosis.diagnosis`."""
    target = found["target"]
    vectors = f"{target['name']}, vectors of {target['lanes']} float32 ({target['bits']} bits)"
    sections: dict[str, Sequence[str]] = {
        "versions": [", ".join(f"{name} {version}" for name, version in found["versions"].items())],
        "system": [found["system"]],
        "processor": [f"{found['cpu']['name']} (LLVM: {found['cpu']['llvm_name']})"],
        "target": [vectors, *_pairs(target["reasons"])],
        "threads": [found["threads"]],
        "covered": _pairs(found["covered"]),
        "handed back": _pairs(found["handed_back"]),
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for title, lines in sections.items():
        grid.add_row(title, Text("\n".join(lines)))
    grid.add_row("self test", _verdict(found["self_test"]))
    return Group(grid)


def _pairs(table: dict[str, str]) -> list[str]:
    return [f"{name}: {text}" for name, text in table.items()]


def _verdict(test: dict[str, Any]) -> Text:
    took = "" if test["compile_ms"] is None else f", compiled in {test['compile_ms']:.0f} ms"
    if test["ok"]:
        line = Text("ok", style="bold green")
        what = f": {test['block']}, forward and backward as PyTorch's{took}"
    else:
        line = Text("NOT OK", style="bold red")
        what = f": {test['block']}{took}: {test['message']}"
    return line.append(what, style="not bold default")
