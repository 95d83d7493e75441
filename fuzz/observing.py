"""What can be seen of a run: results, gradients, arguments, the module and the process, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

Observation = dict[str, Any]
"""Name -> :class:`Seen` for tensors, a comparable value for everything else."""


@dataclass(frozen=True)
class Seen:
    """A tensor, as it was."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    device: str
    requires_grad: bool
    data: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> Seen:
        """A copy, so that later writes do not show."""
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.device.type == "cpu"
        data = None
        if plain:
            with torch.no_grad():
                data = tensor.detach().clone()
                data = data.to(torch.float64) if data.is_floating_point() else data
        # The stride of an axis with one element, or of no elements, addresses nothing.
        some = tensor.numel() > 0
        strides = [s if n > 1 and some else 0 for n, s in zip(tensor.shape, tensor.stride())]  # noqa: B905
        return cls(
            type(tensor).__name__, tuple(tensor.shape), str(tensor.dtype), tuple(strides),
            str(tensor.device), tensor.requires_grad, data,
        )  # fmt: skip


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nested result, with where it is; containers show as their type."""
    if isinstance(value, TwoTensor):
        yield f"{path}<>", "TwoTensor"
        yield f"{path}.a", value.a
        yield f"{path}.b", value.b
    elif isinstance(value, dict):
        yield f"{path}<>", type(value).__name__
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        yield f"{path}<>", type(value).__name__
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"{path}<>", type(value).__name__
        for name in (f.name for f in dataclasses.fields(value)):
            yield from leaves(getattr(value, name), f"{path}.{name}")
    else:
        yield path, value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a nested result, in order."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def look(value: Any, name: str) -> Observation:
    """A nested value."""
    return {
        f"{name}{path}": Seen.of(leaf) if isinstance(leaf, Tensor) else plain(leaf)
        for path, leaf in leaves(value)
    }


def plain(value: Any) -> Any:
    """Something comparable for a value that is no tensor."""
    if isinstance(value, int | float | str | bool | torch.dtype | torch.device | type(None)):
        return f"{type(value).__name__} {value!r}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return type(value).__name__


def sharing(given: list[Any], result: Any, name: str) -> Observation:
    """Which tensors of a result are arguments or one another, and which share their memory."""
    known = [t for value in given for t in tensors_of(value)]
    same, memory = [], []
    for tensor in tensors_of(result):
        same.append(next((i for i, t in enumerate(known) if t is tensor), None))
        memory.append(next((i for i, t in enumerate(known) if _memory(t) == _memory(tensor)), None))
        known.append(tensor)
    return {f"{name} identity": tuple(same), f"{name} memory": tuple(memory)}


def _memory(tensor: Tensor) -> Any:
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # a wrapper without memory
        return id(tensor)


MARKS = ("_is_torch_compile",)
"""What torch.compile itself leaves on a module."""


def module_state(model: nn.Module, name: str = "model") -> Observation:
    """All that a module and its submodules keep: types, values, devices, hooks, flags."""
    found: Observation = {}
    for path, module in model.named_modules():
        where = f"{name}.{path}" if path else name
        found[f"{where}()"] = type(module).__name__
        for key, value in module.__dict__.items():
            if key in MARKS:
                continue
            if key in ("_parameters", "_buffers"):
                found[f"{where} {key}"] = tuple(value)
                for own, tensor in value.items():
                    found.update(look(tensor, f"{where}.{own}"))
            elif key == "_modules":
                found[f"{where} {key}"] = tuple(value)
            elif key.startswith("_") and isinstance(value, dict):
                found[f"{where} {key}"] = tuple(plain(v) for v in value.values())
            elif not isinstance(value, nn.Module):
                found.update(look(value, f"{where}.{key}"))
    return found


def process_state() -> Observation:
    """What belongs to nobody: modes, defaults, settings."""
    return {
        "process: grad mode": torch.is_grad_enabled(),
        "process: inference mode": torch.is_inference_mode_enabled(),
        "process: autocast": torch.is_autocast_enabled("cpu"),
        "process: default dtype": str(torch.get_default_dtype()),
        "process: default device": str(torch.get_default_device()),
        "process: threads": torch.get_num_threads(),
        "process: deterministic": torch.are_deterministic_algorithms_enabled(),
        "process: mkldnn": torch.backends.mkldnn.enabled,
        "process: matmul precision": torch.get_float32_matmul_precision(),
        "process: dynamo": repr(sorted(torch._dynamo.config.get_config_copy().items(), key=str)),
    }


def random_state() -> Observation:
    """The state of PyTorch's generator."""
    return {"process: random state": hash(torch.get_rng_state().numpy().tobytes())}
