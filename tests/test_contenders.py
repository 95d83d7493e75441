"""What runs inside one process of the race: it builds, prepares, checks, times, and says so."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neocog import answering
from neocog.answering import serve
from neocog.architectures import ARCHITECTURES, Architecture
from neocog.contenders import ENGINES, Contender, Engine, Task
from neocog.race import Case, Race, Settings, command_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the race needs Linux")


def tiny() -> nn.Sequential:
    """From [N, 1, 6, 6] to [N, 3]."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", Architecture("tiny", tiny, (1, 6, 6)))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an engine of what it returns when it is called."""

    def known(run: Any) -> str:
        fake = Engine(lambda task, model, x: lambda: run(model, x), "a fake")
        monkeypatch.setitem(ENGINES, "fake", fake)
        return "fake"

    return known


def contender(folder: Path, engine: str = "eager", batch: int = 2) -> Contender:
    return Contender(Task(engine, "tiny", batch, 1, folder))


def answers(found: Contender, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    out = io.StringIO()
    serve(found, io.StringIO("".join(f"{json.dumps(request)}\n" for request in requests)), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def reference(folder: Path) -> None:
    assert answers(contender(folder), {"do": "reference"}) == [{"ok": True}]


def test_a_result_is_checked_against_float64(tmp_path: Path) -> None:
    reference(tmp_path)
    assert np.load(tmp_path / "tiny_2.npy").dtype == np.float64
    prepared, checked = answers(contender(tmp_path), {"do": "prepare"}, {"do": "check"})
    assert prepared["ok"] and prepared["first_call_s"] > 0
    assert prepared["prepare_s"] >= 0 and prepared["import_s"] >= 0
    assert checked["ok"] and 0 < checked["error"] < 2e-6


def test_the_error_is_relative_to_the_largest_result(tmp_path: Path, engine: Any) -> None:
    reference(tmp_path)
    largest = np.abs(np.load(tmp_path / "tiny_2.npy")).max()
    for off in (0.25, -0.5):
        name = engine(lambda model, x, off=off: model(x) + off * largest)
        _, checked = answers(contender(tmp_path, name), {"do": "prepare"}, {"do": "check"})
        assert checked["error"] == pytest.approx(abs(off), rel=1e-4)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda model, x: model(x)[:1], "returned float32 (1, 3), expected float32 (2, 3)"),
        (lambda model, x: model(x).double(), "returned float64 (2, 3), expected float32 (2, 3)"),
        (lambda model, x: model(x) * torch.nan, "returned NaN or infinities"),
    ],
    ids=["shape", "dtype", "nan"],
)
def test_what_is_no_result_is_refused(run: Any, why: str, tmp_path: Path, engine: Any) -> None:
    reference(tmp_path)
    _, checked = answers(contender(tmp_path, engine(run)), {"do": "prepare"}, {"do": "check"})
    assert checked == {"ok": False, "reason": f"RuntimeError: {why}"}


def test_every_process_builds_the_same_network_and_pictures(tmp_path: Path) -> None:
    one, other = contender(tmp_path), contender(tmp_path, "inductor")
    assert torch.equal(one.x, other.x) and one.x.shape == (2, 1, 6, 6)
    assert one.x.is_contiguous() and not one.model.training
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert one.model[1].running_mean.abs().max() > 0


def test_calls_are_counted_and_timed(tmp_path: Path, engine: Any) -> None:
    seen: list[Tensor] = []
    found = contender(tmp_path, engine(lambda model, x: seen.append(x)))
    _, timed = answers(found, {"do": "prepare"}, {"do": "time", "seconds": 1e-4})
    assert timed["ok"] and timed["ms"] > 0 and timed["calls"] >= 1
    # the first one, and one that warms the caches
    assert len(seen) == timed["calls"] + 2
    assert all(x is found.x for x in seen)


def test_a_call_longer_than_the_sample_is_made_once(tmp_path: Path, engine: Any) -> None:
    calls: list[float] = []

    def slow(model: nn.Module, x: Tensor) -> None:
        calls.append(time.monotonic())
        time.sleep(answering.LONG_CALL + 0.01 if len(calls) > 1 else 0)

    found = contender(tmp_path, engine(slow))
    _, timed = answers(found, {"do": "prepare"}, {"do": "time", "seconds": 0.01})
    assert timed["calls"] == 1 and timed["ms"] > 1e3 * answering.LONG_CALL
    assert len(calls) == 2


def test_memory_is_what_an_engine_takes_beyond_the_network(tmp_path: Path, engine: Any) -> None:
    kept: list[Tensor] = []

    def greedy(model: nn.Module, x: Tensor) -> None:
        if not kept:
            kept.append(torch.ones(2**23))  # 34 MB stay
            torch.ones(2**25)  # 134 MB pass

    found = contender(tmp_path, engine(greedy))
    _, memory = answers(found, {"do": "prepare"}, {"do": "memory"})
    assert 33 < memory["steady_mb"] < 60
    assert 167 < memory["peak_mb"] < 200


@pytest.mark.parametrize("name", ["eager-channels-last", "neocog-freeze"])
def test_engines_compute_the_network(name: str, tmp_path: Path) -> None:
    reference(tmp_path)
    _, checked, timed, memory = answers(
        contender(tmp_path, name),
        {"do": "prepare"},
        {"do": "check"},
        {"do": "time", "seconds": 1e-3},
        {"do": "memory"},
    )
    assert checked["ok"] and 0 < checked["error"] < 5e-6
    assert timed["ok"] and memory["ok"]
    assert (memory["winograd_mb"] is None) == (name != "neocog-freeze")


def test_a_frozen_network_tells_its_winograd_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = Architecture("tiny", lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 56, 56))
    monkeypatch.setitem(ARCHITECTURES, "tiny", deep)
    _, memory = answers(contender(tmp_path, "neocog-freeze"), {"do": "prepare"}, {"do": "memory"})
    # 36 numbers for each kernel of 3x3
    assert memory["winograd_mb"] == pytest.approx(1e-6 * 4 * 36 * 64 * 64, rel=0.05)


def test_a_failure_is_an_answer_in_one_line(tmp_path: Path, engine: Any) -> None:
    def fails(model: nn.Module, x: Tensor) -> None:
        raise ModuleNotFoundError("No module named 'x'\nand more")

    found = contender(tmp_path, engine(fails))
    failed, converted = answers(found, {"do": "prepare"}, {"do": "convert"})
    assert failed == {"ok": False, "reason": "ModuleNotFoundError: No module named 'x'"}
    assert converted["ok"]  # it goes on, and there is nothing to convert


def test_all_engines_say_what_their_time_includes() -> None:
    assert all(engine.includes for engine in ENGINES.values())
    assert {name for name in ENGINES if name.startswith("neocog")} == {
        "neocog-freeze",
        "neocog-compile",
    }


SCRIPT = """
    import os
    from pathlib import Path
    from torch import nn
    from neocog import contenders
    from neocog.architectures import ARCHITECTURES, Architecture

    def chatty(task, model, x):
        print("loading, dear user")
        os.write(1, b"loaded by C\\n")
        return lambda: model(x)

    def tiny():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 3))

    ARCHITECTURES["tiny"] = Architecture("tiny", tiny, (1, 6, 6))
    contenders.ENGINES["chatty"] = contenders.Engine(chatty, "talk")
    contenders.main()
