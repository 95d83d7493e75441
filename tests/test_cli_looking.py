"""`neocog summary` and `neocog explain` as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from neocog import data, models
from neocog.cli import build_app, looking
from neocog.cli.explain_view import FEW_CHANNELS, Numbers
from neocog.errors import InvalidData, InvalidModel, InvalidProblem
from neocog.models import parse

NETWORK = "32C3-P2-64C3-P2-10"


def run(*arguments: str, columns: int = 80) -> Result:
    app = typer.Typer()
    looking.register(app)
    plain = {"COLUMNS": str(columns), "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(app, list(arguments), env=plain)


def printed(*arguments: str, columns: int = 80) -> str:
    result = run(*arguments, columns=columns)
    assert result.exit_code == 0, result.output
    return result.output


def as_json(*arguments: str) -> Any:
    return json.loads(printed(*arguments, "--json"))


def failure(*arguments: str) -> Exception:
    result = run(*arguments)
    assert isinstance(result.exception, Exception), result.output
    assert "\n" not in str(result.exception)
    assert result.output == ""
    return result.exception


# The article's own examples, as the README types them


def test_a_2x2_kernel_has_4_weights_where_4_hidden_units_have_36() -> None:
    convolution = printed("summary", "1C2p0", "--input", "1,3,3")
    assert re.search(r"1 kernel of 1x2x2 = 4 +1 +36 \+ 4", convolution)
    assert re.search(r"9 x 4 = 36 +4 ", printed("summary", "4", "--input", "1,3,3"))


@pytest.mark.parametrize("token", ["1C3p1", "1C5p2", "1C3", "1C5"])
def test_zero_padding_1_keeps_the_size_under_3x3_and_2_under_5x5(token: str) -> None:
    (layer,) = as_json("summary", token, "--input", "1,28,28")["layers"]
    assert layer["out_shape"] == [1, 28, 28]
    kernel, padding = int(token[2]), int(token[2]) // 2
    expected = f"floor((28 - 1*({kernel}-1) - 1 + {padding} + {padding})/1) + 1 = 28"
    assert layer["stages"][0]["height"] == expected
    assert expected in printed("summary", token, "--input", "1,28,28")


def test_a_kernel_has_the_channels_of_its_input_and_there_is_one_for_each_output() -> None:
    assert "5 kernels of 3x3x3 = 135" in printed("summary", "5C3", "--input", "3,28,28")


def test_pooling_has_no_weights_and_keeps_the_channels() -> None:
    assert "no weights, 7 channels kept" in printed("summary", "P2", "--input", "7,8,8")


# summary


@pytest.mark.parametrize("columns", [80, 100])
def test_summary_of_the_demo_network_fits_the_terminal(columns: int) -> None:
    text = printed("summary", NETWORK, columns=columns)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= columns
    assert "floor((14 - 1*(3-1) - 1 + 1 + 1)/1) + 1 = 14" in text
    assert re.search(r"64 kernels of 32x3x3 = 18,432 +64 +78,675,968 \+ 12,544 +3,612,672", text)
    assert re.search(r"50,080 in all +106 +3,869,824", text)
    assert re.search(r"\+ max pool 2x2 +64x7x7 +10x10 +4", text)


def test_summary_as_json() -> None:
    found = as_json("summary", NETWORK)
    assert found["input"] == [1, 28, 28]
    assert (found["weights"], found["biases"], found["parameters"]) == (50080, 106, 50186)
    first, second, flatten, last = found["layers"]
    assert first["dense_weights"] == 28 * 28 * 32 * 28 * 28
    assert first["dense_biases"] == 32 * 28 * 28
    assert [stage["out_shape"] for stage in second["stages"]] == [[64, 14, 14], [64, 7, 7]]
    assert second["stages"][1]["sees"]["rows"] == {"size": 10, "jump": 4, "start": -3}
    assert flatten["stages"][0]["height"] is None
    assert last["stages"][0]["sees"] == "all"
    assert last["multiply_adds"] == 31360


FACTORY = """
import torch
from torch import nn
import neocog.nn as cog

