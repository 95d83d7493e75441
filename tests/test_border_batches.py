"""Several batch sizes, shapes and numbers in one program, and from call to call."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from border import GRADIENTS, alone, check, compiled, equal, maps, net, observe, ready, same, ways
from torch import Tensor, nn

import neocog


def two_inputs(m: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return m.c(a).relu(), m.d(b).relu()


def two_maps() -> nn.Module:
    layers = {name: nn.Conv2d(8, 8, 3, padding=1) for name in "cd"}
    return net(two_inputs, **layers)


@pytest.mark.parametrize("first, second", [(2, 2), (2, 3), (3, 2), (1, 4), (4, 1)])
@ways
@alone
def test_two_batches(first: int, second: int, way: str):
    """Of different sizes in one program, neither of which is the batch."""
    a, b = maps(first, 8, 12, 12), maps(second, 8, 12, 12, seed=4)
    if way == "train":
        a.requires_grad_()
        b.requires_grad_()
    check(two_maps(), a, b, way=way)


@ways
@alone
def test_two_batches_that_meet(way: str):
    """One map of one image is added to, multiplied with and joined to maps of several."""

    def flow(m, a, b):
        y, z = m.c(a).relu(), m.d(b).relu()
        return y + z, m.d(y * z), torch.cat([y, z])

    model = net(flow, **{name: nn.Conv2d(8, 8, 3, padding=1) for name in "cd"})
    check(model, maps(3, 8, 12, 12), maps(1, 8, 12, 12, seed=4), way=way)


@ways
@alone
def test_a_batch_that_grows_and_shrinks(way: str):
    """Images cut into tiles, halves of a batch, a batch joined with itself."""

    def flow(m, x):
        tiles = torch.cat([x[..., :6], x[..., 6:]])
        y = m.c(tiles).relu()
        left, right = y.chunk(2)
        both = m.d(left + right)
        return m.d(torch.cat([both, both, both])).relu(), both[:1], m.c(y[1:3])

    model = net(flow, **{name: nn.Conv2d(8, 8, 3, padding=1) for name in "cd"})
    check(model, maps(2, 8, 12, 12), way=way)


class Standardised(nn.Conv2d):
    """Scaled weight standardisation, as timm writes it: weights are a batch of their own."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.full((outputs, 1, 1, 1), 0.7))
        self.scale = 0.2

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None,
            weight=(self.gain * self.scale).view(-1), training=True, momentum=0.0, eps=1e-6,
        )  # fmt: skip
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


def standardised() -> nn.Module:
    torch.manual_seed(0)
    layers = (Standardised(3, 8), nn.ReLU(), Standardised(8, 24), nn.ReLU(), Standardised(24, 48))
    return nn.Sequential(*layers)


@ways
@alone
def test_weight_standardisation(way: str):
    check(standardised(), maps(1, 3, 16, 16), way=way, bound=2e-5)


def test_weights_that_are_computed_are_computed_once():
    """They depend on parameters alone: a frozen model is one program."""
    frozen = neocog.freeze(standardised().eval(), maps(1, 3, 16, 16))
    frozen(maps(1, 3, 16, 16))
    (report,) = neocog.report(frozen)
    assert report.programs == 1 and not report.handed_back


@ways
def test_parametrised_weights(way: str):
    """Weight norm and spectral norm, by torch.nn.utils.parametrizations."""
    model = net(lambda m, x: m.b(torch.relu(m.a(x))))
    nn.utils.parametrizations.weight_norm(model.a)
    if way != "train":  # which changes its vectors by an iteration at each step
        nn.utils.parametrizations.spectral_norm(model.b)
    check(model, maps(), way=way)


# ------------------------------------------------------------------------------ from call to call


def sizes_in_turn(call, eager: nn.Module, model: nn.Module, gradients: bool, sizes) -> None:
    for i, (batch, side) in enumerate(sizes):
        x = maps(batch, 3, side, side + 1, seed=i).requires_grad_(gradients)
        same(observe(call, (x,), model, gradients), observe(eager, (x,), eager, gradients))
        eager.zero_grad()
        model.zero_grad()


