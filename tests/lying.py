"""Where maps lie in the tests of kernels inside programs.

In buffers with halos of their own width and with channels of other maps beside theirs, which are
NaN and may not be read into any result.
"""

from __future__ import annotations

from dataclasses import dataclass

import kernel_tools as kt
import torch
from torch import Tensor

from neocog.maps import Halo, Map
from neocog.program import Place


@dataclass(frozen=True)
class Lying:
    """A map in a call buffer of its own: its halo, and channels of other maps beside it."""

    shape: tuple[int, ...]
    halo: Halo
    beside: int = 0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        batch, channels, height, width = self.shape
        h = self.halo
        return (batch, height + h.top + h.bottom, width + h.left + h.right, channels + self.beside)

    def map(self, place: Place) -> Map:
        _, rows, cols, pixel = self.sizes
        first = (self.halo.top * cols + self.halo.left) * pixel
        return Map(place + first, rows * cols * pixel, cols * pixel, pixel)

    def filled(self, values: kt.Array, around: float = 0.0) -> Tensor:
        """The buffer: values in a halo of zeros (or another number), NaN beside."""
        batch, channels, height, width = self.shape
        made = torch.full(self.sizes, float("nan"))
        made[..., :channels] = around
        self.interior(made).copy_(kt.tensor(values))
        return made

    def interior(self, buffer: Tensor) -> Tensor:
        """The map (N, C, H, W) as a view of its buffer."""
        _, channels, height, width = self.shape
        h = self.halo
        part = buffer[:, h.top : h.top + height, h.left : h.left + width, :channels]
        return part.permute(0, 3, 1, 2)
