"""The conductor of the race, with children that need no torch; and what becomes of its rows."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner, Result

from neocog import race
from neocog.cli import ErrorsInOneLine, machine, race_view
from neocog.contenders import Task
from neocog.race import Case, Child, Failed, Race, Row, Settings, geometric_mean, standings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the race needs Linux")

CHILD = (sys.executable, str(Path(__file__).with_name("race_child.py")))
TINY = Case("tiny", 1, 1)


def settings(folder: Path, timeout: float = 60) -> Settings:
    return Settings(folder, rounds=3, pause=0, timeout=timeout, command=CHILD)


def run(folder: Path, *engines: str, cold_start: bool = False, timeout: float = 60) -> list[Row]:
    return Race(settings(folder, timeout), engines).run(TINY, cold_start)


def times(rows: list[Row]) -> dict[str, Row]:
    return {row["engine"]: row for row in rows if row["what"] == "time"}


def diary(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "diary.txt").read_text().splitlines()]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# conducting


def test_rows_hold_the_median_and_the_error(tmp_path: Path) -> None:
    rows = run(tmp_path, "one", "two")
    where = {"network": "tiny", "batch": 1, "threads": 1}
    good = {"ms": 2.0, "min_ms": 1.0, "error": 1e-6, "failure": None}
    memory = {"peak_mb": 8.0, "steady_mb": 4.0, "winograd_mb": None}
    assert rows == [
        {"what": "time", **where, "engine": "one", **good},
        {"what": "time", **where, "engine": "two", **good},
        {"what": "memory", **where, "engine": "one", **memory},
        {"what": "memory", **where, "engine": "two", **memory},
    ]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_engines_take_turns(tmp_path: Path) -> None:
    run(tmp_path, "one", "two")
    asked = [(engine, do) for _, engine, _, _, do in diary(tmp_path)]
    assert asked == [
        ("eager", "reference"),
        *(("one", do) for do in ("prepare", "check")),
        *(("two", do) for do in ("prepare", "check")),
        *(3 * [("one", "time"), ("two", "time")]),
        *((engine, "memory") for engine in ("one", "two")),
    ]


def test_references_and_files_are_made_once_for_all_threads(tmp_path: Path) -> None:
    conductor = Race(settings(tmp_path), ("onnxruntime", "one"))
    for case in (TINY, Case("tiny", 1, 2), Case("tiny", 16, 1)):
        conductor.run(case)
    once = ("reference", "convert")
    made = Counter((e, batch, do) for _, e, batch, _, do in diary(tmp_path) if do in once)
    assert made == {
        ("eager", "1", "reference"): 1,
        ("onnxruntime", "1", "convert"): 1,
        ("eager", "16", "reference"): 1,
        ("onnxruntime", "16", "convert"): 1,
    }


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("fails", "prepare: RuntimeError: no kernel for it"),
        ("dies", "time: the process ended with exit code 7: out of luck"),
        ("wrong", "check: the result is off by 5.0e-01 of the largest, a wrong one"),
        ("nan", "check: the result is off by nan of the largest, a wrong one"),
    ],
)
def test_a_failure_is_a_row_that_says_why(engine: str, why: str, tmp_path: Path) -> None:
    rows = run(tmp_path, "one", engine, "two", cold_start=True)
    failed = times(rows)[engine]
    assert (failed["ms"], failed["min_ms"], failed["error"]) == (None, None, None)
    assert failed["failure"] == why
    for other in ("one", "two"):
        assert times(rows)[other]["ms"] == 2.0
    assert {r["engine"] for r in rows if r["what"] == "memory"} == {"one", "two"}
    json.dumps(rows, allow_nan=False)


@pytest.mark.slow
def test_a_child_that_hangs_is_left_behind(tmp_path: Path) -> None:
    start = time.monotonic()
    rows = run(tmp_path, "one", "hangs", timeout=10)
    assert times(rows)["hangs"]["failure"] == "time: no answer within 10 s"
    assert times(rows)["one"]["ms"] == 2.0
    asked = Counter(do for _, engine, _, _, do in diary(tmp_path) if engine == "hangs")
    assert asked["time"] == 1
    assert time.monotonic() - start < 60  # it sleeps for ten minutes


def test_an_engine_that_cannot_be_started_is_a_failure(tmp_path: Path) -> None:
    nowhere = Settings(tmp_path, command=(sys.executable, "-c", "import no_such_engine"))
    rows = Race(nowhere, ("one",)).run(TINY)
    assert (
        "exit code 1: ModuleNotFoundError: No module named 'no_such_engine'"
        in (times(rows)["one"]["failure"])
    )
    missing = Settings(tmp_path, command=(str(tmp_path / "python"),))
    rows = Race(missing, ("one",)).run(TINY)
    assert "No such file" in times(rows)["one"]["failure"]


def test_memory_may_be_unknown(tmp_path: Path) -> None:
    rows = run(tmp_path, "forgets", "one")
    assert times(rows)["forgets"]["ms"] == 2.0
    assert {r["engine"] for r in rows if r["what"] == "memory"} == {"one"}


def test_a_cold_start_is_measured_without_and_with_what_the_first_left(tmp_path: Path) -> None:
    rows = run(tmp_path, "one", "two", cold_start=True)
    found = [r for r in rows if r["what"] == "cold start"]
    starts = [(r["engine"], r["cache"], r["import_s"], r["prepare_s"]) for r in found]
    assert starts == [(e, c, 2.0, 0.5) for c in ("empty", "warm") for e in ("one", "two")]
    pids = {pid for pid, engine, *_, do in diary(tmp_path) if (engine, do) == ("one", "prepare")}
    assert len(pids) == 2


def test_an_idle_child_is_stopped(tmp_path: Path) -> None:
    with Child(Task("one", "tiny", 1, 1, tmp_path), settings(tmp_path)) as child:
        assert child.ask("check") == {"error": 1e-6}
        for _ in range(500):
            status = Path(f"/proc/{child.process.pid}/stat").read_text()
            if status.rsplit(")", 1)[1].split()[0] == "T":
                break
            time.sleep(0.01)
        else:
            pytest.fail(f"it runs: {status}")
        assert child.ask("time", seconds=1)["ms"] == 3.0
    assert child.process.returncode == 0  # it ended by itself, though it had been stopped


def test_no_process_outlives_a_race_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(race, "time", SimpleNamespace(sleep=interrupted))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "one", "two")
    pids = {int(pid) for pid, *_ in diary(tmp_path)}
    assert len(pids) == 3 and all(is_gone(pid) for pid in pids)


def test_a_child_that_does_not_end_is_killed(tmp_path: Path) -> None:
    deaf = (
        sys.executable,
        "-c",
        "import time; print('{\"ok\": true}', flush=True); time.sleep(99)",
    )
    impatient = Settings(tmp_path, command=deaf, goodbye=0.1)
    with Child(Task("one", "tiny", 1, 1, tmp_path), impatient) as child:
        assert child.ask("check") == {}
    assert child.process.returncode == -9


def test_nonsense_for_an_answer_is_a_failure(tmp_path: Path) -> None:
    noisy = Settings(tmp_path, command=(sys.executable, "-c", "input(); print('Loading...')"))
    task = Task("one", "tiny", 1, 1, tmp_path)
    with Child(task, noisy) as child, pytest.raises(Failed, match="check: answered 'Loading...'"):
        child.ask("check")


def test_a_child_that_closes_its_answers_and_lives_on_is_killed(tmp_path: Path) -> None:
    mute = "import os, time; input(); os.close(1); time.sleep(99)"
    impatient = Settings(tmp_path, command=(sys.executable, "-c", mute), goodbye=0.1)
    task = Task("one", "tiny", 1, 1, tmp_path)
    with Child(task, impatient) as child, pytest.raises(Failed, match="ended with signal 9"):
        child.ask("check")


# what came out


def row(engine: str, ms: float | None, network: str = "tiny") -> Row:
    where = {"what": "time", "network": network, "batch": 1, "threads": 2}
    return {**where, "engine": engine, "ms": ms, "error": None, "failure": None if ms else "why"}


def test_leads_are_over_the_best_peer_and_over_inductor() -> None:
    rows = [
        row("inductor", 8.0),
        row("ncnn", 3.0),
        row("openvino", None),
        row("neocog-freeze", 1.5),
        row("neocog-compile", 2.0),
        {"what": "memory", "network": "tiny", "batch": 1, "threads": 2, "engine": "ncnn"},
        row("neocog-freeze", 1.0, "other"),
        row("inductor", 1.0, "third"),
        row("neocog-freeze", None, "third"),
    ]
    found, alone, failed = standings(rows)
    assert (found.best_peer, found.lead, found.compile_lead) == ("ncnn", 2.0, 4.0)
    assert (alone.best_peer, alone.lead, alone.compile_lead) == (None, None, None)
    assert (failed.best_peer, failed.lead) == ("inductor", None)
    assert str(failed.case) == "third, batch 1, 2 threads"


def test_the_geometric_mean_is_of_what_there_is() -> None:
    assert geometric_mean([2.0, None, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([None]) is None


def test_the_plot_is_a_png_file() -> None:
    assert race_view.plot([row("ncnn", 3.0), row("neocog-freeze", 1.5)])[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("ms", "text"), [(0.0123, "0.0123"), (0.25, "0.250"), (7.1234, "7.12"), (1097.3, "1097.3")]
)
def test_milliseconds_keep_their_figures(ms: float, text: str) -> None:
    assert race_view.milliseconds(ms) == text


# as it is typed


def typed(*arguments: str) -> Result:
    app = typer.Typer(cls=ErrorsInOneLine)
    machine.register(app)
    plain = {"FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "80"}
    return CliRunner().invoke(app, ["bench", *arguments], env=plain)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_view, "command_of", lambda python: CHILD)
    monkeypatch.setattr(race_view, "RACED", ("digits", "resnet18"))


ENGINES = ("--engines", "eager,inductor,neocog-freeze,neocog-compile")


def test_a_race_is_shown_written_and_drawn(fakes: None, tmp_path: Path) -> None:
    file, plot = tmp_path / "race.json", tmp_path / "race.png"
    options = ("--batches", "1", "--threads", "1", "--rounds", "3")
    result = typed("--networks", *ENGINES, *options, "--json", str(file), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    for text in ("digits, batch 1, 1 thread", "resnet18, batch 1, 1 thread, warm cache"):
        assert text in result.stdout
    assert "best peer / neocog-freeze: geometric mean 1.00, least 1.00" in result.stdout
    assert "0.75" in result.stdout and "8 / 4" in result.stdout
    assert "0.75 (+2.00)" in result.stdout
    rows = json.loads(file.read_text())
    found = [(r["network"], r["ms"]) for r in rows if r["what"] == "time"]
    assert found == 4 * [("digits", 2.0)] + 4 * [("resnet18", 2.0)]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert sorted(os.listdir(tmp_path)) == ["race.json", "race.png"]


def test_rows_alone_can_be_printed(fakes: None) -> None:
    result = typed("--networks", *ENGINES, "--filter", "digits, batch 16", "--json", "-")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {(r["network"], r["batch"]) for r in rows} == {("digits", 16)}
    assert {r["threads"] for r in rows} <= {1, 2}


def test_rows_are_kept_case_by_case(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Race.run

    def stops(self: Race, case: Case, cold_start: bool = False) -> list[Row]:
        if case.network == "resnet18":
            raise KeyboardInterrupt
        return whole(self, case, cold_start)

    monkeypatch.setattr(Race, "run", stops)
    file = tmp_path / "race.json"
    typed("--networks", *ENGINES, "--batches", "1", "--threads", "1", "--json", str(file))
    assert {r["network"] for r in json.loads(file.read_text())} == {"digits"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", "1,x"), "--threads 1,x: expected a number, or several as 1,2"),
        (("--threads", "0"), "--threads 0: expected 1 to"),
        (("--batches", "1,0"), "--batches 1,0: expected at least 1"),
        (("--engines", "eager,cudnn"), "--engines cudnn: expected some of eager, "),
        (("--filter", "alexnet"), "--filter 'alexnet'"),
        (("--rounds", "0"), "--rounds 0: expected at least 1"),
        (("--blocks",), "--networks: alone, without other things to measure"),
        (("--plot", "no/such/folder/x.png"), "--plot no/such/folder/x.png: there is no folder"),
    ],
)
def test_bad_options_are_refused(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Race, "run", lambda *_: pytest.fail("it was raced"))
    result = typed("--networks", *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_other_systems_are_told_that_they_cannot_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "sys", SimpleNamespace(platform="darwin"))
    assert "--networks: needs Linux" in typed("--networks").stderr


def test_an_engine_races_once() -> None:
    assert race_view.engines("ncnn,eager,ncnn") == ["ncnn", "eager"]


def test_several_threads_are_for_networks_alone() -> None:
    if (os.cpu_count() or 1) > 1:
        assert "--threads 1,2: expected one number" in typed("--blocks", "--threads", "1,2").stderr


def test_larger_networks_are_raced_by_name() -> None:
    named = {case.network for case in race_view.cases([1], [1], "")}
    assert "vgg16" not in named and "resnet50" in named
    assert {case.network for case in race_view.cases([1], [1], "vgg16")} == {"vgg16"}
    assert len(race_view.cases([1, 16], [1, 2], "digits")) == 4
