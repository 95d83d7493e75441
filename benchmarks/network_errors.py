"""How far whole networks are off: PyTorch eager, neocog.freeze, and exact=True, against float64.

    python benchmarks/network_errors.py [--json FILE] [--filter TEXT] [--seeds N]

The networks are those of the race, and three shapes that others build: a U-Net, the decoder of a
variational autoencoder, and a feature pyramid on ResNet-18. Weights are random, as PyTorch or
``neocog.architectures`` makes them. Batch norms come with statistics in two ways: "fresh", those
of a new model (mean 0, variance 1), and "seen", taken from pictures like the one that is then
asked about. Pictures are noise, one at a time, of 64 to 256 pixels, tried with several seeds.

The error is the largest difference of a result from that in float64, over the latter's largest
value; of several results, the worst. It shall be at most max(3e-6, 4 x eager's): "share" is how
much of that it takes.
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

import neocog
from neocog.architectures import ARCHITECTURES, randomise_batch_norms
from neocog.diagnosis import cpu_name

LIMIT, RATIO = 3e-6, 4.0
"""What an error may be, and how many times eager's, whichever is more."""

SEEN_BATCHES, SEEN_BATCH = 4, 4
"""Pictures from which batch norms take their statistics."""

Row = dict[str, Any]


# ------------------------------------------------------------------------------------ networks


def double(into: int, out: int, norms: bool) -> nn.Sequential:
    """Two convolutions, as a U-Net has them."""
    steps: list[nn.Module] = []
    for channels in (into, out):
        steps.append(nn.Conv2d(channels, out, 3, padding=1, bias=not norms))
        steps += [nn.BatchNorm2d(out)] * norms
        steps.append(nn.ReLU(inplace=True))
    return nn.Sequential(*steps)


class UNet(nn.Module):
    """Ronneberger et al., arXiv:1505.04597, padded; from [N, 3, H, W] to [N, 2, H, W]."""

    WIDTHS = (32, 64, 128, 256)

    def __init__(self, norms: bool) -> None:
        super().__init__()
        widths = self.WIDTHS
        self.down = nn.ModuleList(
            double(a, b, norms) for a, b in zip((3, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[-2::-1])
        self.join = nn.ModuleList(double(2 * w, w, norms) for w in widths[-2::-1])
        self.out = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for k, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if k else x)
            kept.append(x)
        for up, join, beside in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([beside, up(x)], 1))
        return self.out(x)


class ResidualBlock(nn.Module):
    """Of a decoder: (norm, SiLU, convolution) twice."""

    def __init__(self, into: int, out: int, norms: bool) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for channels in (into, out):
            steps += [nn.GroupNorm(8, channels)] * norms
            steps += [nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)]
        self.body = nn.Sequential(*steps)
        self.beside = nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x) + self.body(x)


class Decoder(nn.Sequential):
    """As that of Rombach et al., arXiv:2112.10752, smaller: [N, 4, H, W] to [N, 3, 8H, 8W]."""

    WIDTHS = (128, 128, 64, 32)

    def __init__(self, norms: bool) -> None:
        width = self.WIDTHS[0]
        steps: list[nn.Module] = [nn.Conv2d(4, width, 3, padding=1)]
        for k, out in enumerate(self.WIDTHS):
            if k:
                steps += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
            steps += [ResidualBlock(width, out, norms), ResidualBlock(out, out, norms)]
            width = out
        steps += [nn.GroupNorm(8, width)] * norms
        super().__init__(*steps, nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))


