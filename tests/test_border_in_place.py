"""Writes to memory: activations, slices, views of inputs, buffers, what autograd has saved."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from border import GRADIENTS, alone, check, compiled, equal, inference, maps, net, ready, ways
from torch import Tensor, nn

import neocog

# ------------------------------------------------------------------------- writes to intermediates


def relu_of_a_result(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both names are one tensor, which is returned too."""
    y = m.a(x)
    z = F.relu(y, inplace=True)
    return m.b(z), y


def relu_after_a_read(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What was read before keeps its value."""
    y = m.a(x)
    total = y.sum((2, 3))
    return m.b(y.relu_()), total


def channels_written(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :2] = torch.tanh(y[:, 2:])
    return m.b(y)


def channels_cleared(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 1] = 0.0
    y[..., ::2].mul_(0.5)
    return m.b(torch.relu(y))


def masked(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y[y < 0.1] = -1.0
    return m.b(y.masked_fill_(y > 1, 1.0))


def through_a_permuted_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y.permute(0, 2, 3, 1).mul_(torch.tensor([1.0, 2, 3, 4]))
    return m.b(y)


def through_a_flat_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(y.shape[0], -1)[:, :9].add_(5)
    return m.b(y)


def copied_into(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.zeros(2, 8, 6, 6)
    y[:, :4].copy_(m.a(x))
    y[:, 4:] = torch.relu(m.a(x))
    return m.b(y[:, 2:6])


def set_item_in_a_loop(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.empty(2, 2, 6, 6)
    for i in range(2):
        y[i] = m.b(torch.relu(m.a(x[i : i + 1])))[0]
    return y


def an_out_argument(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x).detach()
    torch.mul(y, 2.0, out=y)
    return m.b(y)


def both_halves(m: nn.Module, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, 1)
    z = torch.cat([left.relu(), right], 1)
    z += 1
    return m.b(z) + left.sum()


WRITES = (
    relu_of_a_result, relu_after_a_read, channels_written, channels_cleared, masked,
    through_a_permuted_view, through_a_flat_view, copied_into, set_item_in_a_loop,
    an_out_argument, both_halves,
)  # fmt: skip


@pytest.mark.parametrize("flow", WRITES, ids=lambda f: f.__name__)
@ways
@alone
def test_writes(flow: Callable[..., object], way: str):
    check(net(flow), maps(), way=way)


def refused_or_right(flow: Callable[..., Tensor], meant: Callable[..., Tensor]) -> None:
    """PyTorch refuses the gradients of ``flow``; so does what is compiled, or gives those meant."""
    eager = net(flow)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        eager(maps()).sum().backward()
    model, right = net(flow), net(meant)
    try:
        compiled(model)(maps()).sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    right(maps()).sum().backward()
    for (name, p), q in zip(model.named_parameters(), right.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        equal(p.grad, q.grad, name, GRADIENTS)


def test_a_write_to_what_a_layer_has_saved():
    def flow(m, x):
        y = torch.sigmoid(m.a(x))
        z = y * y
        y.mul_(2)
        return m.b(z)

    refused_or_right(flow, lambda m, x: m.b(torch.sigmoid(m.a(x)) ** 2))


def test_a_write_to_a_result_that_its_layer_has_saved():
    refused_or_right(lambda m, x: torch.relu(m.a(x)).mul_(2), lambda m, x: torch.relu(m.a(x)) * 2)


@pytest.mark.parametrize("layer", [lambda m, x: m.a(x), lambda m, x: torch.relu(m.a(x))])
def test_a_write_to_a_result_before_backward(layer: Callable[..., Tensor]):
    """By the caller: a convolution does not need its result, a ReLU does."""
    gradients = []
    for run in (lambda m: m, compiled):
        model = net(layer)
        made = run(model)(maps())
        wanted = made.detach().clone() * 2
        made.mul_(2)
        equal(made.detach(), wanted)
        try:
            (made * torch.linspace(0, 1, 6)).sum().backward()
            gradients.append(model.a.weight.grad)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
    if len(gradients) == 2:
        equal(gradients[1], gradients[0], "gradient", GRADIENTS)


# -------------------------------------------------------------------------------- writes to inputs


def add_to_a_slice_of_the_input(m: nn.Module, x: Tensor) -> Tensor:
    y = x[:, :, 1:7, 1:7]
    y += m.other(x)
    return m.a(x)


def relu_of_the_input(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x.relu_()) + x.sum()


def a_view_of_the_input(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.transpose(2, 3)
    y.mul_(0.5)
    return m.a(y), y


def an_input_overwritten(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    x.zero_()
    return y + m.a(x)


def a_row_of_the_input(m: nn.Module, x: Tensor) -> Tensor:
    before = m.a(x)
    x[0] = x[1]
    return before - m.a(x)


INPUT_WRITES = (add_to_a_slice_of_the_input, relu_of_the_input, a_view_of_the_input,
                an_input_overwritten, a_row_of_the_input)  # fmt: skip


@pytest.mark.parametrize("flow", INPUT_WRITES, ids=lambda f: f.__name__)
@inference
@alone
def test_writes_to_the_input(flow: Callable[..., object], way: str):
    """The caller's tensor changes as in eager."""
    check(net(flow, other=nn.Conv2d(3, 3, 3)), maps(), way=way)


@pytest.mark.parametrize("flow", INPUT_WRITES[:3], ids=lambda f: f.__name__)
def test_writes_to_the_input_while_training(flow: Callable[..., object]):
    check(net(flow, other=nn.Conv2d(3, 3, 3)).requires_grad_(False), maps(), way="train")


@ways
@alone
def test_two_inputs_of_one_memory(way: str):
    """A write through one is seen through the other."""

    def flow(m, x, y):
        before = m.a(y)
        x.mul_(2)
        return before, m.a(y)

    x = maps(3, 3, 8, 8)
    check(net(flow).requires_grad_(False), x[:2], x[1:], way=way)


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x[:, 1:], lambda x: x.flatten(1)])
@ways
def test_results_that_are_inputs_and_their_views(of: Callable[[Tensor], Tensor], way: str):
    """They share memory with the argument, as in eager."""
    model = net(lambda m, x: (m.a(x), of(x), x))
    call, x = ready(model, way, (maps(),)), maps()
    with torch.set_grad_enabled(way == "train"):
        y, view, again = call(x)
        wanted = model(x)
    equal(y, wanted[0])
    assert again is x
    assert view.data_ptr() == of(x).data_ptr() and view.stride() == of(x).stride()
    view.fill_(3.0)
    assert bool((of(x) == 3.0).all())


