"""Arguments that fit no layer: one clear line from the public functions, in torch's error types."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import kernel_tools as kt
import pytest
import torch
from torch import Tensor

from neocog import functional
from neocog.errors import InvalidProblem
from neocog.problem import pooling


def whole(*shape: int) -> Tensor:
    return torch.tensor(kt.integers(shape, 0), dtype=torch.float32)


X, W = whole(1, 3, 6, 6), whole(4, 3, 3, 3)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "kernel too large": (
        lambda: functional.conv2d(whole(1, 3, 2, 6), W),
        r"1\*\(3-1\) \+ 1 = 3.*0 \+ 2 \+ 0 = 2.*"
        r"floor\(\(2 - 1\*\(3-1\) - 1 \+ 0 \+ 0\)/1\) \+ 1 = 0",
    ),
    "channels": (lambda: functional.conv2d(whole(1, 2, 6, 6), W), r"has 2 channels.*3\*1 = 3"),
    "groups": (
        lambda: functional.conv2d(whole(1, 6, 6, 6), whole(4, 2, 3, 3), groups=3),
        r"groups=3 must divide out_channels=4: 4 = 3\*1 \+ 1",
    ),
    "no group": (lambda: functional.conv2d(X, W, groups=0), "groups must be at least 1, got 0"),
    "stride": (lambda: functional.conv2d(X, W, stride=0), "stride must be at least 1, got 0"),
    "dilation": (lambda: functional.conv2d(X, W, dilation=-1), "dilation .* at least 1, got -1"),
    "padding": (lambda: functional.conv2d(X, W, padding=-1), "padding must be at least 0, got -1"),
    "padding's name": (
        lambda: functional.conv2d(X, W, padding="full"),
        "'same' or 'valid', got 'full'",
    ),
    "same and stride": (
        lambda: functional.conv2d(X, W, padding="same", stride=2),
        r"padding='same'.*stride=\(2, 2\)",
    ),
    "bias": (lambda: functional.conv2d(X, W, whole(3)), r"bias must have shape \(4,\).*got \(3,\)"),
    "five dimensions": (
        lambda: functional.conv2d(X[None], W),
        r"3 or 4 dimensions.*\(1, 1, 3, 6, 6\)",
    ),
    "flat weight": (lambda: functional.conv2d(X, W[0]), r"weight 4, got.*\(3, 3, 3\)"),
    "flat weight, same": (
        lambda: functional.conv2d(X, W[0], padding="same"),
        r"weight 4, got.*\(3, 3, 3\)",
    ),
    "activation": (lambda: functional.conv_block(X, W, activation="swish"), "relu.*got 'swish'"),
    "residual": (
        lambda: functional.conv_block(X, W, residual=X),
        r"residual.*\(1, 4, 4, 4\).*, got \(1, 3, 6, 6\)",
    ),
    "pool in a block": (
        lambda: functional.conv_block(X, W, pool=pooling("max", 5)),
        r"1\*\(5-1\) \+ 1 = 5.*0 \+ 4 \+ 0 = 4",
    ),
    "pool too large": (
        lambda: functional.max_pool2d(X, 7),
        r"1\*\(7-1\) \+ 1 = 7.*0 \+ 6 \+ 0 = 6",
    ),
    "pool's padding": (
        lambda: functional.max_pool2d(X, 2, padding=2),
        "half its kernel, 2 // 2 = 1, got low=2",
    ),
    "pool's size": (lambda: functional.avg_pool2d(X, 0), "kernel size must be at least 1, got 0"),
    "pool's stride": (lambda: functional.avg_pool2d(X, 2, 0), "stride must be at least 1, got 0"),
    "divisor": (
        lambda: functional.avg_pool2d(X, 2, divisor_override=0),
        "divisor_override must not be 0",
    ),
    "three sizes": (lambda: functional.max_pool2d(X, (2, 2, 2)), r"kernel_size .* got \(2, 2, 2\)"),
    "flat picture": (lambda: functional.max_pool2d(X[0, 0], 2), r"3 or 4 dimensions.*\(6, 6\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    """One line with the value, what was expected and the numbers; torch's error types catch it."""
    call, pattern = WRONG[name]
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, InvalidProblem)
        assert re.search(pattern, str(caught.value)), str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_number_that_is_none() -> None:
    """As torch does: a TypeError or our own, which names the argument."""
    for value in (1.5, "1"):
        with pytest.raises((TypeError, InvalidProblem), match="stride"):
            functional.conv2d(X, W, stride=value)
