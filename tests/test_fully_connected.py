"""Fully connected layers while training: the same gradients, the largest of them last."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from neocog.fully_connected import late, linear


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def pictures() -> Tensor:
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def close(made: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_weights_of_fully_connected_layers_come_last_and_the_last_layers_at_the_end() -> None:
    model = network()
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    torch.compile(model, backend="neocog")(pictures()).sum().backward()
    assert order[-2:] == ["3.weight", "5.weight"]
    assert set(order[:-2]) == {"0.weight", "0.bias", "3.bias", "5.bias"}


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients(passes: int) -> None:
    """Of one backward pass, and of two of the same graph."""
    model, x = network(), pictures()
    expected = copy.deepcopy(model)
    out, wanted = torch.compile(model, backend="neocog")(x), expected(x)
    for i in range(passes):
        keep = i + 1 < passes
        out.pow(2).sum().backward(retain_graph=keep)
        wanted.pow(2).sum().backward(retain_graph=keep)
    close(gradients(model), gradients(expected))


def test_a_weight_that_two_layers_share() -> None:
    weight = torch.randn(6, 6, requires_grad=True)
    x = torch.randn(4, 6)

    def two(first: Tensor, second: Tensor) -> Tensor:
        return torch.nn.functional.linear(
            torch.nn.functional.linear(x, first).tanh(), second
        ).pow(2).sum()  # fmt: skip

    (expected,) = torch.autograd.grad(two(weight, weight), weight)
    a, b = late([weight, weight])
    linear(linear(x, a, None).tanh(), b, None).pow(2).sum().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_a_frozen_weight_and_an_input_alone() -> None:
    weight, bias = torch.randn(3, 4), torch.randn(3, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    (one,) = late([weight])
    linear(x, one, bias).pow(2).sum().backward()
    expected = [torch.autograd.grad((x @ weight.t() + bias).pow(2).sum(), t)[0] for t in (x, bias)]
    close([x.grad, bias.grad], expected)
    assert weight.grad is None


def test_gradients_of_an_input_then_of_the_weight_to_be_differentiated_again() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    (one,) = late([weight])
    out = linear(x, one, None).pow(2).sum()
    torch.autograd.grad(out, x, retain_graph=True)
    for create in (True, False):
        (made,) = torch.autograd.grad(out, weight, create_graph=create, retain_graph=True)
        torch.testing.assert_close(made, 2 * (x @ weight.t()).t() @ x)
        assert made.requires_grad == create


def test_a_penalty_on_the_gradient() -> None:
    model, x = network(), pictures()
    expected = copy.deepcopy(model)

    def penalty(step: nn.Module, module: nn.Module) -> list[Tensor]:
        given = x.clone().requires_grad_()
        wanted = [given, *module.parameters()]
        found = torch.autograd.grad(step(given).pow(2).sum(), wanted, create_graph=True)
        torch.stack([g.pow(2).sum() for g in found]).sum().backward()
        return gradients(module)

    made = penalty(torch.compile(model, backend="neocog"), model)
    for a, b in zip(made, penalty(expected, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
