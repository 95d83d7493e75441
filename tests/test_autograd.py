"""Autograd's wiring in float64: what is saved, which gradients are asked for, where they go.

The float64 reference takes the place of the kernels (see reference_engine.py), so that gradcheck
can compare with finite differences; the kernels themselves are tested in test_kernels.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference_engine
import torch
from test_ops import BLOCKS, LAST, MAX, MEAN, PADDED, STRIDED, block_arguments, numbers
from torch import Tensor

from neocog import ops
from neocog.problem import pooling


@pytest.fixture
def reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "engine", reference_engine)


def wired(channels: int, outputs: int, window: Any, epilogue: str) -> tuple[Any, list[Tensor]]:
    """A function of its differentiable inputs, and those inputs in float64."""
    x = numbers(2, channels, 4, 5, dtype=torch.float64)
    w = numbers(outputs, channels // window[3], 3, 2, dtype=torch.float64)
    shape = torch.ops.neocog.conv_block(x, w, None, None, *window, "", False)[0].shape
    optional = {
        "bias": numbers(outputs, dtype=torch.float64) if "bias" in epilogue else None,
        "add": numbers(*shape, seed=5, dtype=torch.float64) if "add" in epilogue else None,
    }
    present = [t for t in optional.values() if t is not None]

    def run(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        given = iter(rest)
        b, r = (None if t is None else next(given) for t in optional.values())
        return torch.ops.neocog.conv_block(x, w, b, r, *window, epilogue, True)[0]

    return run, [t.requires_grad_() for t in (x, w, *present)]


def check_twice(run: Any, *inputs: Tensor) -> None:
    """Gradients that can be differentiated are the same gradients, and theirs are right.

    The first is not what gradgradcheck asks: it differentiates whatever it is given.
    """
    y = run(*inputs)
    grad = numbers(*y.shape, seed=9, dtype=torch.float64)
    once = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    again = torch.autograd.grad(y, inputs, grad, create_graph=True)
    for ours, theirs in zip(again, once, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


WIRINGS = [
    (channels, outputs, window, " | ".join(filter(None, steps)))
    for (channels, outputs, window), steps in itertools.product(
        ((2, 3, PADDED), (4, 2, STRIDED)),
        (
            ("", "", "", ""),
            ("bias", "", "relu", ""),
            ("", "add", "leaky_relu(0.25)", ""),
            ("bias", "", "relu", MAX),
            ("", "", "leaky_relu(0.25)", MEAN),
            ("bias", "add", "", MAX),
            ("bias", "add", "", MEAN),
        ),
    )
]


@pytest.mark.parametrize("wiring", WIRINGS, ids=lambda w: f"{w[2][3]} {w[3] or 'plain'}")
def test_gradients_of_blocks(reference_computes: None, wiring: Any) -> None:
    run, inputs = wired(*wiring)
    assert torch.autograd.gradcheck(run, inputs)
    for number in range(len(inputs)):  # each alone: the others ask for no gradient
        few = [t.detach().requires_grad_(n == number) for n, t in enumerate(inputs)]
        assert torch.autograd.gradcheck(run, few)


@pytest.mark.parametrize("wiring", WIRINGS[:7], ids=lambda w: w[3] or "plain")
def test_second_gradients_of_blocks(reference_computes: None, wiring: Any) -> None:
    run, inputs = wired(*wiring)
    check_twice(run, *inputs)


@pytest.mark.parametrize("text", [MAX, MEAN, str(pooling("mean", 2, 1, 1, divisor_override=3))])
def test_gradients_of_pools(reference_computes: None, text: str) -> None:
    for x in (numbers(2, 3, 5, 4, dtype=torch.float64), numbers(1, 1, 3, 3, dtype=torch.float64)):
        for way in (x, x.to(memory_format=LAST)):
            way = way.detach().requires_grad_()

            def run(x: Tensor) -> Tensor:
                return torch.ops.neocog.pool(x, text, True)[0]

            assert torch.autograd.gradcheck(run, way)
            check_twice(run, way)


def test_one_tensor_in_two_places(reference_computes: None) -> None:
    """Its gradient is the sum of both, each counted once; so in second gradients."""
    x = numbers(3, 3, 4, 4, dtype=torch.float64).requires_grad_()
    w = numbers(3, 3, 3, 3, dtype=torch.float64).requires_grad_()

    def residual(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.neocog.conv_block(x, w, None, x, *PADDED, "add | leaky_relu(0.25)", True)[
            0
        ]

    def weight(w: Tensor) -> Tensor:
        return torch.ops.neocog.conv_block(w, w, None, None, *PADDED, "", True)[0]

    for run, inputs in ((residual, (x, w)), (weight, (w,))):
        assert torch.autograd.gradcheck(run, inputs)
        check_twice(run, *inputs)


def test_the_reference_engine_is_the_kernels_double() -> None:
    """Both engines give the same, in results, dtypes of what is saved, and strides."""
    for row in BLOCKS:
        x, w, b, r, *window = block_arguments(*row)
        real = torch.ops.neocog.conv_block(x, w, b, r, *window, True)
        ops.engine, kept = reference_engine, ops.engine
        try:
            double = torch.ops.neocog.conv_block(x, w, b, r, *window, True)
        finally:
            ops.engine = kept
        assert double[0].dtype == torch.float64  # it was the reference indeed
        for ours, theirs in zip(real, double, strict=True):
            assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)
