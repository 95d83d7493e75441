"""Models that others wrote: ``package.module:factory``, and weights from the files they come in."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import InvalidModel
from .files import read_safetensors


def is_factory(spec: str) -> bool:
    """Whether a MODEL argument has the form ``package.module:factory``."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec) is not None


def from_factory(spec: str) -> nn.Module:
    """The module that ``package.module:factory`` makes, called without arguments.

    Modules of the working directory are found too, as ``python -m`` finds them.

    Raises:
        InvalidModel: no such module or name, an error inside it, or no ``torch.nn.Module`` made.
    """
    if not is_factory(spec):
        raise InvalidModel(f"factory {spec!r}: expected package.module:factory")
    module_name, name = spec.split(":")
    with _working_directory_first():
        # what fails here is code that neocog does not know: any exception can come out of it
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise InvalidModel(f"factory {spec!r}: cannot be imported: {_said(error)}") from error
        factory = getattr(module, name, None)
        if not callable(factory):
            kind = "nothing" if factory is None else f"no function but {type(factory).__name__}"
            raise InvalidModel(f"factory {spec!r}: {name!r} is {kind} in module {module_name!r}")
        try:
            model = factory()
        except Exception as error:
            raise InvalidModel(f"factory {spec!r}: {name}() failed: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise InvalidModel(
            f"factory {spec!r}: {name}() made {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def check_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], source: Path | str, what: str
) -> None:
    """Raises InvalidModel naming the first tensor that does not fit ``model``, with both shapes."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        shape = _shape(tensor)
        if name not in tensors:
            raise InvalidModel(f"{source}: has no tensor {name!r}; {what} has one of {shape}")
        if tensors[name].shape != tensor.shape:
            raise InvalidModel(
                f"{source}: tensor {name!r} is {_shape(tensors[name])}; {what} has {shape}"
            )
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise InvalidModel(
                f"{source}: tensor {name!r} is {tensors[name].dtype}; {what} has {tensor.dtype}"
            )
    for name, tensor in tensors.items():
        if name not in wanted:
            raise InvalidModel(
                f"{source}: has a tensor {name!r} of {_shape(tensor)} that {what} lacks"
            )


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata (a safetensors file's) and tensors of a file for ``--weights``.

    Raises:
        InvalidModel: neither safetensors nor a state dict.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return read_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # a damaged file makes torch.load raise anything from KeyError to zipfile's own errors
    except Exception as error:
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise InvalidModel(
            f"{path}: neither safetensors nor a state dict that torch.load reads with "
            f"weights_only=True ({first})"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidModel(f"{path}: holds {type(state).__name__}, expected a dict of tensors")
    return {}, dict(state)


@contextmanager
def _working_directory_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have rearranged the path itself
            sys.path.remove(folder)


def _said(error: Exception) -> str:
    """An error in one line, with its type: ``ValueError: no such width``."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"
