"""The gradients of weight and bias as steps of a program, by every algorithm that sums them.

Inputs of a layer stand in maps with the halo its taps reach, between guards of NaN that must not be
read; results stand between guards that must not be written. Direct sums of small whole numbers are
exact; Winograd's products are compared with the literal sums in float64.
"""

from __future__ import annotations

import kernel_tools as kt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neocog import reference, weight_gradients, winograd_gradients
from neocog.geometry import Window
from neocog.maps import Map, halo_of
from neocog.problem import Conv, parse
from neocog.program import Place, Program
from neocog.target import TARGETS, Target, host
from neocog.weight_gradients import weight_gradient_steps

BOUND = 3e-6
"""Of the largest gradient; seen: 1.2e-6."""

GUARD = 96
"""Elements before and behind every tensor."""

WINOGRAD = (
    "conv n1 c1x1x1 k1 3x3 p1",
    "conv n1 c3x2x5 k5 3x3 p1",
    "conv n3 c19x9x7 k19 3x3 p1",
    "conv n1 c8x3x3 k17 3x3",
    "conv n1 c17x1x13 k7 3x3 p2",
    "conv n3 c16x4x8 k64 3x3 p1",
    "conv n1 c70x6x11 k70 3x3 p0,2,2,1",
    "conv n1 c130x5x6 k33 3x3 p2,0,1,2",
    "conv n3 c11x22x23 k13 3x3 p1",
    "conv n1 c3x15x18 k19 7x7 s2x2 p3",
    "conv n2 c1x9x6 k5 3x3 s2x2 p1",
    "conv n3 c4x13x11 k17 5x5 s2x2 p2",
    "conv n1 c3x37x40 k70 7x7 s2x2 p3,2,1,3",
    "conv n1 c8x1x1 k4 3x3 s2x2 p1",
    "conv n2 c8x12x9 k19 3x3 s2x2 p1",
    "conv n1 c16x19x14 k36 5x5 s2x2 p2",
    "conv n1 c24x16x23 k7 7x7 s2x2 p0,1,3,2",
    "conv n3 c40x17x15 k70 3x3 s2x2",
)

DIRECT = (
    "conv n3 c7x9x8 k5 1x1",
    "conv n2 c16x8x8 k24 1x1",
    "conv n3 c48x7x5 k9 1x1",
    "conv n1 c96x16x16 k24 1x1",
    "conv n5 c33x1x1 k40 1x1",
    "conv n1 c3x8x8 k20 1x1 p1",
    "conv n3 c20x9x9 k35 1x1 s2x2",
    "conv n1 c40x2x2 k6 1x1 s2x2",
    "conv n2 c3x21x17 k33 7x7 s2x2 p3",
    "conv n1 c64x4x4 k64 3x3 p1",
    "conv n2 c6x9x7 k10 3x3 p1 g2",
    "conv n3 c1x28x28 k32 3x3 p1",
    "conv n1 c5x12x9 k7 3x2 s2x1 p2,0,1,2 d2x1",
    "conv n0 c3x5x5 k4 3x3 p1",
    "conv n7 c2x31x1 k3 1x1",
    *WINOGRAD,
)


@pytest.fixture(params=["direct", "exact", "winograd"])
def algorithm(request, monkeypatch) -> str:
    choose(monkeypatch, request.param)
    return request.param


def choose(patch, name: str) -> None:
    """Make the steps use one algorithm wherever it covers a layer."""
    patch.setattr(
        weight_gradients,
        "prefers_winograd",
        lambda _, conv: name == "winograd" and covered(conv),
    )


def covered(conv: Conv) -> bool:
    """Whether there is a Winograd kernel, and something to do for it."""
    return winograd_gradients.covers(conv) and conv.multiply_adds > 0


