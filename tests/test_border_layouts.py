"""Strides: of results and gradients, and what the model sees of them in between."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from border import alone, check, equal, maps, net, ready, strides, ways
from torch import Tensor, nn

CL = torch.channels_last


def own(flow: Callable[..., object], channels_last: bool = False) -> nn.Module:
    model = net(flow, c=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    return model.to(memory_format=CL) if channels_last else model


def doubled_strides(y: Tensor) -> Tensor:
    s = y.stride()
    return y.as_strided((2, 4, 3, 3), (s[0], s[1], s[2] * 2, s[3] * 2))


def ask(question: Callable[[Tensor], bool]) -> Callable[..., object]:
    """The answer decides what is computed."""

    def flow(m, x):
        y = torch.relu(m.a(x))
        return m.c(y) * 2 if question(y) else m.c(y)

    return flow


VIEWS: dict[str, tuple[Callable[..., object], bool, bool]] = {
    # flow, channels_last input, channels_last model
    "contiguous() between two layers, then view": (
        lambda m, x: torch.relu(m.c(m.a(x).contiguous())).view(x.shape[0], 2, -1), True, False),
    "view after a layer norm": (
        lambda m, x: m.c(F.layer_norm(m.a(x), [6, 6])).view(x.shape[0], 2, -1), True, False),
    "permute and view, model in channels_last": (
        lambda m, x: torch.relu(m.c(m.a(x))).permute(0, 2, 3, 1).view(x.shape[0], -1, 4),
        False, True),
    "permute and view, both in channels_last": (
        lambda m, x: torch.relu(m.c(m.a(x))).permute(0, 2, 3, 1).view(x.shape[0], -1, 4),
        True, True),
    "as_strided with own strides": (
        lambda m, x: (lambda y: y.as_strided(y.shape, y.stride()))(torch.relu(m.a(x))),
        True, False),
    "as_strided with doubled strides": (
        lambda m, x: doubled_strides(torch.relu(m.a(x))), False, True),
    "is_contiguous()": (ask(lambda y: y.is_contiguous()), True, False),
    "is_contiguous(channels_last)": (ask(lambda y: y.is_contiguous(memory_format=CL)), True, False),
    "is_contiguous() of a channels_last model": (ask(lambda y: y.is_contiguous()), False, True),
    "stride()": (ask(lambda y: y.stride(1) == 1), True, False),
    "stride() of the input": (ask(lambda y: y.stride()[3] == 4), False, True),
    "empty_like": (
        lambda m, x: torch.zeros_like(m.a(x)) + torch.empty_like(m.a(x)).zero_(), True, False),
    "flatten shares or copies": (lambda m, x: m.a(x).flatten(2).contiguous(), True, False),
    "reshape of a permuted map": (
        lambda m, x: m.c(m.a(x).permute(0, 1, 3, 2)).reshape(2, -1), True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
@ways
@alone
def test_views_that_eager_allows(name: str, way: str):
    flow, channels_last, model = VIEWS[name]
    x = maps().contiguous(memory_format=CL) if channels_last else maps()
    check(own(flow, model), x, way=way)


def test_a_view_that_eager_refuses():
    """``view`` across memory that does not lie so raises as in PyTorch."""

    def flow(m, x):
        return torch.relu(m.a(x)).view(x.shape[0], -1)

    x = maps().contiguous(memory_format=CL)
    for way in ("freeze", "compile", "train"):
        model = own(flow)
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            model(x)
        with pytest.raises(Exception, match="view size is not compatible"):
            check(model, x, way=way)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: maps(2, 3, 8, 9),
    "channels_last": lambda: maps(2, 3, 8, 9).contiguous(memory_format=CL),
    "permuted": lambda: maps(2, 3, 9, 8).transpose(2, 3),
    "permuted channels": lambda: maps(8, 2, 9, 3).permute(1, 3, 0, 2),
    "expanded": lambda: maps(1, 3, 8, 9).expand(2, 3, 8, 9),
    "expanded channels": lambda: maps(2, 1, 8, 9).expand(2, 3, 8, 9),
    "with gaps": lambda: maps(2, 3, 16, 18)[:, :, ::2, ::2],
    "channels_last with gaps": lambda: maps(2, 6, 8, 9).contiguous(memory_format=CL)[:, ::2],
    "one image": lambda: maps(1, 3, 8, 9).contiguous(memory_format=CL),
    "no batch": lambda: maps(3, 8, 9),
}


def results(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Of a layer, an activation, a pool, a norm, a sum, a concatenation, pieces, a resampling."""
    y = m.a(x)
    z = torch.relu(m.c(y))
    if x.dim() == 3:
        return y, z, F.max_pool2d(z, 2), torch.cat([y, z])
    return y, F.max_pool2d(z, 2), m.norm(z), y + z, torch.cat([y, z], 1), z[:, 1:3], x * 2


