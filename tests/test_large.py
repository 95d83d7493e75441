"""Sizes of 2**31 elements and more, and taps that reach far beyond their map."""

from __future__ import annotations

import logging
import mmap
from types import SimpleNamespace
from typing import Any

import kernel_tools as kt
import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import neocog
import neocog.functional as F
from neocog import compiler, maps
from neocog.errors import InvalidProblem, Unsupported
from neocog.problem import Block, conv2d_problem, parse
from neocog.program import Place, Step

WIDE = (1 << 31) + 64
"""Elements of a row that 32 bits do not count."""


@pytest.fixture(scope="module")
def row() -> Tensor:
    """A row of WIDE elements, whose pages exist only where they have been written."""
    memory = mmap.mmap(-1, 4 * WIDE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    made = torch.frombuffer(memory, dtype=torch.float32).reshape(1, 1, 1, WIDE)
    for at, value in ((0, 2.0), (1 << 30, 3.0), (1 << 31, 5.0)):
        made[0, 0, 0, at] = value
    return made


def test_inputs_beyond_32_bits(row: Tensor) -> None:
    w, bias = torch.full((1, 1, 1, 1), 2.0, requires_grad=True), torch.ones(1)
    y = F.conv2d(row, w, bias, stride=(1, 1 << 30))
    assert y.flatten().tolist() == [5, 7, 11]
    (gw,) = torch.autograd.grad((y * torch.tensor([1.0, 2.0, 4.0])).sum(), w)
    assert gw.item() == 2 + 2 * 3 + 4 * 5
    for pool in (F.max_pool2d, F.avg_pool2d):
        assert pool(row, (1, 1), (1, 1 << 30)).flatten().tolist() == [2, 3, 5]


PROBLEMS = [
    "conv n3 c512x2048x2048 k512 3x3 p1 | bias | relu",
    "conv n70000 c256x14x14 k64 1x1",
    "conv n64 c3x4096x4096 k96 4x4 s4 | bias",
    "conv n1000 c3x1024x1024 k3 16x16 s16 g3",
    "conv n9 c64x2048x2048 k64 3x3 p1 g64",
]


@pytest.mark.parametrize("line", PROBLEMS)
def test_programs_count_in_64_bits(line: str) -> None:
    """Tables of steps hold what Python counted, whatever its size; nothing is allocated here."""
    problem = parse(line) if "|" in line else Block(parse(line))
    assert isinstance(problem, Block)
    strides = torch.empty(problem.conv.weight_shape, device="meta").stride()
    programs = [
        compiler.forward(problem, "nchw", strides, "nhwc"),
        compiler.backward(problem, "nchw", "nchw", strides, "nchw", "nchw", ("x", "w")),
    ]
    largest = 0
    for program in programs:
        _, arena, *_, (_, tables, _, _, constants) = program._table(2)
        homes, _ = program._homes(2)
        for step, table in zip(program.steps, tables, strict=True):
            assert table.tolist() == step.words(homes)
            assert min(table.tolist()) >= -(1 << 40)
            largest = max(largest, *table.tolist())
        assert constants.dtype == np.int64
        assert arena > 1 << 33, "it packs a map of more than 2**31 elements"
    assert largest >= 1 << 31, "no step of this problem needs more than 32 bits"


def test_more_than_memory_can_be() -> None:
    with pytest.raises(InvalidProblem, match=r"\(1, 1, 268435456, 268435456\).*2\*\*56"):
        conv2d_problem((1, 1, 1 << 28, 1 << 28), (1, 1, 1, 1))
    with pytest.raises(InvalidProblem, match=r"fewer than 2\*\*56 elements"):
        parse("max n1 c1x268435456x268435456 2x2")
    kernel: Any = SimpleNamespace(name="none", fields=("x*", "n"))
    step = Step(kernel, 1, {"x": Place(1, 1 << 60), "n": 1 << 40})
    assert step.words({}) == [1, 1 << 62, 1 << 40]


def test_winners_beyond_32_bits() -> None:
    with pytest.raises(Unsupported, match=r"2147483712 taps wins: kernels count to 2\*\*31"):
        compiler.pool_forward(parse(f"max n1 c1x1x{WIDE} 1x{WIDE}"), "nhwc", "nhwc", True)


FAR = dict(padding=10**6, dilation=10**6)


def test_a_halo_out_of_proportion_is_pytorchs(caplog: pytest.LogCaptureFixture) -> None:
    """Its taps meet the map in one place; a halo for the others would take 16 TB."""
    x, w = (torch.from_numpy(kt.integers(s, 1)).float() for s in ((1, 2, 8, 8), (3, 2, 3, 3)))
    x.requires_grad_()
    neocog.handback.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "neocog"):
        y = F.conv2d(x, w, **FAR)
    (gx,) = torch.autograd.grad(y.sum(), x)
    assert "1000000 rows and 1000000 columns beyond a map of 8x8" in caplog.text
    assert torch.equal(y, TF.conv2d(x, w, **FAR))
    assert torch.equal(gx, torch.autograd.grad(TF.conv2d(x, w, **FAR).sum(), x)[0])
    layer = nn.Conv2d(2, 3, 3, **FAR)
    frozen = neocog.freeze(nn.Sequential(layer, nn.ReLU()).eval(), x.detach())
    assert "beyond a map of 8x8" in str(neocog.report(frozen)[0])
    with torch.no_grad():
        assert torch.equal(frozen(x), layer(x).relu())
    with pytest.raises(Unsupported, match="1000000 rows"):
        torch.ops.neocog.conv_block(
            x.detach(), w, None, None, [1, 1], [10**6] * 4, [10**6] * 2, 1, "", False
        )


def test_padding_under_a_wide_stride() -> None:
    conv = conv2d_problem((1, 1, 8, 8), (1, 1, 1, 1), 1000, 10**6)
    assert conv.out_shape == (1, 1, 2001, 2001)
    assert "would take 16,000.0 GB" in str(maps.too_far(conv))


def test_ordinary_halos_are_in_proportion() -> None:
    for shape, kernel, padding, dilation in (
        ((1, 2048, 14, 14), 3, 36, 36), ((16, 3, 224, 224), 7, 3, 1), ((1, 64, 7, 7), 7, 3, 1),
    ):  # fmt: skip
        conv = conv2d_problem(shape, (64, shape[1], kernel, kernel), 1, padding, dilation)
        assert maps.too_far(conv) is None, f"{conv}"


def test_gradients_whose_halo_is_out_of_proportion() -> None:
    """Forward the taps stay on the map; back they would reach through 1.4 GB of zeros."""
    conv = conv2d_problem((1, 1, 600, 600), (256, 1, 3, 3), 1, 0, 290)
    assert maps.too_far(conv) is None and maps.too_far(conv.grad_input()) is not None
    x, w = (torch.from_numpy(kt.integers(s, 1)).float() for s in (conv.in_shape, conv.weight_shape))
    x.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(lib.conv2d(x, w, dilation=290).sum(), x)[0] for lib in (F, TF)
    )
    assert torch.equal(ours, theirs)
    backward = compiler.backward(Block(conv), *["nchw"] * 2, w.stride(), *["nchw"] * 2, ("x",))
    assert backward._table(1)[1] < 10_000_000, "bytes of scratch"
