"""The commands that look into a network: ``summary`` and ``explain``."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidProblem
from ..foreign import shown, text_of
from .given import (
    Given,
    InputOption,
    ModelArgument,
    Picture,
    check_out,
    numbers,
    open_model,
    read_picture_for,
    serve_command,
)
from .reading import WeightsOption
from .shared import ForceOption, JsonOption, check_new, print_json, say

if TYPE_CHECKING:
    from ..web.page import Page

MEGA = 1_000_000

InputsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME=]SIZES[:TYPE]",
        help="A tensor that MODEL takes, as 3,224,224 or ids=12:int64; several: see above.",
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
    input: InputsOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a network layer by layer: sizes, weights, work and receptive fields.

    For each convolution and pool the size formula with its numbers, and the weights beside those
    of a fully connected layer between the same shapes. A network that cannot take its input is
    listed up to the layer that fails.

    --input is given once for each tensor that MODEL takes, without the batch: 3,224,224 goes by
    position; image=3,224,224 is the argument of that name; ids=12:int64 has another type than the
    weights; batch.ids=12:int64 is the entry ids of a dictionary, the argument batch.
    """
    from rich.text import Text

    from ..factories import is_factory
    from ..given_inputs import InputSpec
    from ..layers import describe_as_far_as_it_goes
    from ..models import weight_count
    from .looking_json import summary_json
    from .summary_view import summary_view
    from .terminal import SafeConsole

    specs = [InputSpec.parse(text) for text in input or ()]
    if is_factory(model):
        given = open_model(model, weights, "1,1,1" if specs else None)  # it may take anything
    elif len(specs) > 1:
        raise InvalidProblem(f"--input {specs[1]}: {model} takes one picture, expected one C,H,W")
    else:
        given = open_model(model, weights, input[0] if input else None)
        specs = []
    specs = specs or [InputSpec(given.in_shape)]
    walked = describe_as_far_as_it_goes(given.loaded.model, *specs)
    error = walked.error or given.error
    parameters = weight_count(given.loaded.model)
    if error is not None and (as_json or not walked.layers):
        raise error
    if as_json:
        print_json(summary_json(model, specs, walked, parameters))
        return
    console = SafeConsole()
    source = given.loaded.source
    on = f"an input of {specs[0]}" if len(specs) == 1 else ", ".join(map(str, specs))
    console.print(Text.assemble((shown(source), "bold"), f" on {on}"))
    console.print()
    counted = parameters if error is None else None
    console.print(summary_view(walked, specs, counted))
    if error is not None:
        raise error


