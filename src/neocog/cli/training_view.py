"""How ``train`` looks on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..augmentation import Augmentation
from ..distribution import Group
from ..foreign import shown
from ..models import weight_count
from ..runs import Run
from ..training import OnStep, Trainer
from .given import word
from .shared import BAR, bar, percent, program
from .terminal import SafeConsole

NAMES = {"cnn": "network", "mlp": "perceptron"}
COLOURS = {"cnn": "cyan", "mlp": "dark_orange"}


class TrainingView:
    """What ``train`` shows while it runs and when it is done.

    ``to_stderr`` keeps stdout free for JSON; ``quiet`` shows nothing, as all workers but one do.
    """

    def __init__(self, to_stderr: bool = False, quiet: bool = False) -> None:
        self.console = SafeConsole(stderr=to_stderr, quiet=quiet)
        self._epochs = 0

    def notes(self, notes: Iterable[str]) -> None:
        """What was done to the data."""
        for note in notes:
            self.console.print(Text(f"note: {shown(note)}", style="dim"), soft_wrap=True)

    def begin(self, run: Run, trainer: Trainer) -> None:
        """What is about to be trained, and where."""
        found = trainer.data
        self._epochs = trainer.settings.epochs
        counts = f"{len(found.train):,} to learn, {len(trainer.val):,} to choose the best epoch"
        self.console.print(f"pictures    {counts}, {len(found.test):,} to test")
        for name, learner in trainer.learners.items():
            weights = weight_count(learner.model)
            self.console.print(f"{NAMES[name]:11s} {learner.architecture}, {weights:,} weights")
        if trainer.settings.mlp and "mlp" not in trainer.learners:
            self.console.print("no convolution in it: nothing to compare with a perceptron")
        on = "neocog's kernels on the CPU, "
        on += "the whole step compiled" if run.settings.engine == "neocog" else "layer by layer"
        if trainer.device.type != "cpu":
            on = f"PyTorch's own kernels on {trainer.device}: neocog's are for the CPU"
        done = f", {len(trainer.history)} epochs are done" if trainer.history else ""
        count = torch.get_num_threads()
        threads = "1 thread" if count == 1 else f"{count} threads"
        if trainer.group.size > 1:
            threads = f"{trainer.group.size} processes of {threads}"
        self.console.print(f"distorted   {_distorted(trainer.augmentation)}")
        self.console.print(f"computed by {on}, {threads}, seed {run.settings.seed}")
        self.console.print(f"run         {shown(run.folder)}{done}\n")
        self.console.print("loss on the training pictures, share of the validation pictures right:")

    @contextmanager
    def progress(self, trainer: Trainer) -> Iterator[OnStep]:
        """A live bar over all epochs; the function it yields moves it by one step."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        shown = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        total = trainer.settings.epochs * trainer.steps
        with shown:
            task = shown.add_task("", total=total, completed=len(trainer.history) * trainer.steps)

            def on_step(step: int, steps: int, losses: dict[str, float]) -> None:
                epoch = len(trainer.history) + 1
                text = ", ".join(f"{loss:.3f}" for loss in losses.values())
                text = f"epoch {epoch}/{trainer.settings.epochs} loss {text}"
                shown.update(task, advance=1, description=text)

            yield on_step

    def epoch(self, row: Mapping[str, Any]) -> None:
        """One line for a finished epoch."""
        width = len(str(self._epochs))
        line = Text(f"epoch {row['epoch']:{width}d}/{self._epochs}")
        for name in (name for name in NAMES if name in row):
            part = row[name]
            line.append(f"   {NAMES[name]} ", style=COLOURS[name])
            line.append(f"loss {part['loss']:.3f}, {percent(part['val_accuracy'])}")
        self.console.print(line)

    def stopped(self, run: Run, epochs: int, group: Group) -> None:
        """After Ctrl-C."""
        self.console.print(
            f"\nstopped; {epochs} of {run.settings.epochs} epochs are kept. Go on by"
        )
        called = program() if group.size == 1 else group.command
        self._command(f"train --resume {word(run.folder)}", called)

    def results(self, run: Run, metrics: Mapping[str, Any], pages: Sequence[Path]) -> None:
        """The accuracies, the shift table, the pages to open; at last what to type next."""
        self.console.print()
        self.console.print(_accuracies(metrics))
        self.console.print()
        self.console.print(_shift_chart(metrics["shifted"], self.console.options.ascii_only))
        self.console.print(_about_shifts(run, "mlp" in metrics["shifted"]["0"]), style="dim")
        self.console.print(f"{metrics['seconds']:.1f} s of training: {_times(metrics)}")
        self.console.print(f"In {shown(run.folder)}:")
        files = sorted(path.name for path in run.folder.iterdir())
        self.console.print(Padding(", ".join(map(shown, files)), (0, 0, 0, 2)))
        if pages:
            self.console.print("\nOpen in a browser, and point at any number to see its origin:")
        for page in pages:
            link = Text(f"  {shown(page)}", style=f"bold link {page.absolute().as_uri()}")
            self.console.print(link, soft_wrap=True)
        self.console.print("\nNext:")
        for command in _next_commands(run.folder, metrics["examples"]):
            self._command(command)

    def _command(self, arguments: str, called: str | None = None) -> None:
        # In one piece however narrow the terminal is, so that it can be copied.
        line = f"  {called or program()} {arguments}"
        self.console.print(Text(line, style="bold"), soft_wrap=True)


