"""Explanations against the network, and the list of layers of models of every shape."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neocog.nn as cog
from neocog.errors import InvalidProblem, Unsupported
from neocog.geometry import ReceptiveField
from neocog.layers import LayerInfo, describe
from neocog.sight import Beyond, Field
from neocog.tracing import Explanation, explain_value

# One line each: a name, the layers, and the size of the input they are tried on.
MODELS: dict[str, tuple[list[nn.Module], tuple[int, int, int]]] = {
    "padded": ([cog.Conv2d(3, 4, 3, padding=1)], (3, 7, 6)),
    "no bias": ([cog.Conv2d(3, 4, (2, 3), bias=False)], (3, 7, 6)),
    "one pixel kernel": ([cog.Conv2d(5, 2, 1)], (5, 3, 4)),
    "strided": ([cog.Conv2d(2, 3, 3, stride=(2, 3), padding=(0, 1))], (2, 9, 11)),
    "dilated": ([cog.Conv2d(2, 3, 3, dilation=(1, 2), padding=2)], (2, 8, 9)),
    "grouped": ([cog.Conv2d(6, 9, 3, groups=3, padding=1)], (6, 5, 6)),
    "depthwise": ([cog.Conv2d(4, 4, 3, groups=4, stride=2)], (4, 8, 8)),
    "same, even kernel": ([cog.ConvBlock(2, 3, (2, 4), padding="same")], (2, 6, 7)),
    "torch's own": ([nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)], (2, 9, 9)),
    "max pool": ([cog.MaxPool2d(3, stride=2, padding=1)], (2, 7, 8)),
    "max pool, dilated, ceil": ([cog.MaxPool2d(2, 2, dilation=2, ceil_mode=True)], (2, 8, 9)),
    "average pool": ([cog.AvgPool2d((2, 3))], (2, 7, 8)),
    "average, padding counted": ([cog.AvgPool2d(3, 2, padding=1)], (2, 7, 8)),
    "average, padding not counted": (
        [cog.AvgPool2d(3, 2, padding=1, count_include_pad=False)],
        (2, 7, 8),
    ),
    "average, ceil": ([cog.AvgPool2d(3, 2, padding=1, ceil_mode=True)], (2, 8, 8)),
    "average, divisor": ([cog.AvgPool2d(2, divisor_override=3)], (2, 6, 6)),
    "block": ([cog.ConvBlock(2, 4, 3, padding="same", pool=cog.MaxPool2d(2))], (2, 8, 9)),
    "block, leaky, overlapping pool": (
        [
            cog.ConvBlock(
                *(2, 4, 3),
                padding=1,
                activation="leaky_relu",
                negative_slope=0.2,
                pool=cog.MaxPool2d(3, 2, padding=1),
            )
        ],
        (2, 8, 9),
    ),
    "block, average": (
        [cog.ConvBlock(2, 4, 3, activation="identity", pool=cog.AvgPool2d(2, padding=1))],
        (2, 8, 9),
    ),
    "stack": (
        [
            cog.ConvBlock(1, 4, 3, padding="same", pool=cog.MaxPool2d(2)),
            nn.BatchNorm2d(4),
            cog.ConvBlock(4, 6, 5, stride=2, padding=2, groups=2),
            cog.AvgPool2d(2),
        ],
        (1, 16, 16),
    ),
}


class Residual(nn.Module):
    """Two convolutions beside a shortcut, and an addition fused into the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cog.Conv2d(1, 4, 3, stride=2, padding=1)
        self.inner = cog.ConvBlock(4, 4, 3, padding=1)
        self.outer = cog.ConvBlock(4, 4, 3, padding=1, pool=cog.MaxPool2d(2))
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.outer(self.inner(x), residual=x)
        return self.head(self.mean(x).flatten(1))


