"""The gradient of a strided convolution's input, by products first: exact, and in few steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import kernel_tools as kt
import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import neocog.functional as F
from neocog import compiler, execution, reference, strided
from neocog.convolutions import Weights
from neocog.cpu import depthwise_gradient
from neocog.kernels import kernel
from neocog.problem import Block, Conv, conv2d_problem, parse
from neocog.program import Place

CASES = {
    "patches": dict(x=(2, 3, 32, 48), w=(8, 3, 16, 16), stride=16),
    "patches of two sizes": dict(x=(2, 3, 30, 24), w=(20, 3, 5, 8), stride=(5, 8)),
    "rows apart": dict(x=(2, 5, 41, 30), w=(7, 5, 2, 3), stride=(6, 2)),
    "rows apart, columns padded": dict(x=(2, 5, 41, 30), w=(7, 5, 2, 3), stride=6, padding=(0, 2)),
    "one tap": dict(x=(1, 5, 21, 40), w=(7, 5, 1, 1), stride=8),
    "less than a stride": dict(x=(2, 5, 33, 29), w=(7, 5, 3, 3), stride=9, padding=1),
    "overlapping": dict(x=(1, 20, 23, 19), w=(33, 20, 7, 7), stride=5, padding=3),
    "larger than the image": dict(x=(1, 3, 8, 8), w=(8, 3, 3, 3), stride=500),
    "mostly padding": dict(x=(1, 3, 5, 6), w=(4, 3, 4, 5), stride=6, padding=3),
    "dilated": dict(x=(1, 3, 26, 22), w=(4, 3, 3, 2), stride=6, padding=4, dilation=(5, 9)),
    "groups": dict(x=(2, 12, 20, 20), w=(8, 3, 6, 6), stride=6, groups=4),
    "depthwise": dict(x=(2, 21, 33, 26), w=(21, 1, 3, 3), stride=6, padding=1, groups=21),
    "depthwise patches": dict(x=(1, 16, 32, 32), w=(16, 1, 8, 8), stride=8, groups=16),
    "depthwise, overlapping": dict(x=(1, 5, 24, 31), w=(5, 1, 9, 7), stride=5, groups=5),
    "windows that overlap much": dict(x=(1, 2, 40, 40), w=(3, 2, 21, 21), stride=5),
    "three": dict(x=(2, 6, 20, 17), w=(10, 6, 3, 5), stride=3, padding=2),
}


def case(name: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Whole numbers, whose sums float32 holds exactly."""
    window = dict(CASES[name])
    x, w = (
        torch.from_numpy(kt.integers(window.pop(key), seed)).float()
        for seed, key in enumerate("xw")
    )
    return x, w, window


