"""Capture and fusion: which operations a model becomes, and which models are refused."""

from __future__ import annotations

import pytest
import tiny_networks as tn
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neocog import network as net
from neocog.capture import SharedMemory, capture
from neocog.errors import Unsupported
from neocog.fusion import fuse
from neocog.problem import Act, Add, Affine, Bias, Pooling


def operations(flow, x: Tensor | None = None, **layers: nn.Module) -> list[net.Node]:
    """The nodes of a captured model, without those for tensors from outside."""
    model = tn.ready(tn.Net(flow, **layers))
    made = capture(model, [tn.images() if x is None else x]).network
    return [node for node in made.nodes if not isinstance(node.op, net.Input)]


def epilogues(flow, fuses_pool: bool = True, **layers: nn.Module) -> list[tuple]:
    """The epilogue of every convolution after fusion."""
    captured = capture(tn.ready(tn.Net(flow, **layers)), [tn.images()])
    fused = fuse(captured.network, lambda block, pool: fuses_pool)
    return [n.op.block.epilogue for n in fused.nodes if isinstance(n.op, net.Layer)]


def kinds(epilogue: tuple) -> list[type]:
    return [type(step) for step in epilogue]


@pytest.mark.parametrize("name", tn.NETWORKS)
def test_shapes_are_those_of_pytorch(name):
    """The captured outputs have the shapes that eager gives, and every layer is covered."""
    model, x = tn.make(name), tn.images()
    captured = capture(model, [x])
    with torch.no_grad():
        expected = list(tn.leaves(model(x)))
    assert [node.shape for node in captured.network.outputs] == [tuple(t.shape) for t in expected]
    foreign = {n.op.name for n in captured.network.nodes if isinstance(n.op, net.Foreign)}
    # PyTorch calls it whatever it likes: only the network that is about foreign calls has any.
    assert bool(foreign) == (name == "foreign_layers"), foreign


def test_parameters_keep_their_names():
    model = tn.make("residual_add_relu")
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    captured = capture(model, [tn.images()], names)
    read = {"first.weight", "first.bias", "second.weight", "norm.weight", "norm.bias",
            "norm.running_mean", "norm.running_var"}  # fmt: skip
    inputs = {n.op.name for n in captured.network.nodes if isinstance(n.op, net.Input)}
    # Parameters that only layers read need no node, but those that have one are called by name.
    assert inputs <= read | {"argument 0"}
    assert set(captured.parameters) == read
    assert captured.parameters["first.weight"] is model.first.weight


def test_the_structure_of_the_result_comes_back():
    captured = capture(tn.make("two_outputs"), [tn.images()])
    made = captured.result([v.shape if isinstance(v, net.Node) else v for v in captured.leaves])
    assert made == {"inside": (2, 19, 12, 16), "pair": ((2, 8, 12, 16), (2, 8)), "number": 7}


@pytest.mark.parametrize(
    "flow",
    [
        tn.looks_at_values,
        lambda m, x: x * x.max().item(),
        lambda m, x: x[x > 0],
        lambda m, x: torch.nonzero(x),
        lambda m, x: torch.from_numpy(x.numpy() * 2),
        lambda m, x: x * x.flatten().tolist()[0],
    ],
    ids=["if", "item", "mask", "nonzero", "numpy", "tolist"],
)
def test_values_decide(flow):
    """A model whose result depends on the values of tensors in Python cannot be captured."""
    with pytest.raises(Unsupported):
        operations(flow, first=tn.conv(3, 4))


def test_errors_of_the_model_are_its_own():
    with pytest.raises(RuntimeError) as caught:
        operations(lambda m, x: m.layer(x), layer=tn.conv(4, 4))
    assert not isinstance(caught.value, Unsupported)
    with pytest.raises(KeyError):
        operations(lambda m, x: {}["absent"])


