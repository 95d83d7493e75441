"""The network of ``neocog train`` from end to end, beside the same in PyTorch eager.

Both in both of PyTorch's layouts, by turns in one run; inference and a whole training step
(forward, loss, backward, SGD).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models
from .architectures import digits
from .benchmark import SAMPLE, TORCH, Times, WrongResult, interleave, whole_numbers
from .cpu.runtime import thread_count
from .execution import FORMATS

ARCHITECTURE = "32C3-P2-64C3-P2-10"

OURS = {layout: name.replace("torch", "neocog") for layout, name in TORCH.items()}

TOLERANCE = 1e-4
"""Of losses and logits, which are of the order of 1."""


@dataclass(frozen=True)
class NetworkCase:
    """What is done to a batch of pictures."""

    training: bool
    batch: int

    def __str__(self) -> str:
        return f"{'training step' if self.training else 'inference'}, batch {self.batch}"


CASES = tuple(NetworkCase(training, batch) for training in (False, True) for batch in (1, 64))


@dataclass(frozen=True)
class NetworkRow:
    """One case measured: each side in the faster of its two layouts."""

    case: NetworkCase
    times: Times
    threads: int
    rounds: int

    @property
    def neocog(self) -> float:
        """Seconds."""
        return min(self.times.seconds[name] for name in OURS.values())

    @property
    def torch(self) -> float:
        """Seconds."""
        return min(self.times.seconds[name] for name in TORCH.values())

    @property
    def ratio(self) -> float:
        """How many times faster neocog is."""
        return self.torch / self.neocog

    def plain(self) -> dict[str, Any]:
        """The row for a JSON file."""
        row = {"network": ARCHITECTURE, "task": str(self.case).split(",")[0]}
        each = {f"{n.replace(' ', '_')}_ms": 1e3 * s for n, s in self.times.seconds.items()}
        return row | {
            "batch": self.case.batch,
            "neocog_ms": 1e3 * self.neocog,
            "torch_ms": 1e3 * self.torch,
            "ratio": self.ratio,
            **each,
            "threads": self.threads,
            "rounds": self.rounds,
            "samples": self.times.samples,
            "disturbed": self.times.disturbed,
        }


def measure_network(case: NetworkCase, rounds: int, sample: float = SAMPLE) -> NetworkRow:
    """Measure a case with the threads that PyTorch is set to; WrongResult if it goes wrong."""
    found = contenders(case)
    expected, *others = [run() for run in found.values()]
    for name, other in zip(list(found)[1:], others, strict=True):
        if not torch.allclose(expected, other, rtol=TOLERANCE, atol=TOLERANCE):
            far = (expected - other).abs().max().item()
            raise WrongResult(f"{case}: {name} differs from {next(iter(found))} by {far:g}")
    return NetworkRow(case, interleave(found, rounds, sample), thread_count(), rounds)


def contenders(case: NetworkCase) -> dict[str, Callable[[], Tensor]]:
    """neocog and PyTorch in either layout, from the same weights and pictures.

    A call returns the logits, or after a training step its loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = models.parse(ARCHITECTURE)
    pictures = whole_numbers((case.batch, 1, 28, 28), 2, seed=1)
    labels = torch.arange(case.batch) % models.class_count(ARCHITECTURE)
    found = {}
    sides: tuple[tuple[dict[str, str], Callable[[], nn.Module]], ...] = (
        (OURS, lambda: models.parse(ARCHITECTURE)),
        (TORCH, digits),
    )
    for names, make in sides:
        for layout, name in names.items():
            network = make()
            for ours, given in zip(network.parameters(), start.parameters(), strict=True):
                ours.data.copy_(given.data)
            # Not `.to`, which leaves tensors of one channel as they are.
            x = torch.empty(pictures.shape, memory_format=FORMATS[layout]).copy_(pictures)
            network.to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
            found[name] = _step(network, x, labels) if case.training else _inference(network, x)
    return found


def _inference(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    network.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            return network(x)

    return run


def _step(network: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    # So slow that thousands of steps change nothing about the work of one.
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run