class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = cog.Conv2d(2, 3, (3, 2), stride=(2, 3))
        self.up = nn.Upsample(scale_factor=2)
        self.extra = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return self.up(self.conv(x))

def tuple_of_nothing():
    return ()

def wide():
    return cog.Conv2d(6, 2, 3, padding=1)

class Grey(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = cog.Conv2d(6, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(x.expand(-1, 6, -1, -1))
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_factory.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return "a_factory"


def test_summary_of_a_third_party_model(factory: str) -> None:
    text = printed("summary", f"{factory}:Uneven", "--input", "2,8,9")
    assert "conv 3x2, height  floor((8 - 1*(3-1) - 1 + 0 + 0)/2) + 1 = 3" in text
    assert "conv 3x2, width   floor((9 - 1*(2-1) - 1 + 0 + 0)/3) + 1 = 3" in text
    assert "no window reaches row 7 and columns 2, 5, 8" in text
    assert re.search(r"Upsample\(.*\) +3x6x6 +\? +\?", text)
    assert "?: cannot be told" in text
    assert re.search(r"^ +extra, 5 = 5 *$", text, re.M) and "no layer that" not in text


def test_many_unreached_columns_are_counted(factory: str) -> None:
    text = printed("summary", f"{factory}:Uneven", "--input", "2,9,30")
    assert "no window reaches columns 2, 5, 8, 11 and 6 more" in text


# explain


def test_explain_draws_the_padding_the_winner_and_the_sum() -> None:
    text = printed("explain", NETWORK, "test:3", "--layer", "2", "--channel", "1", "--at", "0,6")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "layer 2 (1): conv 3x3, padding 1, relu + max pool 2x2" in text
    assert "channel 1 of 64, row 0 and column 6 of 7x7" in text
    assert "sees rows 0 to 6, columns 21 to 27 of the input" in text
    assert re.search(r"[01]\|.*\[ *[0-9.]+\]", text)  # the pool's winner
    assert re.search(r"-1\|( +·)+ +", text)  # the row of padding above the map
    assert len(re.findall(r"^  input channel \d+ +adds ", text, re.M)) == FEW_CHANNELS
    assert len(re.findall(r"^  [ +] input channel \d+ ", text, re.M)) == FEW_CHANNELS
    assert "28 more input channels, hidden (--all shows them)" in text
    assert re.search(r"check: explained (\S+), network (\S+), difference \S+ \(ok\)$", text.strip())


def test_explain_all_draws_every_input_channel() -> None:
    place = ("--layer", "2", "--channel", "0", "--at", "3,2", "--all")
    text = printed("explain", "8C3-4C3-10", "test:0", *place)
    assert re.findall(r"  input channel (\d)   adds", text) == [str(c) for c in range(8)]
    assert "hidden" not in text


def test_explain_as_json_adds_up_to_the_value_that_the_layer_gives() -> None:
    place = ("--layer", "1", "--channel", "5", "--at", "4,7")
    found = as_json("explain", NETWORK, "test:3", *place)
    torch.manual_seed(0)
    model = parse(NETWORK)
    pixels = data.load().test.images[3:4].float() / 255
    with torch.no_grad():
        expected = float(model[0](pixels)[0, 5, 4, 7])
    assert found["network"] == pytest.approx(expected, rel=1e-6)
    assert found["explained"] == pytest.approx(expected, rel=1e-5)
    assert found["matches"] is True
    conv, pool = found["convolution"], found["pool"]
    (channel,) = conv["input_channels"]
    products = np.multiply(channel["window"], channel["kernel"])
    assert channel["products"] == pytest.approx(products)
    assert conv["pre_activation"] == pytest.approx(products.sum() + conv["bias"])
    assert conv["at"] == pool["winner_at"]
    assert pool["values"][pool["winner"][0]][pool["winner"][1]] == conv["activated"]
    assert found["sees"] == {"rows": [7, 11], "columns": [13, 17]}


def test_explain_an_average_pool() -> None:
    place = ("--layer", "2", "--channel", "0", "--at", "2,3")
    text = printed("explain", "2C3-2C3-A3-10", "test:1", *place)
    assert re.search(r"mean: sum \S+ / 9 = \S+", text)
    assert "divisor 9: the cells of the window" in text
    assert "the largest of them" in text
    assert "= mean of the pool's window" in text


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("size", [2, 3, 5, 9, 21])
def test_windows_of_every_size_fit_the_terminal(size: int, columns: int) -> None:
    place = ("--layer", "1", "--channel", "0", "--at", "0,3")
    text = printed("explain", f"1C{size}-10", "test:1", *place, columns=columns)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= columns
    assert "(ok)" in text
    assert ("12 largest of 441 products" in text) == (size == 21)


def test_explain_from_a_picture_file(tmp_path: Path) -> None:
    path = tmp_path / "ink.png"
    ink = np.zeros((40, 30), dtype=np.uint8)
    ink[5:20, 4:9] = 200
    Image.fromarray(ink).save(path)
    place = ("--layer", "1", "--channel", "2", "--at", "5,5")
    text = printed("explain", NETWORK, str(path), *place)
    assert "note: resized from 40 x 30 to 28 x 28" in text
    assert "(ok)" in text


def test_explain_names_and_weights_of_a_third_party_model(factory: str) -> None:
    state = {"conv.weight": torch.ones(2, 6, 3, 3), "conv.bias": torch.tensor([0.0, 0.5])}
    torch.save(state, "ones.pt")
    Image.new("L", (8, 8), 255).save("white.png")
    arguments = ("explain", f"{factory}:Grey", "white.png", "--weights", "ones.pt")
    place = ("--input", "1,8,8", "--layer", "conv", "--channel", "1", "--at", "0,0")
    found = as_json(*arguments, *place)
    assert found["explained"] == 6 * 4 + 0.5  # a corner: 4 of 9 cells lie on the picture
    assert len(found["convolution"]["input_channels"]) == 6
    assert found["convolution"]["inside"] == [[False] * 3, [False, True, True], [False, True, True]]


def test_explain_says_so_and_exits_with_1_where_the_network_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tampered(*arguments: Any, **options: Any) -> Any:
        model = parse(*arguments, **options)
        model[0].register_forward_hook(lambda module, args, output: output + 0.01)
        return model

    monkeypatch.setattr(models, "parse", tampered)
    result = run("explain", "1C3-10", "test:0", *("--layer", "1", "--channel", "0", "--at", "9,9"))
    assert result.exit_code == 1
    assert re.search(r"difference 1\.0e-02 \(NOT OK\)", result.stdout)
    assert re.search(r"they differ by 1\.0e-02, at most \S+ is rounding", result.stderr)


# Bad input: one clear line each, and nothing on the standard output


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            ("--layer", "5"),
            InvalidProblem,
            r"layer must be 1 to 4 .*, got 5; .*: 1 \(0\), 2 \(1\)$",
        ),
        (("--layer", "0"), InvalidProblem, r"layer must be 1 to 4 .*, got 0"),
        (("--layer", "conv1"), InvalidProblem, r"a module's name, got 'conv1'"),
        (("--layer", "3"), InvalidProblem, r"layer 3 \(2, flatten\) has no windows to explain"),
        (("--channel", "32"), InvalidProblem, r"channel must be 0 to 31, got 32: layer 1"),
        (("--at", "14,0"), InvalidProblem, r"row must be 0 to 13, got 14: .* 32x14x14$"),
        (("--at", "0,-1"), InvalidProblem, r"column must be 0 to 13, got -1"),
        (("--at", "3"), InvalidProblem, r"--at '3': expected Y,X, 2 whole numbers"),
        (("--at", "a,b"), InvalidProblem, r"--at 'a,b': expected Y,X"),
        (("--input", "1,28"), InvalidProblem, r"--input '1,28': expected C,H,W, 3 whole"),
        (("--input", "1,0,28"), InvalidProblem, r"--input 1,0,28: expected C,H,W of at least 1"),
        (("--input", "1,32,32"), InvalidData, r"test:0 of digits is .* 1x28x28, .* 1x32x32"),
    ],
)
def test_explain_refuses(arguments: tuple[str, str], kind: type, message: str) -> None:
    # The last of an option given twice counts.
    place = ("--layer", "1", "--channel", "0", "--at", "0,0", *arguments)
    error = failure("explain", NETWORK, "test:0", *place)
    assert isinstance(error, kind)
    assert re.search(message, str(error))


