"""What the tests of `neocog train` share: a tiny data set, and calls of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner, Result

from neocog.cli import build_app
from neocog.training import PARTS

MLP = "mlp.safetensors"
EPOCHS = 40
KEPT = ["best.safetensors", "config.json", "last.safetensors", "mlp.safetensors", "pictures.json"]


def call(*arguments: object) -> Result:
    plain = {"COLUMNS": "200", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(build_app(), ["train", *map(str, arguments)], env=plain)


def options(bars: Path, epochs: int = 2, seed: int = 3) -> list[str]:
    """The arguments of a run of a second, with the rate that learns bars soon."""
    found = [str(bars), "--arch", tiny.ARCHITECTURE, "--threads", "1", "--batch-size", "16"]
    found += ["--lr", "0.01", "--epochs", str(epochs), "--seed", str(seed)]
    return [*found, "--engine", "eager"]


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    """The one line on stderr of a call that must fail."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")


def metrics_of(folder: Path) -> dict[str, Any]:
    """A run's metrics without the time it took, and what that went into."""
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found.pop("seconds") > 0
    shares = found.pop("time_shares")
    assert sum(shares[part] for part in PARTS) == pytest.approx(1, abs=2e-4)  # of 4 digits each
    assert shares["step"] > 0 and shares["preparing"] > 0
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
