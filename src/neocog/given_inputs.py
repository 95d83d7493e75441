"""What a model is called with, as it is written on a command line: ``--input`` by ``--input``.

    3,224,224           a tensor of that shape, float32, without the batch
    ids=12:int64        the argument ids, of another type
    batch.mask=12:bool  the entry mask of a dictionary, which is the argument batch

Every tensor gets a batch of one, and holds zeros: shapes are all that is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidProblem
from .headers import LARGEST
from .sight import tensors_in

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
FORM = "[NAME=]SIZES[:TYPE], as 3,224,224 or ids=12:int64"
_SPEC = re.compile(r"(?:(?P<name>[^=:]+)=)?(?P<sizes>[^=:]*)(?::(?P<dtype>[^=:]*))?")


@dataclass(frozen=True)
class InputSpec:
    """One tensor: its argument (``batch.mask``: an entry of one), shape without batch, and type.

    ``dtype`` None is that of the model's parameters.
    """

    shape: tuple[int, ...]
    name: str | None = None
    dtype: torch.dtype | None = None

    @staticmethod
    def parse(text: str) -> InputSpec:
        """The tensor that a text asks for; InvalidProblem if it asks for none."""
        found = _SPEC.fullmatch(text)
        if found is None:
            raise InvalidProblem(f"--input {text!r}: expected {FORM}")
        name, sizes, dtype = found["name"], found["sizes"], found["dtype"]
        if name is not None and not all(part.isidentifier() for part in name.split(".")):
            raise InvalidProblem(f"--input {text!r}: {name!r} is no name, expected {FORM}")
        if dtype is not None and dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InvalidProblem(f"--input {text!r}: {dtype!r} is no type, expected one of {known}")
        parts = [part.strip() for part in sizes.split(",")] if sizes.strip() else []
        if not (name or parts) or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
            raise InvalidProblem(f"--input {text!r}: expected {FORM}")
        shape = tuple(map(int, parts))
        if not 1 <= math.prod(shape) <= LARGEST:
            raise InvalidProblem(f"--input {text!r}: expected sizes of at least 1, not too large")
        return InputSpec(shape, name, None if dtype is None else DTYPES[dtype])

    def __str__(self) -> str:
        text = "x".join(map(str, self.shape)) or "a number"
        text = text if self.name is None else f"{self.name} {text}"
        return text if self.dtype is None else f"{text} {self.dtype_name}"

    @property
    def dtype_name(self) -> str | None:
        """The name of the type, as ``int64``."""
        return None if self.dtype is None else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All tensors in them."""
        return list(tensors_in((self.args, self.kwargs)))

    def __str__(self) -> str:
        tensors = self.tensors()
        text = " and ".join("x".join(map(str, x.shape[1:])) or "a number" for x in tensors)
        picture = len(tensors) == 1 and tensors[0].ndim == 4
        return f"{text} (channels x height x width)" if picture else text


def zeros(specs: Sequence[InputSpec], model: nn.Module) -> Inputs:
    """These inputs, a batch of one each, where the model's parameters are.

    InvalidProblem if two have the same name, or one is a tensor and a dictionary at once.
    """
    like = next(model.parameters(), torch.zeros(()))
    args: list[Tensor] = []
    kwargs: dict[str, Any] = {}
    for spec in specs:
        dtype = like.dtype if spec.dtype is None else spec.dtype
        x = torch.zeros(1, *spec.shape, dtype=dtype, device=like.device)
        if spec.name is None:
            args.append(x)
            continue
        place = kwargs
        *outer, last = spec.name.split(".")
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise InvalidProblem(f"--input {spec.name}: {part} is a tensor already")
        if last in place:
            raise InvalidProblem(f"--input {spec.name}: is given twice")
        place[last] = x
    return Inputs(tuple(args), kwargs)
