"""The command ``train``."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import NeocogError
from ..foreign import text_of
from .given import word
from .reading import StrictOption
from .shared import JsonOption, ThreadsOption, print_json, use_threads

if TYPE_CHECKING:  # torch takes a second or two to import: only a command that runs pays for it
    from ..distribution import Group
    from ..runs import Run
    from ..training import Trainer
    from .training_view import TrainingView


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(train)


def train(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH",
            help="IDX files as MNIST's, or a folder of class folders.",
            show_default="5,000 handwritten digits that neocog brings along",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="LAYERS",
            help="Kernels C size, P(ool) size, A(verage pool) size, units; the last are classes.",
            show_default="32C3-P2-64C3-P2-<classes>",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Rounds through the data.", show_default="30")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Pictures a step.", show_default="32")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="The highest learning rate.", show_default="0.002"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of all that is random.", show_default="0")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda.", show_default="cpu")
    ] = None,
    threads: ThreadsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run directory to make, new or empty.",
            show_default="runs/<data>-<n>",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the run in this directory.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="N", help="Resize all pictures to N x N.")
    ] = None,
    no_mlp: Annotated[
        bool, typer.Option("--no-mlp", help="Train no multilayer perceptron to compare with.")
    ] = False,
    no_augment: Annotated[
        bool, typer.Option("--no-augment", help="Show the training pictures as they are.")
    ] = False,
    rotation: Annotated[
        float | None,
        typer.Option(metavar="DEGREES", help="Turn pictures by up to so much.", show_default="15"),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(metavar="PIXELS", help="Shift pictures by up to so much.", show_default="0"),
    ] = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror every other picture, left and right.")
    ] = False,
    crop: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Cut off up to this share of height and width, and enlarge the rest.",
            show_default="0",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="neocog: the whole step compiled. eager: layer by layer.",
            show_default="neocog",
        ),
    ] = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a network on pictures, and a multilayer perceptron beside it to compare with.

    Both are then judged by the test pictures, as they are and shifted. Ctrl-C stops; --resume
    goes on with what is finished. Several processes: torchrun --nproc-per-node N -m neocog train.
    """
    from ..distribution import join, leave
    from .training_view import TrainingView

    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    settings |= {"architecture": arch, "mlp": False if no_mlp else None, "engine": engine}
    settings |= {"augment": False if no_augment else None, "flip": flip or None}
    settings |= {"rotation": rotation, "shift": shift, "crop": crop}
    given = {name: value for name, value in settings.items() if value is not None}
    group = join()
    view = TrainingView(to_stderr=as_json, quiet=not group.first)
    held = ExitStack()  # the lock of the run
    try:
        with held:
            with group.watched():
                if resume is not None:
                    others = {"PATH": path, "device": device, "out": out, "size": size}
                    _refuse_beside_resume(resume, {**others, **given})
                    run, trainer = _resumed(resume, threads, group, view.notes, strict, held)
                else:
                    source = (path, size, strict)
                    run, trainer = _begun(
                        source, given, device or "cpu", threads, group, out, view.notes, held
                    )
            _run(run, trainer, view, as_json)
    except typer.Exit:
        raise
    except Exception:
        if group.tells():
            raise
        raise typer.Exit(2) from None  # another worker has said why
    leave()


def _run(run: Run, trainer: Trainer, view: TrainingView, as_json: bool) -> None:
    """The training, and its results by the first worker."""
    from ..distribution import WorkerLost

    group = trainer.group
    try:
        with group.watched():
            view.begin(run, trainer)
            _train(run, trainer, view)
            if not group.first:
                return
            metrics = run.finish(trainer)
    except KeyboardInterrupt:
        if group.size > 1:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun hands it on once more
            if group.first:
                group.tells()
        view.stopped(run, _kept(run, trainer), group)
        raise typer.Exit(130) from None
    except WorkerLost as error:
        kept = f"{_kept(run, trainer)} of {run.settings.epochs} epochs are kept"
        command = f"{group.command} train --resume {word(run.folder)}"
        raise WorkerLost(f"{error}: the run stops; {kept}. Go on by: {command}") from error
    pages = _pages(run, metrics, view.notes)
    if as_json:
        print_json({"run": text_of(run.folder), "pages": [*map(text_of, pages)], **metrics})
    else:
        view.results(run, metrics, pages)


