"""Gradients of depthwise layers inside programs: of weights and biases, and of the input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import kernel_tools as kt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lying import Lying
from strategies import smallest_fitting
from torch import Tensor

from neocog import reference
from neocog.convolutions import Weights, convolve_packed, pack, packed_elements
from neocog.cpu import ahead
from neocog.depthwise_gradients import depthwise_weight_gradient_steps
from neocog.geometry import Window
from neocog.maps import Halo, halo_of
from neocog.problem import Add, Conv, parse
from neocog.program import Program
from neocog.target import Target
from neocog.weight_gradients import weight_gradient_steps

MARGIN = 7.5
"""What stands around results before they are written, and afterwards."""


def conv_of(line: str) -> Conv:
    problem = parse(line)
    assert isinstance(problem, Conv), line
    return problem


def weight_gradients(
    conv: Conv, x: kt.Array, g: kt.Array, target: Target | None = None, beside: int = 0,
    needs: tuple[str, ...] = ("w", "bias"), threads: int = 1,
) -> tuple[dict[str, Tensor], Program]:  # fmt: skip
    """Gradients by name; asserts that nothing around them was written."""
    p = Program(("x", "g", *(f"g{name}" for name in needs)))
    x_lies = Lying(conv.in_shape, halo_of(conv), beside)
    g_lies = Lying(conv.out_shape, Halo(0, 1, 2, 1), beside)
    places = [p.buffer(f"g{name}") if name in needs else None for name in ("w", "bias")]
    depthwise_weight_gradient_steps(
        p, target or kt.host(), conv, x_lies.map(p.buffer("x")), g_lies.map(p.buffer("g")),
        needs, *places,
    )  # fmt: skip
    shapes = {"w": conv.weight_shape, "bias": (conv.out_channels,)}
    sizes = {name: int(np.prod(shapes[name])) for name in needs}
    results = {name: torch.full((sizes[name] + 32,), MARGIN) for name in needs}
    tensors = [x_lies.filled(x), g_lies.filled(g), *results.values()]
    p.run(*(t.data_ptr() for t in tensors), threads=threads)
    for name, t in results.items():
        assert (t[sizes[name] :] == MARGIN).all(), f"written behind {name}\n{p}"
    return {name: t[: sizes[name]].view(shapes[name]) for name, t in results.items()}, p


def check_weight_gradients(conv: Conv, target: Target | None = None, beside: int = 0) -> None:
    """The reference's, from small whole numbers, on one thread and on three."""
    x, g = kt.integers(conv.in_shape, 0), kt.integers(conv.out_shape, 1)
    truth = {"w": reference.convolution_grad_weight(conv, g, x), "bias": g.sum(axis=(0, 2, 3))}
    for threads in (1, 3):
        ours, program = weight_gradients(conv, x, g, target, beside, threads=threads)
        for name, theirs in truth.items():
            kt.Context(conv, f"{target} {threads} threads", program).check(name, ours[name], theirs)


def input_gradient(
    conv: Conv, w: kt.Array, g: kt.Array, start: kt.Array | None = None,
    target: Target | None = None, beside: int = 0, threads: int = 1,
) -> tuple[Tensor, Program]:  # fmt: skip
    """The gradient of the input, added to ``start`` where the result stands, if given."""
    target, adjoint = target or kt.host(), conv.grad_input()
    weights = kt.tensor(w)
    packed = torch.full((packed_elements(target, adjoint),), float("nan"))
    packer = Program(("w", "packed"))
    adjoined = Weights.of(packer.buffer("w"), weights.stride(), conv).adjoint()
    pack(packer, target, adjoint, adjoined, packer.buffer("packed"))
    packer.run(weights.data_ptr(), packed.data_ptr(), threads=threads)

    p = Program(("g", "packed", "out"))
    g_lies = Lying(adjoint.in_shape, halo_of(adjoint), beside)
    out_lies = Lying(adjoint.out_shape, Halo(1, 2, 3, 1), beside)
    out = out_lies.map(p.buffer("out"))
    extra = {f"residual{name[3:]}": value for name, value in out.fields("out").items()}
    convolve_packed(
        p, target, adjoint, g_lies.map(p.buffer("g")), p.buffer("packed"), out,
        *([(Add(),), None, extra] if start is not None else []),
    )  # fmt: skip
    result = torch.full(out_lies.sizes, MARGIN)
    if start is not None:
        out_lies.interior(result).copy_(kt.tensor(start))
    tensors = (g_lies.filled(g), packed, result)
    p.run(*(t.data_ptr() for t in tensors), threads=threads)
    made = out_lies.interior(result).clone()
    out_lies.interior(result).fill_(MARGIN)
    assert (result == MARGIN).all(), f"written around the result\n{p}"
    return made, p