def results(conv: Any, x: Tensor, w: Tensor, window: dict[str, Any]) -> list[Tensor]:
    """A convolution's result and its gradients."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = conv(x, w, **window)
    torch.manual_seed(3)
    return [y, *torch.autograd.grad(y, (x, w), torch.randint(-4, 5, y.shape).float())]


def check(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for name, one, other in zip(("result", "x", "w"), ours, theirs, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("layout", execution.FORMATS.values(), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_pytorchs(name: str, layout: torch.memory_format) -> None:
    x, w, window = case(name)
    given = [t.contiguous(memory_format=layout) for t in (x, w)]
    check(results(F.conv2d, *given, window), results(TF.conv2d, x, w, window))


@pytest.mark.parametrize("name", ["patches", "overlapping", "depthwise"])
def test_weights_of_any_strides(name: str) -> None:
    x, w, window = case(name)
    turned = w.transpose(2, 3).contiguous().transpose(2, 3)
    check(results(F.conv2d, x, turned, window), results(TF.conv2d, x, w, window))


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_on_every_target(target: Any) -> None:
    for name in ("patches", "overlapping", "depthwise"):
        x, w, window = case(name)
        conv = conv2d_problem(tuple(x.shape), tuple(w.shape), **window)
        block = Block(conv)
        grad = torch.from_numpy(kt.integers(block.out_shape, 9)).float()
        program = compiler.backward(
            block, "nchw", "nchw", w.stride(), "nchw", "nchw", ("x",), target
        )
        gx = torch.full_like(x, torch.nan)
        program.run(*(t.data_ptr() for t in (grad, x, w, grad, grad, gx)))
        torch.manual_seed(0)
        wanted = torch.nn.grad.conv2d_input(x.shape, w, grad, **window)
        assert torch.equal(gx, wanted), name


def steps_of(conv: Conv) -> int:
    w = torch.empty(conv.weight_shape, device="meta")
    block = Block(conv)
    program = compiler.backward(block, "nchw", "nchw", w.stride(), "nchw", "nchw", ("x",))
    return len(program.steps)


def test_steps_do_not_grow_with_the_stride() -> None:
    for stride, size, image in ((16, 16, 224), (64, 3, 64), (64, 64, 224), (500, 3, 8)):
        for groups, out in ((1, 8), (3, 3)):
            weight = (out, 3 // groups, size, size)
            conv = conv2d_problem((1, 3, image, image), weight, stride, groups=groups)
            assert steps_of(conv) <= 6, f"{conv}"


def test_kernels_do_not_grow_with_the_stride() -> None:
    """Memory asked for ahead of time was that of stride**2 pixels: 20 seconds to compile."""
    lengths = []
    for stride in (8, 32):
        conv = conv2d_problem((2, 16, 224, 224), (16, 1, 3, 3), stride, groups=16)
        plan = depthwise_gradient.plan_for(kt.host(), conv, False)
        lengths.append(len(kernel(replace(plan, heights=(2,), tiles=(2, 1))).llvm_ir))
    assert lengths[1] < 1.1 * lengths[0]


def test_phases_without_taps_take_no_step() -> None:
    assert steps_of(conv2d_problem((1, 16, 32, 32), (16, 16, 1, 1), 2)) == 5


def test_what_it_is_for() -> None:
    """Not strides of 2, nor windows that overlap much, nor weights of other strides."""

    def chosen(kernel: int, stride: int, *strides: int) -> bool:
        conv = conv2d_problem((1, 8, 224, 224), (8, 8, kernel, kernel), stride)
        given = strides or (8 * kernel**2, kernel**2, kernel, 1)
        return strided.prefers(conv.grad_input(), Weights.of(Place(2), given, conv).adjoint())

    assert chosen(3, 3) and chosen(16, 16) and chosen(1, 64)
    assert not chosen(3, 2) and not chosen(11, 4) and not chosen(3, 1)
    assert not chosen(16, 16, 8 * 256, 256, 1, 16)


@pytest.mark.parametrize("steps", ["bias | relu", "affine | bias | leaky_relu(0.25)"])
@pytest.mark.parametrize("groups", [1, 20])
def test_blocks_with_a_base_dilation(steps: str, groups: int) -> None:
    problem = parse(f"conv n2 c20x4x3 k20 3x3 b5x6 p2 g{groups} | {steps}")
    assert isinstance(problem, Block)
    inputs = kt.block_inputs(problem)
    made, context = kt.forward(problem, inputs)
    context.check("out", made["out"], reference.block(problem, **kt.operands(inputs)).out)


def test_training_adds_to_gradients_that_stand_there() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 1, bias=False)
            self.patches = nn.Conv2d(6, 4, 6, 6, bias=False)
            self.others = nn.Conv2d(6, 4, 3, 6, padding=0, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.patches(y) + self.others(y)

    model = Twice()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-2, 2).round_()
    x = torch.randint(-2, 3, (2, 3, 24, 24)).float()
    compiled = torch.compile(model, backend="neocog", options={"strict": True})
    grads = []
    for run in (model, compiled):
        x = x.detach().requires_grad_()
        grads.append(torch.autograd.grad(run(x).sum(), [x, *model.parameters()]))
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", execution.FORMATS.values(), ids=str)
@pytest.mark.parametrize(
    "window",
    [(9, 2, 4), (17, 1, 8), (12, 12, 0), (5, 1, 0, 3)],
    ids=lambda w: "x".join(map(str, w)),
)
def test_gradients_of_large_max_pools(window: tuple[int, ...], layout: torch.memory_format) -> None:
    """Each goes to the winner, not by way of all taps; ties and NaN as in PyTorch."""
    for channels in (3, 21, 64):
        x = torch.from_numpy(kt.integers((2, channels, 25, 27), channels)).float()
        x[0, 1, 3, 4] = torch.nan
        grads = []
        for lib in (F, TF):
            given = x.clone().contiguous(memory_format=layout).requires_grad_()
            y = lib.max_pool2d(given, *window)
            weights = torch.arange(1, y.numel() + 1, dtype=torch.float32).remainder(7)
            grads.append(torch.autograd.grad(y, given, weights.reshape(y.shape))[0])
        assert torch.equal(*grads)
