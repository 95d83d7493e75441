"""Training steps that were refused or broken: what is frozen, dropped out, or written in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from border import alone, check, compiled, maps, programs, ways
from torch import nn

import neocog

NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "conv conv": lambda: [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)],
    "separable": lambda: [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)],
    "conv relu conv": lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)],
    "conv maxpool conv": lambda: [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)],
    "conv avgpool conv": lambda: [nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.Conv2d(8, 4, 3)],
    "conv norm relu conv": lambda: [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)],
    "conv relu pool conv": lambda: [
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)],
}  # fmt: skip

FROZEN: dict[str, Callable[[str, str], bool]] = {
    "last weight frozen": lambda name, last: name != f"{last}.weight",
    "biases only": lambda name, last: "bias" in name,
    "weights only": lambda name, last: "weight" in name,
    "first layer only": lambda name, last: name[0] == "0",
}


@pytest.mark.parametrize("trained", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("name", NETS)
@alone
def test_frozen_parameters(name: str, trained: Callable[[str, str], bool]):
    torch.manual_seed(0)
    model = nn.Sequential(*NETS[name]())
    for parameter, p in model.named_parameters():
        p.requires_grad_(trained(parameter, str(len(model) - 1)))
    call = check(model, maps(2, 3, 12, 12), way="train", bound=2e-5)
    assert programs(call) >= 1


@pytest.mark.parametrize("thawed", ["0.weight", "2.weight", "2.bias"])
def test_parameters_thawed_between_steps(thawed: str):
    """One compiled model: fine-tuning unfreezes layer by layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model.requires_grad_(False)
    call, x = compiled(model), maps()
    model[2].bias.requires_grad_()
    for name in ("2.bias", thawed):
        model.get_parameter(name).requires_grad_()
        model.zero_grad()
        call(x).square().sum().backward()
        own = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        model(x).square().sum().backward()
        for n, p in model.named_parameters():
            assert (own[n] is None) == (p.grad is None), n
            if p.grad is not None:
                torch.testing.assert_close(own[n], p.grad, rtol=1e-4, atol=1e-4)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.1, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["leaky_relu", "silu", "elu"])
@ways
def test_dropout_before_an_activation_in_place(name: str, p: float, way: str):
    """At p = 0 dropout may be its argument itself: the write must not reach what is kept."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(p), ACTIVATIONS[name]())
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 3))
    call = check(model, maps(2, 3, 10, 10), way=way, bound=2e-5)
    assert programs(call) >= 1 and not neocog.report(call)[0].whole


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropouts(kind: type[nn.Module], p: float):
    """The same seed drops the same values, and leaves the stream where eager does."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), kind(p), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    check(nn.Sequential(*layers), maps(), way="train")


class StaysInEval(nn.Sequential):
    """A frozen backbone, which ``train()`` leaves as it is."""

    def train(self, mode: bool = True) -> StaysInEval:
        return super().train(False)


@pytest.mark.parametrize("name", ACTIVATIONS)
@ways
def test_layers_that_do_nothing_before_an_activation_in_place(name: str, way: str):
    """Identities hand their argument on: what is written is the value itself."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.Identity(), nn.Dropout(0.5).eval(), ACTIVATIONS[name]())
    check(StaysInEval(*layers, nn.Conv2d(8, 8, 3)), maps(), way=way, bound=2e-5)


def test_weights_change_between_forward_and_backward():
    """PyTorch raises, for the gradient of the input needs the old ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    for call in (model, compiled(model)):
        made = call(maps()).square().sum()
        with torch.no_grad():
            model[2].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.backward()


def test_a_step_of_an_optimizer():
    """Several steps of SGD with momentum and weight decay end where eager's end."""
    results = []
    for run in (lambda m: m, compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        call = run(model)
        for i in range(4):
            optimizer.zero_grad()
            F.mse_loss(call(maps(seed=i)), torch.ones(2, 2, 4, 4)).backward()
            optimizer.step()
        results.append({n: t.detach().clone() for n, t in model.state_dict().items()})
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-4, atol=1e-5, msg=name)