class Pyramid(nn.Module):
    """Lin et al., arXiv:1612.03144, on ResNet-18: from [N, 3, H, W] to maps of H/4 to H/32."""

    WIDTHS = (64, 128, 256, 512)

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        body = dict(ARCHITECTURES["resnet18"].make().named_children())
        self.stem = nn.Sequential(*(body[n] for n in ("conv1", "bn1", "relu", "maxpool")))
        self.stages = nn.ModuleList(body[f"layer{k}"] for k in (1, 2, 3, 4))
        self.beside = nn.ModuleList(nn.Conv2d(w, width, 1) for w in self.WIDTHS)
        self.out = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.WIDTHS)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage, beside in zip(self.stages, self.beside, strict=True):
            x = stage(x)
            maps.append(beside(x))
        for k in (2, 1, 0):
            maps[k] = maps[k] + F.interpolate(maps[k + 1], scale_factor=2.0)
        return [out(m) for out, m in zip(self.out, maps, strict=True)]


@dataclass(frozen=True)
class Subject:
    """A network, and the pictures it is asked about."""

    name: str
    make: Callable[[], nn.Module]
    sizes: tuple[int, ...] = (64, 96, 128, 224, 256)
    channels: int = 3
    shrink: int = 1
    """How much larger the result of a decoder is than what it is given."""


SUBJECTS = (
    Subject("digits", ARCHITECTURES["digits"].make, (28,), 1),
    *(Subject(n, ARCHITECTURES[n].make) for n in ("vgg11", "resnet18", "resnet50", "mobilenet_v2")),
    Subject("unet", lambda: UNet(norms=False), (64, 128, 256)),
    Subject("unet, norms", lambda: UNet(norms=True), (64, 128, 256)),
    Subject("decoder", lambda: Decoder(norms=False), (64, 128, 256), 4, 8),
    Subject("decoder, norms", lambda: Decoder(norms=True), (64, 128, 256), 4, 8),
    Subject("pyramid", Pyramid, (64, 128, 256)),
)


# ----------------------------------------------------------------------------------- measuring


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def see(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Batch norms take their statistics from noise, scale and shift being those of training."""
    randomise_batch_norms(model, 0)
    for norm in norms_of(model):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    model.train()
    for _ in range(SEEN_BATCHES):
        model(torch.randn(SEEN_BATCH, *shape))


def outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def error(found: Any, truth: list[Tensor]) -> float:
    """The largest difference over the largest value, of the worst result."""
    pairs = zip(outputs(found), truth, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@torch.no_grad()
def measure(subject: Subject, size: int, statistics: str, seed: int) -> Row:
    """The errors of one case."""
    torch.manual_seed(seed)
    model = subject.make()
    shape = (subject.channels, size // subject.shrink, size // subject.shrink)
    if statistics == "seen":
        see(model, shape)
    model.eval()
    x = torch.randn(1, *shape)
    truth = outputs(copy.deepcopy(model).double()(x.double()))
    errors = {
        "eager": error(model(x), truth),
        "neocog": error(neocog.freeze(model, x)(x), truth),
        "neocog exact": error(neocog.freeze(model, x, exact=True)(x), truth),
    }
    share = errors["neocog"] / max(LIMIT, RATIO * errors["eager"])
    about = {"network": subject.name, "size": size, "statistics": statistics, "seed": seed}
    return {**about, "errors": errors, "share": share}


def cases(text: str) -> Iterator[tuple[Subject, int, str]]:
    for subject in SUBJECTS:
        if text in subject.name:
            ways = ("fresh", "seen") if norms_of(subject.make()) else ("none",)
            yield from ((subject, size, way) for size in subject.sizes for way in ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--filter", default="")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for subject, size, statistics in cases(options.filter):
        found = [measure(subject, size, statistics, seed) for seed in range(options.seeds)]
        worst = max(found, key=lambda row: row["share"])
        told = "  ".join(f"{name} {value:.1e}" for name, value in worst["errors"].items())
        case = f"{subject.name} {size} {statistics}"
        print(f"{case:26} {told}  share {worst['share']:.2f}", flush=True)
        rows += found
    if options.json is not None:
        command = f"python benchmarks/network_errors.py --json FILE --seeds {options.seeds}"
        about = {"command": command, "processor": cpu_name(), "torch": torch.__version__}
        text = json.dumps({**about, "limit": [LIMIT, RATIO], "rows": rows}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
