"""One run in several processes: what ``torchrun`` starts trains together by PyTorch's own engine.

Every process (a *worker*, numbered from 0 by its *rank*) holds the whole network and sees the same
order of pictures; of each batch it takes its part. ``DistributedDataParallel`` averages the
gradients, which are weighted so that the average is the gradient of the whole batch, however
unevenly it falls apart. So the settings mean the same for any number of workers, and results differ
by rounding alone.

https://docs.pytorch.org/docs/stable/elastic/run.html
https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import NeocogError

TELLS = "neocog/tells"
"""Key of the store under which workers agree on who tells how the run ended."""


class WorkerLost(NeocogError, RuntimeError):
    """Another worker of the run has ended, or cannot be reached any more."""


class _Terminated(BaseException):
    """SIGTERM, on its way out of whatever was being done."""


@dataclass(frozen=True)
class Group:
    """The workers of one run; a process that nobody else trains with is a group of one.

    Attributes:
        rank: of this worker, from 0. The first one writes the files.
        size: how many workers there are.
        local_rank, local_size: likewise, among those of this machine.
        store: in which workers leave each other notes; None in a group of one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this worker writes files and shows progress."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """How workers like these are started, without what follows ``neocog``."""
        machines = self.size // self.local_size
        several = f"--nnodes {machines} ... " if machines > 1 else ""
        return f"torchrun {several}--nproc-per-node {self.local_size} -m neocog"

    def threads(self) -> int | None:
        """Each worker's share of the machine's cores; None, PyTorch's choice, in a group of one.

        torchrun gives every worker one thread unless OMP_NUM_THREADS says otherwise; who says
        otherwise is obeyed.
        """
        if self.size == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        return max(1, (cores or os.cpu_count() or 1) // self.local_size)

    def device(self, asked: torch.device) -> torch.device:
        """The device of this worker: several on one machine take one GPU each."""
        if self.size == 1 or asked.type != "cuda":
            return asked
        return torch.device("cuda", self.local_rank)

    def part(self, count: int) -> slice:
        """This worker's part of a list of that length; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def wrapped(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over the workers by the time backward returns."""
        if self.size == 1:
            return module
        device = next(module.parameters()).device
        return DistributedDataParallel(
            module, device_ids=None if device.type == "cpu" else [device.index]
        )

    def total(self, values: Tensor) -> Tensor:
        """The sum over all workers, in place; every worker has the very same bits of it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def rows(self, mine: Tensor, count: int) -> Tensor:
        """[count, ...]: all rows, of which each worker brings its :meth:`part`."""
        if self.size == 1:
            return mine
        found = mine.new_zeros(count, *mine.shape[1:])
        found[self.part(count)] = mine
        return self.total(found)  # zeros added: nothing is rounded

    def from_first(self, value: Any) -> Any:
        """What the first worker has, for all; the others' values are not looked at."""
        if self.size == 1:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def tells(self) -> bool:
        """Whether this worker is the one, of its machine, to tell how the run ended."""
        if self.store is None:
            return True
        try:
            return self.store.add(f"{TELLS}/{self.rank // self.local_size}", 1) == 1
        except RuntimeError:  # the store went with the worker that kept it
            return True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raises WorkerLost where another worker's end is noticed.

        That is in whatever waits for it, or by SIGTERM, by which torchrun ends the others.
        """
        if self.size == 1:
            yield
            return
        before = signal.signal(signal.SIGTERM, _terminated)
        try:
            yield
        except BaseException as error:
            # This process is about to end by itself: SIGTERM follows, and says no more than this.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            reason = self._lost(error)
            if reason is None:
                raise
            raise WorkerLost(reason) from error
        signal.signal(signal.SIGTERM, before)

    def _lost(self, error: BaseException) -> str | None:
        """What an error says about the other workers; None if it is about something else."""
        if isinstance(error, _Terminated):
            return f"another of {self.size} workers ended, or torchrun was stopped"
        # Errors of gloo have no class of their own.
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error).lower()
        ):
            other = f"worker {1 - self.rank}" if self.size == 2 else "another worker"
            return f"{other} of {self.size} ended or cannot be reached"
        return None


def join() -> Group:
    """The group that ``torchrun`` put this process into; of one, if it did not.

    Tensors on the CPU travel by gloo, those on GPUs by NCCL.

    Raises:
        WorkerLost: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return Group()
    on_gpus = torch.cuda.is_available()
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        group = Group(
            rank,
            size,
            int(os.environ.get("LOCAL_RANK", rank)),
            int(os.environ.get("LOCAL_WORLD_SIZE", size)),
            store,
        )
        if on_gpus:
            torch.cuda.set_device(group.local_rank % torch.cuda.device_count())
        backends = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backends, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise WorkerLost(f"the other workers cannot be reached: {first}") from error
    return group


def leave() -> None:
    """Ends this process if it is in a group of several; all it has to say is said.

    At once: threads of the engine may outlive it, and abort the process (SIGABRT, which torchrun
    takes for a failure) if they ask for the interpreter while that takes itself apart.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated
