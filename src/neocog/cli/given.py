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
    from ..data import DataSet

Shape = tuple[int, int, int]

_TEST = re.compile(r"test:-?[0-9]+")
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


def read_picture_for(image: str, given: Given, model: str) -> Picture:
    """The picture that an argument names; InvalidData if there is none that fits.

    ``test:N`` is one of the test part of what ``model``, the MODEL argument, was trained on.
    """
    from ..images import read_picture
    from ..layers import size_text

    in_shape, how = given.in_shape, given.loaded.preprocessing
    if not is_test_picture(image):
        channels, *size = in_shape
        prepared = read_picture(
            image,
            channels,
            (size[0], size[1]),
            background=how.background,
            digit_like=how.digit_like,
        )
        return Picture(_applied(how, prepared.tensor), prepared.notes)
    found = own_data(model, given.loaded, f"{image}: ")
    index = test_number(image, found)
    shape = tuple(found.test.images.shape[1:])
    if shape != in_shape:
        raise InvalidData(
            f"{image} of {found.name} is a picture of {size_text(shape)}, the network takes "
            f"{size_text(in_shape)}"
        )
    return Picture(_applied(how, found.test.images[index]), truth=int(found.test.labels[index]))


def is_test_picture(image: str) -> bool:
    """Whether an argument names a picture of the test part, as ``test:7``."""
    return _TEST.fullmatch(image) is not None


def test_number(image: str, found: DataSet) -> int:
    """The N of ``test:N``; InvalidData if the test part has no such picture."""
    index = int(image.partition(":")[2])
    if not 0 <= index < len(found.test):
        raise InvalidData(
            f"{image}: expected test:0 to test:{len(found.test) - 1}, the test pictures of "
            f"{found.name}"
        )
    return index


def own_data(model: str, loaded: LoadedModel, before: str = "", strict: bool = False) -> DataSet:
    """The pictures that a network was trained on; neocog's digits if nothing speaks against it.

    A run knows its pictures. A checkpoint away from its run does not, nor does a third party's
    model: these get the digits, unless they say that they take something else.

    Raises:
        Changed: the run's pictures are not those it was trained on; says what has changed.
        InvalidData: the pictures cannot be read, or are not known; begins with ``before``.
    """
    from .. import data
    from ..runs import Run

    run = Run.of(model)
    if run is not None:
        return run.load_data(strict)
    digits = data.load()
    known = loaded.architecture is not None and loaded.classes
    if known and not (loaded.preprocessing.digit_like and loaded.classes == digits.classes):
        raise InvalidData(
            f"{before}{loaded.source} was trained on pictures of its own ("
            f"{some(loaded.classes)}), and lies in no run directory that says where they are"
        )
    return digits


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def word(argument: Path | str) -> str:
    """An argument as it is typed in a shell; a path that looks like an option as a path."""
    text = str(argument)
    return quoted(f"./{text}" if text.startswith("-") else text)


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
    words = [program(), "explain", word(model), word(image)]
    words += [] if weights is None else ["--weights", word(weights)]
    words += [] if size is None else ["--input", size]
    return " ".join([*words, "--serve"])


def _applied(how: Preprocessing, pixels: Tensor) -> Tensor:
    return how.apply(pixels[None])[0]
