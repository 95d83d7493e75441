"""What reads or changes the graph of gradients: hooks, autograd.grad, checkpoints, sharing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from border import (
    GRADIENTS,
    alone,
    check,
    compiled,
    equal,
    maps,
    net,
    observe,
    same,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def both(model: nn.Module) -> tuple[nn.Module, Callable[..., Any], nn.Module]:
    """The model, compiled, and a copy for PyTorch."""
    eager = copy.deepcopy(model)
    return model, compiled(model), eager


def same_gradients(model: nn.Module, eager: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        equal(p.grad, q.grad, f"gradient of {name}", GRADIENTS)


def test_requires_grad_on_an_intermediate():
    def flow(m, x):
        y = torch.relu(m.a(x)).detach().requires_grad_()
        return m.b(y), y

    model, call, eager = both(net(flow))
    (made, y), (wanted, z) = call(maps()), eager(maps())
    equal(made, wanted)
    made.square().sum().backward()
    wanted.square().sum().backward()
    same_gradients(model, eager)
    equal(y.grad, z.grad, "gradient of the intermediate", GRADIENTS)


def test_autograd_grad_inside():
    """A penalty on the gradient of the input, itself differentiated."""

    def flow(m, x):
        y = m.a(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return m.b(torch.relu(y)).sum() + slope.square().sum()

    check(net(flow), maps().requires_grad_(), way="train")


@pytest.mark.parametrize("factor", [None, 3.0], ids=["looks", "changes"])
def test_a_hook_on_an_intermediate(factor: float | None):
    """Read before and after it is set: it sees the whole gradient, and may change it."""

    def flow(m, x):
        y = torch.relu(m.a(x))
        first = m.b(y)

        def hook(g: Tensor) -> Tensor | None:
            m.seen.append(g.detach().clone())
            return None if factor is None else g * factor

        y.register_hook(hook)
        return first + m.b(torch.tanh(y))

    model = net(flow)
    model.seen = []
    model, call, eager = both(model)
    wanted = observe(eager, (maps().requires_grad_(),), eager, True)
    same(observe(call, (maps().requires_grad_(),), model, True), wanted)
    assert len(model.seen) == len(eager.seen) == 1
    equal(model.seen[0], eager.seen[0], "what the hook sees", GRADIENTS)


def test_retain_grad_on_an_intermediate():
    def flow(m, x):
        y = torch.relu(m.a(x))
        first = m.b(y)
        y.retain_grad()
        return first + m.b(torch.tanh(y)), y

    model, call, eager = both(net(flow))
    (made, y), (wanted, z) = call(maps()), eager(maps())
    made.square().sum().backward()
    wanted.square().sum().backward()
    same_gradients(model, eager)
    equal(y.grad, z.grad, "gradient of the intermediate", GRADIENTS)


def test_hooks_on_a_result():
    model, call, eager = both(net(lambda m, x: (lambda y: (m.b(y), y))(torch.relu(m.a(x)))))
    seen: list[list[Tensor]] = [[], []]
    for run, kept in ((call, seen[0]), (eager, seen[1])):
        made, y = run(maps())
        y.register_hook(kept.append)
        (made.square().sum() + y.sum()).backward()
    same_gradients(model, eager)
    equal(seen[0][0], seen[1][0], "what the hook sees", GRADIENTS)


def test_hooks_on_parameters():
    """Set before and after compiling."""
    model = net(lambda m, x: m.b(torch.relu(m.a(x))))
    model, call, eager = both(model)
    for m in (model, eager):
        m.a.weight.register_hook(lambda g: g * 2)
    for _ in range(2):
        call(maps()).square().sum().backward()
        eager(maps()).square().sum().backward()
        same_gradients(model, eager)
        for m in (model, eager):
            m.b.weight.register_hook(lambda g: -g)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_modules(kind: str):
    hooks: dict[str, Callable[..., Any]] = {
        "forward": lambda layer, args, out: out * 2,
        "forward_pre": lambda layer, args: (args[0] * 2,),
        "full_backward": lambda layer, before, after: (before[0] * 2,),
        "full_backward_pre": lambda layer, after: (after[0] * 2,),
    }
    model = net(lambda m, x: m.b(torch.relu(m.a(x))))
    eager = copy.deepcopy(model)
    for m in (model, eager):
        getattr(m.b, f"register_{kind}_hook")(hooks[kind])
    wanted = observe(eager, (maps().requires_grad_(),), eager, True)
    same(observe(compiled(model), (maps().requires_grad_(),), model, True), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool):
    def flow(m, x):
        def part(y: Tensor) -> Tensor:
            return torch.relu(m.a(y)) * torch.sigmoid(m.a(y))

        return m.b(checkpoint(part, x, use_reentrant=reentrant))

    check(net(flow), maps().requires_grad_(), way="train")


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "around"])
def test_a_checkpoint_with_dropout(outside: bool):
    """The second run draws what the first one drew."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 1))
    if outside:
        eager, call = copy.deepcopy(layers), compiled(layers)
        for run in (eager, call):
            torch.manual_seed(5)
            checkpoint(run, maps().requires_grad_(), use_reentrant=False).square().sum().backward()
        same_gradients(layers, eager)
        return
    model = net(lambda m, x: m.b(checkpoint(m.part, x, use_reentrant=False)), part=layers)
    check(model, maps().requires_grad_(), way="train")