SIZES = ((2, 8), (3, 8), (1, 8), (3, 11), (5, 9), (2, 8))


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_sizes_from_call_to_call(dynamic: bool | None, gradients: bool):
    model = net(lambda m, x: m.b(F.max_pool2d(torch.relu(m.a(x)), 2)))
    eager = copy.deepcopy(model)
    call = compiled(model, dynamic=dynamic)
    sizes_in_turn(call, eager, model, gradients, SIZES[: 3 if dynamic is False else None])
    assert all(r.programs == 1 and not r.whole for r in neocog.report(call))


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_a_marked_axis(gradients: bool):
    model = net(lambda m, x: m.b(torch.relu(m.a(x))).flatten(1).sum(1) / x.shape[0])
    eager, call = copy.deepcopy(model), compiled(model)
    for batch in (3, 5, 2):
        x = maps(batch, 3, 8, 8)
        torch._dynamo.mark_dynamic(x, 0)
        made, wanted = call(x), eager(x)
        equal(made, wanted)
        if gradients:
            made.sum().backward()
            wanted.sum().backward()
            equal(model.a.weight.grad, eager.a.weight.grad, "gradient", GRADIENTS)
    assert all(not r.whole for r in neocog.report(call))


@ways
def test_sizes_read_by_the_model(way: str):
    """Reshapes by sizes, strides of windows from sizes, one result a number of Python."""

    def flow(m, x):
        y = torch.relu(m.a(x))
        n, c, h, w = y.shape
        pooled = F.adaptive_avg_pool2d(y, (h // 2, w // 2))
        return m.b(pooled).reshape(n, -1), y.view(n, c, h * w), h * w

    model = net(flow)
    eager, call = copy.deepcopy(model), ready(model, way, (maps(2, 3, 8, 9),))
    eager.train(way == "train")
    sizes_in_turn(call, eager, model, way == "train", ((2, 8), (3, 8), (3, 10)))


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_numbers_that_change_between_calls(gradients: bool):
    """A float, an int that sets a size, a string: each call by its own."""

    def flow(m, x, scale, size, how):
        y = torch.relu(m.a(x)) * scale
        return F.interpolate(m.b(y), size=(size, size), mode=how)

    model = net(flow)
    eager, call = copy.deepcopy(model), compiled(model)
    for more in ((0.5, 4, "nearest"), (1.5, 4, "nearest"), (1.5, 9, "nearest"),
                 (-2.0, 9, "bilinear"), (0.5, 4, "nearest")):  # fmt: skip
        args = (maps(), *more)
        same(observe(call, args, model, gradients), observe(eager, args, eager, gradients))
        eager.zero_grad()
        model.zero_grad()


def test_a_number_kept_on_the_model():
    """An attribute that a schedule changes, as drop path and temperatures are."""
    model = net(lambda m, x: m.b(torch.relu(m.a(x))) * m.temperature)
    model.temperature = 1.0
    eager, call = copy.deepcopy(model), compiled(model)
    for value in (1.0, 0.25, 3.0, 0.25):
        eager.temperature = model.temperature = value
        same(observe(call, (maps(),), model, True), observe(eager, (maps(),), eager, True))
        eager.zero_grad()
        model.zero_grad()


def test_training_and_inference_in_turn():
    """One compiled model, its mode and grad mode switched between calls."""
    model = net(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), norm=nn.BatchNorm2d(4))
    eager, call = copy.deepcopy(model), compiled(model)
    for training, gradients in ((True, True), (False, False), (False, True), (True, False)) * 2:
        model.train(training)
        eager.train(training)
        same(
            observe(call, (maps(),), model, gradients), observe(eager, (maps(),), eager, gradients)
        )
        eager.zero_grad()
        model.zero_grad()


@pytest.mark.parametrize("batch", [0, 1])
@ways
@alone
def test_batches_of_none_and_one(batch: int, way: str):
    model = net(lambda m, x: m.b(F.max_pool2d(torch.relu(m.a(x)), 2)).flatten(1))
    check(model, maps(batch, 3, 8, 8), way=way)
