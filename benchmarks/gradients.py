"""How far gradients are off: PyTorch eager, neocog, and neocog with exact=True against float64.

    python benchmarks/gradients.py [--json FILE] [--filter TEXT]

Gradients of a whole network would show nothing: of millions of values a few lie so near to 0 that a
ReLU decides otherwise in float32 than in float64, or so near to each other that a max pool does.
Each such value changes gradients by far more than all rounding, in any engine. So the network is
taken apart, at the sizes of the training race (its smallest batches, batch norms in training mode,
dropout off): one float32 step of PyTorch gives what goes into each block, and the gradient of what
comes out. A block is what runs one behind the other: convolution or Linear [+ batch norm]
[+ ReLU or ReLU6] [+ max pool], or a part of that where it stands alone; so does an average pool. An
activation behind a sum only lets gradients through, and is left out.

Each block is computed anew from these two, in float64 and by each engine. Where the derivative
jumps nearby, the gradient that comes in is set to 0, alike for all: where the input of an
activation, in float64, is closer to 0 (for ReLU6: or to 6) than 1e-5 of its map's largest value,
and where the two largest values of a pool's window are that close to each other, unless the
activation has clipped them, for then nothing goes through anyway. "left_out" in JSON is the share.

The error: the largest difference of a gradient from that in float64, over the latter's largest
value. Gradients of a batch norm may be sums that cancel, since another one behind takes out what
its parameters do (a shift before a 1x1 convolution, say). Where they cancel so far that rounding
each term once may cost 1e-5, the largest gradient of the block takes that value's place, whichever
parameter it is of ("scale" in JSON). The table has, for each network, how many such gradients there
are, the largest errors and how many are above 1e-5; and the ratio of exact=True to eager, gradient
by gradient, where an error below the rounding of a single number counts as that. JSON has all.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neocog.architectures import ARCHITECTURES
from neocog.training_contenders import CLASSES, WORKLOADS, without_dropout

NEAR = 1e-5
"""Share of a map's largest value within which float32 may stand on the other side of a jump."""

LIMIT, RATIO = 1e-5, 2.0
"""What errors, and those of exact=True over PyTorch's, should not exceed."""

ROUNDING = 2.0**-24
"""Of a single number in float32: the least error that counts in a ratio."""

POSITIONS: dict[type[nn.Module], int] = {
    nn.Conv2d: 0,
    nn.Linear: 0,
    nn.AdaptiveAvgPool2d: 0,
    nn.BatchNorm2d: 1,
    nn.ReLU: 2,
    nn.ReLU6: 2,
    nn.MaxPool2d: 3,
}
"""In a block. What computes nothing (Flatten, Identity, dropout switched off) has none."""

JUMPS: dict[type[nn.Module], tuple[float, ...]] = {nn.ReLU: (0.0,), nn.ReLU6: (0.0, 6.0)}
"""Where the derivative of an activation jumps: at the values it clips to."""

ENGINES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "neocog": lambda model: torch.compile(model, backend="neocog"),
    "neocog exact": lambda model: torch.compile(model, backend="neocog", options={"exact": True}),
}

Row = dict[str, Any]


# ---------------------------------------------------------------------------------- recording