def check_input_gradient(conv: Conv, target: Target | None = None, beside: int = 0) -> None:
    """The reference's, alone and added to what stands there, on one thread and on three."""
    w, g = kt.integers(conv.weight_shape, 0), kt.integers(conv.out_shape, 1)
    before = kt.integers(conv.in_shape, 2)
    truth = reference.convolution_grad_input(conv, g, w)
    for start, theirs in ((None, truth), (before, truth + before)):
        for threads in (1, 3):
            ours, program = input_gradient(conv, w, g, start, target, beside, threads)
            context = kt.Context(conv, f"{target} {threads} threads {start is None}", program)
            context.check("x", ours, theirs)


SHAPES = (
    *(f"conv n2 c{c}x5x9 k{c} 3x3 p1 g{c}" for c in (2, 15, 16, 19, 32, 33, 64)),
    *(f"conv n3 c19x{h}x8 k19 3x3 p1 g19" for h in (1, 2, 3, 4)),
    *(f"conv n1 c16x4x{w} k16 3x3 p1 g16" for w in (1, 2, 6, 7, 8, 15, 29)),
    *(f"conv n1 c20x{n}x{m} k20 3x3 s2 p1 g20" for n, m in ((1, 1), (2, 9), (8, 8), (9, 30))),
    "conv n2 c33x8x11 k33 3x3 s2 p1,0,0,1 g33",
    "conv n1 c20x9x10 k20 5x5 p2 g20",
    "conv n1 c20x9x11 k20 5x5 s2 p2 g20",
    "conv n1 c20x13x12 k20 7x7 s2 p3 g20",
    "conv n1 c17x2x70 k17 1x31 p0,0,15,15 g17",
    "conv n1 c20x9x10 k20 3x3 s1x2 p1 g20",
    "conv n1 c20x9x10 k20 3x3 d2 p2 g20",
    "conv n1 c20x9x12 k20 3x3 d1x3 s2x1 p1,1,3,3 g20",
    "conv n1 c20x9x12 k20 3x3 s2 d2 p2 g20",
    "conv n2 c20x10x9 k20 2x2 s3 g20",
    "conv n1 c20x9x9 k20 1x1 s2 g20",
    "conv n2 c20x11x13 k20 3x3 s4 p1 g20",
    "conv n2 c20x11x13 k20 3x3 s5 p1 g20",
    "conv n1 c20x7x8 k20 3x3 p-1,0,2,1 g20",
    "conv n1 c200x7x7 k200 3x3 p1 g200",
)


@pytest.mark.parametrize("line", SHAPES)
def test_weights_and_biases(line: str) -> None:
    check_weight_gradients(conv_of(line))


@pytest.mark.parametrize("line", SHAPES)
def test_inputs(line: str) -> None:
    check_input_gradient(conv_of(line))


@pytest.mark.parametrize("line", SHAPES[::4])
def test_maps_that_are_parts_of_others(line: str) -> None:
    check_weight_gradients(conv_of(line), beside=5)
    check_input_gradient(conv_of(line), beside=5)


