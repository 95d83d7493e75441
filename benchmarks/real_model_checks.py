"""What real_models.py compares: results with float64, and a model with what it was."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

BOUND, TIMES_EAGER = 3e-6, 4.0
"""What a tensor may be off by: so much of its largest value, or so many times eager's error."""


def tensors(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a result and their places: inside lists, dicts and objects with fields."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{where}[{key!r}]")
    elif dataclasses.is_dataclass(value) or type(value).__name__.endswith("Output"):
        for key, item in vars(value).items():
            yield from tensors(item, f"{where}.{key}")
    elif value is not None:
        yield where, value


def kind(value: Any) -> Any:
    """The types of a result, without its numbers."""
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(kind, value)]
    if isinstance(value, dict):
        return [type(value).__name__, {str(k): kind(v) for k, v in value.items()}]
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape)]
    return type(value).__name__


def state(model: nn.Module) -> dict[str, Any]:
    """What a model is, for comparison: each tensor's identity and value, each attribute's kind."""
    found: dict[str, Any] = {"random state": torch.get_rng_state().clone()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            place = f"{name}.{key}"
            if key in ("_parameters", "_buffers"):
                for own, tensor in value.items():
                    found[f"{name}.{own}"] = tensor_state(tensor)
            elif isinstance(value, Tensor):
                found[place] = tensor_state(value)
            elif isinstance(value, (bool, int, float, str, type(None), torch.Size)):
                found[place] = value
            elif isinstance(value, (list, tuple, dict, set)):
                inside = [tensor_state(t) for _, t in tensors(value) if isinstance(t, Tensor)]
                found[place] = (type(value), len(value), inside)
            else:
                found[place] = type(value)
    return found


def tensor_state(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return (id(tensor), type(tensor), "no data")
    return (id(tensor), type(tensor), tensor.requires_grad, tensor.detach().clone())


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [k for k in {**before, **after} if not same(before.get(k), after.get(k))]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def without_data(model: nn.Module) -> list[str]:
    """Fake and meta tensors anywhere on the model."""
    found = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "_modules":
                continue
            for where, leaf in tensors(value):
                if isinstance(leaf, Tensor) and (
                    leaf.device.type == "meta" or isinstance(leaf, FakeTensor)
                ):
                    found.append(f"{name}.{key}{where}")
    return found


def compare(result: Any, eager: Any, truth: Any) -> dict[str, Any]:
    """Errors against float64 and whether they are within bounds."""
    row: dict[str, Any] = {"frozen": 0.0, "eager": 0.0, "right": True}
    if kind(result) != kind(eager):
        return {"right": False, "why": f"returns {kind(result)} instead of {kind(eager)}"[:300]}
    leaves = zip(tensors(result), tensors(eager), tensors(truth), strict=True)
    for (where, ours), (_, theirs), (_, exact) in leaves:
        if not isinstance(ours, Tensor) or not ours.is_floating_point():
            if not (torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs):
                row.update(right=False, why=f"{where}: other whole numbers")
            continue
        if not theirs.isfinite().all() or not exact.isfinite().all():
            if not torch.equal(ours.isfinite(), theirs.isfinite()):
                row.update(right=False, why=f"{where}: infinite or NaN elsewhere")
            continue
        if not ours.numel():
            continue
        size = exact.abs().max().clamp_min(1e-30)
        error, own = (((v - exact).abs().max() / size).item() for v in (ours, theirs))
        row["frozen"], row["eager"] = max(row["frozen"], error), max(row["eager"], own)
        if not error <= max(BOUND, TIMES_EAGER * own):  # NaN is wrong as well
            row.update(right=False, why=f"{where}: off by {error:.2e}, eager by {own:.2e}")
    return row


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(text.split(":", 1)[1].strip() for text in lines if "model name" in text)
    except (OSError, StopIteration):
        return platform.processor()
