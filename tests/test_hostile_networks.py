"""Networks that went wrong once: maps read in several ways, edges of sizes and of names."""

import threading

import pytest
import tiny_networks as tn
import torch
import torch.nn.functional as F
from torch import nn

import neocog
from neocog.backend import LiveGraph
from neocog.network import Layer

BOUND = 5e-6


def check(model: nn.Module, *shape: int) -> None:
    """Right in both layouts, one thread and two, for a batch of one and of several."""
    model = tn.ready(model)
    before = torch.get_num_threads()
    try:
        for batch in (shape[0], 3):
            x = torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                expected = list(tn.leaves(model.double()(x.double())))
                model.float()
            frozen = neocog.freeze(model, x)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for y in (x, x.contiguous(memory_format=torch.channels_last)):
                    given = y.clone()
                    for _ in range(2):
                        results = list(tn.leaves(frozen(y)))
                        assert torch.equal(given, y), "it wrote to its input"
                        for ours, truth in zip(results, expected, strict=True):
                            assert ours.shape == truth.shape
                            far = (ours - truth).abs().max() if truth.numel() else 0
                            assert far <= BOUND * truth.abs().max().clamp(min=1e-3)
    finally:
        torch.set_num_threads(before)


def net(flow, **layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return tn.Net(flow, **layers)


def test_one_channel_flattened_and_returned():
    check(nn.Sequential(tn.conv(3, 1, 1), nn.Flatten(), nn.Linear(30, 4)), 2, 3, 5, 6)

    def flow(m, x):
        y = m.first(x)
        return y, m.second(y), torch.flatten(y, 1)

    check(net(flow, first=tn.conv(3, 1), second=tn.conv(1, 4)), 2, 3, 5, 6)


def test_a_part_of_a_concatenation_returned_and_flattened():
    def flow(m, x):
        y = m.a(x)
        both = torch.cat([y, m.b(x)], 1)
        return y, both, torch.flatten(y, 1)

    check(net(flow, a=tn.conv(3, 7), b=tn.conv(3, 9)), 2, 3, 5, 6)


def test_a_batch_of_none_with_large_maps():
    model = tn.ready(nn.Sequential(tn.conv(4, 16, 1), tn.conv(16, 16, 1)))
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(0, 4, 128, 160).contiguous(memory_format=format)
        assert neocog.freeze(model, x)(x).shape == (0, 16, 128, 160)


@pytest.mark.parametrize("padding", [(5, 0), (1, 1), (2, 0)])
def test_more_padding_than_a_window_spans(padding):
    check(nn.Sequential(tn.conv(4, 16, 1), tn.conv(16, 16, 1, padding=padding)), 1, 4, 8, 2560)
    layers = (tn.conv(4, 16, 1), nn.ReLU(), nn.ZeroPad2d((1, 1, 9, 9)), tn.conv(16, 16, 1))
    check(nn.Sequential(*layers), 1, 4, 8, 2560)


def test_padding_with_a_halo_around_it():
    def flow(m, x):
        y = m.first(x)
        padded = F.pad(y, (1, 1, 1, 1))
        return m.a(padded), m.b(padded), m.c(x) * 3

    wide = {"padding": (0, 1)}
    layers = {
        "first": tn.conv(8, 512), "c": tn.conv(8, 8),
        "a": nn.Conv2d(512, 8, (1, 3), **wide), "b": nn.Conv2d(512, 8, (1, 3), **wide),
    }  # fmt: skip
    check(net(flow, **layers), 1, 8, 4, 4)


def test_an_adaptive_pool_that_changes_nothing_is_a_copy():
    def flow(m, x):
        y = m.first(x)
        pooled = F.adaptive_avg_pool2d(y, tuple(y.shape[2:]))
        pooled.relu_()
        return y + pooled, F.adaptive_max_pool2d(x, tuple(x.shape[2:])).relu_()

    check(net(flow, first=tn.conv(3, 6)), 2, 3, 7, 6)


def test_tensors_without_a_name_beside_parameters_with_odd_ones():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.tensor0 = nn.Parameter(torch.randn(5, 3, 3, 3))
            self.hidden = [torch.randn(5, 3, 3, 3)]

        def forward(self, x):
            return F.conv2d(x, self.hidden[0]) - F.conv2d(x, self.tensor0).relu()

    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 3, 8, 9)
    with torch.no_grad():
        assert torch.allclose(neocog.freeze(model, x)(x), model(x), atol=1e-4)


