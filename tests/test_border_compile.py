"""torch.compile(backend="neocog") with Dynamo's options, and compiled autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from border import (
    alone,
    check,
    check_function,
    compiled,
    equal,
    maps,
    net,
    observe,
    programs,
    same,
)
from torch import Tensor, nn

import neocog


def branches(m: nn.Module, x: Tensor) -> Tensor:
    """Dead ones: a layer, a pool of a value that is read, a write to a copy, a random number."""
    y = torch.relu(m.a(x))
    m.b(y)
    F.max_pool2d(y, 2)
    y.clone().mul_(0)
    z = m.other(x)
    torch.rand(2)
    del z
    return m.b(y * 2)


@pytest.mark.parametrize("way", ["compile", "train"])
def test_dead_branches(way: str):
    check(net(branches, other=nn.Conv2d(3, 4, 3)), maps(), way=way)


def test_a_batch_norm_whose_result_nobody_uses():
    """Its statistics move all the same."""

    def flow(m, x):
        y = m.a(x)
        m.norm(y)
        return m.b(torch.relu(y))

    check(net(flow, norm=nn.BatchNorm2d(4)), maps(), way="train")


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_fullgraph(gradients: bool):
    model = net(lambda m, x: m.b(F.silu(m.norm(m.a(x)))), norm=nn.BatchNorm2d(4))
    eager, call = copy.deepcopy(model), compiled(model, fullgraph=True)
    for _ in range(2):
        wanted = observe(eager, (maps(),), eager, gradients)
        same(observe(call, (maps(),), model, gradients), wanted)
        eager.zero_grad()
        model.zero_grad()
    assert len(neocog.report(call)) == 1 and programs(call) >= 1


@pytest.mark.parametrize("way", ["compile", "train"])
def test_graph_breaks(way: str):
    """A print, a look at a value: either side is compiled, gradients pass through."""

    def flow(m, x):
        y = torch.relu(m.a(x))
        if y.sum() > 0:
            y = y * 2
        torch._dynamo.graph_break()
        return m.b(y)

    call = check(net(flow), maps(), way=way)
    assert sum(r.programs for r in neocog.report(call)) >= 2


@pytest.mark.parametrize("dynamic", [None, True])
@alone
def test_compiled_autograd(dynamic: bool | None):
    """Dynamo traces the backward pass as well."""
    model = net(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), norm=nn.BatchNorm2d(4))
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        call = torch.compile(model, backend="neocog", dynamic=dynamic)

        @torch.compile(backend="neocog", dynamic=dynamic)
        def step(x: Tensor) -> Tensor:
            made = call(x).square().sum()
            made.backward()
            return made.detach()

        for i in range(2):
            made = step(maps(seed=i))
            wanted = eager(maps(seed=i)).square().sum()
            wanted.backward()
            equal(made, wanted.detach(), "loss")
            most = max(float(q.grad.abs().max()) for q in eager.parameters())
            for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
                equal(p.grad, q.grad, name, 2e-5, 0.02 * most)


@alone
def test_backward_under_a_compiler_of_gradients():
    """``torch._dynamo.compiled_autograd._enable`` around the backward pass of a compiled model."""
    model = net(lambda m, x: m.b(torch.relu(m.a(x))))
    eager, call = copy.deepcopy(model), compiled(model)
    made, wanted = call(maps()).square().sum(), eager(maps()).square().sum()
    compiler = torch.compile(backend="eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        made.backward()
    wanted.backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        equal(p.grad, q.grad, name, 2e-5)


FUNCTIONS: dict[str, Callable[..., object]] = {
    "weights as arguments": lambda x, w: F.conv2d(x, w, padding=1).relu(),
    "one weight twice": lambda x, w: F.conv2d(F.conv2d(x, w[:3]).relu(), w),
    "weights computed": lambda x, w: F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True)),
    "weights sliced": lambda x, w: F.conv2d(x[:, :2], w[:, :2]) + F.conv2d(x, w).tanh(),
    "weights transposed": lambda x, w: F.conv2d(x, w.transpose(2, 3)),
    "weights expanded": lambda x, w: F.conv2d(x, w[:, :1].expand(-1, 3, -1, -1)),
    "bias from the input": lambda x, w: F.conv2d(x, w, x.mean((0, 2, 3)).repeat(2)[:4]),
    "one image's own weights": lambda x, w: torch.cat(
        [F.conv2d(x[i : i + 1], w * (i + 1)) for i in range(2)]
    ),
    "grouped by the batch": lambda x, w: F.conv2d(
        x.reshape(1, 6, 8, 8), torch.cat([w, w * 2]), groups=2
    ).view(2, 4, 6, 6),
    "a scalar": lambda x, w: F.conv2d(x, w).sum(),
    "no tensor of its own": lambda x, w: (x, w, 3),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", FUNCTIONS)
@alone
def test_functions(name: str, gradients: bool):
    """Without modules: weights are what the program says they are."""
    x, w = maps(), maps(4, 3, 3, 3, seed=4)
    if gradients:
        x.requires_grad_()
        w.requires_grad_()
    check_function(FUNCTIONS[name], x, w, gradients=gradients)


def test_weights_of_another_call():
    """One compiled function, fed with weights of another layout, and with none that is trained."""
    call = compiled(lambda x, w: F.conv2d(x, w).relu())
    w = maps(4, 3, 3, 3, seed=4)
    for weight in (w, w.clone().requires_grad_(), w.contiguous(memory_format=torch.channels_last),
                   w.flip(0), maps(4, 3, 6, 6)[:, :, ::2, ::2]):  # fmt: skip
        made, wanted = call(maps(), weight), F.conv2d(maps(), weight).relu()
        equal(made, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["inside", "around", "off inside"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_autocast(where: str, dtype: torch.dtype, gradients: bool):
    """Regions computed in another type, and switched off within one."""

    def flow(m, x):
        if where == "around":
            return m.b(torch.relu(m.a(x)))
        with torch.autocast("cpu", dtype, enabled=where == "inside"):
            y = torch.relu(m.a(x.float()))
        return m.b(y.float())

    model = net(flow)
    eager, call = copy.deepcopy(model), compiled(model)
    around = torch.autocast("cpu", dtype, enabled=where != "inside")

    def under(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def go(x: Tensor) -> Tensor:
            with around:
                return run(x)

        return go

    wanted = observe(under(eager), (maps(),), eager, gradients)
    same(observe(under(call), (maps(),), model, gradients), wanted, 0.02)


def test_a_default_dtype_of_double():
    """Tensors that the model makes are doubles then, and maps become so."""
    torch.set_default_dtype(torch.float64)
    try:
        model = net(lambda m, x: m.b(torch.relu(m.a(x.double())) + torch.ones(1)).float())
        for way in ("compile", "train"):
            check(model, maps().float(), way=way)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("higher", ["cond", "map", "while"])
def test_higher_order_operators(higher: str):
    """Layers inside their branches stay PyTorch's, those around are compiled."""
    from torch._higher_order_ops import while_loop

    def flow(m, x):
        y = torch.relu(m.a(x))
        if higher == "cond":
            y = torch.cond(y.sum() > 0, lambda t: torch.relu(t), lambda t: -t, (y,))
        elif higher == "map":
            y = torch._higher_order_ops.map(lambda t: torch.tanh(t) * 2, y)
        else:
            i = torch.zeros((), dtype=torch.int64)
            y = while_loop(lambda i, t: i < 2, lambda i, t: (i + 1, t * 0.5), (i, y))[1]
        return m.b(y)

    check(net(flow), maps(), way="compile")