def places(info: LayerInfo, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """The four corners and ``count`` random places of a layer's output: (channel, y, x)."""
    channels, height, width = info.out_shape
    corners = [(0, y, x) for y in (0, height - 1) for x in (0, width - 1)]
    inner = [tuple(int(rng.integers(n)) for n in info.out_shape) for _ in range(count)]
    return [*corners, (channels - 1, 0, width - 1), *inner]


@pytest.mark.parametrize("name", MODELS)
def test_every_explained_value_is_the_networks(name: str) -> None:
    layers, in_shape = MODELS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(*layers), torch.randn(in_shape)
    rng = np.random.default_rng(0)
    explained = 0
    for info in describe(model, in_shape):
        if info.explainable:
            expected = run_to(model, x, info.index)
            for channel, row, col in places(info, 6, rng):
                found = explain_value(model, x, info.index, channel, (row, col))
                check_arithmetic(found)
                assert found.network == expected[channel, row, col]
                assert found.matches, (info.name, channel, row, col, found)
                assert found.allowed <= 1e-4 * max(1.0, float(expected.abs().max()))
                explained += 1
    assert explained >= 11


def run_to(model: nn.Sequential, x: Tensor, count: int) -> Tensor:
    """The output (C, H, W) of the first ``count`` layers."""
    with torch.no_grad():
        return model.eval()[:count](x[None].clone())[0].clone()


def check_arithmetic(found: Explanation) -> None:
    """What is shown adds up to what is explained."""
    conv, pool = found.conv, found.pool
    if conv is not None:
        assert not conv.window[:, ~conv.taps.inside].any()
        total = sum(
            float(w) * float(k) for w, k in zip(conv.window.flat, conv.kernel.flat, strict=True)
        )
        assert conv.pre_activation == pytest.approx(
            total + (conv.bias or 0) + (conv.residual or 0), rel=1e-12, abs=1e-12
        )
    if pool is None:
        assert conv is not None and found.explained == conv.activated
        return
    cells = pool.values[pool.taps.inside]
    if pool.divisor is None:
        assert pool.winner is not None
        assert pool.values[pool.winner] == cells.max() == found.explained
        if conv is not None:
            assert conv.activated == found.explained
            assert conv.at == pool.position(pool.winner)
    else:
        assert found.explained == pytest.approx(cells.sum() / pool.divisor, rel=1e-12)


def test_a_residual_model_lists_in_execution_order_and_explains_its_addition() -> None:
    torch.manual_seed(1)
    model, x = Residual().train(), torch.randn(1, 12, 12)
    layers = describe(model, (1, 12, 12))
    assert [info.name for info in layers] == ["stem", "inner", "outer", "mean", "head"]
    assert [info.index for info in layers] == [1, 2, 3, 4, 5]
    assert all(module.training for module in model.modules())
    found = explain_value(model, x, "outer", 2, (1, 2))
    assert found.conv is not None and found.conv.residual is not None
    with torch.no_grad():
        shortcut = torch.relu(model.stem(x[None]))
    assert found.conv.residual == float(shortcut[0, 2, found.conv.at[0], found.conv.at[1]])
    check_arithmetic(found)
    assert found.matches


def test_receptive_fields_follow_branches_of_the_same_jump() -> None:
    stem, inner, outer, mean, head = describe(Residual(), (1, 12, 12))
    # stem: 3 wide, jump 2; two more 3x3 on the longer branch add 2*2 each; the pool adds 1*2.
    assert stem.stages[0].sight == same(ReceptiveField(3, 2, -1))
    assert inner.stages[0].sight == same(ReceptiveField(7, 2, -3))
    assert outer.stages[0].sight == same(ReceptiveField(11, 2, -5))
    assert outer.stages[1].sight == same(ReceptiveField(13, 4, -5))
    assert mean.stages[0].sight is head.stages[0].sight is Beyond.ALL


def same(field: ReceptiveField) -> Field:
    return Field(field, field)


class Branches(nn.Module):
    """A 5x5 convolution beside a 1x1, joined by a function, then one more 3x3."""

    def __init__(self, join: str, stride: int = 1) -> None:
        super().__init__()
        self.join = join
        self.wide = cog.Conv2d(1, 2, 5, padding=2)
        self.narrow = cog.Conv2d(1, 2, 1, stride=stride)
        self.last = cog.Conv2d(4 if join == "cat" else 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = self.wide(x), self.narrow(x)
        if self.join == "cat":
            joined = torch.cat([wide, narrow], dim=1)
        elif self.join == "gate":  # a squeeze-and-excitation: one factor from everywhere
            joined = wide * torch.sigmoid(narrow.mean((2, 3), keepdim=True))
        elif self.join == "pooled":
            joined = wide[:, :, ::2, ::2] + narrow
        else:
            joined = torch.nn.functional.interpolate(narrow, scale_factor=2.0) + wide
        return self.last(joined)


@pytest.mark.parametrize(
    ("join", "stride", "expected"),
    [
        ("cat", 1, same(ReceptiveField(7, 1, -2))),
        ("gate", 1, Beyond.ALL),
        ("pooled", 2, Beyond.UNKNOWN),
        ("upsampled", 2, Beyond.UNKNOWN),
    ],
)
def test_where_the_receptive_field_cannot_be_told_it_is_unknown(
    join: str, stride: int, expected: Field | Beyond
) -> None:
    last = describe(Branches(join, stride), (1, 12, 12))[-1]
    assert last.name == "last"
    assert last.stages[0].sight == expected


def test_the_receptive_field_is_where_the_input_has_a_gradient() -> None:
    # Positive weights and no maximum: no two contributions cancel and none is switched off.
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(2, 1, (3, 5), stride=(1, 2))
    )
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    x = torch.rand(1, 20, 20, requires_grad=True)
    for at in ((0, 0), (2, 1), (7, 2)):
        found = explain_value(model, x, 3, 0, at)
        (grad,) = torch.autograd.grad(model(x[None])[0, 0, at[0], at[1]], x)
        rows, cols = grad[0].sum(1).nonzero().flatten(), grad[0].sum(0).nonzero().flatten()
        seen = ((int(rows[0]), int(rows[-1]) + 1), (int(cols[0]), int(cols[-1]) + 1))
        assert found.seen == seen


def test_formulas_and_what_no_window_reaches() -> None:
    conv = cog.Conv2d(1, 1, (3, 2), stride=(2, 3), padding=(1, 0))
    (info,) = describe(conv, (1, 7, 9))
    assert info.stages[0].formulas() == (
        "floor((7 - 1*(3-1) - 1 + 1 + 1)/2) + 1 = 4",
        "floor((9 - 1*(2-1) - 1 + 0 + 0)/3) + 1 = 3",
    )
    assert info.stages[0].unused() == ((), (2, 5, 8))
    (square,) = describe(cog.MaxPool2d(2), (1, 5, 5))
    assert square.stages[0].formulas() == ("floor((5 - 1*(2-1) - 1 + 0 + 0)/2) + 1 = 2",)
    assert square.stages[0].unused() == ((4,), (4,))


def test_weights_beside_those_of_a_fully_connected_layer() -> None:
    (conv,) = describe(cog.Conv2d(1, 1, 2), (1, 3, 3))
    assert (conv.weights, conv.biases) == (4, 1)
    assert (conv.dense_weights, conv.dense_biases) == (36, 4)
    assert conv.multiply_adds == 16
    (pool,) = describe(cog.AvgPool2d(2), (3, 4, 4))
    assert (pool.weights, pool.biases, pool.dense_weights) == (0, 0, None)
    assert pool.out_shape == (3, 2, 2)
    flatten, linear = describe(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), (1, 3, 3))
    assert (linear.weights, linear.biases, linear.multiply_adds) == (36, 4, 36)
    assert flatten.weights == 0


