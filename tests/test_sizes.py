"""A model compiles nothing from the fourth size of its input on, and is right at all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import neocog
from neocog import kernels
from neocog.choices import WINOGRAD

Size = tuple[int, int, int]

SIZES: list[Size] = [
    (1, 40, 40), (1, 37, 46), (2, 51, 33), (1, 48, 48), (3, 30, 31), (1, 8, 8), (1, 9, 70),
    (1, 35, 34), (2, 8, 10), (1, 160, 161),
]  # fmt: skip
"""(batch, height, width): even and odd, of few tiles and many, and with a map in bands."""


def layers(
    act: Callable[[], nn.Module] = nn.ReLU, pool: type[nn.Module] = nn.MaxPool2d
) -> nn.Sequential:
    """Direct, depthwise and Winograd layers, a fused pool, and one over the whole map."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), act(), pool(2),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), act(),
        nn.Conv2d(32, 48, 3, padding=1), act(),
        nn.Conv2d(48, 48, 3, stride=2, padding=1, groups=48), act(),
        nn.Conv2d(48, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def compiled_by(run: Callable[[], object]) -> int:
    before = kernels.compiled()
    run()
    return kernels.compiled() - before


def whole_numbers(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1).round_()


def test_a_frozen_model_is_exact_at_every_size() -> None:
    """Sums of whole numbers: no kernel for any size may differ by a bit."""
    torch.manual_seed(0)
    model = layers()[:10].eval()
    whole_numbers(model)
    frozen = neocog.freeze(model, torch.zeros(1, 3, 16, 16), exact=True)
    counts = []
    for size in SIZES:
        x = torch.randint(-2, 3, (size[0], 3, *size[1:])).float()
        counts.append(compiled_by(lambda x=x: frozen(x)))
        with torch.no_grad():
            assert torch.equal(frozen(x), model(x)), size
    assert counts[2:] == [0] * len(counts[2:])
    assert counts[1] > 0, "kernels for any size have to be compiled some time"


def test_a_frozen_model_with_winograd_layers() -> None:
    torch.manual_seed(0)
    model = layers().eval()
    truth = copy.deepcopy(model).double()
    frozen = neocog.freeze(model, torch.zeros(1, 3, 44, 44))
    counts = []
    for size in SIZES:
        x = torch.randn(size[0], 3, *size[1:])
        counts.append(compiled_by(lambda x=x: frozen(x)))
        with torch.no_grad():
            wanted = truth(x.double())
        # The largest error of F(4, 3) is 3e-6 of a layer's largest value; there are two in a row.
        torch.testing.assert_close(
            frozen(x).double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item()
        )
    assert counts[2:] == [0] * len(counts[2:])
    last = frozen.plans[-1].natives[0]
    assert any(packed.algorithm in WINOGRAD for packed in last.packed)


def gradients(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> Sequence[Tensor]:
    x = x.requires_grad_()
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])


@pytest.mark.slow
def test_training_compiles_nothing_from_the_fourth_size_on() -> None:
    torch.manual_seed(0)
    # Smooth: where a sign or a maximum is in doubt, gradients go elsewhere.
    model = layers(nn.Tanh, nn.AvgPool2d)
    truth = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="neocog", dynamic=False)
    counts = []
    for size in SIZES:
        x = torch.randn(size[0], 3, *size[1:])
        ours: Sequence[Tensor] = ()

        def step(x: Tensor = x) -> None:
            nonlocal ours
            ours = gradients(model, compiled, x)

        with torch._dynamo.config.patch(recompile_limit=64):
            counts.append(compiled_by(step))
        for got, wanted in zip(ours, gradients(truth, truth, x.detach().double()), strict=True):
            # As above, for twice as many layers.
            bound = 4e-5 * wanted.abs().max().item() + 1e-12
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=bound)
    assert counts[3:] == [0] * len(counts[3:])


def test_sizes_of_one_network_are_not_counted_apart() -> None:
    """A layer that stands in a network five times, at five sizes, has its own kernel for each."""
    sizes = kernels.Sizes()
    with sizes.size("first"):
        assert not any(kernels.serves_any_size(n, lambda: None) for n in range(5))
    with sizes.size("second"):
        assert not kernels.serves_any_size(5, lambda: None)
    prepared = []
    with sizes.size("third"):
        assert kernels.serves_any_size(6, lambda: prepared.append(6))
        assert not kernels.serves_any_size(3, lambda: prepared.append(3))
    assert prepared == [6, 3]
    with sizes.size("second"):
        assert not kernels.serves_any_size(8, lambda: None), "met again after others"
    assert not kernels.serves_any_size(7, lambda: None), "outside a model, as ever"


def test_choices_are_settled_by_the_third_size() -> None:
    sizes, made = kernels.Sizes(), []
    for choice in "abcd":
        with sizes.size(choice):
            made.append(kernels.settle("layer", lambda choice=choice: choice))
            again = kernels.Moment.now()
    assert made == ["a", "b", "c", "c"]
    with kernels.at(again):
        assert kernels.many_sizes() and kernels.settle("layer", lambda: "e") == "c"
    assert not kernels.many_sizes() and kernels.settle("layer", lambda: "e") == "e"
