"""Well-known convolutional networks in plain torch.nn, to compile and to measure.

No weights come with them: they are initialised as for training from scratch. All but the first
have torchvision's structure and names of parameters: a state dict saved there can be loaded here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]
"""(channels, height, width) of one picture."""

MOMENTS = 0.5
"""How far :func:`randomise_batch_norms` moves scales and variances from 1."""

VGG11 = (64, "P", 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P")
VGG16 = (
    64,
    64,
    "P",
    128,
    128,
    "P",
    *(256,) * 3,
    "P",
    *(512,) * 3,
    "P",
    *(512,) * 3,
    "P",
)
"""Kernels of 3x3 of each convolution; P: a 2x2 max pool."""

MOBILE_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""MobileNetV2: expansion, channels, blocks and stride of the first block of each stage."""

FIRES = (
    *((16, 64), (16, 64), "P"),
    *((32, 128), (32, 128), "P"),
    *((48, 192), (48, 192), (64, 256), (64, 256)),
)
"""SqueezeNet 1.1: squeezed and expanded channels (of each kernel size) of each fire module."""


def digits(num_classes: int = 10) -> nn.Sequential:
    """``32C3-P2-64C3-P2-10``: from [N, 1, 28, 28] to logits [N, num_classes]."""
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, num_classes),
    )
    return _initialised(network)


# ----------------------------------------------------------------------------------------- VGG


def vgg11(num_classes: int = 1000) -> nn.Sequential:
    """VGG-A without batch norm: from [N, 3, H, W], H and W >= 32, to logits [N, num_classes].

    Source: Simonyan and Zisserman, arXiv:1409.1556.
    """
    return _vgg(VGG11, num_classes)


def vgg16(num_classes: int = 1000) -> nn.Sequential:
    """VGG-D without batch norm; shapes and source as :func:`vgg11`."""
    return _vgg(VGG16, num_classes)


def _vgg(plan: tuple[int | str, ...], num_classes: int) -> nn.Sequential:
    features: list[nn.Module] = []
    channels = 3
    for kernels in plan:
        if isinstance(kernels, str):
            features.append(nn.MaxPool2d(2))
        else:
            features += [
                nn.Conv2d(channels, kernels, 3, padding=1),
                nn.ReLU(inplace=True),
            ]
            channels = kernels
    classifier = nn.Sequential(
        nn.Linear(channels * 7 * 7, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, num_classes),
    )
    return _named(
        features=nn.Sequential(*features),
        avgpool=nn.AdaptiveAvgPool2d(7),
        flatten=nn.Flatten(),
        classifier=classifier,
    )


# -------------------------------------------------------------------------------------- ResNet


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``.

    From [N, into, H, W] to [N, channels, ceil(H/stride), ceil(W/stride)].
    """

    EXPANSION = 1

    def __init__(self, into: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(into, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, activated=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(into, channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 (which strides) and a 1x1 convolution beside a shortcut.

    From [N, into, H, W] to [N, 4*channels, ceil(H/stride), ceil(W/stride)].
    """

    EXPANSION = 4

    def __init__(self, into: int, channels: int, stride: int) -> None:
        super().__init__()
        out = self.EXPANSION * channels
        self.conv1 = _conv(into, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _conv(channels, out, 1, activated=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(into, out, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return self.relu(y)


def resnet18(num_classes: int = 1000) -> nn.Sequential:
    """From [N, 3, H, W] to logits [N, num_classes]. Source: He et al., arXiv:1512.03385."""
    return _resnet(BasicBlock, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int = 1000) -> nn.Sequential:
    """As :func:`resnet18`, with bottlenecks whose 3x3 convolution strides (version 1.5)."""
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes)


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    blocks: tuple[int, ...],
    num_classes: int,
) -> nn.Sequential:
    into, stages = 64, {}
    for stage, count in enumerate(blocks):
        found = []
        for position in range(count):
            stride = 2 if stage and not position else 1
            found.append(block(into, 64 << stage, stride))
            into = block.EXPANSION * (64 << stage)
        stages[f"layer{stage + 1}"] = nn.Sequential(*found)
    return _named(
        conv1=_conv(3, 64, 7, stride=2),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
        **stages,
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(into, num_classes),
    )


def _conv(
    into: int, out: int, size: int, stride: int = 1, groups: int = 1, *, activated: bool = True
) -> nn.Conv2d:
    """Without bias, padded by half its size; ``activated``: a ReLU is behind its batch norm."""
    conv = nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=False)
    _he(conv, "relu" if activated else "linear")
    return conv


def _shortcut(into: int, out: int, stride: int) -> nn.Module:
    if into == out and stride == 1:
        return nn.Identity()
    return nn.Sequential(_conv(into, out, 1, stride, activated=False), nn.BatchNorm2d(out))