class Layer:
    """One layer as a program; ``needs`` are delivered to places inside guarded buffers."""

    def __init__(self, conv: Conv, needs=("w", "bias"), fill=kt.integers, exact: bool = False,
                 target: Target | None = None):  # fmt: skip
        self.conv, self.needs = conv, needs
        self.x, self.grad = fill(conv.in_shape, 0), fill(conv.out_shape, 1)
        self.program = Program(("x", "grad", "weights", "biases"))
        x, self.tensors = self._map("x", self.x, halo_of(conv)), []
        grad = self._map("grad", self.grad, halo_of(conv.grad_input()))
        self.tensors = [x[1], grad[1]]
        weight_gradient_steps(
            self.program, target or host(), conv, x[0], grad[0], needs, exact,
            self.program.buffer("weights") + GUARD, self.program.buffer("biases") + GUARD,
        )  # fmt: skip

    def _map(self, name: str, values, halo) -> tuple[Map, torch.Tensor]:
        padded = np.pad(
            values,
            ((0, 0), (0, 0), (halo.top, halo.bottom), (halo.left, halo.right)),
        ).transpose(0, 2, 3, 1)
        flat = np.pad(padded.ravel(), GUARD, constant_values=np.nan)
        _, height, width, channels = padded.shape
        row = width * channels
        place = self.program.buffer(name) + (GUARD + halo.top * row + halo.left * channels)
        return Map(place, height * row, row, channels), kt.tensor(flat)

    def run(self, threads: int = 1) -> dict[str, torch.Tensor]:
        """Those gradients that are needed; twice, so that stale scratch cannot matter."""
        sizes = (int(np.prod(self.conv.weight_shape)), self.conv.out_channels)
        results = [torch.full((n + 2 * GUARD,), float("nan")) for n in sizes]
        for tensors in ([torch.full_like(t, float("nan")) for t in self.tensors], self.tensors):
            buffers = [t.data_ptr() for t in (*tensors, *results)]
            self.program.run(*buffers, threads=threads)
        found = {}
        shapes = (self.conv.weight_shape, (self.conv.out_channels,))
        for name, shape, result in zip(("w", "bias"), shapes, results, strict=True):
            inside = result[GUARD:-GUARD]
            outside = torch.cat([result[:GUARD], result[-GUARD:]])
            assert outside.isnan().all(), f"{name}: written outside\n{self.conv}\n{self.program}"
            if name in self.needs:
                found[name] = inside.reshape(shape).clone()
            else:
                assert inside.isnan().all(), f"{name} was not asked for\n{self.conv}"
        return found

    def check(self, threads: int = 1) -> None:
        """Exact where direct sums are, else within the bound."""
        context = kt.Context(self.conv, f"{self.needs} threads={threads}", self.program)
        expected = {
            "w": reference.convolution_grad_weight(self.conv, self.grad, self.x),
            "bias": self.grad.sum(axis=(0, 2, 3)),
        }
        multiplied = "winograd" in str(self.program)
        for name, result in self.run(threads).items():
            true = expected[name]
            bound = np.full(true.shape, BOUND * np.abs(true).max(initial=1.0))
            context.check(name, result, true, bound if multiplied and name == "w" else None)


@pytest.mark.parametrize("text", DIRECT)
def test_every_algorithm_sums_the_gradients(text, algorithm):
    Layer(parse(text), exact=algorithm == "exact").check()


@pytest.mark.parametrize("text", WINOGRAD)
def test_what_winograd_covers_is_done_by_it(text, monkeypatch):
    choose(monkeypatch, "winograd")
    layer = Layer(parse(text), fill=kt.integers)
    assert "winograd" in str(layer.program)


@pytest.mark.parametrize("needs", [("w",), ("bias",), ("w", "bias")])
@pytest.mark.parametrize("text", ["conv n2 c19x9x7 k19 3x3 p1", "conv n1 c96x16x16 k24 1x1"])
def test_only_what_is_needed_is_summed(text, needs, algorithm):
    Layer(parse(text), needs, exact=algorithm == "exact").check()


def test_inputs_and_gradients_change_roles_where_that_fills_the_lanes():
    vectors = TARGETS[0]
    assert weight_gradients.swaps(vectors, parse("conv n1 c96x16x16 k24 1x1"))
    for text in ("conv n1 c24x16x16 k96 1x1", "conv n1 c90x16x16 k24 1x1",
                 "conv n1 c96x16x16 k24 1x1 p1", "conv n1 c96x16x16 k24 1x1 s2x2",
                 "conv n1 c96x16x16 k24 3x3 p1"):  # fmt: skip
        assert not weight_gradients.swaps(vectors, parse(text)), text


@pytest.mark.parametrize("target", kt.OTHERS, ids=lambda t: t.name)
@pytest.mark.parametrize("text", ["conv n3 c19x9x7 k19 3x3 p1", "conv n3 c3x15x18 k19 7x7 s2x2 p3",
                                  "conv n2 c8x12x9 k19 3x3 s2x2 p1",
                                  "conv n3 c48x7x5 k9 1x1"])  # fmt: skip
