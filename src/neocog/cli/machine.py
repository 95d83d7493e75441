"""The commands about the kernels and the machine they run on: bench, doctor and inspect."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidProblem
from ..problem import Add, Bias, Block, Conv, Pool, Problem, parse
from .shared import JsonOption, print_json

if TYPE_CHECKING:  # torch takes a second or two to import: only a command that runs pays for it
    from ..cpu.runtime import Kernel
    from ..program import Program
    from ..target import Target

ROUNDS = 25


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(bench)
    app.command()(doctor)
    app.command()(inspect)


# --------------------------------------------------------------------------------------- bench


def bench(
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Each kernel's share of the processor's peak.")
    ] = False,
    network: Annotated[
        bool, typer.Option("--network", help="The digits network, inference and training.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the rows as JSON; - prints them."),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", help="Threads of neocog, of PyTorch and of the peak.")
    ] = 1,
    filter: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="Only rows whose name holds TEXT.")
    ] = "",
    rounds: Annotated[
        int, typer.Option("--rounds", help="Samples of each contender; their median counts.")
    ] = ROUNDS,
) -> None:
    """Measure neocog's kernels beside the processor's peak and PyTorch eager, in one run."""
    from .. import benchmark, network_benchmark
    from .machine_view import show_blocks, show_network, what_can_be_measured, wide_console

    if not (blocks or network):
        typer.echo(what_can_be_measured())
        return
    cases = [c for c in benchmark.CASES if blocks and filter in str(c)]
    networks = [c for c in network_benchmark.CASES if network and filter in str(c)]
    _check_options(cases or networks, json_file, threads, filter, rounds)
    printed = json_file is not None and str(json_file) == "-"
    console = wide_console(quiet=printed)
    rows: list[Any] = []
    with benchmark.threads(threads):
        if cases:
            rows += show_blocks(console, cases, rounds)
        if networks:
            rows += show_network(console, networks, rounds)
    plain = [row.plain() for row in rows]
    if printed:
        print_json(plain)
    elif json_file is not None:
        _write_json(json_file, plain)


def _check_options(
    cases: Any, json_file: Path | None, threads: int, filter: str, rounds: int
) -> None:
    """Before anything is measured, for that takes a while."""
    processors = os.cpu_count() or 1
    if not cases:
        raise InvalidProblem(f"--filter {filter!r}: no row's name holds this text")
    if not 1 <= threads <= processors:
        raise InvalidProblem(f"--threads {threads}: expected 1 to {processors}, the processors")
    if rounds < 1:
        raise InvalidProblem(f"--rounds {rounds}: expected at least 1")
    if json_file is not None and not json_file.parent.is_dir():
        raise InvalidProblem(f"--json {json_file}: there is no folder {json_file.parent}")


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    from ..files import write_atomically

    write_atomically(path, f"{json.dumps(rows, indent=2, allow_nan=False)}\n".encode())


# -------------------------------------------------------------------------------------- doctor


def doctor(as_json: JsonOption = False) -> None:
    """Say what neocog finds here, what its kernels cover, and whether they work.

    Exit code 1 if the self test fails.
    """
    from rich.console import Console

    from ..diagnosis import diagnosis
    from .machine_view import diagnosis_view

    found = diagnosis()
    if as_json:
        print_json(found)
    else:
        Console(highlight=False).print(diagnosis_view(found))
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
            typer.echo(f"{name.replace('_', ' ')}: {value}")
        typer.echo(str(program))
    for kernel in kernels:
        for kind, comment in (("llvm_ir", ";"), ("assembly", "#")):
            if kind in kernel:
                typer.echo(f"{comment} {kernel['name']}\n{kernel[kind]}")


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