@pytest.mark.parametrize(
    "flow",
    [
        tn.writes_to_a_view,
        lambda m, x: [y := m.first(x), y.view(2, -1), y.relu_()][1],
        lambda m, x: [y := m.first(x), y.flatten(1).relu_(), y][2],
        lambda m, x: [y := m.first(x), y[:, 0].mul_(2), y][2],
        lambda m, x: [y := m.first(x), y.add_(y[:, :1]), y][2],
        lambda m, x: [y := m.first(x), z := y.contiguous(), z.relu_(), y + z][3],
    ],
    ids=["slice", "viewed", "flat", "foreign", "own part", "contiguous"],
)
def test_writes_to_shared_memory(flow):
    with pytest.raises(SharedMemory):
        operations(flow, first=tn.conv(3, 4))


def test_a_value_read_before_a_foreign_write():
    """Stages would run the write before a native reader that waits for a foreign result."""

    def flow(m, x):
        h = m.first(x)
        a = torch.cos(h) + h
        h.exp_()
        return a + h

    with pytest.raises(SharedMemory):
        operations(flow, first=tn.conv(3, 4))


def test_foreign_calls_say_why():
    def flow(m, x):
        y = F.leaky_relu(m.first(x), -0.1)
        return torch.cos(F.adaptive_avg_pool2d(y, 5)), F.hardtanh(y), torch.cat([y, y], 2)

    made = [n.op for n in operations(flow, first=tn.conv(3, 4)) if isinstance(n.op, net.Foreign)]
    reasons = [op.reason for op in made if not op.part]
    for part in ("negative slope", "windows of several sizes", "cos: no kernel", "0 to 6", "dim=2"):
        assert sum(part in reason for reason in reasons) == 1, (part, reasons)


def test_foreign_multiply_adds():
    """PyTorch's own count: 8 x 6 x 2 x 2 taps for each of 12 x 16 pixels of 2 images."""
    made = operations(lambda m, x: m.up(m.first(x)), first=tn.conv(3, 8),
                      up=nn.ConvTranspose2d(8, 6, 2, 2))  # fmt: skip
    work = [n.multiply_adds for n in made if isinstance(n.op, net.Foreign)]
    assert sum(work) == 8 * 6 * 4 * 12 * 16 * 2


def test_other_dtypes_are_foreign():
    model = nn.Sequential(tn.conv(3, 4), nn.ReLU()).double().eval()
    made = capture(model, [tn.images().double()]).network
    assert not any(node.native for node in made.nodes)


def test_tensors_that_attributes_give():
    """x.data and x.mT are tensors of the model, not parameters it brought itself."""
    model = tn.ready(tn.Net(lambda m, x: m.first(x.data) + m.first(x).mT.mT, first=tn.conv(3, 4)))
    captured = capture(model, [tn.images()])
    assert not any(t.is_meta for t in captured.parameters.values())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_capture_in_every_mode(mode):
    with mode():
        captured = capture(tn.make("foreign_layers"), [tn.images()])
    assert captured.network.outputs


def test_autocast_is_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Unsupported, match="autocast"):
        capture(tn.make("chain"), [tn.images()])


def test_buffers_that_a_model_writes_stay_its_own():
    """A counter that the model keeps is no meta tensor afterwards."""

    def flow(m, x):
        m.calls += 1
        return m.first(x)

    model = tn.Net(flow, first=tn.conv(3, 4))
    calls = torch.zeros(2)
    model.register_buffer("calls", calls)
    capture(model.eval(), [tn.images()])
    assert model.calls is calls


def test_weights_of_another_dtype_are_refused_as_pytorch_does():
    model = tn.Net(lambda m, x: m.first(x), first=tn.conv(3, 4).double()).eval()
    with pytest.raises(RuntimeError):
        capture(model, [tn.images()])


# ------------------------------------------------------------------------------------ fusion


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
        fused = fuse(capture(tn.make(name), [tn.images()]).network, lambda block, pool: True)
        seen: set[net.Node] = set()
        for node in fused.nodes:
            assert set(node.inputs) <= seen, name
            seen.add(node)
        assert set(fused.outputs) <= seen, name