def test_every_instruction_set_agrees(text, target, algorithm):
    Layer(parse(text), target=target, exact=algorithm == "exact").check()


WINDOWS = st.sampled_from([(1, 1), (3, 1), (3, 2), (7, 2), (5, 1)])


@settings(max_examples=25)
@given(
    name=st.sampled_from(["direct", "winograd"]),
    batch=st.sampled_from([1, 2, 3]),
    channels=st.tuples(st.sampled_from([1, 3, 16, 21, 40]), st.sampled_from([1, 17, 48, 65])),
    sizes=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    window=WINDOWS,
    padding=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    needs=st.sampled_from([("w",), ("w", "bias")]),
)
def test_hostile_shapes(name, batch, channels, sizes, window, padding, needs):
    (size, stride), (top, bottom, left, right) = window, padding
    height, width = (max(n, size - p) for n, p in zip(sizes, (top, left), strict=True))
    conv = Conv(
        batch, channels[0], height, width, channels[1],
        Window(size, stride, 1, top, bottom), Window(size, stride, 1, left, right),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, name)
        Layer(conv, needs).check()


@pytest.mark.parametrize("text", ["conv n2 c64x16x16 k64 3x3 p1", "conv n3 c80x7x7 k96 1x1",
                                  "conv n1 c64x8x4 k64 3x3 p1", "conv n4 c3x32x32 k64 7x7 s2x2 p3",
                                  "conv n6 c1x14x14 k32 3x3 p1"])  # fmt: skip
def test_threads_share_the_work_and_change_nothing(text, algorithm):
    layer = Layer(parse(text), fill=kt.normals, exact=algorithm == "exact")
    work = max(step.items for step in layer.program.steps if "gradient" in step.kernel.name)
    assert work >= 2, str(layer.program)
    alone = layer.run()
    for threads in (2, 3):
        together = layer.run(threads)
        assert all(torch.equal(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize("text", ["conv n2 c64x28x28 k64 3x3 p1",
                                  "conv n2 c3x64x64 k64 7x7 s2x2 p3",
                                  "conv n2 c96x28x28 k48 1x1"])  # fmt: skip
@pytest.mark.parametrize("exact", [False, True])
def test_layers_of_real_size_round_little(text, exact):
    conv = parse(text)
    layer = Layer(conv, fill=kt.normals, exact=exact)
    stride, padding = (conv.rows.stride, conv.cols.stride), (conv.rows.low, conv.cols.low)
    true = torch.nn.grad.conv2d_weight(
        torch.tensor(layer.x), conv.weight_shape, torch.tensor(layer.grad), stride, padding
    )
    found = layer.run()
    bound = 1e-6 if exact else BOUND
    assert (found["w"].double() - true).abs().max() <= bound * true.abs().max()
    bias = torch.tensor(layer.grad.sum(axis=(0, 2, 3)))
    assert (found["bias"].double() - bias).abs().max() <= 1e-6 * bias.abs().max()


def test_results_go_to_the_call_buffers_unless_told_otherwise():
    conv = parse("conv n1 c2x5x4 k3 3x3 p1")
    p = Program(("x", "grad", "gw", "gbias"))
    x, grad = Map.dense(Place(0), 2, 7, 6), Map.dense(Place(0), 3, 5, 4)
    weight_gradient_steps(p, host(), conv, x, grad, ("w", "bias"))
    written = [step.fields["w"] for step in p.steps if "w" in step.fields]
    assert written == [p.buffer("gw"), p.buffer("gbias")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("conv n8 c64x56x56 k64 3x3 p1", True),
        ("conv n8 c512x7x7 k512 3x3 p1", True),
        ("conv n64 c32x14x14 k64 3x3 p1", True),
        ("conv n8 c3x224x224 k64 7x7 s2x2 p3", True),
        ("conv n64 c1x28x28 k32 3x3 p1", False),
        ("conv n8 c64x56x56 k128 1x1 s2x2", False),
        ("conv n8 c64x56x56 k128 3x3 s2x2 p1", True),
        ("conv n8 c64x56x56 k64 3x3 p1 g2", False),
        ("conv n8 c64x56x56 k64 3x3 p2 d2x2", False),
    ],
)
def test_the_estimate_prefers_what_is_faster(text, expected):
    assert weight_gradients.prefers_winograd(TARGETS[0], parse(text)) is expected