def explain(
    model: ModelArgument,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="A picture file, or test:N, a test picture of MODEL's own data.",
        ),
    ],
    layer: Annotated[
        str | None,
        typer.Option("--layer", metavar="L", help="Its number in `summary`, or its name."),
    ] = None,
    channel: Annotated[
        int | None, typer.Option("--channel", metavar="C", help="The output channel, from 0.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="Y,X", help="Row and column of its output, from 0."),
    ] = None,
    weights: WeightsOption = None,
    input: InputOption = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Draw every input channel, not only the largest few.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page.", show_default="<IMAGE>.html"),
    ] = None,
    force: ForceOption = False,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="L,L", help="Layers whose exact numbers come first."),
    ] = None,
    budget: Annotated[
        float, typer.Option("--budget", metavar="MB", help="Of exact numbers in the page.")
    ] = 8,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page with all its numbers until Ctrl-C.")
    ] = False,
    port: Annotated[
        int,
        typer.Option(
            "--port", metavar="N", help="To serve at.", show_default="a free one", min=0, max=65535
        ),
    ] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
    no_times: Annotated[
        bool, typer.Option("--no-times", help="Compile and time no kernels.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where the numbers of a network come from, and check them against the network.

    Writes a page in which to point at any number of any feature map: the window it was computed
    from with its padding, the kernel, every product, the sum of each input channel, bias,
    activation and the pool's winner. With --layer, --channel and --at, prints one number's to the
    terminal; exit code 1 if that does not lead to the network's own value.
    """
    place = {"--layer": layer, "--channel": channel, "--at": at}
    missing = [name for name, value in place.items() if value is None]
    if missing and len(missing) < len(place):
        raise InvalidProblem(
            f"{missing[0]} is missing: --layer, --channel and --at name one number together"
        )
    if not 0 < MEGA * budget < math.inf:
        raise InvalidProblem(f"--budget {budget:g}: expected a number of megabytes above 0")
    if serve and (as_json or len(missing) < len(place)):
        raise InvalidProblem("--serve goes with neither --json nor --layer, --channel and --at")
    path = out or Path(f"{Path(image.replace(':', '-')).stem}.html")
    check_out(path, [image, model, weights])
    if not serve and missing:
        check_new(path, force)
    given = open_model(model, weights, input)
    picture = read_picture_for(image, given, model)
    if layer is not None and channel is not None and at is not None:
        row, col = numbers("--at", at, "Y,X", 2)
        _print(model, image, given, picture, (layer, channel, (row, col)), show_all, as_json)
        return
    from ..web.page import make_page
    from ..web.payload import About

    about = About(
        model=text_of(model),
        image=text_of(image),
        notes=picture.notes,
        command=serve_command(model, image, weights, input),
        classes=given.loaded.classes or None,
        truth=picture.truth,
    )
    page = make_page(
        given.loaded.model,
        picture.x[None],
        about,
        layers=[part.strip() for part in (layers or "").split(",") if part.strip()],
        budget=round(MEGA * budget),
        serve=serve,
        timed=not no_times,
        error=given.error,
    )
    if serve:
        _serve(page, port, _on_desktop() and not no_open)
    else:
        page.save(path)
        if as_json:
            exact = [name for name, exact in page.layers() if exact]
            print_json({"page": text_of(path), "bytes": path.stat().st_size, "exact": exact})
        else:
            _say(page, path)
            if _on_desktop() and not no_open:
                typer.launch(str(path))
    if page.scene.error is not None:
        raise page.scene.error


def _print(
    model: str,
    image: str,
    given: Given,
    picture: Picture,
    place: tuple[str, int, tuple[int, int]],
    show_all: bool,
    as_json: bool,
) -> None:
    """One number, on the terminal."""
    from rich.text import Text

    from ..tracing import explain_value
    from .explain_view import Look, explain_view
    from .looking_json import explanation_json
    from .terminal import SafeConsole

    layer, channel, at = place
    wanted = int(layer) if layer.isdecimal() else layer
    found = explain_value(given.loaded.model, picture.x, wanted, channel, at)
    if as_json:
        print_json(explanation_json(model, image, picture.notes, found))
    else:
        console = SafeConsole()
        for note in picture.notes:
            console.print(Text(f"note: {shown(note)}", style="dim"))
        padding = "." if console.options.ascii_only else "·"
        console.print(explain_view(found, Look(console.width, show_all, padding)))
    if not found.matches:
        say(
            f"the explanation gives {found.explained:.9g} but the network {found.network:.9g}: "
            f"they differ by {found.difference:.1e}, at most {found.allowed:.1e} is rounding",
            err=True,
        )
        raise typer.Exit(1)


def _say(page: Page, path: Path) -> None:
    """Where the page is, and what it holds."""
    say(f"{shown(path)}  ({path.stat().st_size / MEGA:.1f} MB)")
    pictures = [name for name, exact in page.layers() if not exact]
    if pictures:
        first = ", ".join(pictures[:4]) + (f" and {len(pictures) - 4} more" if pictures[4:] else "")
        say(f"pictures only, without exact numbers: {shown(first)}")
        say(f"for all numbers: {page.data['command']}")


def _serve(page: Page, port: int, browse: bool) -> None:
    from ..web.server import Server

    with Server(page, port) as server:
        say(f"{server.url}  (Ctrl-C stops)")
        if browse:
            typer.launch(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")


def _on_desktop() -> bool:
    """Whether a browser can be opened for somebody who looks at this terminal."""
    shown = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    return shown and sys.stdout.isatty()
