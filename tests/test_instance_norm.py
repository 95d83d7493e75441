"""InstanceNorm2d in a compiled training step, also at batch 1 in channels_last.

PyTorch computes the norm itself (2.13), and its gradient at batch 1 is wrong if what arrives is
channels_last. Its own convolutions give a contiguous input a contiguous gradient, so that eager
never meets the fault: the gradients of a compiled stage must have their inputs' layouts, too.
"""

import itertools

import pytest
import torch
from torch import nn

LAST, FIRST = torch.channels_last, torch.contiguous_format


def network(affine, track):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=affine, track_running_stats=track),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("format", [LAST, FIRST], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_is_the_one_of_pytorch(batch, format, train):
    for affine, track in itertools.product((False, True), repeat=2):
        torch._dynamo.reset()
        ours, theirs = network(affine, track).train(train), network(affine, track).train(train)
        compiled = torch.compile(ours, backend="neocog")
        for step in range(2):
            torch.manual_seed(step)
            x = torch.randn(batch, 3, 8, 8).to(memory_format=format)
            mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, right = compiled(mine), theirs(other)
            # Sums of up to 72 products, normalised to 1: float32 to about 1e-6.
            torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-5)
            y.square().sum().backward()
            right.square().sum().backward()
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3)
            pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
            for p, q in pairs:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
            for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_comes_out_has_the_strides_of_pytorch():
    """The norm's result is contiguous, whatever came in, and so is that of a layer behind it."""
    ours, theirs = network(False, False).train(), network(False, False).train()
    torch._dynamo.reset()
    x = torch.randn(1, 3, 8, 8).to(memory_format=LAST)
    y = torch.compile(ours, backend="neocog")(x)
    assert y.stride() == theirs(x).stride()
