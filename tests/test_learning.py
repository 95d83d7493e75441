"""Training under torch.compile(model, backend="neocog"): gradients, and what else a step leaves.

Everything is compared with the same model in float64, by PyTorch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence

import pytest
import tiny_networks as tn
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neocog
from neocog import handback, memory, training_steps, winograd_steps
from neocog.errors import Unsupported

BOUND = 2e-5
"""Of each gradient's largest value: these networks are deep for their few pixels."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo counts recompilations over all models of a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backward(outputs: object) -> None:
    """A scalar that depends on every output in a way of its own, differentiated."""
    total = torch.zeros((), dtype=torch.float64)
    for i, out in enumerate(tn.leaves(outputs)):
        weights = torch.linspace(-1, 1 + i, out.numel(), dtype=torch.float64).reshape(out.shape)
        total = total + (out.double() * weights).sum() + 0.1 * (out.double() ** 2).sum()
    total.backward()


def close(
    made: Tensor | None, expected: Tensor | None, bound: float = BOUND, least: float = 1e-2
) -> bool:
    """Within ``bound`` of the largest value, or of ``least``."""
    if made is None or expected is None:
        return made is expected
    error = (made.double() - expected.double()).abs().max()
    return made.shape == expected.shape and bool(error <= bound * max(least, expected.abs().max()))


def same_step(model: nn.Module, x: Tensor, bound: float = BOUND, **options: object) -> nn.Module:
    """Asserts outputs, gradients and buffers of one step; returns the compiled module."""
    expected = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="neocog", options=options)
    given = x.detach().clone().requires_grad_()
    given64 = x.detach().double().requires_grad_()
    made, wanted = compiled(given), expected(given64)
    for a, b in zip(tn.leaves(made), tn.leaves(wanted), strict=True):
        assert close(a, b, bound)
        if max(a.shape[2:], default=1) > 1:  # maps of one pixel are in both layouts
            assert a.stride() == b.stride()
    backward(wanted)
    backward(made)
    # A bias before a batch norm has none but for rounding, which is that of the others.
    least = max(float(p.grad.abs().max()) for p in expected.parameters() if p.grad is not None)
    assert close(given.grad, given64.grad, bound)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert close(p.grad, q.grad, bound, least), name
    for (name, p), q in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert close(p, q), name
    return compiled


LEARNABLE = sorted(tn.NETWORKS.keys() - {"in_place", "numbers"})
"""PyTorch itself refuses to differentiate the others."""


@pytest.mark.parametrize("name", LEARNABLE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_network(name: str, channels_last: bool):
    model, x = tn.make(name).train(), tn.images(3, channels_last=channels_last)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    compiled = same_step(model, x)
    assert all(not r.whole for r in neocog.report(compiled))


@pytest.mark.parametrize("name", ["chain", "residual_add_relu", "separable", "strided"])
def test_exact_networks(name: str):
    same_step(tn.make(name).train(), tn.images(3), 5e-6, exact=True)


def test_batch_norms_that_stand_still():
    """In eval mode with gradients: their statistics are given, weight and bias still learn."""
    same_step(tn.make("residual_add_relu").eval(), tn.images(3))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {}])
def test_kinds_of_batch_norm(options: dict[str, bool]):
    torch.manual_seed(0)
    model = nn.Sequential(tn.conv(3, 20), nn.BatchNorm2d(20, **options), nn.ReLU6(), tn.conv(20, 5))
    same_step(model, tn.images(4))


