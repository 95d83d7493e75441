"""What capturing a model must not do to it: device, constants, attributes, slices, scripts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from border import (
    alone,
    check,
    compiled,
    equal,
    inference,
    left_alone,
    maps,
    net,
    programs,
    ready,
    ways,
)
from torch import Tensor, nn

import neocog

# --------------------------------------------------------------------------------- scripted code


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Gate(nn.Module):
    """To be scripted: a branch and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > 1:
            return x * torch.sigmoid(self.inner(x))
        return x


@ways
@alone
def test_a_scripted_function(way: str):
    check(net(lambda m, x: m.b(swish(m.a(x)))), maps(), way=way)


@ways
@alone
def test_a_scripted_function_on_a_map_that_is_read_again(way: str):
    def flow(m, x):
        y = m.a(x)
        return m.b(swish(y)) + m.b(y)

    check(net(flow), maps(), way=way)


@ways
@pytest.mark.filterwarnings("ignore:`torch.jit")
@alone
def test_a_scripted_module(way: str):
    model = net(lambda m, x: m.b(m.gate(m.a(x))), gate=torch.jit.script(Gate()))
    check(model, maps(), way=way)


@inference
@pytest.mark.filterwarnings("ignore:`torch.jit")
@alone
def test_a_traced_module(way: str):
    traced = torch.jit.trace(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), maps(2, 4, 6, 6))
    model = net(lambda m, x: m.b(m.gate(m.a(x))), gate=traced)
    check(model, maps(), way=way)


# ---------------------------------------------------------------------------------------- devices


def line(x: Tensor) -> Tensor:
    """Coordinates of the columns, as CoordConv has them."""
    made = torch.linspace(-1, 1, x.shape[3], device=x.device).view(1, 1, 1, -1)
    return made.expand(x.shape[0], 1, x.shape[2], -1)


DEVICES: dict[str, Callable[..., object]] = {
    "arange_embedding": lambda m, x: m.a(x) + m.e(torch.arange(6, device=x.device)),
    "device_branch": lambda m, x: m.a(x) * (1 if x.device.type == "cpu" else 5),
    "is_cpu": lambda m, x: m.a(x) if x.is_cpu else m.a(x) * 5,
    "is_meta": lambda m, x: m.a(x) * (5 if x.is_meta else 1),
    "device_of_a_map": lambda m, x: (lambda y: y * (1 if str(y.device) == "cpu" else 5))(m.a(x)),
    "device_of_a_weight": lambda m, x: m.a(x) * (1 if m.b.weight.device.type == "cpu" else 5),
    "coordconv": lambda m, x: m.c(torch.cat([x, line(x)], 1)),
    "to_x_device": lambda m, x: m.b(m.a(x).to(x.device)),
    "to_x": lambda m, x: m.b(m.a(x).to(x)),
    "cpu": lambda m, x: m.b(m.a(x).cpu()),
    "zeros": lambda m, x: m.a(x) + torch.zeros(1, device=x.device),
    "lstm": lambda m, x: m.l(m.a(x).mean(2).transpose(1, 2))[0],
    "grucell": lambda m, x: m.g(m.a(x).mean((2, 3))),
    "ones_like": lambda m, x: m.a(x) + torch.ones_like(x[:, :1, :6, :6]),
    "new_ones": lambda m, x: m.a(x) * x.new_ones(x.shape[0], 1, 1, 1),
    "to_weight_device": lambda m, x: m.a(x.to(m.a.weight.device)),
    "to_a_parameter": lambda m, x: m.a(x.to(next(m.parameters()))),
    "input_cpu": lambda m, x: m.a(x.cpu()),
    "ones_there": lambda m, x: m.a(x + torch.ones(3, 1, 1, device=m.a.weight.device)),
    "ones_to_x": lambda m, x: m.a(x + torch.ones(3, 1, 1).to(x)),
    "ones_to_device": lambda m, x: m.a(x + torch.ones(3, 1, 1).to(m.a.weight.device)),
    "tensor_there": lambda m, x: m.a(x + torch.tensor([1.0, 2, 3], device=x.device)[:, None, None]),
    "tensor": lambda m, x: m.a(x * torch.tensor([1.0, 2, 3]).view(3, 1, 1)),
    "dtype_branch": lambda m, x: m.a(x) * (1 if x.dtype == torch.float32 else 5),
    "data_ptr": lambda m, x: m.a(x) * (1 if x.is_contiguous() and not x.is_quantized else 5),
}


