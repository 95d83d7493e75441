"""Does neocog train as PyTorch does? The losses of both, from the same weights on the same batches.

    python benchmarks/loss_curves.py [--json FILE] [--plot FILE] [--steps N] [--filter TEXT]

The digits network learns the embedded digits; ResNet-18 learns pictures of 64x64, each the mean
picture of its class under noise. Each is trained with torch.compile(backend="neocog") and with
PyTorch eager.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neocog import data
from neocog.architectures import ARCHITECTURES

STEPS, CLASSES, NOISE = 200, 10, 1.0
Batches = Iterator[tuple[Tensor, Tensor]]
COLOURS = {"eager": "#c8553d", "neocog": "#0b6e99"}


def digits(batch: int) -> Batches:
    """Batches of the embedded digits, values from 0 to 1, always the same ones."""
    train = data.load().train
    generator = torch.Generator().manual_seed(1)
    while True:
        chosen = torch.randint(len(train), (batch,), generator=generator)
        yield train.images[chosen].float() / 255, train.labels[chosen]


def noisy_classes(batch: int) -> Batches:
    """Batches of [3, 64, 64]: the mean picture of a class, and noise as strong as it."""
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(CLASSES, 3, 64, 64, generator=generator)
    while True:
        labels = torch.randint(CLASSES, (batch,), generator=generator)
        noise = torch.randn(batch, 3, 64, 64, generator=generator)
        yield means[labels] + NOISE * noise, labels


@dataclass(frozen=True)
class Lesson:
    """What a network learns, and how fast."""

    batches: Callable[[int], Batches]
    batch: int
    rate: float


LESSONS = {"digits": Lesson(digits, 64, 0.01), "resnet18": Lesson(noisy_classes, 16, 0.01)}

ENGINES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "neocog": lambda model: torch.compile(model, backend="neocog"),
}


def losses(model: nn.Module, forward: Callable[[Tensor], Tensor], lesson: Lesson, steps: int):
    """The loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lesson.rate)
    found = []
    for _, (x, labels) in zip(range(steps), lesson.batches(lesson.batch), strict=False):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def measure(network: str, steps: int) -> dict[str, Any]:
    """The curves of one network."""
    lesson = LESSONS[network]
    torch.manual_seed(0)
    start = ARCHITECTURES[network].make().train()
    curves = {}
    for engine, prepare in ENGINES.items():
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        curves[engine] = losses(model, prepare(model), lesson, steps)
    row = {"network": network, "batch": lesson.batch, "learning_rate": lesson.rate}
    return {**row, "losses": curves}


def show(row: dict[str, Any]) -> None:
    """The losses at the start and at the end, and how far apart the curves are at most."""
    one, other = row["losses"].values()
    apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
    ends = ", ".join(f"{who} {ls[0]:.4f} -> {ls[-1]:.4f}" for who, ls in row["losses"].items())
    print(f"{row['network']}: {ends}; at most {apart:.1e} apart", flush=True)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """The curves of each network, one over the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(rows), 3.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for (engine, curve), width in zip(row["losses"].items(), (4, 1.2), strict=True):
            axes.plot(curve, label=engine, color=COLOURS[engine], linewidth=width)
        axes.set(title=row["network"], xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("loss_curves.json"))
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("loss_curves.png"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--filter", default="")
    options = parser.parse_args()
    rows = []
    for network in (name for name in LESSONS if options.filter in name):
        rows.append(measure(network, options.steps))
        show(rows[-1])
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.plot)


if __name__ == "__main__":
    main()
