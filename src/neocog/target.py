"""Targets: one row per instruction set. Everything the emitters know about hardware stands here.

A new instruction set is a new row of :data:`TARGETS`; no emitter asks for a name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Target:
    """An instruction set as the emitters see it.

    ``tiles`` maps NB (vectors of output channels held at once) to MR (pixels held at once): the
    NB * MR accumulators, NB weights and one broadcast input value fit the vector registers.
    """

    name: str
    lanes: int
    """float32 values in one vector register."""
    tiles: tuple[tuple[int, int], ...]
    requires: frozenset[str]
    """LLVM CPU features without which the row cannot run."""
    cpu: str = ""
    """LLVM CPU name; empty: the processor neocog runs on."""
    features: str = ""
    """LLVM feature string; empty with an empty ``cpu``: every feature of this processor."""

    def pixels(self, blocks: int) -> int:
        """MR: the pixels of a register tile that holds ``blocks`` vectors of output channels."""
        return dict(self.tiles)[blocks]

    @property
    def max_blocks(self) -> int:
        """The largest NB of the table."""
        return max(nb for nb, _ in self.tiles)

    @property
    def attributes(self) -> tuple[str, ...]:
        """LLVM function attributes that keep vectors whole (they would be split to 256 bits)."""
        bits = 32 * self.lanes
        return (f'"prefer-vector-width"="{bits}"', f'"min-legal-vector-width"="{bits}"')


TARGETS = (
    # 32 registers of 16 lanes. NB x MR = 24..28 accumulators hide the latency of two FMA units.
    Target(
        "avx512",
        lanes=16,
        tiles=((1, 14), (2, 14), (3, 8), (4, 6)),
        requires=frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    ),
    # 16 registers of 8 lanes.
    Target(
        "avx2",
        lanes=8,
        tiles=((1, 10), (2, 6)),
        requires=frozenset({"avx2", "fma"}),
        cpu="x86-64-v3",
    ),
    # 16 registers of 4 lanes: SSE on x86, NEON on arm64. Without FMA a product needs a register.
    Target("generic", lanes=4, tiles=((1, 8), (2, 4)), requires=frozenset()),
)


def named(name: str) -> Target:
    """The row called ``name`` (for tests and benchmarks: the AVX2 row runs on AVX-512 machines)."""
    row = next((t for t in TARGETS if t.name == name), None)
    if row is None:
        known = ", ".join(t.name for t in TARGETS)
        raise ValueError(f"target: {name!r} is none of {known}")
    if not row.requires <= host_features():
        raise ValueError(f"target: {name!r} needs {', '.join(row.requires - host_features())}")
    return row


@functools.cache
def host_features() -> frozenset[str]:
    """LLVM's names of the features this processor has."""
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


@functools.cache
def host() -> Target:
    """The first row of the table that this processor can run."""
    return next(t for t in TARGETS if t.requires <= host_features())
