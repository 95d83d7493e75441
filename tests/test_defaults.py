"""PyTorch's default data type and device are not those of what kernels write to."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import pytest
import tiny_networks as tn
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neocog
from neocog import functional
from neocog.memory import POOL
from neocog.program import free_memory

every_default = pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is kept from a time of other defaults."""
    torch._dynamo.reset()
    free_memory()
    POOL.clear()
    yield
    torch._dynamo.reset()


@contextlib.contextmanager
def odd(default: torch.dtype | str) -> Iterator[None]:
    """With this default data type or device."""
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        torch.set_default_device(default)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def all_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Within rounding of the largest value: a bias before a batch norm has no gradient but that."""
    largest = max(float(t.detach().abs().max()) for t in theirs)
    return all(
        a.dtype == torch.float32 and torch.allclose(a, b, rtol=0, atol=2e-5 * largest)
        for a, b in zip(ours, theirs, strict=True)
    )


@every_default
@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
def test_layers(default: torch.dtype | str, pool) -> None:
    x, w, b = tn.images().requires_grad_(), torch.randn(19, 3, 3, 3), torch.randn(19)
    inputs = x, w.requires_grad_(), b.requires_grad_()
    y = pool(F.conv2d(x, w, b, 2, 1), 2)
    g = torch.randn(y.shape)
    expected = y, *torch.autograd.grad(y, inputs, g)
    with odd(default):
        y = getattr(functional, pool.__name__)(functional.conv2d(x, w, b, 2, 1), 2)
        ours = y, *torch.autograd.grad(y, inputs, g)
    assert all_close(ours, expected)


@every_default
def test_frozen_and_compiled_models(default: torch.dtype | str) -> None:
    model, x = tn.make("chain"), tn.images()
    with torch.no_grad():
        expected = model(x)
    with odd(default), torch.no_grad():
        frozen = neocog.freeze(model, [x])
        ours = frozen(x), torch.compile(model, backend="neocog")(x)
    assert all_close(ours, (expected, expected))


@every_default
def test_training(default: torch.dtype | str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(tn.conv(3, 64), nn.BatchNorm2d(64), nn.ReLU(), tn.conv(64, 64))
    beside, x = copy.deepcopy(model), tn.images()
    beside(x).sum().backward()
    with odd(default):
        torch.compile(model, backend="neocog")(x).sum().backward()
    assert all_close(*([p.grad for p in m.parameters()] for m in (model, beside)))