def more_results(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Of what else hands a layout on, or does not."""
    z = torch.relu(m.a(x))
    return (z, F.avg_pool2d(z, 2), z.chunk(2, 1)[1], F.interpolate(z, scale_factor=2),
            F.pad(z, (1, 1)), z.mean((2, 3)), z * 2, torch.sigmoid(x), z.sum(1, keepdim=True),
            torch.stack([z, z]), z.clone(), F.softmax(z, 1), z.mT, z.flatten(1))  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["model", "channels_last model"])
@pytest.mark.parametrize("name", INPUTS)
def test_strides_of_frozen_results(name: str, channels_last: bool):
    """``check`` compares those of every result with eager's."""
    for flow in (results, more_results)[: INPUTS[name]().dim() - 2]:
        check(own(flow, channels_last), INPUTS[name]().detach(), way="freeze")


DYNAMO = (
    ("contiguous", True), ("channels_last", False), ("channels_last", True), ("permuted", False),
    ("expanded", False), ("with gaps", True), ("one image", False),
)  # fmt: skip
"""Of the same, few: Dynamo takes a second for each."""


@pytest.mark.parametrize("name, channels_last", DYNAMO)
@pytest.mark.parametrize("way", ["compile", "train"])
def test_strides_of_compiled_results(name: str, channels_last: bool, way: str):
    """And of the gradients of parameters and inputs."""
    x = INPUTS[name]().detach()
    if way == "train" and 0 not in x.stride():
        x.requires_grad_()
    check(own(results, channels_last), x, way=way)


@pytest.mark.parametrize("way", ["compile", "train"])
def test_strides_of_more_compiled_results(way: str):
    check(own(more_results), INPUTS["channels_last"](), way=way)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_parameters_lie_as_parameters_do(channels_last: bool):
    model = own(lambda m, x: m.norm(m.c(torch.relu(m.a(x)))), channels_last)
    call = torch.compile(model.train(), backend="neocog")
    call(maps()).square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert strides(p.grad) == strides(p), name


@pytest.mark.parametrize("shape", [(2, 3, 8, 1), (2, 3, 1, 1), (2, 1, 8, 8), (1, 3, 1, 8)])
@ways
def test_sizes_of_one(shape: tuple[int, ...], way: str):
    """Where several layouts have the same strides, and PyTorch picks one."""
    model = net(lambda m, x: (m.d(x), torch.relu(m.e(x)), m.d(x) + m.e(x)),
                d=nn.Conv2d(shape[1], 4, 1), e=nn.Conv2d(shape[1], 4, 1))  # fmt: skip
    for x in (maps(*shape), maps(*shape).contiguous(memory_format=CL)):
        check(model, x, way=way)


@ways
def test_one_model_for_all_layouts(way: str):
    """The same compiled model meets them one after another."""
    model = own(lambda m, x: torch.relu(m.c(m.a(x))))
    eager, call = copy.deepcopy(model), ready(model, way, (maps(2, 3, 8, 9),))
    eager.train(way == "train")
    for name in ("contiguous", "channels_last", "permuted", "contiguous", "channels_last"):
        with torch.set_grad_enabled(way == "train"):
            equal(call(INPUTS[name]()), eager(INPUTS[name]()), name)


@pytest.mark.parametrize("groups", [1, 2, 4])
@ways
def test_instance_norm_of_one_image_in_channels_last(groups: int, way: str):
    """PyTorch folds images into channels, and the layout with them."""
    norm = nn.InstanceNorm2d(4, affine=True) if groups == 4 else nn.GroupNorm(groups, 4)
    model = net(lambda m, x: m.b(torch.relu(m.n(m.a(x)))), n=norm).to(memory_format=CL)
    check(model, maps(1, 3, 8, 8).contiguous(memory_format=CL), way=way)
