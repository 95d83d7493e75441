"""`neocog train` stopped by a kill, by Ctrl-C, by a full disk, and gone on with."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from run_tools import EPOCHS, KEPT, MLP, call, content, done, metrics_of, options, refused

from neocog import runs
from neocog.checkpoint import BEST, LAST, load
from neocog.runs import Run
from neocog.training import Learner


@pytest.fixture(scope="module")
def whole(bars, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done(*options(bars, EPOCHS), "--out", folder)
    return folder


def assert_ended_alike(folder: Path, whole: Path) -> None:
    assert metrics_of(folder) == metrics_of(whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for name in (BEST, MLP):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    one, other = (load(path / LAST) for path in (folder, whole))
    for kind in ("tensors", "resume_tensors"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


IN_A_TERMINAL = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("neocog", run_name="__main__", alter_sys=True)
"""
"""`python -m neocog` that heeds Ctrl-C even where whoever runs the tests has had it ignored."""


def stopped_by(number: int, folder: Path, arguments: list[str], epochs: int) -> tuple[int, str]:
    """Trains in a process of its own, sends it a signal once ``epochs`` are saved.

    Returns its exit code and what it printed.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / BEST).exists() or load(folder / LAST).header.epoch < epochs:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the epochs were not finished in 120 s"
            time.sleep(0.005)
        os.kill(process.pid, number)
        printed = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        process.wait()
    return process.returncode, printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: a kill (it takes POSIX signals)")
def test_a_run_killed_twice_ends_as_one_that_was_not(bars, whole, tmp_path):
    folder = tmp_path / "run"
    begun = [*options(bars, EPOCHS), "--out", str(folder)]
    for arguments, epochs in ((begun, 1), (["--resume", str(folder)], 12)):
        code, printed = stopped_by(signal.SIGKILL, folder, arguments, epochs)
        assert code == -signal.SIGKILL, printed
        assert epochs <= load(folder / LAST).header.epoch < EPOCHS
        assert not (folder / "metrics.json").exists()
    (folder / f".{LAST}.0123abcd.part").write_bytes(b"what a kill within a write leaves")
    result = done("--resume", folder)
    assert "epochs are done" in result.stdout
    assert_ended_alike(folder, whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: Ctrl-C (it takes POSIX signals)")
def test_ctrl_c_stops_cleanly(bars, whole, tmp_path):
    folder = tmp_path / "run"
    arguments = [*options(bars, EPOCHS), "--out", str(folder)]
    code, printed = stopped_by(signal.SIGINT, folder, arguments, 5)
    assert code == 130, printed
    epochs = load(folder / LAST).header.epoch
    assert f"stopped; {epochs} of {EPOCHS} epochs are kept. Go on by" in printed
    assert f"train --resume {folder}" in printed and "Traceback" not in printed
    assert sorted(path.name for path in folder.iterdir()) == KEPT
    done("--resume", folder)
    assert_ended_alike(folder, whole)


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_a_run_has_begun_leaves_nothing(bars, workplace, monkeypatch):
    for where, name in ((runs, "fingerprint"), (runs.Source, "load"), (runs, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupt)
            assert call(*options(bars), "--out", "run").exit_code == 130
        assert not Path("run", "config.json").exists()
    done(*options(bars), "--out", "run")


@pytest.mark.slow
def test_ctrl_c_while_results_are_drawn_can_be_gone_on_from(bars, workplace, monkeypatch):
    done(*options(bars), "--out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(runs.plots, "shift_curve", interrupt)
        result = call(*options(bars), "--out", "run")
    assert result.exit_code == 130 and "stopped; 2 of 2 epochs are kept" in result.stdout
    assert not Path("run", "metrics.json").exists()
    done("--resume", "run")
    assert_ended_alike(Path("run"), Path("whole"))


def test_a_finished_run_may_be_resumed_and_stays_as_it_is(bars, workplace):
    done(*options(bars), "--out", "run")
    before = content(workplace)
    result = done("--resume", "run")
    assert "2 epochs are done" in result.stdout and "epoch 1/" not in result.stdout
    assert content(workplace) == before


def failing_in_epoch(epoch: int, name: str) -> Callable[..., tuple[float, int]]:
    """Learner.step, but for a loss that is NaN in the second step of an epoch."""
    step, calls = Learner.step, 0

    def patched(self: Learner, batch: Any, lr: float) -> tuple[float, int]:
        nonlocal calls
        calls += self.architecture == name
        value, right = step(self, batch, lr)
        steps = -(-42 // 16)
        return (math.nan if calls == (epoch - 1) * steps + 2 else value), right

    return patched


@pytest.mark.slow
def test_a_run_that_diverges_keeps_the_epochs_before(bars, workplace, monkeypatch):
    done(*options(bars, epochs=4), "--out", "whole")
    assert metrics_of(Path("whole"))["pictures"]["train"] == 42
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", failing_in_epoch(3, tiny.ARCHITECTURE))
        message = refused(*options(bars, epochs=4), "--out", "run")
    assert message.startswith("the loss became nan in epoch 3, step 2 of 3 (cnn, architecture ")
    assert "the state after epoch 2 is kept; try a learning rate below 0.01" in message
    assert load(Path("run", LAST)).header.epoch == 2
    assert sorted(path.name for path in Path("run").iterdir()) == KEPT
    done("--resume", "run")
    assert_ended_alike(Path("run"), Path("whole"))


# --- a full disk


WIDE = ("--arch", "16C3-P2-16C3-P2-3")
"""Weights of 12 KB, and 12 KB of the perceptron: last.safetensors holds them four times."""


def larger(disk: Path) -> None:
    command = ["mount", "-o", "remount,size=8m", str(disk)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.slow
def test_a_disk_that_fills_while_training_leaves_what_was_and_can_be_gone_on_from(bars, tmp_path):
    whole, arguments = tmp_path / "whole", [*options(bars, epochs=3), *WIDE]
    done(*arguments, "--out", whole)
    with tiny.full_disk(tmp_path / "disk", "200k") as disk:
        folder = disk / "run"
        message = refused(*arguments, "--out", folder)
        assert message.startswith(f"{folder}/") and message.endswith(": No space left on device")
        assert load(folder / LAST).header.epoch == 0
        for path in folder.iterdir():  # none is half written
            assert path.name in KEPT
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                load(path)
        assert Run.open(folder).settings.epochs == 3
        larger(disk)
        done("--resume", folder)
        assert_ended_alike(folder, whole)


@pytest.mark.slow
def test_a_disk_that_fills_while_results_are_drawn_leaves_the_run(bars, tmp_path):
    with tiny.full_disk(tmp_path / "disk", "96k") as disk:
        folder = disk / "run"
        message = refused(*options(bars, epochs=1), "--out", folder)
        assert message.endswith(".png: No space left on device")
        names = {path.name for path in folder.iterdir()}
        assert names >= set(KEPT) and "metrics.json" not in names
        for path in folder.glob("*.png"):
            with Image.open(path) as image:
                image.load()
        larger(disk)
        done("--resume", folder)
        assert metrics_of(folder)["history"][-1]["epoch"] == 1


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_too_small_to_begin_is_left_empty(bars, tmp_path, exists):
    with tiny.full_disk(tmp_path / "disk", "64k") as disk:
        folder = disk / "run"
        if exists:
            folder.mkdir()
        message = refused(*options(bars), *WIDE, "--out", folder)
        assert message == f"{folder / LAST}: No space left on device"
        assert list(disk.rglob("*")) == ([folder] if exists else [])
