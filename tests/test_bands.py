"""Chains of layers in bands: which rows are computed when, and what comes out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neocog
from neocog import bands
from neocog.geometry import Window
from neocog.problem import Conv

WINDOWS = st.builds(
    Window,
    size=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    low=st.integers(0, 3),
    high=st.integers(0, 3),
)


@st.composite
def chains(draw) -> list[Conv]:
    height, made = draw(st.integers(1, 40)), []
    for window in draw(st.lists(WINDOWS, min_size=2, max_size=4)):
        if window.out_size(height) < 1:
            break
        made.append(Conv(1, 2, height, 6, 2, window, Window(1), 1))
        height = made[-1].out_shape[2]
    return made if len(made) > 1 else draw(chains())


@settings(max_examples=200, deadline=None)
@given(chains(), st.integers(1, 12))
def test_no_row_is_computed_twice_and_all_are_there_when_they_are_read(convs, rows):
    made = bands.bands(convs, rows)
    kept = bands.capacities(made)
    for number, conv in enumerate(convs):
        computed: list[int] = []
        for band in made:
            mine = band[number]
            assert mine.start <= mine.stop <= conv.out_shape[2]
            assert not computed or mine.start > computed[-1] or mine.start == mine.stop
            computed += range(mine.start, mine.stop)
            if mine.start < mine.stop:
                assert mine.conv(conv).out_shape[2] == mine.stop - mine.start
            if number + 1 < len(convs) and band[number + 1].count:
                reader = band[number + 1]
                assert reader.count <= kept[number]
                read = set(range(reader.first, reader.first + reader.count))
                assert read & set(range(conv.out_shape[2])) <= set(computed), "not there yet"
                assert mine.start >= reader.first or mine.start == mine.stop, "no room for it"
    assert computed == list(range(convs[-1].out_shape[2]))


def test_bands_fill_what_they_may():
    convs = [
        Conv(1, 16, 56, 56, 96, Window(1), Window(1), 1),
        Conv(1, 96, 56, 56, 96, Window(3, low=1, high=1), Window(3, low=1, high=1), 96),
    ]
    few, many = bands.rows_of(convs, 1000), bands.rows_of(convs, 10**9)
    assert few == bands.STEP
    assert many == 56
    wide = Window(7, low=3, high=3)
    convs[1] = Conv(1, 96, 56, 56, 96, wide, wide, 96)
    assert bands.rows_of(convs, 1000) == 8  # or the six rows that stay would move onto themselves


def conv(into: int, out: int, size: int, **more) -> nn.Sequential:
    layers = [nn.Conv2d(into, out, size, bias=False, **more), nn.BatchNorm2d(out), nn.ReLU6()]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """A chain with a residual that its last layer adds, row by row."""

    def __init__(self):
        super().__init__()
        self.first = conv(3, 8, 3, padding=1)
        self.chain = nn.Sequential(
            conv(8, 24, 1), conv(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1)
        )

    def forward(self, x):
        y = self.first(x)
        return y + self.chain(y)


NETWORKS = {
    "inverted residuals": lambda: nn.Sequential(
        conv(3, 8, 3, stride=2, padding=1), conv(8, 8, 3, padding=1, groups=8), conv(8, 6, 1),
        conv(6, 36, 1), conv(36, 36, 3, stride=2, padding=1, groups=36), conv(36, 10, 1),
    ),
    "residual": Residual,
    "wide windows": lambda: nn.Sequential(
        conv(3, 5, 5, padding=2), conv(5, 7, 7, padding=3), conv(7, 4, 5, padding=4, dilation=2)
    ),
    "no padding": lambda: nn.Sequential(conv(3, 5, 5), conv(5, 6, 2), conv(6, 4, 5, stride=3)),
    "strides leave rows out": lambda: nn.Sequential(
        conv(3, 4, 1), conv(4, 5, 1, stride=3), conv(5, 6, 2, stride=2, padding=1)
    ),
    "groups": lambda: nn.Sequential(conv(3, 6, 5, padding=2), conv(6, 4, 5, padding=2, groups=2)),
}  # fmt: skip


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(bands, "BANDED_BYTES", 0)
    monkeypatch.setattr(bands, "BAND_BYTES", 0)


@pytest.mark.parametrize("size", [(33, 21), (32, 19), (47, 18)])
@pytest.mark.parametrize("name", NETWORKS)
def test_results(name, size, always):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    x = torch.randn(1, 3, *size)
    frozen = neocog.freeze(model, x, exact=True)
    (plan,) = frozen.plans
    last = plan.rewritten.runs[-1].network.nodes[-1]
    names = [s.kernel.name for s in plan.natives[0].program.steps if s.about is last]
    assert max(map(names.count, names)) > 1, "it was not computed in bands"
    with torch.no_grad():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours, near = frozen(x), frozen(x.contiguous(memory_format=torch.channels_last))
            assert torch.equal(ours, near)
        expected = model.double()(x.double())
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


def test_batches_are_computed_image_by_image_in_bands(always):
    torch.manual_seed(0)
    model = NETWORKS["residual"]().eval()
    x = torch.randn(5, 3, 21, 17)
    frozen = neocog.freeze(model, x, exact=True)
    assert torch.equal(frozen(x)[3:4], frozen(x[3:4]))
