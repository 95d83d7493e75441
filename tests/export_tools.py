"""What the tests of `neocog export` share: calls of the command, and files that are run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny_networks
import torch
from tiny_networks import Net, conv
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from neocog.cli import build_app

NETWORK = "4C3-P2-10"
SHAPE = (3, 12, 16)


def call(*arguments: object) -> Result:
    plain = {"COLUMNS": "200", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(build_app(), ["export", *map(str, arguments)], env=plain)


def printed(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0 and result.stderr == "", (result.output, result.exception)
    return result.stdout


def refused(*arguments: object) -> str:
    """The one line on stderr of a call that must fail."""
    result = call(*arguments)
    assert result.exit_code == 2 and result.stdout == "", (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")


def run_onnx(path: Path | str, x: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.as_tensor(y) for y in session.run(None, {"input": x.numpy()})]


def run_pt2(path: Path | str, x: Tensor) -> list[Tensor]:
    return list(tiny_networks.leaves(torch.export.load(path).module()(x)))


RUN = {".onnx": run_onnx, ".pt2": run_pt2}


def operators(path: Path) -> set[str]:
    """The operators of a file, each with the set it comes from."""
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(path)
        assert [entry.domain for entry in model.opset_import] == [""] and not model.functions
        return {f"{node.domain}::{node.op_type}" for node in model.graph.node}
    program = torch.export.load(path)
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


def net(flow: Callable[..., object]) -> nn.Module:
    """A network of one convolution, ``first``, and a function of it and of its input."""
    torch.manual_seed(0)
    return Net(flow, first=conv(3, 8)).eval()
