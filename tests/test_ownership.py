"""`neocog summary` of models that share, parametrise or hold weights, and take several inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from typer.testing import CliRunner, Result

from neocog.cli import build_app
from neocog.errors import InvalidProblem
from neocog.geometry import ReceptiveField, Window
from neocog.given_inputs import InputSpec, zeros
from neocog.layers import Walked, describe, describe_as_far_as_it_goes
from neocog.models import weight_count
from neocog.sight import Field
from neocog.tracing import explain_value


def everything(walked: Walked) -> int:
    assert walked.error is None
    layers = sum(info.weights + info.biases for info in walked.layers)
    return layers + sum(part.count for part in walked.held)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.b(x)))


def test_a_weight_in_two_layers_counts_once() -> None:
    walked = describe_as_far_as_it_goes(Tied(), (4, 8, 8))
    found = [(i.weights, i.biases, i.shared_with) for i in walked.layers]
    assert found == [(144, 4, None), (0, 4, 1), (0, 0, 1)]  # b first, then a, then b again
    assert everything(walked) == weight_count(Tied())


def parametrised() -> list[nn.Module]:
    old = torch.nn.utils.weight_norm
    with pytest.warns(FutureWarning):
        last = old(nn.Conv2d(5, 6, 1))
    return [
        parametrizations.weight_norm(nn.Conv2d(3, 5, 3)),
        parametrizations.spectral_norm(nn.Conv2d(5, 5, 3)),
        torch.nn.utils.spectral_norm(nn.Conv2d(5, 5, 1)),
        last,
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(96, 2)),
        parametrizations.orthogonal(nn.Linear(2, 2)),
    ]


def test_parametrised_layers_are_layers() -> None:
    model = nn.Sequential(*parametrised())
    walked = describe_as_far_as_it_goes(model, (3, 8, 8))
    assert [info.name for info in walked.layers] == ["0", "1", "2", "3", "4", "5", "6"]
    # the lengths of weight_norm are one number for each output channel
    wanted = [(5 * 27 + 5, 5), (225, 5), (25, 5), (30 + 6, 6), (0, 0), (192 + 2, 2), (4, 2)]
    assert [(info.weights, info.biases) for info in walked.layers] == wanted
    assert everything(walked) == weight_count(model) and not walked.held
    assert walked.layers[0].what == "conv 3x3" and walked.layers[0].explainable
    assert [s.sight.rows.size for i in walked.layers[:2] for s in i.stages] == [3, 5]


def test_a_parametrised_convolution_is_explained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(1, 2, 3))).eval()
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
    assert explain_value(model, torch.randn(1, 5, 5), 1, 1, (0, 2)).matches


class Holding(nn.Module):
    """A bit of everything: attention, parameters beside layers, a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encode = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.first = nn.Parameter(torch.zeros(1, 1, 8))
        self.many = nn.ParameterList([torch.zeros(3), torch.zeros(2)])
        self.table = nn.ParameterDict({"bias": torch.zeros(4)})
        self.recurrent = nn.LSTM(8, 4)
        self.scale = Scale()
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.first
        x = self.attend(x, x, x, key_padding_mask=mask)[0]
        return self.recurrent(self.scale(self.encode(x)))[0]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shifts = nn.Parameter(torch.ones(8)), nn.ParameterList([torch.zeros(8)])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shifts[0]


def test_attention_and_what_containers_hold_are_counted_where_they_are() -> None:
    model = Holding()
    walked = describe_as_far_as_it_goes(model, InputSpec((7,), None, torch.int64))
    found = {info.name: (info.weights, info.biases) for info in walked.layers}
    assert found["attend"] == found["encode.self_attn"] == (4 * 64, 4 * 8)
    assert found["embed"] == (88, 0) and found["encode.linear1"] == (128, 16)
    assert found["recurrent"] == (16 * (8 + 4), 2 * 16) and found["scale"] == (16, 0)
    assert "unused" not in found
    held = {part.name: (part.shape, part.count, part.is_bias) for part in walked.held}
    assert held == {
        "first": ((1, 1, 8), 8, False),
        "many.0": ((3,), 3, False),
        "many.1": ((2,), 2, False),
        "table.bias": ((4,), 4, True),
    }
    assert everything(walked) == weight_count(model) - 12


# Circular padding


