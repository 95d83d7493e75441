"""Trained networks for other programs: ONNX files, and torch.export's own format.

What :mod:`neocog.interchange` makes of a model is run and compared with it before it becomes a
file, so that there is none that computes something else.

Each file says under the key ``neocog`` (ONNX: ``metadata_props``; torch.export: the extra file
``neocog.json``) what its input means, as JSON: classes, mean and std among it (:func:`about`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Preprocessing
from .errors import InvalidModel, InvalidProblem, NotExported
from .files import write_atomically
from .foreign import as_json
from .interchange import (
    BATCH,
    INPUT,
    NEEDED,
    TRACED,
    as_onnx,
    as_torch_export,
    largest_error,
    leaves,
    output_names,
    said,
    traced,
)

FORMAT = 1
FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}
"""The format of a file by how its name ends."""

CHECKED = (1, 3)
"""The batches it is run on."""

TOLERANCE = 1e-5
"""How far an answer may be off, as a share of the largest: engines add in orders of their own.

In ONNX Runtime digits, ResNet-18 and MobileNetV2 were off by 6e-7, 7e-7 and 3e-6.
"""


@dataclass(frozen=True)
class Port:
    """An input or output: its name, its data type as ``float32``, its sizes, ``batch`` if any."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Exported:
    """What was written. The names are ONNX's; torch.export's inputs and outputs go by position.

    Attributes:
        path, bytes: the file and its size.
        format: a value of :data:`FORMATS`.
        opset: of ONNX; None for torch.export.
        inputs, outputs: what it takes and gives.
        values: how a pixel of 0..255 becomes a value of the input.
        checked_in: the program that ran it.
        error: how far its answers were off the model's, as a share of the largest, at most
            :data:`TOLERANCE`.
    """

    path: Path
    bytes: int
    format: str
    opset: int | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    values: str
    checked_in: str
    error: float

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "path": str(self.path)}


def export(
    model: nn.Module,
    path: Path | str,
    in_shape: Sequence[int],
    *,
    classes: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    raw: bool = False,
    opset: int | None = None,
) -> Exported:
    """Writes ``model`` as a file that other programs run, for any size of the batch.

    Args:
        model: in evaluation mode, on the CPU, from float32 [N, C, H, W] to a tensor or several.
        path: ending in ``.onnx`` or ``.pt2`` (``torch.export.load``); replaced if it is there.
        in_shape: (C, H, W) of a picture.
        classes: names by index, kept in the file.
        preprocessing: what pictures go through on their way into ``model``, kept in the file; None
            is scaling to 0..1. See :class:`neocog.checkpoint.Preprocessing`.
        raw: the file takes pixels, uint8 [N, C, H, W], and does the preprocessing itself.
        opset: of ONNX; None is what torch.onnx takes.

    Returns:
        What was written, and how far its answers are off ``model``'s.

    Raises:
        InvalidProblem: an ending or an argument that means nothing.
        InvalidModel: ``model`` is in training mode or fails on such an input.
        NotExported: a package is missing, ``model`` cannot be exported, or the export gives other
            answers. Nothing is written.
        OSError: ``path`` cannot be written.
    """
    path, shape, how = Path(path), tuple(in_shape), preprocessing or Preprocessing((0.0,), (1.0,))
    check_request(path, opset)
    _check_shape(shape, how)
    if any(module.training for module in model.modules()):
        raise InvalidModel("model is in training mode; call model.eval() before neocog.export")
    network = _FromPixels(model, how).eval() if raw else model
    with torch.no_grad():
        asked = [_pictures(batch, shape, raw) for batch in (TRACED, *CHECKED)]
        answers = [_answers(network, x) for x in asked]
        if not all(map(torch.equal, answers[0], _answers(network, asked[0]))):
            raise NotExported("the model gives other answers when it is asked again")
        program = traced(network, asked[0])
        note = as_json(about(how, classes, shape, raw), None)
        if path.suffix == ".onnx":
            made = as_onnx(program, len(answers[0]), note, opset)
        else:
            made = as_torch_export(program, note, asked[1:])
        error = largest_error(made, asked[1:], answers[1:])
    if error > TOLERANCE:
        raise NotExported(
            f"{made.checked_in} gives other answers than the model: they are off by {error:.1e} of "
            f"the largest, expected at most {TOLERANCE:.0e}"
        )
    write_atomically(path, made.data)
    return Exported(
        path,
        len(made.data),
        FORMATS[path.suffix],
        made.opset,
        *_ports(program),
        values=_values(how, raw),
        checked_in=made.checked_in,
        error=error,
    )


