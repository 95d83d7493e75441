"""The commands about the kernels and the machine they run on: bench, doctor and inspect."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidProblem
from ..problem import Add, Bias, Block, Conv, Pool, Problem, parse
from .shared import ForceOption, JsonOption, check_new, print_json, say

if TYPE_CHECKING:  # torch takes a second or two to import: only a command that runs pays for it
    from ..cpu.runtime import Kernel
    from ..program import Program
    from ..race import Case
    from ..target import Target

ROUNDS, RACE_ROUNDS = 25, 7
BATCHES, RACE_THREADS = "1,16", "1,2"
PRINTED = Path("-")
"""Stands for stdout."""


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(bench)
    app.command()(doctor)
    app.command()(inspect)


# --------------------------------------------------------------------------------------- bench

BlocksOption = Annotated[
    bool, typer.Option("--blocks", help="Each kernel's share of the processor's peak.")
]
NetworkOption = Annotated[
    bool, typer.Option("--network", help="The digits network, inference and training.")
]
NetworksOption = Annotated[
    bool, typer.Option("--networks", help="Well-known networks, beside other engines.")
]
LayersOption = Annotated[
    bool, typer.Option("--layers", help="Well-known networks, layer by layer.")
]
TrainingOption = Annotated[
    bool, typer.Option("--training", help="Steps of training, beside PyTorch and Inductor.")
]
JsonFileOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the rows as JSON; - prints them."),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Of --networks, --training: the ratios as PNG."),
]
CountsOption = Annotated[
    str | None,
    typer.Option(
        "--threads",
        metavar="N[,N]",
        help="Threads of neocog, of the others and of the peak.",
        show_default=f"1; --networks, --layers: {RACE_THREADS}",
    ),
]
BatchesOption = Annotated[
    str | None,
    typer.Option(
        "--batches",
        metavar="N[,N]",
        help="Of --networks, --layers, --training: pictures.",
        show_default=f"{BATCHES}; --training: each network's own",
    ),
]
EnginesOption = Annotated[
    str | None,
    typer.Option(
        "--engines",
        metavar="NAME[,NAME]",
        help="Of --networks, --training.",
        show_default="all of them",
    ),
]
PeersOption = Annotated[
    Path | None,
    typer.Option(
        "--peers",
        metavar="PYTHON",
        help="The interpreter with the engines of --networks: .venv-peers/bin/python.",
        show_default="this one",
    ),
]
FilterOption = Annotated[
    str, typer.Option("--filter", metavar="TEXT", help="Only rows whose name holds TEXT.")
]
RoundsOption = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        help="Samples of each contender; their median counts.",
        show_default=f"{ROUNDS}; --networks, --training: {RACE_ROUNDS}",
    ),
]


def bench(
    blocks: BlocksOption = False,
    network: NetworkOption = False,
    networks: NetworksOption = False,
    layers: LayersOption = False,
    training: TrainingOption = False,
    json_file: JsonFileOption = None,
    plot: PlotOption = None,
    threads: CountsOption = None,
    batches: BatchesOption = None,
    engines: EnginesOption = None,
    peers: PeersOption = None,
    filter: FilterOption = "",
    rounds: RoundsOption = None,
    force: ForceOption = False,
) -> None:
    """Measure neocog's kernels beside the processor's peak and PyTorch, in one run.

    --networks: whole networks beside the engines that `make peers` installs; that takes an hour.
    --training: whole steps of training beside PyTorch eager and Inductor, and what they keep.
    """
    from .machine_view import what_can_be_measured

    alone = {"--networks": networks, "--layers": layers, "--training": training}
    chosen = [option for option, given in alone.items() if given]
    if not (blocks or network or chosen):
        say(what_can_be_measured())
        return
    _check_options(json_file, plot, rounds, force)
    if chosen:
        if blocks or network or len(chosen) > 1:
            raise InvalidProblem(f"{chosen[0]}: alone, without other things to measure")
        if not layers and sys.platform != "linux":
            raise InvalidProblem(
                f"{chosen[0]}: needs Linux to stop idle engines, not {sys.platform}"
            )
        python = sys.executable if peers is None else str(peers)
        if training:
            _race_training(batches, threads, filter, engines, rounds, python, json_file, plot)
            return
        from . import race_view

        counts = _numbers("--threads", threads or RACE_THREADS, _processors())
        cases = race_view.cases(_numbers("--batches", batches or BATCHES), counts, filter)
        _check_filter(filter, cases)
        if layers:
            _time_layers(cases, rounds or ROUNDS, json_file)
            return
        names = race_view.engines(engines)
        _race(cases, names, rounds or RACE_ROUNDS, python, json_file, plot)
        return
    count, *more = _numbers("--threads", threads or "1", _processors())
    if more:
        raise InvalidProblem(f"--threads {threads}: expected one number, several with --networks")
    _measure(blocks, network, json_file, count, filter, rounds or ROUNDS)


def _check_options(
    json_file: Path | None, plot: Path | None, rounds: int | None, force: bool
) -> None:
    """Before anything is measured, for that takes a while."""
    for option, file in (("--json", json_file), ("--plot", plot)):
        if file is None or file == PRINTED:
            continue
        if not file.parent.is_dir():
            raise InvalidProblem(f"{option} {file}: there is no folder {file.parent}")
        check_new(file, force, option)
    if rounds is not None and rounds < 1:
        raise InvalidProblem(f"--rounds {rounds}: expected at least 1")


def _check_filter(filter: str, found: Sequence[Any]) -> None:
    if not found:
        raise InvalidProblem(f"--filter {filter!r}: no row's name holds this text")


def _measure(
    blocks: bool, network: bool, json_file: Path | None, threads: int, filter: str, rounds: int
) -> None:
    from .. import benchmark, network_benchmark
    from .machine_view import show_blocks, show_network, wide_console

    cases = [c for c in benchmark.CASES if blocks and filter in str(c)]
    networks = [c for c in network_benchmark.CASES if network and filter in str(c)]
    _check_filter(filter, cases or networks)
    console = wide_console(quiet=_is_printed(json_file))
    rows: list[Any] = []
    with benchmark.threads(threads):
        if cases:
            rows += show_blocks(console, cases, rounds)
        if networks:
            rows += show_network(console, networks, rounds)
    _keep([row.plain() for row in rows], json_file)


def _race(
    cases: Sequence[Case],
    engines: Sequence[str],
    rounds: int,
    python: str,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from ..files import write_atomically
    from . import race_view

    console = race_view.wide_console(quiet=_is_printed(json_file))
    keep = _keeper(json_file)
    rows = race_view.show_race(console, cases, engines, rounds, python, keep)
    _print_kept(rows, json_file)
    if plot_file is not None:
        write_atomically(plot_file, race_view.plot(rows))


def _race_training(
    batches: str | None,
    threads: str | None,
    filter: str,
    engines: str | None,
    rounds: int | None,
    python: str,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from ..files import write_atomically
    from ..training_contenders import ENGINES
    from . import training_race_view
    from .race_view import engines as named
    from .race_view import wide_console

    counts = _numbers("--threads", threads or "1", _processors())
    pictures = None if batches is None else _numbers("--batches", batches)
    cases = training_race_view.cases(pictures, counts, filter)
    _check_filter(filter, cases)
    rows = training_race_view.show_training(
        wide_console(quiet=_is_printed(json_file)),
        cases,
        named(engines, ENGINES),
        rounds or RACE_ROUNDS,
        python,
        _keeper(json_file),
    )
    _print_kept(rows, json_file)
    if plot_file is not None:
        write_atomically(plot_file, training_race_view.plot(rows))


def _time_layers(cases: Sequence[Case], rounds: int, json_file: Path | None) -> None:
    from . import race_view
    from .layers_view import show_layers

    console = race_view.wide_console(quiet=_is_printed(json_file))
    _print_kept(show_layers(console, cases, rounds, _keeper(json_file)), json_file)


def _keeper(json_file: Path | None) -> Callable[[Sequence[dict[str, Any]]], None]:
    """Keeps rows in the file as they come, for the next ones may take an hour."""

    def keep(rows: Sequence[dict[str, Any]]) -> None:
        if not _is_printed(json_file):
            _keep(rows, json_file)

    return keep


def _print_kept(rows: Sequence[dict[str, Any]], json_file: Path | None) -> None:
    if _is_printed(json_file):
        print_json(rows)


def _numbers(option: str, text: str, most: int | None = None) -> list[int]:
    """``1,2`` as numbers, each at least 1 and at most so many."""
    expected = "at least 1" if most is None else f"1 to {most}, the processors"
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        raise InvalidProblem(f"{option} {text}: expected a number, or several as 1,2") from None
    if not all(1 <= number <= (most or number) for number in found):
        raise InvalidProblem(f"{option} {text}: expected {expected}")
    return found


def _processors() -> int:
    return os.cpu_count() or 1


def _is_printed(json_file: Path | None) -> bool:
    return json_file == PRINTED


def _keep(rows: Sequence[dict[str, Any]], json_file: Path | None) -> None:
    from ..files import write_atomically

    if _is_printed(json_file):
        print_json(rows)
    elif json_file is not None:
        write_atomically(json_file, f"{json.dumps(rows, indent=2, allow_nan=False)}\n".encode())


# -------------------------------------------------------------------------------------- doctor


def doctor(as_json: JsonOption = False) -> None:
    """Say what neocog finds here, what its kernels cover, and whether they work.

    Exit code 1 if the self test fails.
    """
    from ..diagnosis import diagnosis
    from .machine_view import diagnosis_view
    from .terminal import SafeConsole

    found = diagnosis()
    if as_json:
        print_json(found)
    else:
        SafeConsole().print(diagnosis_view(found))
    if not found["ok"]:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------- inspect


def inspect(
    problem: Annotated[
        str,
        typer.Argument(
            metavar="PROBLEM", help='One line, as "conv n1 c64x56x56 k64 3x3 p1 | bias | relu".'
        ),
    ],
    plan: Annotated[
        bool, typer.Option("--plan", help="The problem and its program (the default).")
    ] = False,
    ir: Annotated[bool, typer.Option("--ir", help="The kernels' LLVM IR.")] = False,
    asm: Annotated[bool, typer.Option("--asm", help="The kernels' assembly.")] = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="Of the gradients, not of the forward pass.")
    ] = False,
    contiguous: Annotated[
        bool, typer.Option("--contiguous", help="For contiguous tensors, not channels_last.")
    ] = False,
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="NAME", help="avx512, avx2 or generic.", show_default="this machine"
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Print what a problem is compiled to: its program, and its kernels' IR or assembly."""
    found = parse(problem)
    row = _target(target)
    program = _program(found, contiguous, backward, row)
    kernels = [_artefacts(kernel, row, ir, asm) for kernel in _kernels(program)]
    facts = {**_facts(found), "target": row.name}
    if as_json:
        lines = str(program).split("\n")
        print_json({**facts, "program": lines, "kernels": kernels})
        return
    if plan or not (ir or asm):
        for name, value in facts.items():
            say(f"{name.replace('_', ' ')}: {value}")
        say(str(program))
    for kernel in kernels:
        for kind, comment in (("llvm_ir", ";"), ("assembly", "#")):
            if kind in kernel:
                say(f"{comment} {kernel['name']}\n{kernel[kind]}")