def _kept(run: Run, trainer: Trainer) -> int:
    """The epochs that are saved; the last one may have been stopped short of that."""
    try:
        return run.kept()
    except (NeocogError, OSError):  # the directory is on another machine
        return len(trainer.history)


def _begun(
    where: tuple[Path | None, int | None, bool],
    given: dict[str, Any],
    device: str,
    threads: int | None,
    group: Group,
    out: Path | None,
    note: Any,
    held: ExitStack,
) -> tuple[Run, Trainer]:
    """A new run; everything that can be wrong is found before its directory is made."""
    import torch

    from ..runs import Run, Source, preprocessing_of
    from ..settings import Settings, choose_device
    from ..training import Trainer

    Settings(**given)
    chosen = choose_device(device)
    use_threads(group.threads() if threads is None else threads)
    path, size, strict = where
    source = Source(None if path is None else str(path.absolute()), size)
    found = source.load(given.get("seed", 0), strict)
    note(found.notes)
    given.setdefault("architecture", f"32C3-P2-64C3-P2-{len(found.classes)}")
    trainer = Trainer(found, Settings(**given), preprocessing_of(found), chosen, group)
    run = None
    if group.first:
        run = Run.create(trainer, source, out=out, threads=torch.get_num_threads())
        held.enter_context(run.locked(lambda line: note([line])))
    return group.from_first(run), trainer


def _pages(run: Run, metrics: Mapping[str, Any], note: Any) -> list[Path]:
    """The pages about the examples; the training is done, whatever becomes of them."""
    from .run_pages import write_pages

    try:
        return write_pages(run, metrics)
    except (NeocogError, OSError) as error:
        note([f"no pages: {error}"])
    except KeyboardInterrupt:
        note(["no pages: stopped"])
    return []


def _resumed(
    folder: Path,
    threads: int | None,
    group: Group,
    note: Any,
    strict: bool,
    held: ExitStack,
) -> tuple[Run, Trainer]:
    from ..runs import Run

    opened: Run | None = None
    if group.first:  # it alone writes, so that workers of one run do not lock each other out
        opened = Run.open(folder)
        held.enter_context(opened.locked(lambda line: note([line])))
    run: Run = group.from_first(opened)
    same = group.size == run.workers
    if threads is None:
        threads = run.threads if same else group.threads()
    use_threads(threads)
    otherwise = "the last digits may come out otherwise"
    if not same:
        count = "one process" if run.workers == 1 else f"{run.workers} processes"
        note([f"begun with {count}: {otherwise}"])
    elif threads != run.threads:
        note([f"begun with --threads {run.threads}: {otherwise}"])
    found = run.load_data(strict)
    note(found.notes)
    return run, run.resume(found, group)


def _refuse_beside_resume(folder: Path, given: dict[str, Any]) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names:
        name = {"architecture": "arch", "mlp": "no-mlp", "augment": "no-augment"}.get(
            names[0], names[0].replace("_", "-")
        )
        shown = name if name == "PATH" else f"--{name}"
        from ..settings import InvalidSetting

        raise InvalidSetting(
            f"{shown} does not go with --resume: a run goes on as it began "
            f"({folder / 'config.json'})"
        )


def _train(run: Run, trainer: Trainer, view: Any) -> None:
    """The epochs that are left."""
    with view.progress(trainer) as on_step:
        while not trainer.finished:
            row = trainer.run_epoch(on_step)
            if trainer.group.first:
                run.save(trainer)
            view.epoch(row)