def check_request(path: Path, opset: int | None) -> None:
    """Raises what :func:`export` does if no model could be exported so."""
    if path.suffix not in FORMATS:
        known = " or ".join(f"{ending} ({name})" for ending, name in FORMATS.items())
        raise InvalidProblem(f"{path}: expected a file whose name ends in {known}")
    if path.suffix != ".onnx":
        if opset is not None:
            raise InvalidProblem(f"opset {opset}: goes with .onnx, {path} is none")
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise NotExported(
            f"{path}: ONNX files are made and checked with {', '.join(NEEDED)}; not installed: "
            f"{', '.join(missing)}; expected pip install 'neocog[export]'"
        )


def _check_shape(shape: Sequence[int], how: Preprocessing) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise InvalidProblem(f"in_shape {shape}: expected (channels, height, width) of at least 1")
    for name, numbers in (("mean", how.mean), ("std", how.std)):
        if len(numbers) not in (1, shape[0]):
            raise InvalidProblem(
                f"preprocessing: {name} {numbers} has {len(numbers)} numbers, expected one for "
                f"each of the {shape[0]} channels, or one for all"
            )


def about(
    how: Preprocessing, classes: Sequence[str], in_shape: Sequence[int], raw: bool
) -> dict[str, Any]:
    """What a file says about itself: what its input is, and which class each answer stands for."""
    return {
        "format": FORMAT,
        "neocog": metadata.version("neocog"),
        "in_shape": list(in_shape),
        "input": _values(how, raw),
        "raw": raw,
        "classes": list(classes),
        "preprocessing": asdict(how),
    }


class _FromPixels(nn.Module):
    """A network that takes pixels, 0..255."""

    def __init__(self, network: nn.Module, how: Preprocessing):
        super().__init__()
        self.network, self.how = network, how

    def forward(self, input: Tensor) -> Any:
        """Input uint8 (N, C, H, W)."""
        return self.network(self.how.apply(input))


def _values(how: Preprocessing, raw: bool) -> str:
    if raw:
        return "pixels 0..255"
    return f"(pixel / 255 - mean) / std, mean {_listed(how.mean)}, std {_listed(how.std)}"


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.6g}" for number in numbers)


def _pictures(batch: int, shape: Sequence[int], raw: bool) -> Tensor:
    """Random pictures as the network takes them, the same each time."""
    generator = torch.Generator().manual_seed(batch)
    if raw:
        return torch.randint(256, (batch, *shape), generator=generator, dtype=torch.uint8)
    return torch.randn((batch, *shape), generator=generator)


def _answers(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What the model gives, in the order of torch.export; InvalidModel if that is no answer."""
    size = "x".join(map(str, x.shape))
    try:
        answers = leaves(network(x))
    except Exception as error:  # a model that neocog does not know: anything can come out of it
        raise InvalidModel(f"the model fails on an input of {size}: {said(error)}") from error
    for answer in answers:
        if not isinstance(answer, Tensor):
            kind = type(answer).__name__
            raise NotExported(f"the model gives {kind} {answer!r} beside tensors, expected tensors")
        if not answer.isfinite().all():
            raise NotExported(f"the model's answers to an input of {size} are not finite")
    if not answers:
        raise NotExported("the model gives nothing, expected tensors")
    return answers


def _ports(program: torch.export.ExportedProgram) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = [values[name] for name in program.graph_signature.user_inputs]
    outputs = [values[name] for name in program.graph_signature.user_outputs]
    size = str(inputs[0].shape[0])

    def port(name: str, value: Any) -> Port:
        sizes = tuple(n if isinstance(n, int) else str(n).replace(size, BATCH) for n in value.shape)
        return Port(name, str(value.dtype).removeprefix("torch."), sizes)

    return (
        tuple(port(INPUT, value) for value in inputs),
        tuple(map(port, output_names(len(outputs)), outputs)),
    )
