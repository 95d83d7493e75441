"""How the output channels of a convolution are cut into blocks that fit a register tile."""

from __future__ import annotations

from dataclasses import dataclass

from ..target import Target


def blocks_for(target: Target, out_channels: int) -> int:
    """NB: as large as the target allows, then evened out over the blocks."""
    vectors = -(-out_channels // target.lanes)
    count = -(-vectors // target.max_blocks)
    return -(-vectors // count)


@dataclass(frozen=True)
class TiledPlan:
    """What every convolution kernel is specialised on, whatever it sums."""

    target: Target
    channels: int
    """Input channels per group (1 when depthwise)."""
    out_channels: int
    """Output channels per group (all of them when depthwise)."""
    pixel_step: int
    """Input elements between the windows of neighbouring output pixels."""
    blocks: int
    """NB, vectors of output channels per block."""

    @property
    def width(self) -> int:
        """Output channels per block."""
        return self.blocks * self.target.lanes

    @property
    def blocks_per_group(self) -> int:
        """How many blocks cover the output channels of one group."""
        return -(-self.out_channels // self.width)
