"""The commands that let a trained network read: ``evaluate`` and ``predict``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvalidData, InvalidModel
from ..foreign import readable, text_of
from .given import is_test_picture, own_data, some, test_number, word
from .shared import JsonOption, ThreadsOption, print_json, program, use_threads

if TYPE_CHECKING:  # torch takes a second or two to import: only a command that runs pays for it
    from torch import Tensor

    from ..checkpoint import LoadedModel
    from ..data import DataSet, Split
    from ..images import PreparedPicture

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
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse pictures that cannot be read: leave none out.")
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
    strict: StrictOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a network: accuracy, per class, and which class it takes for which."""
    from ..evaluation import evaluate as judge
    from .reading_view import print_evaluation

    use_threads(threads)
    loaded = _open(model, weights, input)
    found, notes = _test_data(model, path, loaded, strict)
    answers = _answers(loaded, found.test.images[:1])
    if answers.shape[1] != len(found.classes):
        new = [name for name in found.classes if name not in loaded.classes]
        more = f"; {some(new)} is none of the network's" if loaded.classes and new else ""
        raise InvalidModel(
            f"{loaded.source}: tells {answers.shape[1]} classes apart, {found.name} has "
            f"{len(found.classes)} ({some(found.classes)}){more}"
        )
    test, classes = _aligned(loaded.classes, found, notes)
    result = judge(loaded.model, test, loaded.preprocessing, classes)
    if as_json:
        about = {"model": loaded.source, "data": found.name, "notes": notes}
        print_json({**about, **result.to_dict()})
    else:
        print_evaluation(loaded.source, found.name, notes, result)