def test_on_the_command_line_that_is_one_line_and_exit_code_2() -> None:
    arguments = ["explain", NETWORK, "test:0", "--layer", "1", "--channel", "99", "--at", "0,0"]
    result = CliRunner().invoke(build_app(), arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    expected = "error: channel must be 0 to 31, got 99: layer 1 (0) gives 32x14x14\n"
    assert result.stderr == expected


@pytest.mark.parametrize("image", ["test:1000", "test:-1", "nowhere.png"])
def test_explain_refuses_pictures_that_are_not_there(image: str) -> None:
    place = ("--layer", "1", "--channel", "0", "--at", "0,0")
    error = failure("explain", NETWORK, image, *place)
    assert isinstance(error, InvalidData)
    assert re.search(rf"{image}.*(expected test:0 to test:999|no such file)", str(error))


def test_models_that_cannot_be_looked_into(factory: str) -> None:
    error = failure("summary", f"{factory}:wide")
    assert isinstance(error, InvalidProblem)
    assert "takes 6 channels: --input 6,224,224" in str(error)
    error = failure("summary", f"{factory}:wide", "--input", "3,9,9")
    assert "has 3 channels, but weight of shape (2, 6, 3, 3)" in str(error)
    error = failure("summary", f"{factory}:tuple_of_nothing", "--input", "3,9,9")
    assert isinstance(error, InvalidModel)
    error = failure("summary", "no-such-run")
    assert isinstance(error, InvalidModel) and "no such file or folder" in str(error)
    error = failure("summary", "1C5p0", "--input", "1,3,3")
    assert isinstance(error, InvalidProblem)
    assert "floor((3 - 1*(5-1) - 1 + 0 + 0)/1) + 1 = -1" in str(error)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], ["0", "0"]),
        ([3.0, -12.0], ["  3", "-12"]),
        ([0.5, -0.25], [" 0.500", "-0.250"]),
        ([0.05, -0.00001], ["0.0500", "0.0000"]),
        ([0.002, 0.0], ["0.00200", "0.00000"]),
        ([1234.5, 0.25], ["1234", "   0"]),
        ([31.75, 127.0], [" 31.8", "127.0"]),
        ([2e-7, 0.0], ["2.00e-07", "0.00e+00"]),
        ([float("nan"), float("-inf"), 1.5], ["  nan", " -inf", "1.500"]),
    ],
)
def test_numbers_of_one_grid_are_written_alike(values: list[float], expected: list[str]) -> None:
    number = Numbers(np.array(values))
    assert [number(value) for value in values] == expected


