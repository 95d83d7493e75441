"""The shorthand for networks: what it builds, and what it refuses and how."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import neocog.nn as cog
from neocog import models
from neocog.errors import InvalidModel, InvalidProblem

DIGITS = (1, 28, 28)


def test_a_convolution_and_the_pool_behind_it_are_one_block():
    model = models.parse("32C3-P2-64C5-A3-120-10", DIGITS)
    first, second, flat, hidden, relu, last = model
    assert isinstance(first, cog.ConvBlock) and isinstance(second, cog.ConvBlock)
    assert isinstance(first.pool, cog.MaxPool2d) and first.pool.kernel_size == 2
    assert isinstance(second.pool, cog.AvgPool2d) and second.pool.kernel_size == 3
    assert (first.in_channels, first.out_channels, first.kernel_size) == (1, 32, (3, 3))
    assert (second.in_channels, second.out_channels, second.kernel_size) == (32, 64, (5, 5))
    assert first.activation == second.activation == "relu"
    assert isinstance(flat, nn.Flatten) and isinstance(relu, nn.ReLU)
    # 28 -> 14 by the first pool, 14 -> floor((14-3)/3) + 1 = 4 by the second
    assert (hidden.in_features, hidden.out_features) == (64 * 4 * 4, 120)
    assert (last.in_features, last.out_features) == (120, 10)


def test_a_pool_that_follows_no_convolution_stands_alone():
    model = models.parse("P2-4C3-P2-A2-5", (3, 16, 16))
    kinds = [type(layer) for layer in model]
    assert kinds == [cog.MaxPool2d, cog.ConvBlock, cog.AvgPool2d, nn.Flatten, nn.Linear]
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    "architecture",
    ["32C3-P2-64C3-P2-10", "3C2-10", "3C4-P3-2C1-10", "64-10", "10", "A2-10", " 4C3p0 - P2 - 10 "],
)
def test_the_network_computes_what_torch_computes(architecture):
    torch.manual_seed(0)
    model = models.parse(architecture, (1, 9, 7))
    plain = nn.Sequential()
    for layer in model:
        if isinstance(layer, cog.ConvBlock):
            conv = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding
            )
            conv.load_state_dict(layer.state_dict())
            plain += nn.Sequential(conv, nn.ReLU())
            layer = layer.pool
        if isinstance(layer, (cog.MaxPool2d, cog.AvgPool2d)):
            kind = nn.MaxPool2d if isinstance(layer, cog.MaxPool2d) else nn.AvgPool2d
            layer = kind(layer.kernel_size)
        if layer is not None:
            plain.append(layer)
    x = torch.randn(3, 1, 9, 7)
    torch.testing.assert_close(model(x), plain(x))


def test_given_padding_and_a_network_without_classes():
    (block,) = models.parse("1C2p0", (1, 3, 3), headless=True)
    assert block.padding == (0, 0) and block.weight.numel() == 4
    assert models.parse("2C3p2-P2", (1, 5, 5), headless=True)(torch.zeros(1, 1, 5, 5)).shape == (
        1,
        2,
        3,
        3,
    )


@pytest.mark.parametrize("in_shape", [(1, 28, 28), (3, 9, 5), (1, 1, 1)])
@pytest.mark.parametrize("architecture", ["32C3-64C3-10", "1C1-10", "10", "300-10"])
def test_the_perceptron_beside_is_the_smallest_with_as_many_weights(architecture, in_shape):
    wanted = models.weight_count(models.parse(architecture, in_shape))
    beside = models.mlp_beside(models.parse(architecture, in_shape), in_shape, 10)
    hidden = int(beside.removesuffix("-10"))
    assert models.weight_count(models.parse(beside, in_shape)) >= wanted
    if hidden > 1:
        smaller = models.parse(f"{hidden - 1}-10", in_shape)
        assert models.weight_count(smaller) < wanted


def test_the_counts_of_the_demo():
    model = models.parse("32C3-P2-64C3-P2-10", DIGITS)
    # 32*(9+1) + 64*(32*9+1) + 10*(64*7*7+1)
    assert models.weight_count(model) == 320 + 18_496 + 31_370
    assert models.mlp_beside(model, DIGITS, 10) == "64-10"
    assert models.class_count("32C3-P2-64C3-P2-10") == 10
    assert models.has_convolution("32C3-10") and not models.has_convolution("P2-64-10")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("", "token 1, '', means nothing; expected 32C3"),
        ("32C3--10", "token 2, '', means nothing"),
        ("32D3-10", "token 1, '32D3', means nothing"),
        ("32c3-10", "token 1, '32c3', means nothing"),
        ("32C3-P-10", "token 2, 'P', means nothing"),
        ("C3-10", "token 1, 'C3', means nothing"),
        ("32C-10", "token 1, '32C', means nothing"),
        ("32C3-P2-ten", "token 3, 'ten', means nothing"),
        ("32C3x3-10", "token 1, '32C3x3', means nothing"),
        ("-5-10", "token 1, '', means nothing"),
        ("3.5-10", "token 1, '3.5', means nothing"),
        ("\u0663-10", "means nothing"),  # an Arabic three is no number here
        ("9999999999-10", "token 1, '9999999999', means nothing"),
        ("0C3-10", "token 1, '0C3': expected numbers of at least 1"),
        ("3C0-10", "token 1, '3C0': expected numbers of at least 1"),
        ("P0-10", "token 1, 'P0': expected numbers of at least 1"),
        ("3C3-0", "token 2, '0': expected numbers of at least 1"),
        ("32C3-P2", "ends with 'P2', expected the number of classes"),
        ("64-P2-10", "'64' is fully connected and leaves no rows and columns"),
        ("64-3C3-10", "'64' is fully connected and leaves no rows and columns"),
    ],
)
def test_a_shorthand_that_means_nothing_is_refused(architecture, message):
    with pytest.raises(InvalidModel, match=re.escape(message)) as caught:
        models.parse(architecture, DIGITS)
    assert repr(architecture) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "in_shape", "message"),
    [
        (
            "32C3-P2-P15-10",
            DIGITS,
            "layer 3: pool 15x15 is larger than the 14x14 that reach it: height "
            "floor((14 - 1*(15-1) - 1 + 0 + 0)/15) + 1 = 0, expected at least 1",
        ),
        (
            "P3-10",
            (1, 8, 2),
            "layer 1: pool 3x3 is larger than the 8x2 that reach it: width "
            "floor((2 - 1*(3-1) - 1 + 0 + 0)/3) + 1 = 0, expected at least 1",
        ),
        (
            "2C7p1-10",
            (1, 4, 4),
            "layer 1: kernel 7x7 is larger than the 4x4 that reach it, padded by 1: height "
            "floor((4 - 1*(7-1) - 1 + 1 + 1)/1) + 1 = 0, expected at least 1",
        ),
        ("99999C999-10", DIGITS, "layer 1: 99,799,101,999 weights (372 GiB)"),
        ("999999999-10", DIGITS, "layer 1: 783,999,999,216 weights (2,921 GiB)"),
        ("10", (1, 0, 28), "in_shape (1, 0, 28): expected (channels, height, width)"),
        ("10", (28, 28), "in_shape (28, 28): expected (channels, height, width)"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_formula(architecture, in_shape, message):
    with pytest.raises(InvalidProblem, match=re.escape(message)):
        models.parse(architecture, in_shape)