def test_batch_norm_far_from_zero():
    """The mean is a thousand times the spread: squares must be those of distances."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), tn.conv(3, 4))
    x = 1000 + tn.images(4)
    expected = copy.deepcopy(model).double()(x.double())
    assert close(torch.compile(model, backend="neocog")(x), expected, 1e-4)
    assert close(model[0].running_var, 0.9 + 0.1 * x.double().var(dim=(0, 2, 3)), 1e-5)


def test_one_value_per_channel_is_refused_in_pytorchs_words():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(Exception, match="more than 1 value per channel"):
        torch.compile(model, backend="neocog")(torch.randn(1, 3, 3, 3))


@given(
    batch=st.integers(1, 3), channels=st.sampled_from([1, 3, 16, 19, 70]), out=st.integers(1, 40),
    side=st.integers(5, 12), kernel=st.integers(1, 4), stride=st.integers(1, 3),
    padding=st.integers(0, 2), kind=st.sampled_from(["max", "avg", "norm", "act"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_blocks_of_every_shape(batch, channels, out, side, kernel, stride, padding, kind, seed):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    behind = {
        "max": [nn.Tanh(), nn.MaxPool2d(2, 1, 1)],
        "avg": [nn.ReLU(), nn.AvgPool2d(2, 1)],
        "norm": [nn.BatchNorm2d(out), nn.ReLU()],
        "act": [nn.LeakyReLU(0.1)],
    }[kind]
    model = nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, out, kernel, stride, padding), *behind
    )
    x = torch.randn(batch, channels, side + 4, side)
    if kind == "norm" and model[:2](x)[:, 0].numel() < 8:
        return  # a handful of values a channel: the gradient is rounding alone
    same_step(model, x, 2e-4 if kind == "norm" else BOUND)


# ------------------------------------------------------------------------- what users do with it


def block(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        tn.conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout),
        tn.conv(16, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 3 * 4, 5),
    )  # fmt: skip


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def all_close(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    least = max(float(y.abs().max()) for y in b)
    return len(a) == len(b) and all(
        close(x, y, least=least) for x, y in zip(a, b, strict=True)
    )  # fmt: skip


def test_it_trains():
    """Twenty steps of SGD beside PyTorch's: the losses are the same within rounding."""
    model, x, labels = block(), tn.images(8), torch.arange(8) % 5
    beside = copy.deepcopy(model)
    losses: list[list[float]] = []
    for step in (torch.compile(model, backend="neocog"), beside):
        optimizer = torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(step(x), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_dropout_draws_what_pytorch_draws():
    model, x = block(0.5).train(), tn.images()
    compiled = torch.compile(model, backend="neocog")
    torch.manual_seed(7)
    made = compiled(x)
    torch.manual_seed(7)
    assert close(made, model(x))


def test_accumulation_and_retained_graphs():
    model, x = block(), tn.images()
    compiled = torch.compile(model, backend="neocog")
    compiled(x).sum().backward()
    once = gradients(model)
    out = compiled(x).sum()
    out.backward(retain_graph=True)
    out.backward()
    assert all_close(gradients(model), [3 * g for g in once])


def test_two_forwards_before_a_backward():
    """What one call keeps, the other leaves alone."""
    model, x, other = block(), tn.images(), tn.images() ** 2
    expected = []
    for images in (x, other):
        model.zero_grad()
        model(images).sum().backward()
        expected.append(gradients(model))
    compiled = torch.compile(model, backend="neocog")
    first, second = compiled(x).sum(), compiled(other).sum()
    for out, grads in ((second, expected[1]), (first, expected[0])):
        model.zero_grad()
        out.backward()
        assert all_close(gradients(model), grads)


def test_gradients_that_are_kept_stay():
    """Memory is used again only when nobody holds it."""
    model = nn.Sequential(tn.conv(3, 64), nn.ReLU(), tn.conv(64, 64))
    compiled = torch.compile(model, backend="neocog")
    held = []
    for k in (1.0, 2.0, 3.0):
        model.zero_grad()
        compiled(k * tn.images()).sum().backward()
        held.append(model[2].weight.grad)
    assert held[0].numel() * 4 > memory.SMALL
    assert not torch.equal(held[0], held[1])
    assert len({g.data_ptr() for g in held}) == 3


def test_frozen_layers():
    model = block()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    same_step(model, tn.images(3))
    assert model[0].weight.grad is None
    for p in model.parameters():
        p.requires_grad_(False)
    x = tn.images(3).requires_grad_()
    torch.compile(model, backend="neocog")(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("frozen", ["", "norm", "main", "main norm", "side", "side norm"])
@pytest.mark.parametrize("act", [F.relu, nn.Identity()])
def test_frozen_branches_beside_a_residual(frozen: str, act: Callable[[Tensor], Tensor]):
    """The gradient finds its way past a batch norm through which none has to go."""
    torch.manual_seed(0)
    parts = {"main": tn.conv(3, 16), "norm": nn.BatchNorm2d(16), "side": tn.conv(3, 16)}
    model = tn.Net(lambda m, x: act(m.norm(m.main(x)) + m.side(x)), **parts)
    for name in frozen.split():
        parts[name].requires_grad_(False)
    x, beside = tn.images(3), copy.deepcopy(model)
    torch.compile(model, backend="neocog")(x).square().sum().backward()
    beside(x).square().sum().backward()
    assert all_close(gradients(model), gradients(beside))


@pytest.mark.parametrize("inside", [True, False])
def test_checkpoints(inside: bool):
    """``torch.utils.checkpoint`` around a compiled model, and within one."""
    first, second = block()[:4], block()[5:]
    first.train()
    x = tn.images()
    second(first(x)).sum().backward()
    expected = gradients(first) + gradients(second)
    for part in (first, second):
        part.zero_grad()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            if inside:
                return self.second(checkpoint(self.first, x, use_reentrant=False))
            return self.second(self.first(x))

    compiled = torch.compile(Model(), backend="neocog")
    given = x.clone().requires_grad_()
    out = compiled(given) if inside else checkpoint(compiled, given, use_reentrant=False)
    out.sum().backward()
    assert all_close(gradients(first) + gradients(second), expected)


def test_double_backward(caplog: pytest.LogCaptureFixture):
    """A penalty on the gradient: PyTorch differentiates the stage again, and this is said."""
    handback.warn_once.cache_clear()
    model, x = block(), tn.images()

    def penalty(step, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(step(x).pow(2).sum(), x, create_graph=True)
        g.pow(2).sum().backward()
        return gradients(model)

    expected = penalty(model, x)
    with caplog.at_level(logging.WARNING, "neocog"):
        made = penalty(torch.compile(model, backend="neocog"), x)
    assert all_close(made, expected)
    assert "double backward" in caplog.text


def test_autocast_is_handed_back():
    model, x = block(), tn.images()
    compiled = torch.compile(model, backend="neocog")
    compiled(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        made = compiled(x)
        assert made.dtype == torch.bfloat16
        assert torch.equal(made, model(x))
    # Dynamo makes a graph of its own for autocast, whose tensors are the model's as well.
    assert any("autocast" in r.whole for r in neocog.report(compiled))


def test_writes_to_results():
    """A function in place behind the compiled part, as in PyTorch."""
    model = tn.Net(lambda m, x: F.silu(m.first(x), inplace=True), first=tn.conv(3, 16))
    same_step(model, tn.images())


def test_one_parameter_in_two_layers():
    def flow(m, x):
        return m.shared(F.relu(m.shared(m.first(x))))

    same_step(tn.Net(flow, first=tn.conv(3, 16), shared=tn.conv(16, 16)), tn.images())


def test_a_result_that_is_used_and_returned():
    def flow(m, x):
        y = F.relu(m.first(x))
        z = m.second(y)
        return y, z + z, F.max_pool2d(y + z, 2)

    same_step(tn.Net(flow, first=tn.conv(3, 16), second=tn.conv(16, 16)), tn.images())


def test_what_leads_nowhere():
    """A batch norm whose result nobody uses still counts; its weights have no gradient."""

    def flow(m, x):
        x = m.first(x)
        m.norm(x)
        return F.relu(x)

    same_step(tn.Net(flow, first=tn.conv(3, 4), norm=nn.BatchNorm2d(4)), tn.images())


def test_strict_refuses():
    model = nn.Sequential(tn.conv(3, 4), nn.ReLU()).double()
    compiled = torch.compile(model, backend="neocog", options={"strict": True})
    compiled(tn.images().double()).sum().backward()  # in PyTorch, layer by layer
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Unsupported, match="autocast"):
        compiled(tn.images().double())


def test_in_training_and_out_of_it():
    """Evaluation in between sees the weights of the step before."""
    model, x = block(), tn.images()
    compiled = torch.compile(model, backend="neocog")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.train()
        compiled(x).sum().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            assert close(compiled(x), model(x))


def test_threads_do_not_change_gradients():
    model, x = block(), tn.images(5)
    compiled = torch.compile(model, backend="neocog")
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model.zero_grad()
            compiled(x).sum().backward()
            found.append(gradients(model)[:6])  # the fully connected layer is PyTorch's
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for grads in found[1:] for a, b in zip(found[0], grads, strict=True)
    )


@pytest.mark.parametrize("side", [6, 40])
def test_weights_a_slice_at_a_time(side: int, monkeypatch: pytest.MonkeyPatch):
    """Output channels one register tile after the other; few tiles, and blocks of many."""
    monkeypatch.setattr(winograd_steps, "SLICE_BYTES", 1)
    monkeypatch.setattr(training_steps, "trained", lambda *_: "winograd4")
    torch.manual_seed(0)
    model = nn.Sequential(
        tn.conv(8, 150), nn.Tanh(), tn.conv(150, 72), nn.BatchNorm2d(72), nn.Tanh()
    )  # smooth: a ReLU near 0 may decide otherwise than in float64
    same_step(model, torch.randn(2, 8, side, side))


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_pools_take_batch_norms_along(kind: str):
    """A scale of any sign, windows over the border, and channels that fill no vector."""
    torch.manual_seed(0)
    pool = nn.MaxPool2d(3, 2, 1) if kind == "max" else nn.AvgPool2d(3, 2, 1)
    norm = nn.BatchNorm2d(21)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    same_step(nn.Sequential(tn.conv(3, 21), norm, nn.ReLU(), pool), torch.randn(2, 3, 9, 8))
