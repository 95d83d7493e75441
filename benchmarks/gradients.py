"""How far gradients are off: PyTorch eager, neocog, and neocog with exact=True against float64.

    python benchmarks/gradients.py [--json FILE] [--filter TEXT]

For each parameter: the largest difference from the gradient that PyTorch computes in float64, from
the same weights, pictures and labels, over that gradient's largest value. Where that is nothing but
rounding, because a batch norm behind takes out what the parameter does (as a shift before a 1x1
convolution and another batch norm), the difference is taken over the largest gradient of the whole
network ("scale" in JSON). Networks and pictures are those of the training race, with its
smallest batches. Batch norms in training mode, dropout off. The table has the largest
error of each network, and where it is; JSON has all.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neocog.architectures import ARCHITECTURES
from neocog.training_contenders import CLASSES, WORKLOADS, without_dropout

ZERO = 1e-12
"""Share of the network's largest gradient below which a gradient in float64 is only rounding."""

ENGINES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "neocog": lambda model: torch.compile(model, backend="neocog"),
    "neocog exact": lambda model: torch.compile(model, backend="neocog", options={"exact": True}),
}


def gradients(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Of the cross entropy, in float64, by parameter."""
    F.cross_entropy(forward(x), labels).backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.double()
    return found


def measure(network: str) -> list[dict[str, Any]]:
    """A row for each parameter of a network."""
    torch.manual_seed(0)
    start = ARCHITECTURES[network].make().train()
    without_dropout(start)
    work = WORKLOADS[network]
    batch = work.batches[0]
    x, labels = torch.randn(batch, *work.in_shape), torch.randint(CLASSES, (batch,))
    exact = copy.deepcopy(start).double()
    truth = gradients(exact, exact, x.double(), labels)
    largest = {name: right.abs().max().item() for name, right in truth.items()}
    most = max(largest.values())
    rows: list[dict[str, Any]] = [
        {
            "network": network,
            "parameter": name,
            "largest": own,
            "scale": own if own > ZERO * most else most,
            "errors": {},
        }
        for name, own in largest.items()
    ]
    for engine, prepare in ENGINES.items():
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        found = gradients(model, prepare(model), x, labels)
        for row in rows:
            right = truth[row["parameter"]]
            error = (found[row["parameter"]] - right).abs().max().item()
            row["errors"][engine] = error / row["scale"]
    return rows


def show(network: str, rows: list[dict[str, Any]]) -> None:
    """The largest error of each engine, and of which parameter it is."""
    cells = []
    for engine in ENGINES:
        worst = max(rows, key=lambda row: row["errors"][engine])
        cells.append(f"{worst['errors'][engine]:8.1e} {worst['parameter']:24}")
    print(f"{network:14}" + "".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--filter", default="")
    options = parser.parse_args()
    print(f"{'network':14}" + "".join(f"{engine:33}" for engine in ENGINES))
    rows = []
    for network in (name for name in WORKLOADS if options.filter in name):
        found = measure(network)
        show(network, found)
        rows += found
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
