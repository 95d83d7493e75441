"""Layers timed inside their network, and ``neocog bench --layers``. No number here is a time."""

import json

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import neocog
from neocog.cli import ErrorsInOneLine, machine
from neocog.layer_times import layer_times


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4),
        nn.Flatten(), nn.Linear(192, 7),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_layer_has_a_row(batch, threads):
    x = torch.randn(batch, 3, 16, 16)
    frozen = neocog.freeze(network(), x)
    expected, (native,) = frozen(x), frozen.plans[-1].natives
    program = native.program
    rows = layer_times(frozen, x, 2, threads)
    assert native.program is program and torch.equal(frozen(x), expected)
    names = [row.layer.split(" n")[0] for row in rows]
    layers = [name for name in names if name not in ("input", "flatten")]
    assert layers == ["conv", "conv", "pooling", "linear"]
    assert sum(row.multiply_adds for row in rows) == neocog.report(frozen)[0].multiply_adds
    assert all(row.seconds >= 0 and row.kernels for row in rows)
    assert any(row.seconds > 0 for row in rows)


def test_what_is_too_small_for_two_threads():
    x = torch.randn(1, 3, 4, 4)
    frozen = neocog.freeze(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval(), x)
    rows = layer_times(frozen, x, 2, 2)
    assert all(0 <= row.seconds < float("inf") for row in rows)


def test_layers_between_foreign_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.second(torch.cos(self.first(x)))

    x = torch.randn(1, 3, 12, 12)
    rows = layer_times(neocog.freeze(Net().eval(), x), x, 1, 1)
    assert sum(row.layer.startswith("conv") for row in rows) == 2


def typed(*arguments: str):
    app = typer.Typer(cls=ErrorsInOneLine)
    machine.register(app)
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "120"})


def test_the_command(tmp_path):
    file = tmp_path / "layers.json"
    options = ("--filter", "digits, batch 1,", "--threads", "1", "--rounds", "1")
    result = typed("--layers", *options, "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "digits, batch 1, 1 thread" in result.stdout and "winograd" in result.stdout
    rows = json.loads(file.read_text())
    assert {(row["network"], row["batch"], row["threads"]) for row in rows} == {("digits", 1, 1)}
    assert {"layer", "kernels", "us", "multiply_adds", "share"} <= set(rows[0])
    assert rows == json.loads(file.read_text())
    printed = typed("--layers", *options, "--json", "-")
    assert [row["layer"] for row in json.loads(printed.stdout)] == [row["layer"] for row in rows]


def test_it_is_measured_alone():
    result = typed("--layers", "--blocks")
    assert result.exit_code == 2
    assert "--layers: alone, without other things to measure" in result.stderr
