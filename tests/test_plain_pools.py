"""Pools in ceil mode for other programs: PyTorch's numbers, and shapes that everybody infers."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from export_tools import run_onnx
from torch import Tensor, nn

import neocog
from neocog.plain_pools import SPELLED_OUT

aten = torch.ops.aten
WINDOWS = [
    (size, stride, padding)
    for size, stride, padding in itertools.product(range(1, 5), range(1, 6), range(3))
    if padding <= size // 2
]


def whole_numbers(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(-9, 10, shape).float()


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("n", range(3, 12))
def test_averages_of_every_window(n: int, include: bool) -> None:
    """Sums of at most 16 numbers of at most 9 are exact; three roundings of a mean of at most 9."""
    x = whole_numbers(2, 3, n, n + 2)
    for size, stride, padding in WINDOWS:
        if size > n + 2 * padding:
            continue
        options = ([size], [stride], [padding], True, include)
        wanted = F.avg_pool2d(x, *options)
        got = SPELLED_OUT[aten.avg_pool2d.default](x, *options)
        assert got.shape == wanted.shape, options
        assert (got - wanted).abs().max() <= 3 * 2.0**-21, options


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("n", range(3, 12))
def test_maxima_of_every_window_and_their_places(n: int, dilation: int) -> None:
    x = whole_numbers(2, 3, n, n + 2)
    x[0, 0, 0, 0] = torch.nan
    for size, stride, padding in WINDOWS:
        if dilation * (size - 1) + 1 > n + 2 * padding:
            continue
        options = ([size], [stride], [padding], [dilation], True)
        wanted, places = F.max_pool2d(x, size, stride, padding, dilation, True, True)
        got, found = SPELLED_OUT[aten.max_pool2d_with_indices.default](x, *options)
        assert torch.equal(got.nan_to_num(99), wanted.nan_to_num(99)), options
        assert torch.equal(found, places), options
        alone = SPELLED_OUT[aten.max_pool2d.default](x, *options)
        assert torch.equal(alone.nan_to_num(99), wanted.nan_to_num(99)), options


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(axes: int) -> None:
    x = whole_numbers(2, 3, *(7, 8, 6)[:axes])
    average = getattr(F, f"avg_pool{axes}d")
    largest = getattr(F, f"max_pool{axes}d")
    means, maxima = (getattr(aten, f"{kind}_pool{axes}d").default for kind in ("avg", "max"))
    for include in (True, False):
        wanted = average(x, 3, 4, 1, True, include)
        got = SPELLED_OUT[means](x, [3], [4], [1], True, include)
        assert got.shape == wanted.shape and (got - wanted).abs().max() <= 3 * 2.0**-21
    assert torch.equal(
        SPELLED_OUT[maxima](x, [2], [3], [1], [2], True), largest(x, 2, 3, 1, 2, True)
    )


def test_plain_pools_stay_as_they_are() -> None:
    x = whole_numbers(1, 1, 4, 4)
    assert SPELLED_OUT[aten.avg_pool2d.default](x, [2]) is NotImplemented
    assert SPELLED_OUT[aten.max_pool2d.default](x, [2]) is NotImplemented


class Pools(nn.Module):
    """Pools of many windows side by side, PyTorch's and neocog's."""

    def __init__(self) -> None:
        super().__init__()
        chosen = [(1, 2, 0), (1, 5, 0), (2, 2, 0), (3, 2, 1), (3, 4, 1), (4, 5, 2), (3, 3, 1)]
        self.pools = nn.ModuleList()
        for window in chosen:
            self.pools.append(nn.MaxPool2d(*window, ceil_mode=True))
            self.pools.append(nn.AvgPool2d(*window, ceil_mode=True))
            self.pools.append(nn.AvgPool2d(*window, ceil_mode=True, count_include_pad=False))
        self.pools.append(nn.MaxPool2d(2, 5, 1, 2, ceil_mode=True))
        self.pools.append(neocog.nn.MaxPool2d(3, 4, 1, ceil_mode=True))
        self.pools.append(neocog.nn.AvgPool2d(3, 4, 1, ceil_mode=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [pool(x) for pool in self.pools]


def test_onnx_files_with_pools_in_ceil_mode_pass_every_check(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, x, path = Pools().eval(), torch.randn(2, 3, 9, 12), tmp_path / "pools.onnx"
    neocog.export(model, path, tuple(x.shape[1:]))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    load = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", load, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for got, wanted in zip(run_onnx(path, x), model(x), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
