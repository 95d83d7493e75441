"""`neocog export` refuses in one line what cannot be exported, and leaves nothing behind."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_networks
import torch
import torch.nn.functional as F
from export_tools import NETWORK, SHAPE, net, printed, refused
from tiny_networks import Net, conv
from torch import Tensor, nn

import neocog
from neocog import interchange
from neocog.checkpoint import Preprocessing
from neocog.errors import InvalidProblem, NeocogError, NotExported

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "values": (
        lambda: net(tiny_networks.looks_at_values),
        "torch.export cannot trace the model: its control flow depends on the values of tensors",
    ),
    "batch": (
        lambda: net(lambda m, x: m.first(x).reshape(2, -1)),
        "torch.export cannot trace the model: it works for a batch of 2 only, expected one for",
    ),
    "numpy": (
        lambda: net(lambda m, x: torch.from_numpy(m.first(x).numpy())),
        "torch.export cannot trace the model: RuntimeError: .numpy() is not supported",
    ),
    "number": (
        lambda: tiny_networks.make("two_outputs"),
        "the model gives int 7 beside tensors, expected tensors",
    ),
    "nothing": (lambda: net(lambda m, x: ()), "the model gives nothing, expected tensors"),
    "random": (
        lambda: net(lambda m, x: F.dropout(m.first(x))),
        "the model gives other answers when it is asked again",
    ),
    "infinite": (
        lambda: net(lambda m, x: m.first(x) / 0),
        "the model's answers to an input of 2x3x12x16 are not finite",
    ),
    "channels": (
        lambda: Net(lambda m, x: m.first(x), first=conv(4, 8)).eval(),
        "the model fails on an input of 2x3x12x16: RuntimeError: Given groups=1, weight of size",
    ),
    "training": (
        lambda: net(lambda m, x: m.first(x)).train(),
        "model is in training mode; call model.eval() before neocog.export",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_said(tmp_path: Path, name: str, capfd, caplog) -> None:
    made, message = REFUSED[name]
    with pytest.raises(NeocogError) as raised:
        neocog.export(made(), tmp_path / "x.pt2", SHAPE)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.slow
def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    model = net(lambda m, x: torch.special.bessel_j0(m.first(x)))
    with pytest.raises(NotExported, match="ONNX has no counterpart of prims.bessel_j0$"):
        neocog.export(model, tmp_path / "x.onnx", SHAPE)
    with pytest.raises(NotExported, match="^ONNX Runtime .* cannot load the export: "):
        double = Net(lambda m, x: m.first(x.double()), first=conv(3, 8).double()).eval()
        neocog.export(double, tmp_path / "x.onnx", SHAPE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NETWORK, "--out", "x.bin"], "x.bin: expected a file whose name ends in .onnx (ONNX) or"),
        ([NETWORK, "--out", "onnx"], "onnx: expected a file whose name ends in .onnx (ONNX) or"),
        ([NETWORK, "--out", "x.pt2", "--opset", "18"], "opset 18: goes with .onnx, x.pt2 is none"),
        ([NETWORK, "--out", "."], "--out .: is a folder, expected a file"),
        ([NETWORK, "--out", "no/x.onnx"], "--out no/x.onnx: no is no folder"),
        (["nowhere"], "model 'nowhere': no such file or folder"),
        (["4C3-P2-4C20p0-10"], "architecture '4C3-P2-4C20p0-10', layer 3: kernel 20x20 is larger"),
        (["torch.nn:ReLU", "--out", "x.pt2"], "torch.nn:ReLU does not say what it takes; expected"),
        ([NETWORK, "--input", "1,28", "--out", "x.pt2"], "--input '1,28': expected C,H,W, 3 whole"),
    ],
)
def test_wrong_arguments_are_one_line(workplace: Path, arguments: list[str], message: str) -> None:
    assert refused(*arguments).startswith(message)
    assert list(workplace.iterdir()) == []


def test_the_export_never_replaces_what_it_reads(workplace: Path) -> None:
    torch.save(nn.Identity().state_dict(), "w.pt2")
    before = Path("w.pt2").read_bytes()
    message = refused("torch.nn:Identity", "--weights", "w.pt2", "--out", "w.pt2")
    assert message == "--out w.pt2: would overwrite w.pt2, which is read"
    assert Path("w.pt2").read_bytes() == before


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_its_packages_onnx_is_refused_before_anything_is_read(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert refused("nowhere") == (
        "nowhere.onnx: ONNX files are made and checked with onnx, onnxscript, onnxruntime; not "
        f"installed: {missing}; expected pip install 'neocog[export]'"
    )
    assert printed(NETWORK, "--out", "x.pt2")  # which needs none of them


@pytest.mark.parametrize(
    ("shape", "how", "message"),
    [
        ((3, 12), None, r"in_shape \(3, 12\): expected \(channels, height, width\) of at least 1"),
        ((3, 0, 12), None, r"in_shape \(3, 0, 12\): expected"),
        (SHAPE, Preprocessing((0.5, 0.5), (1.0,)), r"mean \(0.5, 0.5\) has 2 numbers, .* 3 chan"),
        (SHAPE, Preprocessing((0.5,), (1.0, 2.0)), r"std \(1.0, 2.0\) has 2 numbers"),
    ],
)
def test_sizes_that_mean_nothing(tmp_path: Path, shape: Any, how: Any, message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        neocog.export(net(lambda m, x: m.first(x)), tmp_path / "x.pt2", shape, preprocessing=how)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_what_an_onnx_file_holds(tmp_path: Path, monkeypatch) -> None:
    model = net(lambda m, x: m.first(x))
    size = sum(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr(interchange, "ONNX_LIMIT", size - 1)
    with pytest.raises(NotExported, match=f"the weights are {size} bytes, .* expected .pt2"):
        neocog.export(model, tmp_path / "x.onnx", SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    model = net(lambda m, x: m.first(x))
    path = tmp_path / "none" / "x.pt2"
    with pytest.raises(FileNotFoundError) as raised:
        neocog.export(model, path, SHAPE)
    assert raised.value.filename == str(path)
    with tiny.full_disk(tmp_path / "disk", "4k") as disk:
        with pytest.raises(OSError, match="No space left"):
            neocog.export(model, disk / "x.pt2", SHAPE)
        assert os.listdir(disk) == []


# ------------------------------------------------------------------------- the check can fail


@pytest.mark.parametrize("ending", [pytest.param(".onnx", marks=pytest.mark.slow), ".pt2"])
def test_an_export_that_computes_something_else_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """A rounding error of 2e-5 in each convolution, and the old file stays."""
    right = interchange.SPELLED_OUT[interchange.ops.conv_block]
    slightly = {interchange.ops.conv_block: lambda *args: [y * (1 + 2e-5) for y in right(*args)]}
    monkeypatch.setattr(interchange, "SPELLED_OUT", {**interchange.SPELLED_OUT, **slightly})
    path = tmp_path / f"x{ending}"
    path.write_text("old")
    layer = neocog.nn.ConvBlock(3, 8, 3, bias=False).eval()
    with pytest.raises(
        NotExported, match=r"gives other answers than the model: .* by 2\.\de-05 of"
    ):
        neocog.export(layer, path, SHAPE)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_program_that_comes_back_changed_is_no_file(tmp_path: Path, monkeypatch) -> None:
    load = torch.export.load

    def changed(file: Any) -> Any:
        program = load(file)
        next(iter(program.state_dict.values())).data.mul_(1 + 2**-23)  # one bit
        return program

    monkeypatch.setattr(torch.export, "load", changed)
    with pytest.raises(NotExported, match="gives back another network than was saved"):
        neocog.export(net(lambda m, x: m.first(x)), tmp_path / "x.pt2", SHAPE)
    assert list(tmp_path.iterdir()) == []


def answering(*answers: object) -> interchange.Made:
    def run(x: Tensor) -> Any:
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers

    return interchange.Made(b"", run, "somewhere")


@pytest.mark.parametrize(
    ("got", "error"),
    [
        ([[1.0, -4.0], [0.0, 0.0]], 0.0),
        ([[1.0, -3.5], [0.0, 0.0]], 0.125),
        ([[1.0, -4.0], [0.0, 1e-30]], math.inf),
        ([[1.0, math.nan], [0.0, 0.0]], math.inf),
    ],
)
def test_the_error_is_a_share_of_the_largest_answer(got: list[list[float]], error: float) -> None:
    wanted = [torch.tensor([1.0, -4.0]), torch.zeros(2)]
    made = answering(*map(torch.tensor, got))
    assert interchange.largest_error(made, [torch.zeros(1)], [wanted]) == error


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([torch.zeros(3)], r"somewhere gives \[\(\(3,\), torch.float32\)\], the model \[\(\(2,\),"),
        ([torch.zeros(2).double()], r"somewhere gives \[\(\(2,\), torch.float64\)\], the model"),
        ([torch.zeros(2), torch.zeros(2)], "somewhere gives "),
        (
            [ValueError("no\nsuch")],
            "somewhere fails on a batch of 4, unlike the model: ValueError: no",
        ),
    ],
)
def test_answers_of_another_kind(answers: list[object], message: str) -> None:
    with pytest.raises(NotExported, match=message):
        interchange.largest_error(answering(*answers), [torch.zeros(4, 1)], [[torch.zeros(2)]])


def test_no_file_is_replaced_unless_told_to(workplace):
    assert printed(NETWORK, "--out", "net.pt2").startswith("net.pt2  (")
    before = Path("net.pt2").read_bytes()
    message = refused(NETWORK, "--raw", "--out", "net.pt2")
    assert message == (
        "net.pt2: is there already; expected --force to replace it, or another name by --out FILE"
    )
    assert Path("net.pt2").read_bytes() == before
    assert "pixels 0..255" in printed(NETWORK, "--raw", "--out", "net.pt2", "--force")
    assert Path("net.pt2").read_bytes() != before


@pytest.mark.skipif(os.name == "nt", reason="NOT TESTED: links and pipes need rights here")
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_is_no_plain_file_is_never_replaced(workplace, force):
    os.mkfifo("pipe.onnx")
    message = refused(NETWORK, "--out", "pipe.onnx", *force)
    assert message == "--out pipe.onnx: is no plain file, expected a new one"
    os.symlink("nowhere.onnx", "link.onnx")
    if not force:
        assert "link.onnx: is there already" in refused(NETWORK, "--out", "link.onnx")


def test_pixels_have_a_file_of_their_own(workplace):
    printed(NETWORK)
    before = Path(f"{NETWORK}.onnx").read_bytes()
    assert printed(NETWORK, "--raw").startswith(f"{NETWORK}-raw.onnx  (")
    assert Path(f"{NETWORK}.onnx").read_bytes() == before
    for again in ((), ("--raw",)):
        name = f"{NETWORK}{'-raw' if again else ''}.onnx"
        assert refused(NETWORK, *again).startswith(f"{name}: is there already; expected --force")
    assert before == Path(f"{NETWORK}.onnx").read_bytes()
