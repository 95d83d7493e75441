"""What Winograd does to values of very different size, and to very large ones; exact=True does not.

The README and ``neocog.freeze`` say so to users; here it holds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import neocog
from neocog import choices
from neocog.cpu import winograd_transforms as transforms
from neocog.dtypes import FLOAT32
from neocog.network import Layer
from neocog.target import host

LARGEST = float(np.finfo(np.float32).max)

GROWTH = 1605
"""How many times max|x| * sum|w| a value between the transforms may be, whatever the values are."""

NEAR = 6
"""Outputs along one side of the largest tile."""

CHANNELS = 64
TERMS = CHANNELS * 9


def layer(scale: float) -> nn.Conv2d:
    """A convolution whose weights have one size and random signs."""
    torch.manual_seed(0)
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
    conv.weight.data = scale * torch.randn(conv.weight.shape).sign()
    return conv.eval()


def algorithms(frozen) -> list[str]:
    (plan,) = frozen.plans
    blocks = [n.op for n in plan.rewritten.nodes if isinstance(n.op, Layer)]
    choose = choices.exact if frozen.exact else choices.algorithm
    target = () if frozen.exact else (host(),)
    return [choose(*target, op.block.conv, op.block.epilogue, op.averaged) for op in blocks]


@pytest.mark.parametrize(("m", "taps"), [(2, 3), (4, 3), (6, 3), (4, 2), (2, 2), (2, 4), (4, 4)])
def test_how_far_values_grow_between_the_transforms(m: int, taps: int) -> None:
    """By the largest values of each matrix: V, then M, then partial sums of the result."""
    output, weight, inputs = (
        np.abs(np.array(matrix, dtype=np.float64))
        for matrix in (transforms.output_matrix(m, taps, m), transforms.weight_matrix(m, taps),
                       transforms.input_matrix(m, taps, m))
    )  # fmt: skip
    of_inputs, of_weights = inputs.sum(1), weight.max(1)
    assert of_inputs.max() ** 2 <= GROWTH / 7
    assert (of_inputs * of_weights).max() ** 2 <= GROWTH / 7
    assert (output @ (of_inputs * of_weights)).max() ** 2 <= GROWTH


@pytest.mark.parametrize("exact", [False, True])
def test_results_are_finite_as_long_as_is_said(exact: bool) -> None:
    model = layer(0.25)
    x = torch.randn(2, CHANNELS, 24, 24, generator=torch.Generator().manual_seed(1)).sign()
    x *= LARGEST / (1.01 if exact else GROWTH) / (0.25 * TERMS)
    frozen = neocog.freeze(model, x, exact=exact)
    assert all((name in choices.WINOGRAD) != exact for name in algorithms(frozen))
    assert torch.isfinite(frozen(x)).all()


@pytest.mark.parametrize("large", [1e3, 1e7])
def test_one_large_value_among_small_ones(large: float) -> None:
    """Errors are relative to the largest result nearby; with exact=True, to a sum's own terms."""
    model = layer(1 / 16)
    x = torch.randn(1, CHANNELS, 30, 30, generator=torch.Generator().manual_seed(1))
    x[0, :, 15, 15] = large
    with torch.no_grad():
        truth = model.double()(x.double())[0]
        sums = nn.functional.conv2d(x.abs().double(), model.weight.abs(), padding=1)[0]
        model.float()
        ours, exact = (neocog.freeze(model, x, exact=way)(x)[0] for way in (False, True))
    assert ((exact - truth).abs() <= torch.tensor(FLOAT32.error_bound(TERMS, sums.numpy()))).all()
    wrong, largest = (ours - truth).abs(), truth.abs().max()
    assert wrong.max() <= 5e-6 * largest
    far = torch.ones(30, 30, dtype=torch.bool)
    far[15 - NEAR : 16 + NEAR, 15 - NEAR : 16 + NEAR] = False
    assert wrong[:, far].max() <= 5e-6 * truth[:, far].abs().max()
    # What the documentation warns of: next to it, errors are too large for the values there.
    unread = torch.ones(30, 30, dtype=torch.bool)
    unread[14:17, 14:17] = False
    assert wrong[:, unread].max() > 100 * (exact - truth).abs()[:, unread].max()


def test_a_deep_network_that_returns_a_map() -> None:
    """Six layers, statistics of norms taken from pictures: errors of each layer reach the result.

    F(6, 3) is off by 2.5e-6 (root of the mean square, over that of the results), F(4, 3) by 6e-7,
    direct convolution, as PyTorch's, by 3e-7 to 6e-7.
    """
    torch.manual_seed(0)
    steps: list[nn.Module] = []
    for into in (8, *(64,) * 5):
        norm = nn.BatchNorm2d(64, momentum=None)
        steps += [nn.Conv2d(into, 64, 3, padding=1, bias=False), norm, nn.ReLU()]
    model, x = nn.Sequential(*steps, nn.Conv2d(64, 2, 1)), torch.randn(1, 8, 36, 36)
    with torch.no_grad():
        model(x)
        model.eval()
        eager, ours = model(x), neocog.freeze(model, x)(x)
        truth = model.double()(x.double())
    off, theirs = (((y - truth).abs().max() / truth.abs().max()).item() for y in (ours, eager))
    assert off <= max(3e-6, 4 * theirs)