def dependence(model: nn.Module, size: int, channel: int, at: tuple[int, int]) -> tuple[set, set]:
    """The rows and the columns of the input that one output value truly depends on."""
    x = torch.randn(1, 1, size, size, requires_grad=True)
    model(x)[0, channel, at[0], at[1]].backward()
    assert x.grad is not None
    used = x.grad[0, 0] != 0
    return set(used.any(1).nonzero().flatten().tolist()), set(used.any(0).nonzero()[:, 0].tolist())


def circular(channels: int = 1, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, 1, kernel, padding=kernel // 2, padding_mode="circular", **more)


STACKS: dict[str, tuple[Callable[[], list[nn.Module]], bool]] = {
    "one": (lambda: [circular()], True),
    "two": (lambda: [circular(), circular(kernel=5)], True),
    "dilated": (
        lambda: [nn.Conv2d(1, 1, 3, padding=2, dilation=2, padding_mode="circular")],
        False,
    ),
    "after a pool": (lambda: [nn.AvgPool2d(2), circular()], True),
    "zeros after": (lambda: [circular(), nn.Conv2d(1, 1, 3, padding=1)], False),
    "zeros before": (lambda: [nn.Conv2d(1, 1, 3, padding=1), circular()], False),
    "strided": (lambda: [nn.Conv2d(1, 1, 3, stride=2, padding=1), circular()], False),
    "uneven": (lambda: [nn.AvgPool2d(3), circular()], False),
    "two circles": (lambda: [circular(), nn.AvgPool2d(3), circular()], False),
}


@pytest.mark.parametrize("name", STACKS)
def test_circular_padding_sees_the_opposite_edge(name: str) -> None:
    make, exact = STACKS[name]
    torch.manual_seed(0)
    model, size = nn.Sequential(*make(), nn.Conv2d(1, 1, 1)).eval(), 16
    info = describe(model, (1, size, size))[-1]
    sight = info.stages[-1].sight
    assert isinstance(sight, Field) and sight.round
    last = info.out_shape[-1]
    for y in range(last):
        x = last - 1 - y
        rows, cols = dependence(model, size, 0, (y, x))
        for truth, field, o in ((rows, sight.rows, y), (cols, sight.cols, x)):
            first, stop = field.interval(o, size)
            assert 0 <= first < size and stop - first <= size
            seen = {i % size for i in range(first, stop)}
            assert truth == seen if exact else truth <= seen, (y, x)
    found = explain_value(model, torch.randn(1, size, size), len(make()) + 1, 0, (0, 0))
    assert found.seen == (sight.rows.interval(0, size), sight.cols.interval(0, size))


def test_padding_of_other_kinds_stays_within_its_window() -> None:
    for mode in ("zeros", "reflect", "replicate"):
        model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode))
        (info,) = describe(model, (1, 8, 8))
        assert info.stages[0].sight == Field(ReceptiveField(3, 1, -1), ReceptiveField(3, 1, -1))
    unpadded = nn.Sequential(nn.Conv2d(1, 1, 3, padding_mode="circular"))
    assert not describe(unpadded, (1, 8, 8))[0].stages[0].sight.round


def test_a_circle_that_does_not_close_sees_everything() -> None:
    field = ReceptiveField().through(Window(2, 2)).through(Window(3, 1, low=1, high=1), 3)
    assert field.period == 6
    assert (field.interval(0, 6), field.interval(1, 6), field.interval(2, 6)) == ((0, 6),) * 3
    assert field.interval(0, 7) == (0, 7) and field.interval(1, 7) == (0, 6)


