"""The batches of an epoch, made ready in the background while the network learns from others.

A thread of its own picks, distorts and normalises :data:`AHEAD` batches ahead; PyTorch lets go of
the interpreter's lock in its kernels, so that both get on at once. It takes one batch after the
other and is the only one to draw random numbers, so that what is drawn does not depend on time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .augmentation import Augmentation
from .checkpoint import Preprocessing
from .data import Split
from .distribution import Group

AHEAD = 2
"""How many batches are ready or being made ready while one is learned from."""


@dataclass(frozen=True)
class Batch:
    """What one worker learns from in one step.

    Attributes:
        x: float32 [n, C, H, W], normalised.
        labels: int64 [n].
        count: pictures of the whole batch, of which these are this worker's part.
        share: of the whole batch that these are; 0 if the part is empty. Then there is one picture
            all the same, for no kernel needs to know of batches without any.
    """

    x: Tensor
    labels: Tensor
    count: int
    share: float


@dataclass(frozen=True)
class Batches:
    """How a data set is dealt out.

    ``augmentation`` None shows the pictures as they are; batches go to ``device``.
    """

    split: Split
    size: int
    preprocessing: Preprocessing
    augmentation: Augmentation | None
    device: torch.device
    group: Group

    def __len__(self) -> int:
        """Batches of one epoch; the last may be smaller."""
        return -(-len(self.split) // self.size)

    def epoch(self, generator: torch.Generator, spent: dict[str, float]) -> Generator[Batch]:
        """Each picture once, in an order of the generator's.

        ``spent["data"]`` grows by the seconds that were waited for batches, ``spent["preparing"]``
        by those that went into them in the background. What goes wrong there is raised here.
        Close the iterator if it is left early.
        """
        order = torch.randperm(len(self.split), generator=generator)
        pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        ready: deque[Future[tuple[Batch, float]]] = deque()
        try:
            for chosen in order.split(self.size):
                ready.append(pool.submit(self._timed, chosen, generator))
                if len(ready) > AHEAD:
                    yield _awaited(ready.popleft(), spent)
            while ready:
                yield _awaited(ready.popleft(), spent)
        finally:
            pool.shutdown(cancel_futures=True)

    def prepare(self, chosen: Tensor, generator: torch.Generator) -> Batch:
        """This worker's part of the batch of the pictures at these places, int64 [n]."""
        part = self.group.part(len(chosen))
        share = (part.stop - part.start) / len(chosen)
        if not share:
            part = slice(0, 1)
        images = self.split.images[chosen]
        if self.augmentation is not None:
            images = self.augmentation(images, generator, part)
        else:
            images = images[part]
        x = self.preprocessing.apply(images.to(self.device))
        return Batch(x, self.split.labels[chosen][part].to(self.device), len(chosen), share)

    def _timed(self, chosen: Tensor, generator: torch.Generator) -> tuple[Batch, float]:
        started = time.perf_counter()
        batch = self.prepare(chosen, generator)
        return batch, time.perf_counter() - started


def _awaited(batch: Future[tuple[Batch, float]], spent: dict[str, float]) -> Batch:
    started = time.perf_counter()
    found, seconds = batch.result()
    spent["data"] += time.perf_counter() - started
    spent["preparing"] += seconds
    return found