def predict(
    model: ModelArgument,
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Picture files, folders of them, or test:N, a test picture of MODEL's own data.",
        ),
    ],
    top: Annotated[int, typer.Option(metavar="K", help="How many classes to print.")] = 3,
    weights: WeightsOption = None,
    input: InputOption = None,
    strict: StrictOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a network reads in pictures of any format and size, and how sure it is."""
    import torch

    from ..images import PreparedPicture, left_out
    from ..settings import InvalidSetting
    from .reading_view import Prediction, print_predictions

    if top < 1:
        raise InvalidSetting(f"--top {top}: expected at least 1")
    use_threads(threads)
    loaded = _open(model, weights, input)
    if loaded.in_shape is None:
        raise InvalidModel(f"{loaded.source}: does not say what it takes; expected --input C,H,W")
    given = _read_all(model, loaded, loaded.in_shape, pictures)
    read = [one.tensor for _, one in given if isinstance(one, PreparedPicture)]
    notes = left_out([one for _, one in given if isinstance(one, str)], len(given), strict)
    answers = _answers(loaded, torch.stack(read))
    shares, order = answers.double().softmax(dim=1).sort(dim=1, descending=True, stable=True)
    classes = loaded.classes or tuple(map(str, range(answers.shape[1])))
    tops = iter(zip(order.tolist(), shares.tolist(), strict=True))
    predictions = []
    for path, one in given:
        if isinstance(one, str):
            predictions.append(Prediction(path, (), [], one))
            continue
        top_k = [(classes[i], share) for i, share in zip(*next(tops), strict=True)][:top]
        predictions.append(Prediction(path, one.notes, top_k))
    if as_json:
        print_json([prediction.to_dict() for prediction in predictions])
    else:
        print_predictions(predictions, notes[:1])


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


def _read_all(
    model: str, loaded: LoadedModel, in_shape: tuple[int, int, int], arguments: list[str]
) -> list[tuple[str, PreparedPicture | str]]:
    """Each picture by its name, in order; what cannot be read as the line that says why."""
    from ..images import PreparedPicture, expand, read_picture

    channels, height, width = _of_pictures(in_shape, loaded)
    how = loaded.preprocessing
    own: DataSet | None = None
    found: list[tuple[str, PreparedPicture | str]] = []
    for argument in arguments:
        if is_test_picture(argument):
            own = own or _fitting(own_data(model, loaded, f"{argument}: "), in_shape, argument)
            picture = own.test.images[test_number(argument, own)]
            found.append((argument, PreparedPicture(picture, (height, width), ())))
            continue
        try:
            paths = expand([argument])
        except InvalidData as error:
            found.append((text_of(argument), readable(str(error))))
            continue
        for path in paths:
            try:
                prepared = read_picture(
                    path,
                    channels,
                    (height, width),
                    background=how.background,
                    digit_like=how.digit_like,
                )
                found.append((text_of(path), prepared))
            except InvalidData as error:
                found.append((text_of(path), readable(str(error))))
    return found


def _of_pictures(in_shape: tuple[int, int, int], loaded: LoadedModel) -> tuple[int, int, int]:
    """``in_shape``; InvalidModel if no picture has so many channels."""
    if in_shape[0] not in (1, 3):
        raise InvalidModel(
            f"{loaded.source}: takes {in_shape[0]} channels, pictures give 1 (grey) or 3 (colour)"
        )
    return in_shape


def _fitting(found: DataSet, in_shape: tuple[int, int, int], argument: str) -> DataSet:
    if found.in_shape != in_shape:
        shapes = ["x".join(map(str, shape)) for shape in (found.in_shape, in_shape)]
        raise InvalidData(
            f"{argument} of {found.name} is a picture of {shapes[0]}, the network takes {shapes[1]}"
        )
    return found


def _test_data(
    model: str, path: Path | None, loaded: LoadedModel, strict: bool
) -> tuple[DataSet, list[str]]:
    """The data to judge a model by, in the shape that it takes, and what is to be said of it."""
    from .. import data
    from ..runs import Changed, Run

    if loaded.in_shape is not None:
        _of_pictures(loaded.in_shape, loaded)
    if path is None:
        try:
            found = own_data(model, loaded, strict=strict)
        except Changed as error:
            run = Run.of(model)
            own = None if run is None else run.source.path
            if own is None or len(error.found.classes) != len(loaded.classes):
                raise
            command = f"{program()} evaluate {word(model)} {word(own)}"
            raise InvalidData(f"{error}; to judge it by these all the same: {command}") from error
        return found, list(found.notes)
    if loaded.in_shape is None:
        found = data.load(path, strict=strict)
        return found, list(found.notes)
    channels, height, width = loaded.in_shape
    found = data.load(path, size=(height, width), colour=channels == 3, strict=strict)
    notes = list(found.notes)
    return found, notes + _changed(model, path)


def _changed(model: str, path: Path) -> list[str]:
    """A note if ``path`` holds what a run was trained on, and has changed since."""
    from ..runs import Run

    try:
        run = Run.of(model)
    except InvalidModel:  # the network has been read; about its pictures nothing is known
        return []
    own = None if run is None else run.source.path
    if run is None or own is None or not (Path(own).exists() and path.samefile(own)):
        return []
    changes = run.changes()
    if not changes:
        return []
    return [
        f"since {text_of(run.folder)} was trained: {changes}. It may have been trained on some of "
        "the test pictures"
    ]


def _aligned(
    known: tuple[str, ...], found: DataSet, notes: list[str]
) -> tuple[Split, tuple[str, ...]]:
    """The test part with the labels that the network has learned, and the names of its classes.

    A class that the network knows by name is that one. Those left over are taken for one another
    in their order, and that is noted.
    """
    import torch

    from ..data import Split

    classes = found.classes
    if known == classes or len(set(known)) != len(classes):
        return found.test, classes
    left = [name for name in known if name not in classes]
    others = [name for name in classes if name not in known]
    taken = dict(zip(others, left, strict=True))
    if others:
        notes.append(
            f"the classes of {found.name} ({some(others)}) are taken for those of the network "
            f"({some(left)}), in this order"
        )
    label = torch.tensor([known.index(taken.get(name, name)) for name in classes])
    names = {mine: theirs for theirs, mine in taken.items()}
    return (
        Split(found.test.images, label[found.test.labels]),
        tuple(names.get(name, name) for name in known),
    )


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