@ways
def test_one_result_returned_twice_and_as_a_view(way: str):
    """One tensor stays one, and views of it share its memory."""

    def flow(m, x):
        y = torch.relu(m.a(x))
        return y, y, y[:, 1:3]

    model = net(flow)
    call = ready(model, way, (maps(),))
    with torch.set_grad_enabled(way == "train"):
        first, second, part = call(maps())
    assert first is second
    assert part.data_ptr() == first[:, 1:3].data_ptr() and part.stride() == first.stride()
    equal(first.detach(), torch.relu(model.a(maps())).detach())


@ways
def test_results_are_nobody_elses(way: str):
    """A result that is written to changes neither the next result nor the weights."""
    model = net(lambda m, x: (m.b(torch.relu(m.a(x))), m.a.weight * 1, m.kept.clone()))
    model.register_buffer("kept", torch.ones(3))
    call = ready(model, way, (maps(),))
    for _ in range(2):
        with torch.set_grad_enabled(way == "train"):
            made, wanted = call(maps()), model(maps())
        for a, b in zip(made, wanted, strict=True):
            equal(a, b)
            a.detach().fill_(float("nan"))


# ------------------------------------------------------------------------------- writes to buffers


def moving_average(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        m.average.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
    return m.b(y - m.average[:, None, None])


def counter(m: nn.Module, x: Tensor) -> Tensor:
    m.calls += 1
    return m.b(torch.relu(m.a(x))) * m.calls


def replaced(m: nn.Module, x: Tensor) -> Tensor:
    m.calls = m.calls + 1
    return m.b(torch.relu(m.a(x))) * m.calls


def queue(m: nn.Module, x: Tensor) -> Tensor:
    """A memory bank: the latest features in front."""
    with torch.no_grad():
        bank = torch.cat([m.a(x).mean((2, 3)), m.bank[:-2]])
        m.bank.copy_(bank)
    return m.b(m.a(x)) + m.bank.sum()


BUFFER_WRITES = (moving_average, counter, replaced, queue)


@pytest.mark.parametrize("flow", BUFFER_WRITES, ids=lambda f: f.__name__)
@ways
@alone
def test_writes_to_buffers(flow: Callable[..., object], way: str):
    """In training and in eval; a frozen model's buffers change as eager's do."""
    model = net(flow)
    model.register_buffer("average", torch.zeros(4))
    model.register_buffer("calls", torch.zeros(()))
    model.register_buffer("bank", torch.zeros(6, 4))
    check(model, maps(), way=way)


@ways
def test_batch_norms_of_all_modes(way: str):
    """One that always uses the batch's statistics, one without any of its own, one that counts."""
    layers = {
        "always": nn.BatchNorm2d(4, track_running_stats=False),
        "counts": nn.BatchNorm2d(4, momentum=None),
        "plain": nn.BatchNorm2d(4),
    }
    model = net(lambda m, x: m.b(torch.relu(m.plain(m.counts(m.always(m.a(x)))))), **layers)
    check(model, maps(4, 3, 8, 8), way=way, bound=1e-4)


def test_a_frozen_model_whose_weights_change():
    """Either it is noticed, or what takes them over is named in the documentation of Frozen."""
    model = net(lambda m, x: m.b(torch.relu(m.a(x)))).eval()
    fast = neocog.freeze(model, maps())
    with torch.no_grad():
        before = model(maps())
        model.a.weight.mul_(0.5)
        after = model(maps())
    made = fast(maps())
    if not torch.allclose(made, after, atol=1e-5):
        equal(made, before)
        assert hasattr(fast, "refresh") and "refresh" in (type(fast).__doc__ or "")
        fast.refresh()
        equal(fast(maps()), after)


def test_a_copy_for_an_average_of_weights():
    """A teacher that follows the student, compiled both, updated in place between steps."""
    student = net(lambda m, x: m.b(torch.relu(m.a(x))))
    teacher = copy.deepcopy(student).requires_grad_(False)
    call, follow = compiled(student), torch.compile(teacher, backend="neocog")
    for i in range(3):
        call(maps(seed=i)).square().sum().backward()
        with torch.no_grad():
            for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
                p -= 0.01 * p.grad
                q.lerp_(p, 0.3)
        equal(follow(maps()), teacher(maps()))
        assert not follow(maps()).requires_grad