def of_devices(flow: Callable[..., object]) -> nn.Module:
    return net(flow, c=nn.Conv2d(4, 4, 3), e=nn.Embedding(6, 6),
               l=nn.LSTM(4, 5, batch_first=True), g=nn.GRUCell(4, 5))  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
@alone
def test_devices(name: str):
    """As the model sees them: the CPU."""
    check(of_devices(DEVICES[name]), maps(), way="freeze")


@pytest.mark.parametrize("name", ["arange_embedding", "coordconv", "to_x", "ones_to_device"])
@pytest.mark.parametrize("way", ["compile", "train"])
@alone
def test_devices_compiled(name: str, way: str):
    check(of_devices(DEVICES[name]), maps(), way=way)


@pytest.mark.parametrize("name", ["to_x", "ones_to_x", "tensor", "new_ones", "cpu"])
def test_moves_to_where_it_is_cost_no_program(name: str):
    """Layers around them are compiled, and there are at most two programs."""
    call = ready(of_devices(DEVICES[name]), "freeze", (maps(),))
    call(maps())
    assert 1 <= programs(call) <= 2
    assert not neocog.report(call)[0].whole


# --------------------------------------------------------------- what a model keeps on itself


class Grid(nn.Module):
    """A head that makes its grid when the size of maps changes, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.shape != y.shape[2:]:
            self.grid = torch.arange(y.shape[3]).type_as(y)
            self.shape = y.shape[2:]
        return y + self.grid


class Remembers(nn.Module):
    """Keeps its features, counts calls in Python, and lists shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.calls, self.shapes, self.features = 0, [], None

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.relu(self.a(x))
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        return self.b(self.features)


def test_a_cached_grid():
    torch.manual_seed(0)
    model = Grid().eval()
    with left_alone(model):
        fast = neocog.freeze(model, maps())
    for size in (8, 8, 12, 8):
        x = maps(1, 3, size, size)
        with torch.no_grad():
            equal(fast(x), copy.deepcopy(model)(x))
            equal(fast(x), model(x))
    assert model.grid.device.type == "cpu" and type(model.grid) is Tensor
    with torch.no_grad():
        equal(neocog.freeze(model, maps())(maps()), model(maps()))


@pytest.mark.parametrize("way", ["compile", "train"])
def test_a_cached_grid_compiled(way: str):
    torch.manual_seed(0)
    check(Grid(), maps(), way=way)


def test_features_kept_on_the_model():
    """Not one of freeze's own tensors afterwards; the attributes are as they were."""
    model = Remembers().eval()
    with left_alone(model):
        fast = neocog.freeze(model, maps())
    with torch.no_grad():
        equal(fast(maps()), copy.deepcopy(model)(maps()))
        model(maps())
        equal(model.features, torch.relu(model.a(maps())))
    assert all(type(size) is int for shape in model.shapes for size in shape)


@pytest.mark.parametrize("way", ["compile", "train"])
def test_features_kept_by_a_compiled_model(way: str):
    """Dynamo gives them back as results; a training step may go on from there."""
    model = Remembers()
    eager = copy.deepcopy(model)
    call = ready(model, way, ())
    with torch.set_grad_enabled(way == "train"):
        for _ in range(2):
            equal(call(maps()), eager(maps()))
            equal(model.features, eager.features, "features")
    assert model.calls == eager.calls == 2 and model.shapes == eager.shapes


