"""Memory of tensors that come and go with every step, used again as soon as nobody holds it.

A step of training needs hundreds of megabytes for a moment: what is kept for the backward pass, and
the gradients. Fresh pages of the system cost several times what it takes to write them (measured:
1.8 ms a megabyte against 0.25), so they are kept here. A piece of memory is free again when its
storage has no other owner than this pool; whoever still holds a tensor of it, a view, a NumPy array
or the storage itself keeps it, and so does another process that it may have been sent to.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cpu import forks

SMALL = 1 << 16
"""Bytes up to which PyTorch's own allocator is as quick."""

IDLE = 64
"""Passes after which memory that nobody has asked for goes back to the system."""


@dataclass
class Piece:
    """A storage and when it was last given out."""

    storage: torch.UntypedStorage
    pass_number: int

    @property
    def free(self) -> bool:
        """Whether nobody else owns it."""
        return (
            torch._C._storage_Use_Count(self.storage._cdata) == 1
            # Python's object of it counts once, however many names it has: here, and in this call.
            and sys.getrefcount(self.storage) <= 2
            and not self.storage.is_shared()
        )


@dataclass
class Pool:
    """Pieces by their size in bytes."""

    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    passes: int = 0
    lock: threading.RLock = field(default_factory=forks.lock)
    holds: bool = True
    """Whether memory is held ready. If not, all of it comes from PyTorch, and goes back at once."""

    def empty(self, shape: Sequence[int], format: torch.memory_format | None = None) -> Tensor:
        """An uninitialised float32 tensor on the CPU, contiguous unless told otherwise."""
        size = 4 * math.prod(shape)
        if size <= SMALL or not self.holds:
            return torch.empty(
                tuple(shape), dtype=torch.float32, device="cpu",
                memory_format=format or torch.contiguous_format,
            )  # fmt: skip
        with self.lock:
            pieces = self.pieces.setdefault(size, [])
            piece = next((p for p in pieces if p.free), None)
            if piece is None:
                piece = Piece(torch.UntypedStorage(size), self.passes)
                pieces.append(piece)
            piece.pass_number = self.passes
            found = torch.empty(0, dtype=torch.float32, device="cpu")
            found.set_(piece.storage, 0, tuple(shape), _strides(shape, format))
        return found

    def next_pass(self) -> None:
        """A pass begins: give back what has not been asked for in the last ones."""
        with self.lock:
            self.passes += 1
            for size, pieces in list(self.pieces.items()):
                # What is in use belongs to its user alone, and comes back no more.
                pieces[:] = [p for p in pieces if self.passes - p.pass_number <= IDLE]
                if not pieces:
                    del self.pieces[size]

    @property
    def size(self) -> int:
        """Bytes that are held ready or in use."""
        with self.lock:
            return sum(size * len(pieces) for size, pieces in self.pieces.items())

    def clear(self) -> None:
        """Give everything back."""
        with self.lock:
            self.pieces.clear()


def _strides(shape: Sequence[int], format: torch.memory_format | None) -> list[int]:
    order = list(range(len(shape)))
    if format == torch.channels_last:
        order = [0, 2, 3, 1]
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return strides


POOL = Pool()
"""Of this process."""
