"""What the tests of `neocog evaluate` and `neocog predict` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from typer.testing import CliRunner, Result

from neocog.cli import build_app


def call(*arguments: object) -> Result:
    plain = {"COLUMNS": "200", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(build_app(), [*map(str, arguments), "--threads", "1"], env=plain)


def printed(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0 and result.stderr == "", result.output
    return result.stdout


def as_json(*arguments: object) -> Any:
    return json.loads(printed(*arguments, "--json"))


def refused(*arguments: object) -> str:
    """The one line on stderr of a call that must fail, which prints nothing else."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert result.stdout == ""
    return lines[0].removeprefix("error: ")


def bar_picture(label: int) -> np.ndarray:
    """uint8 [12, 12]: a picture that no run has seen, its bar clear of the border.

    (A bright bar along the border can pass for a light background, and is inverted.)
    """
    images, labels = tiny.pictures(5, seed=77)
    return next(image for image in images[labels == label] if image[:, [0, -1]].max() < 100)


def one(model: Path, path: Path | str, *more: object) -> dict[str, Any]:
    (found,) = as_json("predict", model, path, *more)
    return found


def learned(where: Path) -> Path:
    """A run that has learned to tell bars apart, on pictures beside it."""
    bars = tiny.folder(where / "bars")
    result = call(
        *("train", bars, "--arch", tiny.ARCHITECTURE, "--lr", 0.01, "--batch-size", 16),
        *("--epochs", 40, "--no-mlp", "--engine", "eager", "--out", where / "run"),
    )
    assert result.exit_code == 0, result.output
    return where / "run"
