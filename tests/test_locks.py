"""One process trains a run: a second one is refused, and nobody is locked out by the dead."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_tools import content, done, options, refused

from neocog import locks
from neocog.locks import RunInUse, locked
from neocog.runs import CONFIG, Run

HOLD = """
import sys
from pathlib import Path
from neocog.locks import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run" / CONFIG
    path.parent.mkdir()
    path.write_text("{}", encoding="utf-8")
    return path


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its stdin is closed."""
    call = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(
        call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def held(path: Path) -> bool:
    try:
        with locked(path, pytest.fail):
            return False
    except RunInUse:
        return True


def test_a_lock_holds_others_off_and_goes_with_its_process(file):
    before = content(file.parent)
    process = holder(file)
    assert held(file) and held(file)
    process.kill()  # it cannot clean up
    process.communicate()
    assert not held(file) and not held(file)
    with locked(file, pytest.fail):
        assert held(file)  # in this process too
    assert not held(file)
    assert content(file.parent) == before


def test_a_lock_goes_with_an_error_too(file):
    with pytest.raises(ZeroDivisionError), locked(file, pytest.fail):
        raise ZeroDivisionError
    assert not held(file)


def test_a_run_being_trained_is_not_resumed(bars, workplace):
    done(*options(bars), "--out", "run", "--no-mlp")
    (Path("run") / ".last.safetensors.0123abcd.part").write_bytes(b"being written")
    before = content(workplace)
    process = holder(Path("run") / CONFIG)
    try:
        message = refused("--resume", "run")
        assert message == "run: is being trained by another process; expected one at a time"
        assert content(workplace) == before
        assert Run.open(Path("run")).kept() == 2  # whoever only reads may
    finally:
        process.communicate()
    done("--resume", "run")
    done("--resume", "run")  # this process let go of it


def test_a_file_system_without_locks_is_told_of(file, monkeypatch):
    def refuse(handle: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(locks, "_take", refuse)
    told: list[str] = []
    with locked(file, told.append):
        assert told == [
            f"{file.parent} cannot be locked ({os.strerror(errno.EOPNOTSUPP)}): a second --resume "
            "would not be noticed"
        ]


def test_a_run_that_cannot_be_written_says_so(file, monkeypatch):
    def refuse(path: Path, flags: int) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(locks.os, "open", refuse)
    with pytest.raises(OSError) as caught, locked(file, pytest.fail):
        pass
    assert caught.value.filename == str(file)
    assert caught.value.strerror == (
        f"{os.strerror(errno.EROFS)}; a run that goes on writes into its directory"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: a kill (it takes POSIX signals)")
def test_a_running_run_is_not_resumed_and_a_killed_one_blocks_nobody(bars, workplace):
    many = options(bars, epochs=5000)
    call = [sys.executable, "-m", "neocog", "train", *many, "--no-mlp", "--out", "run"]
    process = subprocess.Popen(
        call,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch "):
            assert process.poll() is None
        assert "is being trained by another process" in refused("--resume", "run")
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not held(Path("run") / CONFIG)