def test_freezing_leaves_a_model_alone():
    """Attributes, buffers, hooks, random numbers, modes of submodules, what needs gradients."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), Draws())
    model[0].bias.requires_grad_(False)
    model[0].register_forward_hook(lambda layer, args, out: out * 2)
    model[1].weight.grad = torch.ones(4)
    model.eval()
    with left_alone(model):
        fast = neocog.freeze(model, maps())
    with torch.no_grad():
        equal(fast(maps()), model(maps()))


class Draws(nn.Module):
    """Draws random numbers and throws them away."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return torch.relu(x)


def test_freezing_that_fails_leaves_a_model_alone():
    """Where the model raises in the middle, what it has changed before is put back."""

    class Raises(Remembers):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            self.calls = -1
            raise KeyError("no such thing")

    model = Raises().eval()
    with left_alone(model), contextlib.suppress(Exception):
        neocog.freeze(model, maps())


# --------------------------------------------------------------------------------------- constants


def buffered(flow: Callable[..., object]) -> nn.Module:
    model = net(flow)
    model.register_buffer("strides", torch.tensor([8.0, 16.0]))
    model.register_buffer("counts", torch.tensor([2, 3]))
    return model


CONSTANTS: dict[str, Callable[..., object]] = {
    "new_full": lambda m, x: (lambda y: y * y.new_full((1, 1), m.strides[0]))(m.a(x)),
    "item": lambda m, x: m.a(x) * m.strides[1].item(),
    "tolist": lambda m, x: m.a(x) * sum(m.strides.tolist()),
    "float": lambda m, x: m.b(m.a(x)) / float(m.strides[0]),
    "branch": lambda m, x: m.a(x) if m.strides.sum() > 20 else m.b(m.a(x)),
    "size_from_a_buffer": lambda m, x: F.interpolate(m.a(x), scale_factor=int(m.counts[0])),
    "index": lambda m, x: m.a(x)[:, m.counts],
    "loop": lambda m, x: sum(m.a(x) * s for s in m.strides),
    "full": lambda m, x: m.a(x) + torch.full((1, 1, 6, 6), m.strides[0].item()),
    "weight_norm": lambda m, x: F.conv2d(x, m.a.weight / m.a.weight.norm(), m.a.bias),
    "where": lambda m, x: torch.where(m.strides[0] > 4, m.a(x), -m.a(x)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name: str):
    """Values of buffers and parameters are no values of the input: they can be known."""
    check(buffered(CONSTANTS[name]), maps(), way="freeze")


@pytest.mark.parametrize("name", ["new_full", "item", "branch", "index", "weight_norm"])
@pytest.mark.parametrize("way", ["compile", "train"])
def test_constants_compiled(name: str, way: str):
    check(buffered(CONSTANTS[name]), maps(), way=way)


@pytest.mark.parametrize("name", ["new_full", "item", "tolist", "float", "index", "full"])
def test_constants_are_captured(name: str):
    call = ready(buffered(CONSTANTS[name]), "freeze", (maps(),))
    call(maps())
    assert not neocog.report(call)[0].whole and programs(call) >= 1


# ---------------------------------------------------------------------------------------- in place


def sliced(m: nn.Module, x: Tensor) -> Tensor:
    y = m.p(x)[:, :6]
    y += m.q(x)
    return y


@ways
def test_a_slice_written_in_place(way: str):
    model = net(sliced, p=nn.Conv2d(3, 8, 1), q=nn.Conv2d(3, 6, 1))
    check(model, maps(), way=way)


@inference
def test_a_slice_written_in_place_keeps_its_layers_compiled(way: str):
    model = net(sliced, p=nn.Conv2d(3, 8, 1), q=nn.Conv2d(3, 6, 1))
    call = ready(model, way, (maps(),))
    with torch.no_grad():
        call(maps())
    assert programs(call) >= 1


def test_compiled_twice_and_frozen_again():
    """A model that was frozen is compiled, and frozen in another state."""
    model = net(lambda m, x: m.b(torch.relu(m.a(x)))).eval()
    for way in ("freeze", "compile", "freeze"):
        check(model, maps(), way=way)
        with torch.no_grad():
            model.a.weight.mul_(0.5)
    equal(compiled(model)(maps()), model(maps()))
