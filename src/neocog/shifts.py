"""The reason for convolutions, measured: how well a network reads pictures that are shifted.

A shifted picture is the average over four directions (up, down, left, right; not the diagonals),
and what comes in at the edge is zero, black. MNIST's digits have 4 free pixels on every side of
their box of 20x20, so shifts of up to 4 pixels lose nothing of a digit, or next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .checkpoint import Preprocessing
from .data import Split
from .evaluation import score

PIXELS = (0, 1, 2, 3, 4)
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""(rows, columns) by which a shift of one pixel moves a picture."""


def shifted(images: Tensor, rows: int, cols: int) -> Tensor:
    """Pictures [..., H, W] moved down by ``rows`` and right by ``cols``, zeros coming in."""
    height, width = images.shape[-2:]
    moved = torch.zeros_like(images)
    if abs(rows) < height and abs(cols) < width:
        moved[..., _to(rows, height), _to(cols, width)] = images[
            ..., _to(-rows, height), _to(-cols, width)
        ]
    return moved


def accuracy(model: nn.Module, split: Split, preprocessing: Preprocessing, pixels: int) -> float:
    """Share, 0..1, read rightly after a shift by ``pixels``, averaged over :data:`DIRECTIONS`."""
    if pixels == 0:
        return score(model, split, preprocessing)[1]
    right = 0.0
    for rows, cols in DIRECTIONS.values():
        moved = shifted(split.images, pixels * rows, pixels * cols)
        right += score(model, Split(moved, split.labels), preprocessing)[1]
    return right / len(DIRECTIONS)


def table(
    networks: Mapping[str, nn.Module], split: Split, preprocessing: Preprocessing
) -> dict[str, dict[str, float]]:
    """``{"0": {name: accuracy, ...}, ..., "4": {...}}`` for all of :data:`PIXELS`."""
    return {
        str(pixels): {
            name: accuracy(network, split, preprocessing, pixels)
            for name, network in networks.items()
        }
        for pixels in PIXELS
    }


def _to(offset: int, size: int) -> slice:
    """Where a picture of ``size`` lands inside itself when moved by ``offset``."""
    return slice(max(offset, 0), size + min(offset, 0))