def test_double_backward():
    model, call, eager = both(net(lambda m, x: m.b(torch.tanh(m.a(x)))))
    made = []
    for run in (call, eager):
        x = maps().requires_grad_()
        (slope,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        made.append((slope.detach(), x.grad))
    equal(*(slope for slope, _ in made), "first gradient", GRADIENTS)
    equal(*(grad for _, grad in made), "second gradient", GRADIENTS)
    same_gradients(model, eager)


def test_backward_twice_through_a_retained_graph():
    model, call, eager = both(net(lambda m, x: m.b(torch.relu(m.a(x)))))
    for run in (call, eager):
        made = run(maps()).square().sum()
        made.backward(retain_graph=True)
        made.backward()
    same_gradients(model, eager)
    made = call(maps()).sum()
    made.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        made.backward()


SUBSETS: dict[str, Callable[[str], bool]] = {
    "nothing trained but the input": lambda name: False,
    "weights frozen": lambda name: "bias" in name,
    "biases frozen": lambda name: "weight" in name,
    "first layer frozen": lambda name: name[0] == "b",
    "last layer frozen": lambda name: name[0] == "a",
    "one weight trained": lambda name: name == "a.weight",
}


@pytest.mark.parametrize("of_input", [False, True], ids=["", "input"])
@pytest.mark.parametrize("trained", SUBSETS.values(), ids=SUBSETS)
@alone
def test_subsets_of_parameters(trained: Callable[[str], bool], of_input: bool):
    model = net(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), norm=nn.BatchNorm2d(4))
    for name, p in model.named_parameters():
        p.requires_grad_(trained(name))
    check(model, maps().requires_grad_(of_input), way="train")


def test_shared_weights():
    """One layer twice, on maps of two sizes, and its weight once more by a function."""

    def flow(m, x):
        y = torch.relu(m.c(x))
        return m.c(y), m.c(torch.relu(m.c(y))) * m.c.weight.square().sum()

    check(net(flow, c=nn.Conv2d(3, 3, 3)), maps().requires_grad_(), way="train")


def test_tied_layers():
    model = net(lambda m, x: m.d(torch.relu(m.c(x))), c=nn.Conv2d(3, 3, 3), d=nn.Conv2d(3, 3, 3))
    model.d.weight = model.c.weight
    check(model, maps().requires_grad_(), way="train")


def test_gradients_add_up_over_steps():
    model, call, eager = both(net(lambda m, x: m.b(torch.relu(m.a(x)))))
    for i in range(3):
        for run in (call, eager):
            run(maps(seed=i)).square().sum().backward()
    same_gradients(model, eager)


def test_a_gradient_that_is_no_plain_map():
    """Expanded (``sum``), transposed, and one that shares memory with others."""
    for of in (
        lambda y: y.sum(),
        lambda y: y.transpose(2, 3).contiguous().flatten() @ torch.arange(y.numel()).float(),
        lambda y: y[:, :, ::2].sum() + y[..., 1].sum(),
    ):
        model, call, eager = both(net(lambda m, x: m.b(torch.relu(m.a(x)))))
        of(call(maps())).backward()
        of(eager(maps())).backward()
        same_gradients(model, eager)
