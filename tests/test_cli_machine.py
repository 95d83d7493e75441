"""`neocog bench`, `neocog doctor` and `neocog inspect` as they are typed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import llvmlite
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from neocog import benchmark, diagnosis, network_benchmark
from neocog.cli import ErrorsInOneLine, machine
from neocog.cli.machine_view import _milliseconds
from neocog.handback import COVERED, HANDED_BACK
from neocog.target import host

TINY = "conv n1 c3x6x6 k19 3x3 p1 | bias | relu | max 2x2"
BLOCK = "conv n1 c3x8x8 k19 3x3 p1 | bias | add | relu"


def run(*arguments: str) -> Result:
    app = typer.Typer(cls=ErrorsInOneLine)
    machine.register(app)
    plain = {"FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "80"}
    return CliRunner().invoke(app, list(arguments), env=plain)


def printed(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: str) -> str:
    """The one line on stderr, with nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small cases instead of the table, and short samples."""
    cases = (benchmark.Case(TINY), benchmark.Case(TINY, backward=True))
    monkeypatch.setattr(benchmark, "CASES", cases)
    shorten(monkeypatch)


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    taking_turns = benchmark.interleave

    def quickly(contenders: Any, rounds: int, sample: float) -> benchmark.Times:
        return taking_turns(contenders, rounds, 1e-5)

    monkeypatch.setattr(benchmark, "interleave", quickly)
    monkeypatch.setattr(network_benchmark, "interleave", quickly)


# bench


def test_bench_alone_says_what_there_is() -> None:
    text = printed("bench")
    assert "--blocks" in text and "--network" in text


def test_blocks_are_shown_and_written(tiny: None, tmp_path) -> None:
    file = tmp_path / "rows.json"
    text = printed("bench", "--blocks", "--rounds", "1", "--json", str(file))
    assert TINY in text and f"backward of {TINY}" in text
    assert "1 thread;" in text and "neocog.functional.conv_block" in text
    rows = json.loads(file.read_text())
    assert [row["block"] for row in rows] == [TINY, f"backward of {TINY}"]
    for row in rows:
        assert {"block", "gflops", "peak_gflops", "share"} <= set(row)
        assert row["gflops"] > 0 and row["peak_gflops"] > 0
        assert row["share"] == pytest.approx(row["gflops"] / row["peak_gflops"])
    assert os.listdir(tmp_path) == ["rows.json"]


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_no_file_of_rows_is_replaced_unless_told_to(
    tiny: None, tmp_path: Path, option: str
) -> None:
    file = tmp_path / "rows"
    file.write_text("mine", encoding="utf-8")
    message = refusal("bench", "--blocks", option, str(file))
    assert f"{file}: is there already; expected --force to replace it" in message
    assert f"another name by {option} FILE" in message and file.read_text() == "mine"
    if option == "--json":
        printed("bench", "--blocks", "--rounds", "1", option, str(file), "--force")
        assert json.loads(file.read_text())


def test_json_alone_can_be_printed(tiny: None) -> None:
    rows = json.loads(
        printed("bench", "--blocks", "--filter", "backward", "--rounds", "1", "--json", "-")
    )
    assert [row["block"] for row in rows] == [f"backward of {TINY}"]


def test_the_network_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    found = ("bench", "--network", "--filter", "inference, batch 1", "--rounds", "1")
    assert "inference, batch 1 " in printed(*found)
    (row,) = json.loads(printed(*found, "--json", "-"))
    assert (row["network"], row["batch"]) == (network_benchmark.ARCHITECTURE, 1)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_threads_are_used_and_put_back(tiny: None) -> None:
    before = torch.get_num_threads()
    (row, _) = json.loads(
        printed("bench", "--blocks", "--threads", "2", "--rounds", "1", "--json", "-")
    )
    assert row["threads"] == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--filter", "nowhere"), "--filter 'nowhere'"),
        (("--rounds", "0"), "--rounds 0: expected at least 1"),
        (("--threads", "0"), "--threads 0: expected 1 to"),
        (("--threads", "100000"), "--threads 100000: expected 1 to"),
        (("--json", "no/such/folder/x.json"), "there is no folder no/such/folder"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("it was measured"))
    assert message in refusal("bench", "--blocks", *options)


def test_a_busy_machine_is_admitted(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(10**6))
    monkeypatch.setattr(benchmark, "_interruptions", lambda: next(counts))
    monkeypatch.setattr(benchmark, "PAUSE", 0)
    text = printed("bench", "--blocks", "--rounds", "1")
    assert "busy machine: 10 of 10 samples were interrupted" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5.61e-6, "0.0056"), (2.5e-4, "0.250"), (0.0123, "12.30"), (1.5, "1500.0")],
)
def test_milliseconds_keep_their_figures(seconds: float, text: str) -> None:
    assert _milliseconds(seconds) == text


# doctor


def test_doctor_says_what_is_here() -> None:
    text = printed("doctor")
    for fact in (torch.__version__, llvmlite.__version__, f"{host().name}, vectors of", "chosen:"):
        assert fact in text
    assert "self test" in text and "ok: " in text
    squeezed = " ".join(text.split())
    for name, _ in (*COVERED, *HANDED_BACK):
        assert f"{name}:" in squeezed


def test_doctor_as_json() -> None:
    found = json.loads(printed("doctor", "--json"))
    assert found["ok"] is True
    assert {"neocog", "python", "torch", "llvmlite", "llvm"} == set(found["versions"])
    assert found["target"]["name"] == host().name
    assert found["target"]["bits"] == 32 * host().lanes
    assert [name for name, why in found["target"]["reasons"].items() if "chosen" in why] == [
        host().name
    ]
    assert found["covered"] == dict(COVERED) and found["handed_back"] == dict(HANDED_BACK)
    assert found["self_test"]["ok"] is True and found["self_test"]["compile_ms"] > 0
    assert found["cpu"]["name"] and found["cpu"]["llvm_name"]


def test_doctor_fails_if_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmark.contenders

    def wrong(case: benchmark.Case) -> Any:
        found = right(case)
        out = found[benchmark.PROGRAM]()
        return {**found, benchmark.PROGRAM: lambda: (out[0] + 1, *out[1:])}

    monkeypatch.setattr(benchmark, "contenders", wrong)
    result = run("doctor")
    assert result.exit_code == 1
    assert "NOT OK" in result.stdout
    assert "WrongResult" in result.stdout


def test_doctor_fails_if_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("LLVM has\nno such processor")

    monkeypatch.setattr(diagnosis.compiler, "forward", broken)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert found["self_test"]["compile_ms"] is None
    assert found["self_test"]["message"] == "RuntimeError: LLVM has no such processor"


# inspect


def test_inspect_prints_the_problem_and_its_program() -> None:
    text = printed("inspect", BLOCK)
    assert text.startswith("problem: conv n1 c3x8x8 k19 3x3 s1x1 p1,1,1,1 | bias | add | relu\n")
    assert "input: (1, 3, 8, 8)\nweight: (19, 3, 3, 3)\n" in text
    assert f"multiply adds: {64 * 19 * 27}\n" in text
    assert "program(x, w, bias, residual, out):" in text
    assert "direct_c3k19" in text
    assert text == printed("inspect", BLOCK, "--plan")


def test_inspect_prints_ir_and_assembly_of_every_kernel_once() -> None:
    names = [k["name"] for k in json.loads(printed("inspect", BLOCK, "--json"))["kernels"]]
    assert len(names) == len(set(names)) >= 2
    ir, asm = printed("inspect", BLOCK, "--ir"), printed("inspect", BLOCK, "--asm")
    assert "program(" not in ir + asm
    for name in names:
        assert f"; {name}\n" in ir and f"# {name}\n" in asm
    assert ir.count("define void") >= len(names) and "llvm.fmuladd" in ir
    assert asm.count("ret") >= len(names) and "llvm." not in asm
    both = printed("inspect", BLOCK, "--plan", "--ir")
    assert both == printed("inspect", BLOCK) + ir


def test_inspect_as_json_holds_what_is_asked_for() -> None:
    found = json.loads(printed("inspect", BLOCK, "--json", "--ir", "--asm"))
    assert found["output"] == [1, 19, 8, 8]
    assert found["target"] == host().name
    assert found["program"][0].startswith("program(x, w, bias, residual, out)")
    for kernel in found["kernels"]:
        assert set(kernel) == {"name", "llvm_ir", "assembly"}
        assert "define void" in kernel["llvm_ir"] and "ret" in kernel["assembly"]


def test_inspect_shows_gradients() -> None:
    text = printed("inspect", BLOCK, "--backward")
    assert "program(grad, x, w, result, winners, gx, gw, gbias, gresidual):" in text
    assert "weight_gradient" in text
    assert "program(grad, winners, gx):" in printed("inspect", "max n1 c3x8x8 2x2", "--backward")


def test_inspect_takes_pools_and_bare_convolutions() -> None:
    assert "pool_max2x2" in printed("inspect", "max n1 c3x8x8 2x2")
    assert "program(x, w, out):" in printed("inspect", "conv n1 c3x8x8 k4 3x3")


def test_inspect_knows_layouts_and_targets() -> None:
    assert "transpose" not in printed("inspect", BLOCK)
    assert "transpose" in printed("inspect", BLOCK, "--contiguous")
    generic = printed("inspect", BLOCK, "--target", "generic")
    assert "target: generic\n" in generic and "v4+bias" in generic


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("conv n1 c3x8x8",), "no k<outputs>"),
        (("conv n1 c3x2x2 k4 3x3",), "floor((2 - 1*(3-1) - 1 + 0 + 0)/1) + 1 = 0"),
        (("transformer",), "a problem starts with one of conv"),
        (("conv n1 c3x8x8 k4 3x3 | leaky_relu(-1.0)",), "a negative slope"),
        (("conv n1 c3x8x8 k4 3x3 | relu | bias", "--backward"), "no kernel yet"),
        ((BLOCK, "--target", "abacus"), "'abacus' is none of avx512, avx2, generic"),
    ],
)
def test_inspect_refuses_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal("inspect", *arguments)
