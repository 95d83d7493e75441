"""What a Winograd kernel is specialised on: its tiles, its matrices and their sizes in memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..steps import Step
from ..target import Target
from . import epilogue as ep
from .tiling import blocks_for
from .winograd_transforms import indices

UNROLL = 8
"""Input channels per trip of the products' inner loop."""

LINE = 16
"""float32 in a cache line: what one prefetch brings, and what sets planes apart.

Planes a power of two apart would share the few lines of one cache set.
"""


@dataclass(frozen=True)
class WinogradPlan:
    """Everything a Winograd kernel is specialised on. Sizes below count in float32 elements."""

    target: Target
    channels: int
    out_channels: int
    m: int
    """Outputs along one side of a tile."""
    epilogue: tuple[Step, ...] = ()
    stage: str = "whole"
    kernel: int = 3
    """Taps along one side of the convolution's kernel."""
    stride: int = 1
    tails: tuple[int, int] = (0, 0)
    """Outputs down and across of the tiles that end a map; 0 where whole tiles fill it."""
    folded: bool = False
    """Whether the phases of the input (see ``phases``) are channels of one map already."""
    any_size: bool = False
    """Whether it serves maps of every size: tiles that end a map count as whole ones, which read
    zeros and write nothing beyond the edge. ``tails`` are 0 then."""

    @property
    def taps(self) -> int:
        """Taps along one side that fall on inputs of one phase: F(m, taps)."""
        return -(-self.kernel // self.stride)

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """The inputs fall apart by (row, column) modulo the stride; the phases in V's order.

        Phases of even rows are neighbours in it, and those of even columns: see ``depths``.
        """
        return ((0, 0),) if self.stride == 1 else ((0, 1), (0, 0), (1, 0), (1, 1))

    @property
    def depth(self) -> int:
        """Channels of all phases: what a product sums over."""
        return self.channels * len(self.phases)

    @property
    def shortened(self) -> bool:
        """Whether odd phases have one tap less, hence nothing to multiply at infinity."""
        return self.stride > 1 and self.kernel % self.stride != 0 and not self.folded

    @property
    def size(self) -> int:
        """Inputs of one phase along one side of a tile."""
        return self.m + self.taps - 1

    @property
    def planes(self) -> int:
        """How many matrices there are: the number of xi."""
        return self.size**2

    @property
    def blocks(self) -> int:
        """NB, vectors of output channels of a register tile."""
        return blocks_for(self.target, self.out_channels)

    @property
    def width(self) -> int:
        """Output channels of a register tile."""
        return self.blocks * self.target.lanes

    @property
    def groups(self) -> int:
        """Register tiles across the output channels."""
        return -(-self.out_channels // self.width)

    @property
    def v_row(self) -> int:
        """The channels of one tile in V: whole vectors."""
        return -(-self.depth // self.target.lanes) * self.target.lanes

    @property
    def m_row(self) -> int:
        """The output channels of one tile in M: whole register tiles."""
        return self.groups * self.width

    @property
    def panel(self) -> int:
        """U of one xi and one register tile across."""
        return self.depth * self.width

    @property
    def pixels(self) -> int:
        """MR, the height of the largest register tile, in winograd tiles."""
        return self.target.pixels(self.blocks)

    @property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """Outputs (down, across) of the kinds of tiles, in the order of the tiles.

        Bottom edge, whole, right edge, corner: the tiles that use a plane are neighbours in it.
        """
        (bottom, right), m = self.tails, self.m
        made = ((bottom, m), (m, m), (m, right), (bottom, right))
        return tuple((rows, cols) for rows, cols in made if rows and cols)

    def uses(self, outputs: int) -> tuple[int, ...]:
        """The rows (or columns) of planes that a tile with so many outputs there needs."""
        return indices(self.m, self.taps, outputs)

    @property
    def name(self) -> str:
        """A name for the listing."""
        shape = f"c{self.channels}k{self.out_channels}"
        if (self.kernel, self.stride) != (3, 1):
            shape += f"_{self.kernel}x{self.kernel}s{self.stride}"
        if any(self.tails):
            shape += f"_t{self.tails[0]}x{self.tails[1]}"
        if self.any_size:
            shape += "_any"
        return f"winograd{self.m}_{self.stage}_{shape}{ep.spelled(self.epilogue)}"
