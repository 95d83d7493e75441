"""Several processes by torchrun: the same result as one, and what becomes of a killed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_tools import EPOCHS, done, metrics_of, options
from test_cli_stopping import assert_ended_alike

from neocog.checkpoint import LAST, load
from neocog.distribution import Group

ELASTIC = pytest.mark.skipif(
    sys.platform != "linux", reason="NOT TESTED: torchrun (it is for Linux)"
)

WORKER = """
import os, pathlib, runpy, sys
pathlib.Path(sys.argv.pop(1) + os.environ["RANK"]).write_text(str(os.getpid()))
runpy.run_module("neocog", run_name="__main__", alter_sys=True)
"""
"""`python -m neocog` that leaves its process number in a file."""


def several(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Two workers of `neocog train`; their process numbers go to folder/0 and folder/1."""
    folder.mkdir(exist_ok=True)
    script = folder / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, script, f"{folder}/", "train", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen([*map(str, command)], stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return out, err


def uneven(bars: Path, *more: object) -> list[object]:
    """Batches of 41 and 1 of the 42 pictures: parts of 20 and 21, and of none and one."""
    return [*options(bars, EPOCHS), "--batch-size", 41, *more]


@pytest.fixture(scope="module")
def two(bars, tmp_path_factory) -> Path:
    """A run of two workers that nothing interrupts."""
    folder = tmp_path_factory.mktemp("two")
    process = several(folder, *uneven(bars, "--out", folder / "run"))
    out, err = finished(process)
    assert process.returncode == 0, err
    assert out.count(f"epoch {EPOCHS}/{EPOCHS}") == 1
    assert "2 processes of 1 thread" in " ".join(out.split())
    return folder / "run"


def assert_alike(mine: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """The losses of the first three epochs."""
    for one, other in zip(mine["history"][:3], theirs["history"][:3], strict=True):
        for name in ("cnn", "mlp"):
            for loss in ("loss", "val_loss"):
                assert one[name][loss] == pytest.approx(other[name][loss], rel=tolerance)


@ELASTIC
@pytest.mark.slow
def test_two_workers_learn_what_one_learns(bars, two, workplace):
    done(*uneven(bars), "--out", "one")
    one, both = metrics_of(Path("one")), metrics_of(two)
    assert (one["workers"], both["workers"]) == (1, 2)
    # Six steps, each off by float32's 6e-8 times the root of some 100 terms; Adam divides by small
    # gradients, which makes ten times as much of it. A part weighted wrongly is off by 1e-2.
    assert_alike(one, both, 1e-5)


@ELASTIC
@pytest.mark.slow
def test_two_workers_learn_the_same_by_compiled_steps(bars, two, workplace):
    process = several(workplace, *uneven(bars), "--engine", "neocog", "--epochs", 3, "--out", "run")
    err = finished(process)[1]
    assert process.returncode == 0, err
    done(*uneven(bars), "--engine", "neocog", "--epochs", 3, "--out", "one")
    # As above, and Winograd's rounding, 1e-5 of a layer's largest value.
    assert_alike(metrics_of(Path("run")), metrics_of(Path("one")), 1e-4)


@ELASTIC
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_run_in_one_line_and_it_can_be_gone_on_with(
    bars, two, workplace, rank
):
    run = workplace / "run"
    process = several(workplace, *uneven(bars), "--out", run)
    deadline = time.monotonic() + 120
    while not (run / LAST).exists() or load(run / LAST).header.epoch < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(int((workplace / str(rank)).read_text()), signal.SIGKILL)
    err = finished(process)[1]
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    # by whatever comes first: the broken connection, or torchrun's signal
    seen = f"(worker {rank} of 2 ended or cannot be reached"
    seen += "|another of 2 workers ended, or torchrun was stopped)"
    kept = load(run / LAST).header.epoch
    assert 3 <= kept < EPOCHS and not (run / "metrics.json").exists()
    stops = f"the run stops; {kept} of {EPOCHS} epochs are kept. Go on by: "
    command = f"torchrun --nproc-per-node 2 -m neocog train --resume {run}"
    assert re.fullmatch(f"error: {seen}: {re.escape(stops + command)}", line), line
    if rank == 1:
        assert finished(process := several(workplace, "--resume", run)) and process.returncode == 0
        assert_ended_alike(run, two)
    else:  # by one alone, whose sums round otherwise
        assert "begun with 2 processes" in done("--resume", run).stdout
        assert len(metrics_of(run)["history"]) == EPOCHS


@ELASTIC
@pytest.mark.slow
def test_what_is_wrong_is_said_once(bars, workplace):
    process = several(workplace, bars, "--epochs", 0)
    err = finished(process)[1]
    assert process.returncode != 0 and err.count("error: epochs=0: expected at least 1") == 1
    assert not Path("runs").exists()


def test_parts_follow_each_other_and_differ_by_one_at_most():
    for count in (0, 1, 7, 8, 31):
        parts = [Group(rank, 3).part(count) for rank in range(3)]
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert parts[0].start == 0 and parts[-1].stop == count
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) - min(lengths) <= 1


def test_workers_of_a_machine_share_its_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    assert Group(0, 4, 0, 4).threads() == 1 and Group(0, 4, 0, 2).threads() == 3
    assert Group().threads() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Group(0, 4, 0, 2).threads() is None