@pytest.mark.parametrize("way", ["compile", "train"])
def test_a_function_that_dynamo_leaves_alone(way: str):
    """``torch.compiler.disable`` between layers, allow_in_graph'd and custom operators."""

    @torch.compiler.disable
    def outside(y: Tensor) -> Tensor:
        return torch.tanh(y)

    check(net(lambda m, x: m.b(outside(torch.relu(m.a(x))))), maps(), way=way)


@torch.library.custom_op("border::double_then_count", mutates_args={"count"})
def double_then_count(x: Tensor, count: Tensor) -> Tensor:
    count += 1
    return x * 2


@double_then_count.register_fake
def _(x: Tensor, count: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_custom_operators():
    """With an effect that its schema declares: run once each time, in its place."""

    def flow(m, x):
        y = torch.ops.border.double_then_count(m.a(x), m.count)
        return m.b(torch.relu(y)) + m.count

    model = net(flow)
    model.register_buffer("count", torch.zeros(()))
    check(model, maps(), way="compile")
    check(model, maps(), way="freeze")


def test_compiled_models_in_one_another():
    """One compiled for itself inside another, and one compiled part shared by two models."""
    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    torch._dynamo.reset()
    part.compile(backend="neocog")
    for head in (nn.Conv2d(4, 2, 1), nn.MaxPool2d(2)):
        whole = nn.Sequential(part, head)
        eager = copy.deepcopy(whole)
        call = torch.compile(whole, backend="neocog")
        equal(call(maps()), eager(maps()))


def test_copies_of_a_compiled_model():
    """deepcopy, state_dict and pickling of weights are those of any module."""
    model = net(lambda m, x: m.b(torch.relu(m.a(x))))
    call = compiled(model)
    call(maps()).sum().backward()
    twin = copy.deepcopy(call)
    with torch.no_grad():
        twin.a.weight.zero_()
        equal(call(maps()), model(maps()))
        assert not torch.equal(twin(maps()), model(maps()))
    assert {n.removeprefix("_orig_mod.") for n in call.state_dict()} == set(model.state_dict())