"""


@pytest.mark.slow
def test_real_processes_race(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(SCRIPT))
    settings = Settings(
        tmp_path, rounds=2, sample=1e-3, pause=0, command=(sys.executable, str(script))
    )
    rows = Race(settings, ("eager", "chatty", "nobody")).run(Case("tiny", 2, 1))
    found = {row["engine"]: row for row in rows if row["what"] == "time"}
    for name in ("eager", "chatty"):
        assert found[name]["failure"] is None, rows
        assert found[name]["ms"] > 0 and 0 < found[name]["error"] < 2e-6
    assert found["nobody"]["failure"].endswith("exit code 1: KeyError: 'nobody'")
    assert "loaded by C" in (tmp_path / "chatty.log").read_text()
    assert {row["engine"] for row in rows if row["what"] == "memory"} == {"eager", "chatty"}


@pytest.mark.slow
def test_a_stopped_child_ends_with_a_conductor_that_is_killed(tmp_path: Path) -> None:
    conductor = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from neocog.contenders import Task
        from neocog.race import Child, Settings, command_of
        child = Child(Task("eager", "digits", 1, 1, Path({str(tmp_path)!r})), Settings(Path()))
        child.ask("prepare")
        print(child.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run(
        [sys.executable, "-c", conductor], cwd=tmp_path, capture_output=True, text=True
    )
    pid = int(done.stdout)
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} is still there")


def test_an_interpreter_becomes_a_command() -> None:
    assert command_of("python3") == ("python3", "-m", "neocog.contenders")
