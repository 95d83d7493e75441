"""neocog.nn and neocog.functional where PyTorch has to see its own operators."""

import io

import onnxruntime
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from neocog import functional as F
from neocog import nn as neocog_nn


def network(layers):
    torch.manual_seed(0)
    return nn.Sequential(
        layers.Conv2d(3, 8, 3, padding=1), nn.ReLU(), layers.MaxPool2d(2),
        layers.Conv2d(8, 4, 3, padding="same"), layers.AvgPool2d(2),
    )  # fmt: skip


OURS, THEIRS = network(neocog_nn), network(nn)
BLOCK = neocog_nn.ConvBlock(3, 8, 3, padding=1, pool=nn.MaxPool2d(2))
X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def squares(model, x=X):
    return lambda weights: functional_call(model, weights, (x,)).square().sum()


def test_tensor_subclasses_come_back_as_what_they_are():
    x, w = TwoTensor(X, 2 * X), OURS[0].weight
    y = F.conv2d(x, w)
    assert isinstance(y, TwoTensor)
    assert torch.equal(y.b, torch.nn.functional.conv2d(2 * X, w))
    for pool in (F.max_pool2d, F.avg_pool2d):
        assert isinstance(pool(x, 2), TwoTensor)
    assert isinstance(F.conv2d(X, TwoTensor(w, w)), TwoTensor)


def test_negated_values():
    x = torch.complex(X, X).conj().imag
    assert x.is_neg()
    right = torch.nn.functional.max_pool2d(x, 2)
    assert torch.equal(F.max_pool2d(x, 2), right)


def test_function_modes_see_the_functions_of_pytorch():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        BLOCK(X)
    functions = torch.nn.functional
    assert {torch.conv2d, functions.relu, functions.max_pool2d} <= set(seen)


def test_flops_are_counted():
    def count(model):
        with FlopCounterMode(display=False) as counter:
            model(X).sum().backward()
        return counter.get_total_flops()

    assert count(OURS) == count(THEIRS) > 0
    # 2 * 16 * 16 outputs of 8 channels, 27 products each, forward and for the weight; 2 per product
    assert count(BLOCK) == 2 * 2 * (2 * 16 * 16 * 8 * 27)


def test_transforms():
    ours, theirs = dict(OURS.named_parameters()), dict(THEIRS.named_parameters())
    for mine, right in zip(
        grad(squares(OURS))(ours).values(), grad(squares(THEIRS))(theirs).values(), strict=True
    ):
        assert torch.equal(mine, right)

    def each(model):
        return vmap(lambda w, x: grad(squares(model, x[None]))(w), (None, 0))

    for mine, right in zip(
        each(OURS)(ours, X).values(), each(THEIRS)(theirs, X).values(), strict=True
    ):
        assert torch.equal(mine, right)
    for mine, right in zip(jvp(OURS, (X,), (X,)), jvp(THEIRS, (X,), (X,)), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_inside_a_compiled_function(backend):
    """Without breaking the graph."""
    w = OURS[0].weight.detach()
    programs = (
        lambda x, conv: vmap(lambda y: conv(y[None], w)[0])(x),
        lambda x, conv: grad(lambda y: conv(y, w).square().sum())(x),
        lambda x, conv: jvp(lambda y: conv(y, w), (x,), (x,))[1],
    )
    for program in programs:
        torch._dynamo.reset()
        compiled = torch.compile(program, backend=backend, fullgraph=True)
        right = program(X, torch.nn.functional.conv2d)
        torch.testing.assert_close(compiled(X, F.conv2d), right)


def test_tangents_pass_through_compiled_functions():
    torch._dynamo.reset()
    w = OURS[0].weight.detach()
    compiled = torch.compile(lambda x: F.conv2d(x, w), backend="aot_eager")
    compiled(X)  # compiled for plain tensors before
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(compiled(forward_ad.make_dual(X, 2 * X))).tangent
    torch.testing.assert_close(tangent, torch.nn.functional.conv2d(2 * X, w))


@pytest.mark.filterwarnings("ignore")
def test_traced_modules_serve_other_sizes_and_other_processes():
    traced = torch.jit.trace(OURS, X)
    assert "neocog::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = torch.rand(3, 3, 20, 24)
    assert torch.equal(torch.jit.load(file)(other), THEIRS(other))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("model", [OURS, BLOCK], ids=["layers", "block"])
def test_both_exporters_of_torch_onnx(model, dynamo):
    file = io.BytesIO()
    torch.onnx.export(model.eval(), (X,), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    # sums of 72 products of numbers below 1
    torch.testing.assert_close(torch.from_numpy(y), model(X).detach(), rtol=1e-4, atol=1e-5)


def test_make_fx_sees_pytorchs_operators():
    graph = make_fx(lambda x: F.max_pool2d(F.conv2d(x, OURS[0].weight), 2))(X)
    assert not any("neocog" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(X), torch.nn.functional.max_pool2d(THEIRS[0]._conv_forward(
        X, THEIRS[0].weight, None)[:, :, 1:-1, 1:-1], 2))  # fmt: skip