# --------------------------------------------------------------------------------- MobileNetV2


class InvertedResidual(nn.Module):
    """Expansion (1x1), depthwise 3x3, projection (1x1) without activation; x added if it fits.

    From [N, into, H, W] to [N, out, ceil(H/stride), ceil(W/stride)].
    """

    def __init__(self, into: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * into
        layers: list[nn.Module] = [_conv_relu6(into, inner, 1)] if expansion > 1 else []
        layers.append(_conv_relu6(inner, inner, 3, stride, groups=inner))
        layers += [_conv(inner, out, 1, activated=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def mobilenet_v2(num_classes: int = 1000) -> nn.Sequential:
    """From [N, 3, H, W] to logits [N, num_classes]. Source: Sandler et al., arXiv:1801.04381."""
    features: list[nn.Module] = [_conv_relu6(3, 32, 3, stride=2)]
    into = 32
    for expansion, channels, count, stride in MOBILE_STAGES:
        for position in range(count):
            first = 1 if position else stride
            features.append(InvertedResidual(into, channels, first, expansion))
            into = channels
    features.append(_conv_relu6(into, 1280, 1))
    return _named(
        features=nn.Sequential(*features),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes)),
    )


def _conv_relu6(into: int, out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = _conv(into, out, size, stride, groups)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6(inplace=True))


# ---------------------------------------------------------------------------------- SqueezeNet


class Fire(nn.Module):
    """A 1x1 convolution squeezes; a 1x1 and a 3x3 expand, their channels one behind the other.

    From [N, into, H, W] to [N, 2*expanded, H, W].
    """

    def __init__(self, into: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(into, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1x1(x)), self.relu(self.expand3x3(x))], 1)


def squeezenet(num_classes: int = 1000) -> nn.Sequential:
    """SqueezeNet 1.1: from [N, 3, H, W], H and W >= 17, to logits [N, num_classes].

    Source: Iandola et al., arXiv:1602.07360; 1.1 is the authors' later, quicker variant.
    """
    features: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
    ]
    into = 64
    for fire in FIRES:
        if isinstance(fire, str):
            features.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
        else:
            squeezed, expanded = fire
            features.append(Fire(into, squeezed, expanded))
            into = 2 * expanded
    classifier = nn.Sequential(
        nn.Dropout(),
        nn.Conv2d(into, num_classes, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
    )
    return _named(features=nn.Sequential(*features), classifier=classifier, flatten=nn.Flatten())


# ------------------------------------------------------------------------------------- weights


def _named(**modules: nn.Module) -> nn.Sequential:
    return _initialised(nn.Sequential(OrderedDict(modules)))


def _initialised(network: nn.Sequential) -> nn.Sequential:
    """Weights of what has a bias, and zeros for the biases; the other convolutions have theirs."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
            if isinstance(module, nn.Conv2d):
                _he(module, "relu")
            else:
                nn.init.normal_(module.weight, 0, 0.01)
    return network


def _he(conv: nn.Conv2d, behind: Literal["relu", "linear"]) -> None:
    """He et al., arXiv:1502.01852: outputs as large as inputs.

    By fan-in: the fan-out that torch computes takes depthwise kernels for dense ones and makes
    them so small that nothing of the picture would be left behind a few of them.
    """
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity=behind)


@torch.no_grad()
def randomise_batch_norms(model: nn.Module, seed: int) -> nn.Module:
    """Gives each batch norm statistics, scale and shift as training leaves them. Returns it.

    Fresh ones have mean 0, variance 1, scale 1, shift 0: whoever folds them into a convolution
    wrongly would not be found out. Scales and variances become 0.5 to 1.5, means and shifts are
    normal with standard deviation 0.1; the same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            for around_one in (module.weight, module.running_var):
                around_one.uniform_(1 - MOMENTS, 1 + MOMENTS, generator=generator)
            for around_zero in (module.bias, module.running_mean):
                around_zero.normal_(0, 0.1, generator=generator)
    return model


# --------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Architecture:
    """A network by name: how to make it, and the picture it is usually given."""

    name: str
    make: Callable[[], nn.Module]
    in_shape: Shape


ARCHITECTURES: dict[str, Architecture] = {
    found.name: found
    for found in (
        Architecture("digits", digits, (1, 28, 28)),
        Architecture("vgg11", vgg11, (3, 224, 224)),
        Architecture("vgg16", vgg16, (3, 224, 224)),
        Architecture("resnet18", resnet18, (3, 224, 224)),
        Architecture("resnet50", resnet50, (3, 224, 224)),
        Architecture("mobilenet_v2", mobilenet_v2, (3, 224, 224)),
        Architecture("squeezenet", squeezenet, (3, 224, 224)),
    )
}
