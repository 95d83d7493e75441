"""The commands that let a trained network read: ``evaluate`` and ``predict``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidModel
from .shared import JsonOption, ThreadsOption, print_json, use_threads

if TYPE_CHECKING:  # torch takes a second or two to import: only a command that runs pays for it
    from torch import Tensor

    from ..checkpoint import LoadedModel
    from ..data import DataSet

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run directory, a checkpoint, or package.module:factory.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weights for package.module:factory."),
]
InputOption = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="C,H,W", help="What package.module:factory takes, if it does not say."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds both commands to the command line."""
    app.command()(evaluate)
    app.command()(predict)


def evaluate(
    model: ModelArgument,
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Data to test on, as train takes it: its test part.",
            show_default="the run's own, else neocog's digits",
        ),
    ] = None,
    weights: WeightsOption = None,
    input: InputOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a network: accuracy, per class, and which class it takes for which."""
    from ..evaluation import evaluate as judge
    from .reading_view import print_evaluation

    use_threads(threads)
    loaded = _open(model, weights, input)
    found = _test_data(model, path, loaded)
    answers = _answers(loaded, found.test.images[:1])
    if answers.shape[1] != len(found.classes):
        raise InvalidModel(
            f"{loaded.source}: tells {answers.shape[1]} classes apart, {found.name} has "
            f"{len(found.classes)} ({_some(found.classes)})"
        )
    notes = list(found.notes)
    if loaded.classes and loaded.classes != tuple(found.classes):
        notes.append(
            f"the classes of the network ({_some(loaded.classes)}) and of {found.name} "
            f"({_some(found.classes)}) are taken for the same, in this order"
        )
    result = judge(loaded.model, found.test, loaded.preprocessing, found.classes)
    if as_json:
        about = {"model": loaded.source, "data": found.name, "notes": notes}
        print_json({**about, **result.to_dict()})
    else:
        print_evaluation(loaded.source, found.name, notes, result)


def predict(
    model: ModelArgument,
    pictures: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Picture files, or folders of them."),
    ],
    top: Annotated[int, typer.Option(metavar="K", help="How many classes to print.")] = 3,
    weights: WeightsOption = None,
    input: InputOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a network reads in pictures of any format and size, and how sure it is."""
    import torch

    from ..images import expand, read_picture
    from ..settings import InvalidSetting
    from .reading_view import Prediction, print_predictions

    if top < 1:
        raise InvalidSetting(f"--top {top}: expected at least 1")
    use_threads(threads)
    loaded = _open(model, weights, input)
    if loaded.in_shape is None:
        raise InvalidModel(f"{loaded.source}: does not say what it takes; expected --input C,H,W")
    channels, height, width = loaded.in_shape
    how = loaded.preprocessing
    paths = expand(pictures)
    read = [
        read_picture(
            path,
            channels,
            (height, width),
            background=how.background,
            digit_like=how.digit_like,
        )
        for path in paths
    ]
    answers = _answers(loaded, torch.stack([picture.tensor for picture in read]))
    shares, order = answers.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
    classes = loaded.classes or tuple(map(str, range(answers.shape[1])))
    predictions = [
        Prediction(
            str(path),
            picture.notes,
            [(classes[i], p) for i, p in zip(o.tolist(), s.tolist(), strict=True)][:top],
        )
        for path, picture, o, s in zip(paths, read, order, shares, strict=True)
    ]
    if as_json:
        print_json([prediction.to_dict() for prediction in predictions])
    else:
        print_predictions(predictions)


def _open(spec: str, weights: Path | None, size: str | None) -> LoadedModel:
    """The model; --input stands in where a third-party model does not say what it takes."""
    from ..checkpoint import load_model

    loaded = load_model(spec, weights)
    if size is None:
        return loaded
    if loaded.architecture is not None:
        raise InvalidModel(f"--input {size}: {loaded.source} says itself what it takes")
    parts = size.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise InvalidModel(f"--input {size}: expected C,H,W, three whole numbers of at least 1")
    channels, height, width = map(int, parts)
    return replace(loaded, in_shape=(channels, height, width))


def _test_data(model: str, path: Path | None, loaded: LoadedModel) -> DataSet:
    """The data to judge a model by, in the shape that it takes."""
    from .. import data
    from ..runs import CONFIG, Run

    if path is None and (Path(model) / CONFIG).is_file():
        run = Run.open(Path(model))
        return run.load_data()
    if loaded.in_shape is None:
        return data.load(path)
    channels, height, width = loaded.in_shape
    if channels not in (1, 3):
        raise InvalidModel(
            f"{loaded.source}: takes {channels} channels, pictures give 1 (grey) or 3 (colour)"
        )
    return data.load(path, size=(height, width), colour=channels == 3)


def _answers(loaded: LoadedModel, images: Tensor) -> Tensor:
    """What the model makes of pictures, [N, classes] and finite, or InvalidModel."""
    from ..evaluation import logits

    shape = "x".join(map(str, images.shape[1:]))
    try:
        answers = logits(loaded.model, images, loaded.preprocessing)
    # a third-party model may raise anything; a shape that does not fit is a RuntimeError in torch
    except (RuntimeError, ValueError, TypeError) as error:
        first = str(error).strip().split("\n")[0]
        raise InvalidModel(f"{loaded.source}: cannot take pictures of {shape}: {first}") from error
    if answers.dim() != 2 or not answers.is_floating_point():
        raise InvalidModel(
            f"{loaded.source}: answers {tuple(answers.shape)}, expected (pictures, classes)"
        )
    if not answers.isfinite().all():
        raise InvalidModel(
            f"{loaded.source}: its answers are not finite, its weights are of no use"
        )
    return answers


def _some(names: Any) -> str:
    shown = list(map(str, names[:4]))
    return ", ".join(shown) + (", ..." if len(names) > 4 else "")
