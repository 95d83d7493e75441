"""The training race: what a process finds out, what becomes of its rows, how they are shown."""

from __future__ import annotations

import ctypes
import json
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from neocog import program, training_contenders
from neocog.architectures import ARCHITECTURES, Architecture
from neocog.cli import ErrorsInOneLine, machine, training_race_view
from neocog.contenders import Task
from neocog.memory import POOL
from neocog.race import Case, Row, Settings
from neocog.training_contenders import Contender, Workload, hold_nothing, peak_growth
from neocog.training_race import TrainingRace, command_of, leads, standings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the race needs Linux")

CHILD = (sys.executable, str(Path(__file__).with_name("race_child.py")))
TINY = Case("tiny", 2, 1)
MANY = 64 * 2**20
NEAR = 4 * 2**20


def tiny() -> nn.Sequential:
    """From [N, 1, 6, 6] to [N, 3]."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)
    )


@pytest.fixture
def contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contender:
    monkeypatch.setitem(ARCHITECTURES, "tiny", Architecture("tiny", tiny, (1, 6, 6)))
    monkeypatch.setitem(training_contenders.WORKLOADS, "tiny", Workload((2,), (1, 6, 6)))
    return Contender(Task("eager", "tiny", 2, 1, tmp_path))


# what a process finds out


def test_what_is_kept_is_counted_by_storage(contender: Contender) -> None:
    training_contenders.without_dropout(contender.model)
    pictures, activated, logits, labels, total = 2 * 36 * 4, 2 * 64 * 4, 2 * 10 * 4, 2 * 8, 4
    found = contender.kept()
    # What ReLU returns is kept by it and by the linear layer, what log_softmax returns twice, too.
    assert found["kept_bytes"] == pictures + activated + logits + labels + total
    # The log-softmax of the logits and the loss stay; pictures and labels were there before.
    assert found["allocated_bytes"] == activated + logits + total + 4


def test_a_mask_of_dropout_is_kept_too(contender: Contender) -> None:
    with_dropout = contender.kept()["kept_bytes"]
    training_contenders.without_dropout(contender.model)
    assert with_dropout > contender.kept()["kept_bytes"]


def test_what_hooks_do_not_see_is_allocated_all_the_same(contender: Contender) -> None:
    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.hidden = torch.ones(1000)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    plain = contender.kept()
    contender.forward = lambda x: Hides.apply(contender.model(x))
    hidden = contender.kept()
    assert hidden["kept_bytes"] == plain["kept_bytes"]
    assert hidden["allocated_bytes"] >= plain["allocated_bytes"] + 4000


def peaks() -> list[int]:
    """Of one tensor, of two one by one, and of two at once."""

    def one() -> None:
        torch.ones(MANY // 4)

    def both() -> None:
        first = torch.ones(MANY // 4)
        torch.ones(MANY // 4).add_(first)

    def one_by_one() -> None:
        one()
        one()

    return [peak_growth(run, lambda: None) for run in (one, one_by_one, both)]


def test_a_peak_is_what_is_alive_at_once() -> None:
    # In a process that nothing else has run in, as in the race: no heap keeps what is freed.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        grown = pool.submit(peaks).result()
    assert grown == pytest.approx([MANY, MANY, 2 * MANY], abs=NEAR)


def test_what_is_dropped_before_a_step_counts_in_it() -> None:
    kept: list[Tensor] = []
    for _ in range(2):
        grown = peak_growth(lambda: kept.append(torch.ones(MANY // 4)), kept.clear)
        assert grown == pytest.approx(MANY, abs=NEAR)


def test_memory_that_is_held_ready_counts() -> None:
    def compute() -> None:
        for make in (program._arena_of_this_thread, lambda size: POOL.empty((size // 4,))):
            made = make(MANY)
            ctypes.memset(made.data_ptr(), 1, MANY)
            del made

    compute()
    hold_nothing()
    try:
        assert peak_growth(compute, lambda: None) == pytest.approx(MANY, abs=NEAR)
    finally:
        POOL.holds = True


def test_the_gradients_are_not_part_of_the_peak(
    contender: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_contenders, "peak_growth", lambda run, before: run() and 5000)
    weights = 4 * 9 + 4 + 64 * 10 + 10
    contender.step()
    found = contender.peak()
    assert found.pop("held_bytes") >= 0
    assert found == {"peak_bytes": 5000 - 4 * weights, "gradient_bytes": 4 * weights}


def test_the_work_of_a_step_is_counted_by_definition(contender: Contender) -> None:
    conv, linear = 2 * 4 * 16 * 9, 2 * 10 * 64
    assert contender.limit()["multiply_adds"] == 2 * conv + 3 * linear


def test_losses_start_from_the_same_weights_without_dropout(
    contender: Contender, tmp_path: Path
) -> None:
    contender.prepare()
    first = contender.losses(3)["losses"]
    contender.time(0)
    assert contender.losses(3)["losses"] == first and first[2] < first[0]
    exact = Contender(Task("eager", "tiny", 2, 1, tmp_path)).reference(3)["losses"]
    assert exact == pytest.approx(first, rel=1e-5) and exact != first


# conducting


def run(folder: Path, *engines: str, timeout: float = 60) -> list[Row]:
    settings = Settings(folder, rounds=3, pause=0, timeout=timeout, command=CHILD)
    return TrainingRace(settings, engines).run(TINY)


def steps(rows: list[Row]) -> dict[str, Row]:
    return {row["engine"]: row for row in rows if row["what"] == "step"}


def test_rows_are_complete(tmp_path: Path) -> None:
    rows = run(tmp_path, "eager", "neocog")
    where = {"network": "tiny", "batch": 2, "threads": 1}
    each = {
        "step_ms": 2.0, "min_ms": 1.0, "allocated_bytes": 1000, "peak_bytes": 2000,
        "gradient_bytes": 500, "losses": [2.0, 1.0, 0.5], "failure": None,
        "error": pytest.approx(2e-4, rel=1e-2), "import_s": 2.0, "prepare_s": 0.5,
        "first_call_s": 0.25,
    }  # fmt: skip
    assert rows == [
        {"what": "step", **where, "engine": "eager", "kept_bytes": 3000, **each},
        {"what": "step", **where, "engine": "neocog", "kept_bytes": 1000, **each},
        {"what": "limit", **where, "multiply_adds": 1e6, "peak": 1e9},
    ]


def test_memory_is_measured_apart_from_time(tmp_path: Path) -> None:
    run(tmp_path, "eager", "neocog")
    asked = [line.split() for line in (tmp_path / "diary.txt").read_text().splitlines()]
    by_process: dict[str, list[str]] = {}
    for pid, *_, do in asked:
        by_process.setdefault(pid, []).append(do)
    apart = ["prepare", "kept", "peak", "losses"]
    assert list(by_process.values()) == [
        apart,
        ["reference"],
        apart,
        ["prepare", *3 * ["time"]],
        ["prepare", *3 * ["time", "limit"]],
    ]
    turns = [(who, do) for _, who, *_, do in asked if do in ("time", "limit")]
    assert turns == 3 * [("eager", "time"), ("neocog", "time"), ("neocog", "limit")]


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("fails", "prepare: RuntimeError: no kernel for it"),
        ("dies", "time: the process ended with exit code 7: out of luck"),
        ("wrong", "losses: [2.0, 1.1, 0.5], expected [2.0, 1.0002]"),
        ("nan", "losses: [2.0, nan, 0.5], expected [2.0, 1.0002]"),
    ],
)
def test_a_failure_is_a_row_that_says_why(engine: str, why: str, tmp_path: Path) -> None:
    rows = run(tmp_path, "eager", engine, "neocog")
    failed = steps(rows)[engine]
    assert failed["failure"] == why
    assert failed["step_ms"] is failed["kept_bytes"] is failed["peak_bytes"] is None
    assert steps(rows)["eager"]["step_ms"] == steps(rows)["neocog"]["step_ms"] == 2.0
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_leads_compare_with_the_best_peer_of_each_kind() -> None:
    def row(network: str, engine: str, ms: float, kept: int, peak: int) -> Row:
        where = {"what": "step", "network": network, "batch": 8, "threads": 1, "failure": None}
        return {
            **where, "engine": engine, "step_ms": ms, "kept_bytes": kept, "peak_bytes": peak
        }  # fmt: skip

    limit = {"what": "limit", "network": "a", "batch": 8, "threads": 1}
    rows = [
        row("a", "eager", 4.0, 300, 500),
        row("a", "inductor", 3.0, 600, 400),
        row("a", "neocog", 2.0, 100, 500),
        {**limit, "multiply_adds": 1e9, "peak": 1e12},
        row("b", "eager", 12.0, 100, 100),
        row("b", "neocog", 2.0, 100, 100),
    ]
    a, b = standings(rows)
    assert a.share == pytest.approx(0.5) and b.share is None
    where = {"network": "a", "batch": 8, "threads": 1}
    first, _, mean = leads(rows)
    assert first == {
        "what": "lead", **where, "step_ms": 1.5, "kept_bytes": 3.0, "peak_bytes": 0.8,
        "share_of_limit": a.share,
        "best_peers": {"step_ms": "inductor", "kept_bytes": "eager", "peak_bytes": "inductor"},
    }  # fmt: skip
    assert mean["step_ms"] == pytest.approx(3.0) and mean["peak_bytes"] == pytest.approx(0.8**0.5)


SCRIPT = """
    from torch import nn
    from neocog import training_contenders
    from neocog.architectures import ARCHITECTURES, Architecture
    from neocog.training_contenders import ENGINES, WORKLOADS, Engine, Workload

    def tiny():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))

    def forgets(model, x):
        return lambda x: model[2](model[:2](x).detach()), x

    ARCHITECTURES["tiny"] = Architecture("tiny", tiny, (1, 6, 6))
    WORKLOADS["tiny"] = Workload((2,), (1, 6, 6))
    ENGINES["forgets"] = Engine(forgets, "no gradient for the convolution")
    training_contenders.main()