@dataclass
class Block:
    """Modules that run one behind the other, and what they are given."""

    name: str
    x: Tensor
    is_first: bool
    modules: list[nn.Module] = field(default_factory=list)
    gradient: Tensor | None = None
    """Of what comes out."""
    out: Tensor | None = None
    """What comes out, until its gradient is there."""
    version: int = 0
    """Of ``out``: a sum may be written over it, and then it is something else."""
    hook: RemovableHandle | None = None

    def add(self, module: nn.Module, out: Tensor) -> None:
        """One more module; its output is that of the block from now on."""
        if self.hook is not None:
            self.hook.remove()
        self.modules.append(module)
        self.out, self.version = out, out._version
        self.hook = out.register_hook(self._record)

    def goes_on(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the module belongs to the block, which is the one that ran just before."""
        fits = POSITIONS[type(module)] > POSITIONS[type(self.modules[-1])]
        return fits and x is self.out and x._version == self.version

    def _record(self, gradient: Tensor) -> None:
        self.gradient, self.out = gradient.clone(), None

    def sequential(self) -> nn.Sequential:
        """The block on its own."""
        return nn.Sequential(*copy.deepcopy(self.modules))


def blocks_of(model: nn.Module, pictures: Tensor, labels: Tensor) -> list[Block]:
    """The blocks of a network, recorded in one step."""
    found: list[Block] = []
    current: list[Block] = []  # that which ran last, if something of it did
    names = {module: name for name, module in model.named_modules()}

    def before(module: nn.Module, given: tuple[Tensor]) -> None:
        position = POSITIONS.get(type(module))
        if position is not None and current and current[0].goes_on(module, given[0]):
            return
        current.clear()
        if position is not None and type(module) not in JUMPS:
            x = given[0].detach().clone()  # what is behind may write over it
            current.append(Block(names[module], x, given[0] is pictures))
            found.extend(current)

    def after(module: nn.Module, _: tuple[Tensor], out: Tensor) -> None:
        if current:
            current[0].add(module, out)

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_pre_hook(before) for leaf in leaves]
    hooks += [leaf.register_forward_hook(after) for leaf in leaves]
    F.cross_entropy(model(pictures), labels).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return found


# ---------------------------------------------------------------------------------- measuring


@torch.no_grad()
def near_jump(block: nn.Sequential, x: Tensor) -> Tensor:
    """Where the gradient of what comes out is not to be relied on; ``block`` and x in float64."""
    jumps: tuple[float, ...] = ()
    x = x.clone()
    near = torch.zeros((), dtype=torch.bool)
    for module in copy.deepcopy(block):
        margin = NEAR * x.abs().max()
        if type(module) in JUMPS:
            jumps = JUMPS[type(module)]
            near = torch.stack([(x - jump).abs() < margin for jump in jumps]).any(0)
        elif isinstance(module, nn.MaxPool2d):
            values = windows(module, x, -torch.inf)
            first, second = values.topk(2).values.unbind(-1)
            clipped = torch.stack([first == jump for jump in jumps] or [first.isnan()]).any(0)
            wins = values >= (first - margin)[..., None]
            inside = windows(module, near.expand_as(x).double(), 0.0) > 0
            near = (wins & inside).any(-1) | ((first - second < margin) & ~clipped)
        x = module(x)
    return near.expand_as(x)


def windows(pool: nn.MaxPool2d, x: Tensor, padding: float) -> Tensor:
    """[N, C, H, W, values of a window], of a pool with square windows."""
    size, stride, pad = pool.kernel_size, pool.stride, pool.padding
    assert isinstance(size, int) and isinstance(stride, int) and isinstance(pad, int)
    assert pool.dilation == 1 and not pool.ceil_mode
    x = F.pad(x, [pad] * 4, value=padding)
    return x.unfold(2, size, stride).unfold(3, size, stride).flatten(4)


def gradients(
    model: nn.Module, forward: Callable[[Tensor], Tensor], block: Block, gradient: Tensor
) -> dict[str, Tensor]:
    """Of the block's input, unless that is the network's, and of its parameters."""
    x = block.x.to(gradient.dtype, copy=True).requires_grad_(not block.is_first)
    leaves = {} if block.is_first else {"input": x}
    leaves |= dict(model.named_parameters())
    forward(x).backward(gradient)
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert found.keys() == leaves.keys(), block.name
    return found


def batch_norm_terms(block: nn.Sequential) -> dict[str, float]:
    """The largest sums of absolute terms of a batch norm's gradients, once they are computed."""
    found: dict[str, float] = {}

    def watch(norm: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        normal = F.batch_norm(given[0].detach(), None, None, training=True)

        def add(gradient: Tensor) -> None:
            for name, terms in {"weight": gradient * normal, "bias": gradient}.items():
                sums = terms.abs().sum((0, 2, 3))
                found[f"{list(block).index(norm)}.{name}"] = sums.max().item()

        out.register_hook(add)

    for module in block:
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(watch)
    return found


def measure(network: str, block: Block) -> list[Row]:
    """A row for each gradient of a block."""
    exact = block.sequential().double()
    near = near_jump(exact, block.x.double())
    assert block.gradient is not None
    gradient = block.gradient.masked_fill(near, 0)
    terms = batch_norm_terms(exact)
    truth = gradients(exact, exact, block, gradient.double())
    rows: list[Row] = []
    for name, right in truth.items():
        row: Row = {"network": network, "block": block.name, "gradient": name}
        row["largest"] = row["scale"] = right.abs().max().item()
        row["left_out"], row["errors"] = near.double().mean().item(), {}
        rows.append(row)
    most = max((row["largest"] for row in rows), default=0.0)
    for row in rows:
        if terms.get(row["gradient"], 0.0) * ROUNDING > LIMIT * row["largest"]:
            row["scale"] = most
    for engine, prepare in ENGINES.items():
        torch._dynamo.reset()
        model = block.sequential()
        found = gradients(model, prepare(model), block, gradient)
        for row in rows:
            name = row["gradient"]
            error = (found[name] - truth[name]).abs_().max().item()
            row["errors"][engine] = error / row["scale"]
    return rows


def measure_all(network: str) -> list[Row]:
    torch.manual_seed(0)
    model = ARCHITECTURES[network].make().train()
    without_dropout(model)
    work = WORKLOADS[network]
    batch = work.batches[0]
    x, labels = torch.randn(batch, *work.in_shape), torch.randint(CLASSES, (batch,))
    return [row for block in blocks_of(model, x, labels) for row in measure(network, block)]


# ------------------------------------------------------------------------------------- showing


def ratio(row: Row) -> float:
    """Of the errors of exact=True to PyTorch's."""
    ours, eager = (max(row["errors"][engine], ROUNDING) for engine in ("neocog exact", "eager"))
    return ours / eager


def show(network: str, rows: list[Row]) -> None:
    """The largest errors, and how many are too large."""
    cancelled = sum(row["scale"] != row["largest"] for row in rows)
    print(f"\n{network}: {len(rows)} gradients, {cancelled} of them cancelled")
    columns = {engine: (by(engine), ".1e", LIMIT) for engine in ENGINES}
    columns["exact / eager"] = ratio, ".2f", RATIO
    for label, (measured, form, most) in columns.items():
        worst = max(rows, key=measured)
        above = sum(measured(row) > most for row in rows)
        print(f"  {label:14}{measured(worst):<9{form}}{place(worst):34}{above:3} above {most:g}")


def by(engine: str) -> Callable[[Row], float]:
    return lambda row: row["errors"][engine]


def place(row: Row) -> str:
    return f"{row['block']} {row['gradient']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--filter", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for network in (name for name in WORKLOADS if options.filter in name):
        found = measure_all(network)
        show(network, found)
        rows += found
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
