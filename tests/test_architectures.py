"""The well-known networks: their size, their shapes, and names that published weights fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neocog.architectures import ARCHITECTURES, randomise_batch_norms
from neocog.models import weight_count

PUBLISHED = {
    "digits": 50_186,
    "vgg11": 132_863_336,
    "vgg16": 138_357_544,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "squeezenet": 1_235_496,
}

# Parameter -> shape in torchvision's state dicts, one from each kind of place.
NAMES = {
    "vgg11": {"features.18.weight": (512, 512, 3, 3), "classifier.6.bias": (1000,)},
    "vgg16": {"features.28.bias": (512,), "classifier.0.weight": (4096, 25088)},
    "resnet18": {"layer2.0.downsample.0.weight": (128, 64, 1, 1), "fc.weight": (1000, 512)},
    "resnet50": {"layer4.2.conv3.weight": (2048, 512, 1, 1), "layer1.0.downsample.1.bias": (256,)},
    "mobilenet_v2": {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.17.conv.1.0.weight": (960, 1, 3, 3),
        "features.18.1.running_var": (1280,),
        "classifier.1.weight": (1000, 1280),
    },
    "squeezenet": {
        "features.12.expand3x3.weight": (256, 64, 3, 3),
        "features.3.squeeze.bias": (16,),
        "classifier.1.weight": (1000, 512, 1, 1),
    },
}

SMALL = [name for name in ARCHITECTURES if not name.startswith("vgg")]


@pytest.fixture(scope="module")
def on_meta() -> dict[str, nn.Module]:
    """Every network without memory for its weights: shapes alone."""
    with torch.device("meta"):
        return {name: found.make() for name, found in ARCHITECTURES.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_as_many_as_published(name: str, on_meta: dict[str, nn.Module]) -> None:
    assert weight_count(on_meta[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_torchvisions(name: str, on_meta: dict[str, nn.Module]) -> None:
    state = on_meta[name].state_dict()
    assert {key: tuple(state[key].shape) for key in NAMES[name]} == NAMES[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pictures_become_logits(name: str, training: bool, on_meta: dict[str, nn.Module]) -> None:
    found = ARCHITECTURES[name]
    model = on_meta[name].train(training)
    out = model(torch.empty(2, *found.in_shape, device="meta"))
    assert out.shape == (2, 10 if name == "digits" else 1000)


def test_the_maps_before_the_classifiers_have_the_published_sizes(
    on_meta: dict[str, nn.Module],
) -> None:
    x = torch.empty(1, 3, 224, 224, device="meta")
    sizes = {"vgg11": 7, "vgg16": 7, "mobilenet_v2": 7, "squeezenet": 13}
    for name, size in sizes.items():
        assert on_meta[name].eval().features(x).shape[2:] == (size, size), name
    for name in ("resnet18", "resnet50"):
        head = list(on_meta[name].eval().children())[:-3]
        assert nn.Sequential(*head)(x).shape[2:] == (7, 7), name


@pytest.mark.parametrize("name", SMALL)
def test_random_weights_keep_numbers_finite_and_pictures_apart(name: str) -> None:
    found = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = randomise_batch_norms(found.make(), 1).eval()
    size = found.in_shape if name == "digits" else (3, 64, 64)
    with torch.inference_mode():
        out = model(torch.randn(2, *size))
    assert out.isfinite().all()
    assert out.abs().max() < 1e5
    # a wrong convolution must be seen in the logits
    assert (out[0] - out[1]).abs().max() > 0.01 * out.abs().max()


def test_training_reaches_every_weight() -> None:
    model = ARCHITECTURES["resnet18"].make().train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("classes", [1, 7])
def test_the_number_of_classes_is_a_choice(classes: int) -> None:
    with torch.device("meta"):
        for found in ARCHITECTURES.values():
            x = torch.empty(1, *found.in_shape, device="meta")
            assert found.make(num_classes=classes).eval()(x).shape == (1, classes)


def test_batch_norms_get_statistics_that_folding_must_heed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Sequential(nn.BatchNorm2d(7)))
    weight = model[0].weight.clone()
    assert randomise_batch_norms(model, seed=3) is model
    assert torch.equal(model[0].weight, weight)
    for norm in (model[1], model[2][0]):
        assert ((norm.weight >= 0.5) & (norm.weight <= 1.5)).all()
        assert ((norm.running_var >= 0.5) & (norm.running_var <= 1.5)).all()
        for moment in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert moment.unique().numel() == moment.numel()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    randomise_batch_norms(model, seed=3)
    assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())
    randomise_batch_norms(model, seed=4)
    assert not torch.equal(first["1.running_mean"], model[1].running_mean)
