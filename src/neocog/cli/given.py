"""What the commands that look into a network are given: a model, and a picture for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidData, InvalidProblem, NeocogError
from ..foreign import quoted
from .shared import program

if TYPE_CHECKING:  # torch takes a second or two to import: only a command that runs pays for it
    from torch import Tensor, nn

    from ..checkpoint import LoadedModel, Preprocessing

Shape = tuple[int, int, int]

_SHORTHAND = re.compile(r"[0-9]*[A-Z]?[0-9]+(p[0-9]+)?(-[0-9]*[A-Z]?[0-9]+(p[0-9]+)?)*")

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run directory, a checkpoint, package.module:factory or layers as 32C3-P2-10.",
        show_default=False,
    ),
]
InputOption = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="C,H,W",
        help="Channels, height and width of the input.",
        show_default="what MODEL takes, 1,28,28 for layers",
    ),
]


@dataclass(frozen=True)
class Given:
    """A model, the shape of the input it is to be run on, and why it cannot be whole, if so.

    ``error``: layers in shorthand of which only the first fit; ``loaded`` holds these.
    """

    loaded: LoadedModel
    in_shape: Shape
    error: NeocogError | None = None


@dataclass(frozen=True)
class Picture:
    """A picture as the model takes it, float32 (C, H, W), what was done to it, and its class."""

    x: Tensor
    notes: tuple[str, ...] = ()
    truth: int | None = None


def open_model(spec: str, weights: Path | None, size: str | None) -> Given:
    """The model that the arguments name."""
    from ..checkpoint import load_model
    from ..factories import is_factory

    wanted: Shape | None = None
    if size is not None:
        channels, height, width = numbers("--input", size, "C,H,W", 3)
        wanted = channels, height, width
        if min(wanted) < 1:
            raise InvalidProblem(f"--input {size}: expected C,H,W of at least 1 each")
    plain = weights is None and not Path(spec).exists() and not is_factory(spec)
    if plain and _SHORTHAND.fullmatch(spec):
        return _from_shorthand(spec, wanted or (1, 28, 28))
    loaded = load_model(spec, weights)
    in_shape = wanted or loaded.in_shape
    if in_shape is None:
        raise InvalidProblem(f"{spec} does not say what it takes; {_input_hint(loaded.model)}")
    return Given(loaded, in_shape)


def _from_shorthand(spec: str, in_shape: Shape) -> Given:
    import torch

    from .. import models
    from ..checkpoint import LoadedModel, Preprocessing

    torch.manual_seed(0)  # untrained, but the same numbers every time
    tokens, error, model = spec.split("-"), None, None
    for count in range(len(tokens), 0, -1):
        try:
            model = models.parse("-".join(tokens[:count]), in_shape, headless=True).eval()
            break
        except InvalidProblem as found:
            error = error or found
    if model is None:
        assert error is not None
        raise error
    raw = Preprocessing(mean=(0.0,) * in_shape[0], std=(1.0,) * in_shape[0])
    loaded = LoadedModel(model, in_shape, raw, (), f"{spec} (untrained)", spec)
    return Given(loaded, in_shape, error)


def _input_hint(model: nn.Module) -> str:
    from torch import nn

    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return "expected --input C,H,W"
    example = f"{first.in_channels},224,224"
    return (
        f"expected --input C,H,W (its first convolution takes {first.in_channels} channels: "
        f"--input {example})"
    )


def numbers(option: str, text: str, form: str, count: int) -> list[int]:
    """``count`` whole numbers of an option; InvalidProblem if it holds something else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise InvalidProblem(f"{option} {text!r}: expected {form}, {count} whole numbers")
    return numbers


def read_picture_for(image: str, given: Given) -> Picture:
    """The picture that an argument names; InvalidData if there is none that fits."""
    from .. import data
    from ..images import read_picture
    from ..layers import size_text

    in_shape, how = given.in_shape, given.loaded.preprocessing
    number = re.fullmatch(r"test:(-?[0-9]+)", image)
    if number is None:
        channels, *size = in_shape
        prepared = read_picture(
            image,
            channels,
            (size[0], size[1]),
            background=how.background,
            digit_like=how.digit_like,
        )
        return Picture(_applied(how, prepared.tensor), prepared.notes)
    test = data.load().test
    index = int(number.group(1))
    if not 0 <= index < len(test.images):
        raise InvalidData(f"{image}: expected test:0 to test:{len(test.images) - 1}")
    shape = tuple(test.images.shape[1:])
    if shape != in_shape:
        raise InvalidData(
            f"{image} is a digit of {size_text(shape)}, the network takes {size_text(in_shape)}"
        )
    return Picture(_applied(how, test.images[index]), truth=int(test.labels[index]))


def check_out(path: Path, read: Sequence[Path | str | None]) -> None:
    """InvalidProblem for a file that could not be written, or that would replace what is read."""
    if path.is_dir():
        raise InvalidProblem(f"--out {path}: is a folder, expected a file")
    if not path.parent.is_dir():
        raise InvalidProblem(f"--out {path}: {path.parent} is no folder")
    for other in read:
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            raise InvalidProblem(f"--out {path}: would overwrite {other}, which is read")


def serve_command(
    model: str, image: str, weights: Path | None = None, size: str | None = None
) -> str:
    """What to type for the page of a picture with all its numbers."""
    words = [program(), "explain", quoted(model), quoted(image)]
    words += [] if weights is None else ["--weights", quoted(str(weights))]
    words += [] if size is None else ["--input", size]
    return " ".join([*words, "--serve"])


def _applied(how: Preprocessing, pixels: Tensor) -> Tensor:
    return how.apply(pixels[None])[0]