def _distorted(how: Augmentation | None) -> str:
    """What is done to the training pictures."""
    if how is None:
        return "not at all: shown as they are"
    parts = {
        f"rotation {how.rotation:g}°": how.rotation,
        f"scale {how.scale:.0%}": how.scale,
        f"shear {how.shear:.0%}": how.shear,
        f"bend {how.bend:.0%}": how.bend,
        f"shift {how.shift:g} px": how.shift,
        f"crop {how.crop:.0%}": how.crop,
        "flip": how.flip,
    }
    return ", ".join(part for part, amount in parts.items() if amount)


def _times(metrics: Mapping[str, Any]) -> str:
    """What the time went into, as ``Trainer.spent``."""
    shares = {name: percent(share) for name, share in metrics["time_shares"].items()}
    return (
        f"{shares['step']} steps, {shares['validation']} validation, {shares['data']} waiting for "
        f"batches\n(they were made ready meanwhile, in {shares['preparing']} of the time)."
    )


def _about_shifts(run: Run, compared: bool) -> str:
    text = "Shifted test pictures: the mean over up, down, left and right, zeros coming in.\n"
    if compared and not (run.settings.shift or run.settings.crop):
        text += "Neither was shown a shifted picture in training.\n"
    return text


def _accuracies(metrics: Mapping[str, Any]) -> Table:
    table = Table(title="read rightly", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "layers"):
        table.add_column(heading)
    for heading in ("weights", "best epoch", "validation", "test"):
        table.add_column(heading, justify="right")
    for name, architecture in metrics["architecture"].items():
        table.add_row(
            Text(NAMES[name], style=COLOURS[name]),
            architecture,
            f"{metrics['weights'][name]:,}",
            str(metrics["best_epoch"][name]),
            percent(metrics["val_accuracy"][name]),
            Text(percent(metrics["shifted"]["0"][name]), style="bold"),
        )
    return table


def _shift_chart(shifted: Mapping[str, Mapping[str, float]], ascii_only: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("shifted by", justify="right")
    for name in shifted["0"]:
        table.add_column(NAMES[name], min_width=8 + BAR)
    for pixels, row in shifted.items():
        cells = [
            Text(f"{percent(share):>7s} ").append(bar(share, ascii_only), style=COLOURS[name])
            for name, share in row.items()
        ]
        table.add_row(f"{pixels} pixel{'' if pixels == '1' else 's'}", *cells)
    return table


def _next_commands(folder: Path, examples: Mapping[str, str | None]) -> Iterator[str]:
    run = word(folder)
    pictures = [word(folder / name) for name in examples.values() if name] or ["test:0"]
    yield f"evaluate {run}"
    yield f"summary {run}"
    yield f"predict {run} {' '.join(pictures)}"
    yield f"explain {run} {pictures[0]} --layer 1 --channel 0 --at 0,0"