def test_numbers_beyond_float32_are_handed_back():
    model = tn.ready(net(lambda m, x: m.first(x) / 1e-40, first=tn.conv(3, 4)))
    x = tn.images()
    with torch.no_grad():
        frozen = neocog.freeze(model, x)
        assert torch.equal(frozen(x).isfinite(), model(x).isfinite())
    assert [h.name for h in neocog.report(frozen)[0].handed_back]


def flow_graph() -> LiveGraph:
    """A graph whose weights are arguments like any other."""

    def graph(x, w, b):
        return (F.relu(F.conv2d(x, w, b, padding=1)),)

    options = {"strict": False, "exact": False, "tune": False}
    return LiveGraph(torch.fx.symbolic_trace(graph), options)


def test_weights_of_several_shapes_through_one_graph():
    live, generator = flow_graph(), torch.Generator().manual_seed(0)
    for k, c in ((64, 32), (8, 32), (64, 32), (8, 16), (64, 32)):
        x, w, b = (
            torch.randn(s, generator=generator) for s in ((1, c, 14, 14), (k, c, 3, 3), (k,))
        )
        with torch.no_grad():
            (ours,) = live(x, w, b)
            truth = F.relu(F.conv2d(x.double(), w.double(), b.double(), padding=1))
        assert (ours - truth).abs().max() <= BOUND * truth.abs().max()


def test_two_threads_with_weights_of_their_own_through_one_graph():
    live, wrong = flow_graph(), []

    def call(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((1, 16, 12, 12), (24, 16, 3, 3), (24,))
        x, w, b = (torch.randn(s, generator=generator) for s in shapes)
        truth = F.relu(F.conv2d(x.double(), w.double(), b.double(), padding=1))
        with torch.no_grad():
            for _ in range(60):
                (ours,) = live(x, w, b)
                if (ours - truth).abs().max() > 1e-4:
                    wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def averaged(flow, x, **layers) -> list[int]:
    """Of the layers of a network, in the order in which they are computed."""
    (plan,) = neocog.freeze(tn.ready(net(flow, **layers)), x).plans
    return [n.op.averaged for n in plan.rewritten.nodes if isinstance(n.op, Layer)]


def test_what_a_residual_returns_is_not_averaged():
    """The values of the first layer are returned as they are, beside the second layer's sums."""

    def flow(m, x):
        y = m.first(x)
        return y + m.second(y), m.head(m.third(m.second(m.first(x))).flatten(1))

    layers = {"first": tn.conv(64, 64), "second": tn.conv(64, 64), "third": tn.conv(64, 8)}
    head = nn.Linear(8 * 12 * 12, 10)
    found = averaged(flow, torch.randn(1, 64, 12, 12), **layers, head=head)
    assert sorted(found) == [0, 0, 576, 576, 8 * 12 * 12]


def test_sums_that_make_a_map_average_nothing():
    """Each value of a map that is returned shows what errors there were before it."""
    x, layers = torch.randn(1, 64, 12, 12), (tn.conv(64, 64), tn.conv(64, 32))
    ends = {
        "map": lambda m, y: y,
        "mean": lambda m, y: F.adaptive_avg_pool2d(y, 1).flatten(1),
        "linear": lambda m, y: m.linear(F.adaptive_avg_pool2d(y, 1).flatten(1)),
        "pixel": lambda m, y: m.pixel(F.adaptive_avg_pool2d(y, 1)),
        "both": lambda m, y: (m.linear(y.mean((2, 3))), y),
    }
    parts = {"first": layers[0], "second": layers[1], "linear": nn.Linear(32, 5),
             "pixel": nn.Conv2d(32, 5, 1)}  # fmt: skip
    found = {
        name: averaged(lambda m, x, end=end: end(m, m.second(m.first(x))), x, **parts)[:2]
        for name, end in ends.items()
    }
    assert found == {
        "map": [0, 0], "mean": [0, 0], "linear": [576, 32], "pixel": [576, 32], "both": [0, 0],
    }  # fmt: skip
