"""Which nodes of a graph run together, what stays PyTorch's, and why."""

from __future__ import annotations

import tiny_networks as tn
import torch
import torch.nn.functional as F
from recordings import left, networks, parted
from torch import nn

from neocog import network as net
from neocog.facts import fact
from neocog.partition import PYTORCH


def kinds(flow, *args: torch.Tensor, **layers: nn.Module) -> list[bool]:
    """Of each stage, whether it is compiled."""
    made = parted(tn.ready(tn.Net(flow, **layers)), *(args or (tn.images(),)))
    return [stage.kind != PYTORCH for stage in made.stages]


def reasons(flow, **layers: nn.Module) -> dict[str, str]:
    return left(tn.ready(tn.Net(flow, **layers)), tn.images())


def test_a_model_that_is_covered_is_one_stage():
    assert kinds(lambda m, x: F.relu(m.c(x)) + m.c(x), c=tn.conv(3, 3)) == [True]


def test_what_has_no_kernel_stands_between_two():
    flow = lambda m, x: m.b(torch.cos(m.a(x)))  # noqa: E731
    assert kinds(flow, a=tn.conv(3, 4), b=tn.conv(4, 4)) == [True, False, True]
    assert reasons(flow, a=tn.conv(3, 4), b=tn.conv(4, 4)) == {"cos": "cos: no kernel"}


def test_branches_are_dealt_out_together():
    """What does not need PyTorch's result comes before it, whatever the order of the calls."""

    def flow(m, x):
        y = torch.cos(m.a(x))
        return m.b(y), m.c(x)

    layers = {"a": tn.conv(3, 4), "b": tn.conv(4, 4), "c": tn.conv(3, 4)}
    assert kinds(flow, **layers) == [True, False, True]


def test_reasons():
    def flow(m, x):
        y = F.leaky_relu(m.c(x), -0.1)
        return F.adaptive_avg_pool2d(y, 5), F.hardtanh(y), torch.cat([y, y], 2)

    found = " ".join(reasons(flow, c=tn.conv(3, 4)).values())
    for part in ("negative slope", "windows of several sizes", "0 to 6", "dim=2"):
        assert part in found


def test_maps_of_two_batch_sizes_are_two_programs():
    flow = lambda m, a, b: (m.c(a), m.c(b))  # noqa: E731
    assert kinds(flow, tn.images(2), tn.images(3), c=tn.conv(3, 4)) == [True, True]
    assert kinds(flow, tn.images(2), tn.images(2), c=tn.conv(3, 4)) == [True]


def test_a_write_becomes_a_new_value_where_nobody_can_tell():
    """The value before it may be read before, not behind; no other tensor may share the memory."""
    alone = lambda m, x: m.c(x).relu_()  # noqa: E731
    read_before = lambda m, x: [y := m.c(x), z := m.d(y), y.relu_() + z][2]  # noqa: E731
    shared = lambda m, x: [y := m.c(x), v := y[:, :2], y.relu_(), v][3]  # noqa: E731
    argument = lambda m, x: m.c(x.relu_())  # noqa: E731
    layers = {"c": tn.conv(3, 4), "d": tn.conv(4, 4)}
    assert reasons(alone, **layers) == {}
    assert reasons(read_before, **layers) == {}
    assert "shares" in reasons(shared, **layers)["relu_"]
    assert "shares" in reasons(argument, **layers)["relu_"]


def test_views_stay_views_where_somebody_can_tell():
    alone = lambda m, x: torch.flatten(m.c(x), 1)  # noqa: E731
    both = lambda m, x: [y := m.c(x), (y, torch.flatten(y, 1))][1]  # noqa: E731
    assert reasons(alone, c=tn.conv(3, 4)) == {}
    assert "view" in reasons(both, c=tn.conv(3, 4))["flatten"]


def test_dead_branches_are_left_out():
    def flow(m, x):
        torch.cos(m.d(x))
        return m.c(x)

    (network,) = networks(
        tn.ready(tn.Net(flow, c=tn.conv(3, 4), d=tn.conv(3, 4))), tn.images()
    )  # fmt: skip
    assert sum(isinstance(n.op, net.Convolution) for n in network.nodes) == 1
    assert kinds(flow, c=tn.conv(3, 4), d=tn.conv(3, 4)) == [True]


def test_random_numbers_keep_their_order():
    """Both are PyTorch's, and drawn in the order of the program, though one could come earlier."""

    def flow(m, x):
        a = torch.rand_like(m.c(x))
        return a + m.c(torch.rand(2, 3, 12, 16))

    made = parted(tn.ready(tn.Net(flow, c=tn.conv(3, 4))), tn.images())
    drawn = [fact(n).name for stage in made.stages for n in stage.nodes if fact(n).random]
    assert drawn == ["rand_like", "rand"]


def test_weights_that_depend_on_weights_alone_are_constants():
    flow = lambda m, x: F.conv2d(x, m.c.weight * 2 - m.c.weight.mean())  # noqa: E731
    assert kinds(flow, c=tn.conv(3, 4)) == [True]


def test_multiply_adds_of_what_pytorch_runs():
    """PyTorch's own count: 8 x 6 x 2 x 2 taps for each of 12 x 16 pixels of 2 images."""
    model = tn.Net(lambda m, x: m.up(m.c(x)), c=tn.conv(3, 8), up=nn.ConvTranspose2d(8, 6, 2, 2))
    made = parted(tn.ready(model), tn.images())
    work = [fact(n).multiply_adds for s in made.stages for n in s.nodes if s.kind == PYTORCH]
    assert sum(work) == 8 * 6 * 4 * 12 * 16 * 2


def test_the_public_names():
    """What completion and help show."""
    import neocog

    assert set(neocog.__all__) <= set(dir(neocog))
