"""Fusion: which layers become one node, and in which order their steps stand."""

from __future__ import annotations

import pytest
import tiny_networks as tn
import torch
import torch.nn.functional as F
from recordings import networks
from torch import nn

from neocog import network as net
from neocog.fusion import fuse
from neocog.problem import Act, Add, Affine, Bias, Pooling


def epilogues(flow, fuses_pool: bool = True, **layers: nn.Module) -> list[tuple]:
    """The epilogue of every convolution after fusion."""
    (network,) = networks(tn.ready(tn.Net(flow, **layers)), tn.images())
    fused = fuse(network, lambda block, pool: fuses_pool)
    return [n.op.block.epilogue for n in fused.nodes if isinstance(n.op, net.Layer)]


def kinds(epilogue: tuple) -> list[type]:
    return [type(step) for step in epilogue]


def test_conv_norm_relu():
    steps = epilogues(lambda m, x: F.relu(m.n(m.c(x))), c=tn.conv(3, 4), n=nn.BatchNorm2d(4))
    assert steps == [(Bias(), Affine(), Act("relu"))]


def test_conv_relu_norm():
    steps = epilogues(lambda m, x: m.n(F.relu(m.c(x))), c=tn.conv(3, 4, bias=False),
                      n=nn.BatchNorm2d(4))  # fmt: skip
    assert steps == [(Act("relu"), Affine())]


def test_two_norms_are_not_one():
    steps = epilogues(lambda m, x: m.n(m.n(m.c(x))), c=tn.conv(3, 4), n=nn.BatchNorm2d(4))
    assert steps == [(Bias(), Affine())]


@pytest.mark.parametrize("swap", [False, True])
def test_residuals_in_their_order(swap):
    def add_relu(m, x):
        y = m.a(x)
        z = m.b(y)
        return F.relu(y + z if swap else z + y)

    def relu_add(m, x):
        y = m.a(x)
        z = F.relu(m.b(y))
        return y + z if swap else z + y

    layers = {"a": tn.conv(3, 4, bias=False), "b": tn.conv(4, 4, bias=False)}
    assert [kinds(e) for e in epilogues(add_relu, **layers)].count([Add, Act]) == 1
    assert [kinds(e) for e in epilogues(relu_add, **layers)].count([Act, Add]) == 1


@pytest.mark.parametrize("fuses", [False, True])
def test_conv_relu_pool(fuses):
    steps = epilogues(lambda m, x: F.max_pool2d(F.relu(m.c(x)), 2), fuses, c=tn.conv(3, 4))
    assert [kinds(e) for e in steps] == [[Bias, Act, Pooling] if fuses else [Bias, Act]]


def test_nothing_follows_a_pool():
    steps = epilogues(lambda m, x: F.relu(F.max_pool2d(m.c(x), 2)), c=tn.conv(3, 4))
    assert [kinds(e) for e in steps] == [[Bias, Pooling]]


def test_large_windows_stay_alone():
    steps = epilogues(lambda m, x: F.avg_pool2d(m.c(x), 4), c=tn.conv(3, 4))
    assert [kinds(e) for e in steps] == [[Bias]]


@pytest.mark.parametrize(
    "flow",
    [
        lambda m, x: [y := m.c(x), (F.relu(y), y)][1],
        lambda m, x: [y := m.c(x), torch.cat([F.relu(y), torch.tanh(y)], 1)][1],
        lambda m, x: [y := m.c(x), F.relu(y) + y][1],
    ],
    ids=["returned", "two readers", "residual of itself"],
)
def test_a_value_read_twice_is_kept(flow):
    assert (Bias(),) in epilogues(flow, c=tn.conv(3, 4))


def test_gates_are_no_residuals():
    """A convolution of 1x1 maps that is broadcast over maps cannot add them in its epilogue."""

    def flow(m, x):
        y = m.a(x)
        return m.b(F.adaptive_avg_pool2d(y, 1)) + y

    steps = epilogues(flow, a=tn.conv(3, 4, 1, bias=False), b=tn.conv(4, 4, 1, bias=False))
    assert steps == [(), ()]


def test_fused_networks_are_in_order():
    """Every node comes after what it reads, and no parameter is lost."""
    for name in tn.NETWORKS:
        for network in networks(tn.make(name), tn.images()):
            fused = fuse(network, lambda block, pool: True)
            seen: set[net.Node] = set()
            for node in fused.nodes:
                assert set(node.inputs) <= seen, name
                seen.add(node)
            assert set(fused.outputs) <= seen, name
