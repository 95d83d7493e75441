"""The `neocog` command itself: what it offers, and what becomes of errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import neocog
from neocog import cli
from neocog.errors import InvalidData, InvalidModel, InvalidProblem, Unsupported

COMMANDS = {"train", "evaluate", "predict", "summary", "explain", "export", "bench", "doctor"}


def call(*arguments: str, app: typer.Typer | None = None):
    return CliRunner().invoke(app or cli.build_app(), list(arguments), env={"COLUMNS": "200"})


def app_that_raises(error: BaseException) -> typer.Typer:
    """The command line with one more command, ``fail``."""
    app = cli.build_app()

    @app.command()
    def fail() -> None:
        raise error

    return app


def test_every_command_is_offered_and_explains_itself():
    printed = call("--help")
    assert printed.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in printed.stdout
        own = call(command, "-h")
        assert own.exit_code == 0 and f"{command} [OPTIONS]" in own.stdout


def test_the_version_is_printed():
    result = call("--version")
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["neocog", neocog.__version__])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InvalidData("no\nsuch   picture"), "error: no\\nsuch   picture\n"),
        (InvalidModel("a"), "error: a"),
        (InvalidProblem("b"), "error: b"),
        (Unsupported("c"), "error: c"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x/y"), "error: x/y: No space left on"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "z"), "error: z: Permission den"),
        (OSError("of no number"), "error: of no number"),
    ],
)
def test_expected_errors_are_one_line_and_exit_code_2(error, line):
    result = call("fail", app=app_that_raises(error))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


def test_a_mistake_of_our_own_is_not_hidden():
    result = call("fail", app=app_that_raises(ZeroDivisionError("oh")))
    assert isinstance(result.exception, ZeroDivisionError) and result.exit_code == 1


def test_ctrl_c_is_exit_code_130():
    assert call("fail", app=app_that_raises(KeyboardInterrupt())).exit_code == 130


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["train", "--epoch-count", "3"], ["train", "--epochs", "three"], ["predict"], []],
)
def test_wrong_usage_is_exit_code_2(arguments):
    result = call(*arguments)
    assert result.exit_code == 2 and "Usage: " in result.output


@pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: a closed pipe (no `true` here)")
def test_a_reader_that_leaves_ends_it_quietly():
    shell = f'"{sys.executable}" -m neocog --help | true'
    result = subprocess.run(shell, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr


def test_help_does_not_wait_for_torch():
    code = "import sys; from neocog import cli; cli.build_app(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("command", "set_before", "expected"),
    [
        ("train", None, "PASSIVE"),
        ("predict", None, "PASSIVE"),
        ("train", "ACTIVE", "ACTIVE"),
        ("bench", None, None),
        ("--help", None, None),
    ],
)
def test_threads_of_long_commands_sleep_while_they_wait(monkeypatch, command, set_before, expected):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that whatever main() sets is undone as well
    if set_before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", set_before)
    seen = []
    monkeypatch.setattr(cli, "build_app", lambda: lambda: seen.append(dict(os.environ)))
    monkeypatch.setattr(sys, "argv", ["neocog", command])
    cli.main()
    assert seen[0].get("OMP_WAIT_POLICY") == expected
