"""The commands that look into a network: ``summary`` and ``explain``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidData, InvalidProblem
from .reading import WeightsOption
from .shared import JsonOption, print_json

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


def register(app: typer.Typer) -> None:
    """Adds both commands to the command line."""
    app.command()(summary)
    app.command()(explain)


def summary(
    model: ModelArgument,
    weights: WeightsOption = None,
    input: InputOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a network layer by layer: sizes, weights, work and receptive fields.

    For each convolution and pool the size formula with its numbers, and the weights beside those
    of a fully connected layer between the same shapes.
    """
    from rich.console import Console
    from rich.text import Text

    from ..layers import describe, size_text
    from ..models import weight_count
    from .looking_json import summary_json
    from .summary_view import summary_view

    loaded, in_shape = _open(model, weights, input)
    layers = describe(loaded.model, in_shape)
    parameters = weight_count(loaded.model)
    if as_json:
        print_json(summary_json(model, in_shape, layers, parameters))
        return
    console = Console(highlight=False)
    console.print(Text.assemble((loaded.source, "bold"), f" on an input of {size_text(in_shape)}"))
    console.print()
    console.print(summary_view(layers, in_shape, parameters))


def explain(
    model: ModelArgument,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="A picture file, or test:N for a picture of the digits' test part.",
        ),
    ],
    layer: Annotated[
        str, typer.Option("--layer", metavar="L", help="Its number in `summary`, or its name.")
    ],
    channel: Annotated[
        int, typer.Option("--channel", metavar="C", help="The output channel, from 0.")
    ],
    at: Annotated[
        str, typer.Option("--at", metavar="Y,X", help="Row and column of its output, from 0.")
    ],
    weights: WeightsOption = None,
    input: InputOption = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Draw every input channel, not only the largest few.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where one number of a network comes from, and check it against the network.

    The window with its padding, the kernel, every product, the sum of each input channel, bias,
    activation and the pool's winner. Exit code 1 if that does not lead to the network's own value.
    """
    from rich.console import Console
    from rich.text import Text

    from ..tracing import explain_value
    from .explain_view import Look, explain_view
    from .looking_json import explanation_json

    row, col = _numbers("--at", at, "Y,X", 2)
    loaded, in_shape = _open(model, weights, input)
    x, notes = _picture(image, in_shape, loaded.preprocessing)
    wanted = int(layer) if layer.isdecimal() else layer
    found = explain_value(loaded.model, x, wanted, channel, (row, col))
    if as_json:
        print_json(explanation_json(model, image, notes, found))
    else:
        console = Console(highlight=False)
        for note in notes:
            console.print(Text(f"note: {note}", style="dim"))
        padding = "." if console.options.ascii_only else "·"
        console.print(explain_view(found, Look(console.width, show_all, padding)))
    if not found.matches:
        typer.echo(
            f"the explanation gives {found.explained:.9g} but the network {found.network:.9g}: "
            f"they differ by {found.difference:.1e}, at most {found.allowed:.1e} is rounding",
            err=True,
        )
        raise typer.Exit(1)


# Arguments


def _open(spec: str, weights: Path | None, size: str | None) -> tuple[LoadedModel, Shape]:
    """The model and the shape of the input it is to be run on."""
    from ..checkpoint import load_model
    from ..factories import is_factory

    given: Shape | None = None
    if size is not None:
        channels, height, width = _numbers("--input", size, "C,H,W", 3)
        given = channels, height, width
        if min(given) < 1:
            raise InvalidProblem(f"--input {size}: expected C,H,W of at least 1 each")
    plain = weights is None and not Path(spec).exists() and not is_factory(spec)
    if plain and _SHORTHAND.fullmatch(spec):
        return _from_shorthand(spec, given or (1, 28, 28))
    loaded = load_model(spec, weights)
    in_shape = given or loaded.in_shape
    if in_shape is None:
        raise InvalidProblem(f"{spec} does not say what it takes; {_input_hint(loaded.model)}")
    return loaded, in_shape


def _from_shorthand(spec: str, in_shape: Shape) -> tuple[LoadedModel, Shape]:
    import torch

    from .. import models
    from ..checkpoint import LoadedModel, Preprocessing

    torch.manual_seed(0)  # untrained, but the same numbers every time
    model = models.parse(spec, in_shape, headless=True).eval()
    raw = Preprocessing(mean=(0.0,) * in_shape[0], std=(1.0,) * in_shape[0])
    return LoadedModel(model, in_shape, raw, (), f"{spec} (untrained)", spec), in_shape


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


def _numbers(option: str, text: str, form: str, count: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise InvalidProblem(f"{option} {text!r}: expected {form}, {count} whole numbers")
    return numbers


def _picture(image: str, in_shape: Shape, how: Preprocessing) -> tuple[Tensor, tuple[str, ...]]:
    """The picture as the model takes it, float32 (C, H, W), and what was done to it."""
    from .. import data
    from ..images import read_picture
    from ..layers import size_text

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
        return how.apply(prepared.tensor[None])[0], prepared.notes
    pictures = data.load().test.images
    index = int(number.group(1))
    if not 0 <= index < len(pictures):
        raise InvalidData(f"{image}: expected test:0 to test:{len(pictures) - 1}")
    shape = tuple(pictures.shape[1:])
    if shape != in_shape:
        raise InvalidData(
            f"{image} is a digit of {size_text(shape)}, the network takes {size_text(in_shape)}"
        )
    return how.apply(pictures[index : index + 1])[0], ()