def test_what_a_layer_does_in_words() -> None:
    def words(*modules: nn.Module) -> list[str]:
        return [info.what for info in describe(nn.Sequential(*modules), (4, 9, 9))]

    block = cog.ConvBlock(
        *(4, 4, (3, 2)),
        padding="same",
        groups=2,
        activation="leaky_relu",
        negative_slope=0.5,
        pool=cog.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
    )
    assert words(block, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 3)) == [
        "conv 3x2, padding top 1, bottom 1, left 0, right 1, groups 2, leaky_relu(0.5)"
        " + average pool 3x3, stride 2, padding 1, ceil mode, padding not counted",
        "batch norm",
        "flatten",
        "fully connected 100 -> 3",
    ]
    assert words(
        cog.Conv2d(4, 4, 3, stride=(1, 2), dilation=2, padding=(1, 0)),
        nn.AvgPool2d(2, divisor_override=3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d((1, 2)),
    ) == [
        "conv 3x3, stride 1x2, padding 1x0, dilation 2",
        "average pool 2x2, divisor 3",
        "Tanh",
        "AdaptiveAvgPool2d(output_size=(1, 2))",
    ]


def test_a_layer_used_twice_is_listed_twice_and_counted_once() -> None:
    conv = cog.Conv2d(2, 2, 3, padding=1)
    first, second = describe(nn.Sequential(conv, conv), (2, 5, 5))
    assert (first.weights, second.weights) == (36, 0)
    assert (first.shared_with, second.shared_with) == (None, 1)
    assert first.multiply_adds == second.multiply_adds == 36 * 25


class HasOwn(nn.Module):
    """Learns a number that belongs to no layer the list knows the work of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_layers_of_an_unknown_kind_are_listed_without_guesses() -> None:
    (info,) = describe(HasOwn(), (2, 5, 5))
    assert (info.what, info.weights, info.multiply_adds) == ("HasOwn", 1, None)
    assert info.stages[0].sight == Field()
    assert not info.explainable


@pytest.mark.parametrize(
    ("layer", "channel", "at", "message"),
    [
        (9, 0, (0, 0), r"layer must be 1 to 5 or a module's name, got 9; .*are: 1 \(stem\), 2"),
        ("stm", 0, (0, 0), r"got 'stm'; .*: 1 \(stem\), 2 \(inner\), 3 \(outer\)$"),
        (
            "mean",
            0,
            (0, 0),
            r"layer 4 \(mean, Adaptive.*\) has no windows to explain; .*1 \(stem\)",
        ),
        (1, 4, (0, 0), r"channel must be 0 to 3, got 4: layer 1 \(stem\) gives 4x6x6"),
        (1, -1, (0, 0), r"channel must be 0 to 3, got -1"),
        (1, 0, (6, 0), r"row must be 0 to 5, got 6: layer 1"),
        (3, 0, (2, 3), r"column must be 0 to 2, got 3: layer 3 \(outer\) gives 4x3x3"),
    ],
)
def test_a_place_that_is_not_there(
    layer: int | str, channel: int, at: tuple[int, int], message: str
) -> None:
    with pytest.raises(InvalidProblem, match=message):
        explain_value(Residual(), torch.zeros(1, 12, 12), layer, channel, at)


def test_inputs_the_model_cannot_take() -> None:
    with pytest.raises(InvalidProblem, match=r"layer 1 \(stem, Conv2d\): .* has 3 channels"):
        describe(Residual(), (3, 12, 12))
    model = nn.Sequential(cog.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(InvalidProblem, match=re.escape("floor((2 - 1*(3-1) - 1 + 0 + 0)/1) + 1")):
        describe(model, (1, 2, 2))
    with pytest.raises(
        InvalidProblem, match=r"layer 3 \(2, Linear\): .* takes 8 numbers .* got 18"
    ):
        describe(model, (1, 5, 5))
    with pytest.raises(InvalidProblem, match=r"x must be one input .*, got \(2, 1, 4, 4\)"):
        explain_value(model, torch.zeros(2, 1, 4, 4), 1, 0, (0, 0))


def test_padding_with_anything_but_zeros_is_not_explained() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    assert "padded by reflect" in describe(conv, (1, 5, 5))[0].what
    with pytest.raises(Unsupported, match="padding_mode='reflect'"):
        explain_value(conv, torch.zeros(1, 5, 5), 1, 0, (2, 2))


def test_a_network_that_computes_something_else_is_found_out() -> None:
    conv = cog.Conv2d(1, 1, 3)
    conv.register_forward_hook(lambda module, args, output: output * 1.001)
    with torch.no_grad():
        conv.weight.fill_(1)
    found = explain_value(conv, torch.ones(1, 5, 5), 1, 0, (1, 1))
    assert not found.matches
    assert found.difference == pytest.approx(0.001 * found.explained, rel=1e-3)


def test_not_a_number_passes_through_and_wins() -> None:
    block = cog.ConvBlock(1, 1, 1, pool=cog.MaxPool2d(2))
    x = torch.ones(1, 4, 4)
    x[0, 1, 0] = math.nan
    found = explain_value(block, x, 1, 0, (0, 0))
    assert math.isnan(found.explained) and math.isnan(found.network)
    assert found.matches and found.pool is not None and found.pool.winner == (1, 0)
    assert explain_value(block, x, 1, 0, (1, 1)).matches


def test_large_terms_that_cancel_are_not_held_against_the_network() -> None:
    conv = cog.Conv2d(3, 1, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1))
    x = torch.tensor([1e4, 1e-4, 1e4]).view(3, 1, 1)  # float32 loses the 1e-4 beside 1e4
    found = explain_value(conv, x, 1, 0, (0, 0))
    assert found.explained == pytest.approx(1e-4, rel=1e-6)
    assert found.matches