# The README shows what is printed and what runs

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
ROUNDING = re.compile(r"difference .*")
TYPED = [
    tuple(session.strip("\n").split("\n"))
    for language, text in FENCES
    if language == "console"
    for session in re.split(r"^\$ ", text, flags=re.M)
    if session
]


@pytest.mark.parametrize("session", TYPED, ids=lambda session: session[0])
def test_the_readme_shows_what_the_commands_print(session: tuple[str, ...]) -> None:
    """A line of dots stands for any lines; how far rounding is off may differ between machines."""
    command, *shown = session
    program, *arguments = command.split()
    assert program == "neocog"
    printout = [ROUNDING.sub("", line.rstrip()) for line in printed(*arguments).splitlines()]
    place, skipping = 0, False
    for line in shown:
        if line == "...":
            skipping = True
            continue
        if skipping:
            assert ROUNDING.sub("", line) in printout[place:]
            place = printout.index(ROUNDING.sub("", line), place)
        assert printout[place] == ROUNDING.sub("", line)
        place, skipping = place + 1, False
    assert skipping or place == len(printout)


@pytest.mark.parametrize("code", [text for language, text in FENCES if language == "python"])
def test_the_code_in_the_readme_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_has_examples_of_both_kinds() -> None:
    assert len(TYPED) >= 7
    assert sum(language == "python" for language, _ in FENCES) >= 2
