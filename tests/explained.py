"""A network with one of each kind of layer that ``neocog explain`` takes apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import neocog.nn as cog

IN_SHAPE = (1, 19, 20)
CLASSES = ("zero", "one", "two", "three")


class Sampler(nn.Module):
    """(1, 1, 19, 20) -> (1, 4), through a residual of each sort and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = cog.ConvBlock(1, 6, 3, padding=1, pool=cog.MaxPool2d(2))
        self.strided = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.dilated = cog.ConvBlock(6, 6, 3, dilation=2, padding=2, activation="silu")
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False)
        self.largest = nn.MaxPool2d(3, stride=1, padding=1)
        self.average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.residual = cog.ConvBlock(6, 6, 3, padding=1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.padded(x)
        x = torch.relu(self.norm(self.strided(x)))
        y = self.dilated(x) + x
        z = self.grouped(y)
        z = self.residual(self.largest(z), residual=self.average(z))
        return self.head(self.mean(torch.cat([z, y], 1)).flatten(1))


def sampler() -> tuple[Sampler, Tensor]:
    """The network with weights and moments as training leaves them, and a picture for it."""
    torch.manual_seed(0)
    model = Sampler().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_(0, 0.1)
        model.norm.running_var.uniform_(0.5, 1.5)
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.normal_(0, 0.1)
    return model, torch.randn(IN_SHAPE)


class Unknown(nn.Module):
    """A step that neocog has no operation for, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shuffle = nn.Conv2d(1, 4, 3), nn.PixelShuffle(2)
        self.last = nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shuffle(self.first(x)))


class Broken(nn.Module):
    """Its fully connected layer takes less than what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))
