"""Gradients where the program says otherwise: grad modes, custom functions, branches, backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from border import alone, check, compiled, equal, inference, maps, net, observe, programs, same
from torch import Tensor, nn

import neocog


class StraightThrough(torch.autograd.Function):
    """A ReLU whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.relu(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Reverse(torch.autograd.Function):
    """The identity, with a gradient of the other sign."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return -3 * g


def no_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.relu(m.a(x))
    return m.b(y)


def no_grad_and_a_skip(m: nn.Module, x: Tensor) -> Tensor:
    """One value read inside and outside."""
    y = torch.relu(m.a(x))
    with torch.no_grad():
        gate = torch.sigmoid(m.b(y)).mean(1, keepdim=True)
    return y * gate


def flag(m: nn.Module, x: Tensor, on: bool) -> Tensor:
    with torch.set_grad_enabled(on):
        y = torch.relu(m.a(x))
    return m.b(y)


def nested(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x)
        with torch.enable_grad():
            z = torch.relu(m.a(x))
        y = torch.relu(y) * 0.5
    return m.b(z) + m.b(y)


def until_the_end(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result of the region is also returned: it requires no gradient."""
    with torch.no_grad():
        y = torch.relu(m.a(x))
    return m.b(y), y


def only_no_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.b(torch.relu(m.a(x)))


def inference_mode(m: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = torch.relu(m.a(x))
    return m.b(y.clone())


@torch.no_grad()
def frozen_features(m: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(m.a(x))


def decorated(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(frozen_features(m, x))


def detached(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.relu(m.a(x))
    return m.b(y) * torch.sigmoid(m.b(y.detach()))


def stopped_map(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(torch.relu(m.a(x.detach())))


REGIONS = (
    no_grad, no_grad_and_a_skip, nested, until_the_end, only_no_grad, inference_mode, decorated,
    detached, stopped_map,
)  # fmt: skip


@pytest.mark.parametrize("flow", REGIONS, ids=lambda f: f.__name__)
def test_regions(flow: Callable[..., object]):
    check(net(flow), maps().requires_grad_(), way="train")


@pytest.mark.parametrize("flow", (no_grad, nested, decorated), ids=lambda f: f.__name__)
@inference
def test_regions_without_gradients(flow: Callable[..., object], way: str):
    check(net(flow), maps(), way=way)


@pytest.mark.parametrize("on", [False, True])
def test_a_flag_of_python(on: bool):
    check(net(flag), maps().requires_grad_(), on, way="train")


def test_a_flag_that_changes():
    """One compiled model, called with both."""
    model = net(flag)
    eager, call = copy.deepcopy(model), compiled(model)
    for on in (True, False, True):
        wanted = observe(eager, (maps().requires_grad_(), on), eager, True)
        same(observe(call, (maps().requires_grad_(), on), model, True), wanted)
        eager.zero_grad()
        model.zero_grad()


def test_gradients_on_inside_a_call_without():
    def flow(m, x):
        with torch.enable_grad():
            return m.b(torch.relu(m.a(x)))

    model = net(flow)
    eager, call = copy.deepcopy(model), compiled(model)
    with torch.no_grad():
        made, wanted = call(maps()), eager(maps())
    equal(made, wanted)
    assert made.requires_grad
    made.sum().backward()
    wanted.sum().backward()
    for (name, p), q in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        equal(p.grad, q[1].grad, name, 2e-5)


def test_layers_outside_a_region_are_native():
    call = check(net(no_grad), maps().requires_grad_(), way="train")
    assert programs(call) >= 1


@pytest.mark.parametrize("function", [StraightThrough, Reverse])
def test_custom_functions(function: type[torch.autograd.Function]):
    def flow(m, x):
        return m.b(function.apply(m.a(x)))

    check(net(flow), maps().requires_grad_(), way="train")


@pytest.mark.parametrize("function", [StraightThrough, Reverse])
@inference
def test_custom_functions_without_gradients(function: type[torch.autograd.Function], way: str):
    check(net(lambda m, x: m.b(function.apply(m.a(x)))), maps(), way=way)


def test_a_custom_function_around_layers():
    """Its forward pass holds a convolution; its backward is its own."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return torch.relu(F.conv2d(x, w))

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return 2 * torch.ones_like(x), 3 * torch.ones_like(w)

    check(net(lambda m, x: m.b(Own.apply(x, m.a.weight))), maps().requires_grad_(), way="train")


@pytest.mark.parametrize("through", [torch.relu, torch.tanh, lambda y: F.max_pool2d(y, 2)])
def test_backward_inside(through: Callable[[Tensor], Tensor]):
    """``loss.backward()`` in the compiled function fills the same gradients."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    eager = copy.deepcopy(model)

    def step(m: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            made = through(m(x)).square().sum()
            made.backward()
            return made.detach()

        return run

    made, wanted = compiled(step(model))(maps()), step(eager)(maps())
    equal(made, wanted)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        equal(p.grad, q.grad, "gradient", 2e-5)


@pytest.mark.parametrize("backend", ["eager", "neocog"])
@pytest.mark.parametrize("batch, side", [(2, 8), (3, 9)], ids=["known shape", "new shape"])
def test_a_frozen_model_in_a_compiled_function(backend: str, batch: int, side: int):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    frozen, x = neocog.freeze(model, maps()), maps(batch, 3, side, side)
    torch._dynamo.reset()
    call = torch.compile(lambda x: frozen(x) + 1, backend=backend)
    with torch.no_grad():
        equal(call(x), model(x) + 1)
        equal(call(x * 2), model(x * 2) + 1)


def test_a_branch_that_nobody_uses():
    """Its parameters get no gradient, not one of zeros, which weight decay would act on."""

    def flow(m, x):
        F.interpolate(m.other(x), scale_factor=2)
        return m.a(x).relu()

    check(net(flow, other=nn.Conv2d(3, 4, 3)), maps().requires_grad_(), way="train")


@pytest.mark.parametrize("used", [0, 1])
@alone
def test_one_of_two_results_gets_a_gradient(used: int):
    """The parameters behind the other one have none."""

    def flow(m, x):
        y = m.stem(x).relu()
        return m.a(y), m.other(y).relu()

    layers = {"stem": nn.Conv2d(3, 3, 1), "other": nn.Conv2d(3, 4, 3)}
    model = net(flow, **layers)
    eager = copy.deepcopy(model)
    compiled(model)(maps())[used].square().sum().backward()
    eager(maps())[used].square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        equal(p.grad, q.grad, name, 2e-5)