# Several inputs


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 4, 3, padding=1), nn.Embedding(5, 4)

    def forward(self, image: Tensor, batch: dict[str, Tensor]) -> Tensor:
        assert batch["keep"].dtype == torch.bool and batch["ids"].dtype == torch.int64
        both = self.conv(image) + self.conv(batch["image"])
        return both + self.embed(batch["ids"]).mean(1)[:, :, None, None]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.path.insert(0, {!r})\nfrom test_ownership import *\n"
    (tmp_path / "a_zoo.py").write_text(code.format(str(Path(__file__).parent)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    plain = {"COLUMNS": "100", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(build_app(), ["summary", *arguments], env=plain)


INPUTS = ("--input", "image=3,8,9", "--input", "batch.image=3,8,9", "--input", "batch.ids=6:int64")
INPUTS = (*INPUTS, "--input", "batch.keep=:bool")


def test_several_inputs_a_dictionary_and_whole_numbers(place: None) -> None:
    result = run("a_zoo:Several", *INPUTS)
    assert result.exit_code == 0, result.output
    headline = "image 3x8x9, batch.image 3x8x9, batch.ids 6 int64, batch.keep a number bool"
    assert result.stdout.startswith(f"a_zoo:Several on {headline}\n")
    assert re.search(r"the input batch\.ids +6 ", result.stdout)
    assert re.search(r"^ 2 +conv +conv 3x3, padding 1 +4x8x9 +3x3 +1 *$", result.stdout, re.M)
    assert re.search(r"^ 2 +those of layer 1 ", result.stdout, re.M)
    found = json.loads(run("a_zoo:Several", *INPUTS, "--json").stdout)
    assert found["input"] == [3, 8, 9] and len(found["inputs"]) == 4
    assert found["inputs"][2] == {"name": "batch.ids", "shape": [6], "dtype": "int64"}
    assert found["weights"] + found["biases"] == found["parameters"] == 112 + 20


def test_what_is_held_beside_the_layers_is_listed(place: None) -> None:
    result = run("a_zoo:Holding", "--input", "7:int64", "--input", "mask=7:bool")
    assert result.exit_code == 0, result.output
    assert re.search(r"^ +many\.0, 3 = 3 *$", result.stdout, re.M)
    assert re.search(r"^ +table\.bias, 4 +4 *$", result.stdout, re.M)
    assert "12 more parameters belong to no layer that this input passes" in result.stdout
    found = json.loads(run("a_zoo:Holding", "--input", "7:int64", "--json").stdout)
    assert found["weights"] + found["biases"] == found["parameters"] - 12
    assert found["held"][0] == {"name": "first", "shape": [1, 1, 8], "count": 8}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["x"], "--input 'x': expected [NAME=]SIZES[:TYPE], as 3,224,224 or ids=12:int64"),
        (["3,0,3"], "--input '3,0,3': expected sizes of at least 1, not too large"),
        (["3,-1"], "--input '3,-1': expected [NAME=]SIZES"),
        (["9" * 5000], "expected [NAME=]SIZES"),
        (["99999999,99999999"], "expected sizes of at least 1, not too large"),
        (["٣,8,8"], "expected [NAME=]SIZES"),
        ([""], "--input '': expected [NAME=]SIZES"),
        (["a=b=3"], "expected [NAME=]SIZES"),
        (["a b=3"], "'a b' is no name"),
        (["a..b=3"], "'a..b' is no name"),
        (["3:int65"], "'int65' is no type, expected one of float32, float64"),
        (["a=3", "a=3"], "--input a: is given twice"),
        (["a=3", "a.b=3"], "--input a.b: a is a tensor already"),
        (["a.b=3", "a=3"], "--input a: is given twice"),
        (["3,8,9"], "the model cannot take an input of 3x8x9 (channels x height x width): "),
        (["3,8,9", "3,8,9", "3"], "the model cannot take an input of 3x8x9 and 3x8x9 and 3: "),
        (["image=3,8,9", "other=3"], "unexpected keyword argument 'other'"),
    ],
)
def test_wrong_inputs_are_one_line(place: None, inputs: list[str], message: str) -> None:
    arguments = [part for text in inputs for part in ("--input", text)]
    result = run("a_zoo:Several", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_layers_in_shorthand_take_one_picture() -> None:
    result = run("4C3-10", "--input", "1,8,8", "--input", "1,8,8")
    assert result.exit_code == 2 and "4C3-10 takes one picture" in result.stderr
    for text in ("1,28", "x=1,8,8", "1,8,8:int64"):
        result = run("4C3-10", "--input", text)
        assert result.exit_code == 2 and f"--input '{text}': expected C,H,W" in result.stderr


def test_inputs_are_zeros_of_a_batch_of_one() -> None:
    specs = [InputSpec.parse(text) for text in ("3,4", "a=2:int8", "b.c=", "b.d.e=1:complex64")]
    made = zeros(specs, nn.Linear(1, 1).double())
    assert [x.shape for x in made.tensors()] == [(1, 3, 4), (1, 2), (1,), (1, 1)]
    kinds = [torch.float64, torch.int8, torch.float64, torch.complex64]
    assert [x.dtype for x in made.tensors()] == kinds
    assert made.kwargs["b"].keys() == {"c", "d"} and not any(x.any() for x in made.tensors())
    with pytest.raises(InvalidProblem):
        zeros([specs[1], specs[1]], nn.ReLU())