def _target(name: str) -> Target:
    from ..target import host, named

    try:
        return named(name) if name else host()
    except ValueError as error:
        raise InvalidProblem(f"--target: {error}") from None


def _facts(problem: Problem) -> dict[str, Any]:
    facts: dict[str, Any] = {"problem": str(problem), "input": problem.in_shape}
    conv = problem.conv if isinstance(problem, Block) else problem
    if isinstance(conv, Conv):
        facts |= {"weight": conv.weight_shape, "multiply_adds": conv.multiply_adds}
    return {**facts, "output": problem.out_shape}


def _program(problem: Problem, contiguous: bool, backward: bool, target: Target) -> Program:
    """The program for tensors in that layout, the weight as torch.nn makes it."""
    from .. import compiler
    from ..maps import NCHW, NHWC

    layout = NCHW if contiguous else NHWC
    if isinstance(problem, Pool):
        if backward:
            return compiler.pool_backward_program(problem, layout, layout, target)
        return compiler.pool_forward(problem, layout, layout, False, target)
    block = Block(problem) if isinstance(problem, Conv) else problem
    _, into, rows, cols = block.conv.weight_shape
    strides = (into * rows * cols, rows * cols, cols, 1)
    if not backward:
        return compiler.forward(block, layout, strides, layout, False, target)
    needs = ["x", "w"]
    needs += ["bias"] if Bias() in block.epilogue else []
    needs += ["residual"] if Add() in block.epilogue else []
    return compiler.backward(block, layout, layout, strides, layout, layout, tuple(needs), target)


def _kernels(program: Program) -> list[Kernel]:
    """Each kernel of a program once, in the order of its steps."""
    return list(dict.fromkeys(step.kernel for step in program.steps))


def _artefacts(kernel: Kernel, target: Target, ir: bool, asm: bool) -> dict[str, str]:
    found = {"name": kernel.name}
    if ir:
        found["llvm_ir"] = kernel.llvm_ir
    if asm:
        found["assembly"] = kernel.assembly(target)
    return found