"""


@pytest.mark.slow
def test_real_processes_race(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = (sys.executable, str(script))
    settings = Settings(tmp_path, rounds=1, sample=1e-3, pause=0, command=command)
    engines = ("eager", "forgets", "neocog")
    found = steps(TrainingRace(settings, engines).run(TINY))
    for name in ("eager", "neocog"):
        assert found[name]["failure"] is None, found
        assert found[name]["step_ms"] > 0 and found[name]["error"] < 1e-5
        assert found[name]["kept_bytes"] > 0 and found[name]["gradient_bytes"] == 4 * 690
    assert found["forgets"]["failure"].startswith("losses: [")


# the command


def typed(*arguments: str) -> Result:
    app = typer.Typer(cls=ErrorsInOneLine)
    machine.register(app)
    plain = {"FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "80"}
    return CliRunner().invoke(app, ["bench", *arguments], env=plain)


def test_a_race_is_shown_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_race_view, "command_of", lambda python: CHILD)
    file, plot = tmp_path / "training.json", tmp_path / "training.png"
    options = ("--engines", "eager,inductor,neocog", "--filter", "digits", "--rounds", "3")
    result = typed("--training", *options, "--json", str(file), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    for text in ("digits, batch 64, 1 thread", "digits, batch 256, 1 thread", "kept MB"):
        assert text in result.stdout
    assert "kept, best peer / neocog: geometric mean 3.00" in result.stdout
    rows = json.loads(file.read_text())
    kinds = [row["what"] for row in rows]
    assert kinds == [*2 * ["step", "step", "step", "limit"], "lead", "lead", "mean"]
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engines", "onnxruntime"), "--engines onnxruntime: expected some of eager, "),
        (("--filter", "alexnet"), "--filter 'alexnet'"),
        (("--threads", "0"), "--threads 0: expected 1 to"),
        (("--networks",), "alone, without other things to measure"),
    ],
)
def test_bad_options_are_refused(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingRace, "run", lambda *_: pytest.fail("it was raced"))
    result = typed("--training", *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_contenders_are_asked_for_by_module() -> None:
    assert command_of("python") == ("python", "-m", "neocog.training_contenders")


def test_networks_have_their_own_batches() -> None:
    found = {(c.network, c.batch) for c in training_race_view.cases(None, [1], "")}
    assert {("digits", 64), ("digits", 256), ("resnet18", 8)} <= found
    assert {c.batch for c in training_race_view.cases([3], [1, 2], "")} == {3}