@pytest.mark.parametrize("target", kt.OTHERS, ids=lambda t: t.name)
@pytest.mark.parametrize("line", SHAPES[1::3])
def test_other_targets(line: str, target: Target) -> None:
    check_weight_gradients(conv_of(line), target)
    check_input_gradient(conv_of(line), target)


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches so small that every map comes from memory and is asked for ahead of time."""
    monkeypatch.setattr(ahead, "LARGE", 0)
    yield


@pytest.mark.usefixtures("small_caches")
@pytest.mark.parametrize("line", SHAPES[::3])
def test_maps_that_no_cache_holds(line: str) -> None:
    check_weight_gradients(conv_of(line))
    check_input_gradient(conv_of(line))


@st.composite
def depthwise(draw: st.DrawFn) -> Conv:
    windows, sizes = [], []
    for _ in range(2):
        window = Window(
            size=draw(st.integers(1, 5)),
            stride=draw(st.integers(1, 3)),
            dilation=draw(st.integers(1, 2)),
            low=draw(st.integers(-1, 4)),
            high=draw(st.integers(-1, 4)),
        )
        windows.append(window)
        sizes.append(smallest_fitting(window) + draw(st.integers(0, 9)))
    channels = draw(st.integers(2, 40))
    return Conv(draw(st.integers(1, 3)), channels, *sizes, channels, *windows, groups=channels)


@settings(max_examples=30, deadline=None)
@given(depthwise())
def test_any_shape(conv: Conv) -> None:
    check_weight_gradients(conv)
    check_input_gradient(conv)


def test_only_what_is_needed() -> None:
    conv = conv_of("conv n2 c20x7x8 k20 3x3 p1 g20")
    x, g = kt.integers(conv.in_shape, 0), kt.integers(conv.out_shape, 1)
    both, _ = weight_gradients(conv, x, g)
    for name in ("w", "bias"):
        one, program = weight_gradients(conv, x, g, needs=(name,))
        assert list(one) == [name]
        assert torch.equal(one[name], both[name])
        assert ("+bias" in str(program)) == (name == "bias")


def test_an_empty_batch_has_gradients_of_zero() -> None:
    conv = conv_of("conv n0 c20x7x8 k20 3x3 p1 g20")
    ours, _ = weight_gradients(conv, np.zeros(conv.in_shape), np.zeros(conv.out_shape))
    assert all((t == 0).all() for t in ours.values())


def test_depthwise_layers_take_these_kernels() -> None:
    conv = conv_of("conv n2 c20x8x8 k20 3x3 s2 p1 g20")
    for layer, expected in ((conv, True), (replace(conv, groups=10), False)):
        p = Program(("x", "g", "gw"))
        x = Lying(layer.in_shape, halo_of(layer)).map(p.buffer("x"))
        g = Lying(layer.out_shape, Halo()).map(p.buffer("g"))
        weight_gradient_steps(p, kt.host(), layer, x, g, ("w",))
        assert ("depthwise_gradient_3x3s2x2" in str(p)) == expected
    _, p = input_gradient(conv, kt.integers(conv.weight_shape, 0), kt.integers(conv.out_shape, 1))
    assert [step.kernel.name.split("_")[0] for step in p.steps] == ["depthwise"]


LARGER = ("conv n3 c48x31x29 k48 3x3 p1 g48", "conv n2 c40x30x28 k40 5x5 s2 p2 g40")


@pytest.mark.parametrize("line", LARGER)
def test_any_number_of_threads_gives_the_same_bits(line: str) -> None:
    conv = conv_of(line)
    x, g = kt.normals(conv.in_shape, 0), kt.normals(conv.out_shape, 1)
    w = kt.normals(conv.weight_shape, 2)
    first, _ = weight_gradients(conv, x, g)
    first["x"], _ = input_gradient(conv, w, g)
    for threads in (2, 3, 5):
        again, _ = weight_gradients(conv, x, g, threads=threads)
        again["x"], _ = input_gradient(conv, w, g, threads=threads)
        assert all(torch.equal(first[name], again[name]) for name in first)
    pixels = conv.batch * conv.out_shape[2] * conv.out_shape[3]
    taps = conv.rows.size * conv.cols.size
    truth = {
        "w": (reference.convolution_grad_weight, x, pixels),
        "x": (reference.convolution_grad_input, w, taps),
    }
    for name, (gradient, other, terms) in truth.items():
        size = gradient(conv, np.abs(g), np.abs(other))
        wrong = np.abs(first[name].numpy() - gradient(conv, g, other))
        assert (wrong <= kt.FLOAT32.error_bound(terms + 1, size)).all()
