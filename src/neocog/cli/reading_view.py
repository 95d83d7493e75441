"""How ``evaluate`` and ``predict`` look on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from ..evaluation import Evaluation
from ..foreign import all_shown
from .shared import bar, percent
from .terminal import SafeConsole

MATRIX = 20
"""Up to so many classes the confusion matrix is drawn; beyond, its largest entries are listed."""


def print_evaluation(source: str, name: str, notes: Sequence[str], result: Evaluation) -> None:
    """Accuracy, a table by class and the confusion matrix."""
    source, name, notes, result = all_shown((source, name, notes, result))
    console = SafeConsole()
    for note in notes:
        console.print(Text(f"note: {note}", style="dim"))
    right = round(result.accuracy * result.count)
    console.print(
        Text.assemble(
            (f"{percent(result.accuracy)} ", "bold"),
            f"of the {result.count:,} test pictures of {name} read rightly ({right:,}) by {source}",
        )
    )
    console.print()
    console.print(_by_class(result, "-" if console.options.ascii_only else "–"))
    console.print()
    console.print((_confusion if len(result.classes) <= MATRIX else _confused)(result))


@dataclass(frozen=True)
class Prediction:
    """What a network reads in a picture: ``top`` holds (class, probability), likeliest first.

    ``path`` is readable text, as :func:`neocog.foreign.text_of`; ``error`` says why a picture
    cannot be read; then ``top`` is empty.
    """

    path: str
    notes: tuple[str, ...]
    top: list[tuple[str, float]]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        top = [{"class": name, "probability": share} for name, share in self.top]
        found = {"image": self.path, "notes": list(self.notes), "top": top}
        return {**found, "error": self.error}


def print_predictions(predictions: Sequence[Prediction], notes: Sequence[str]) -> None:
    """Each picture with its notes and its likeliest classes, or why it cannot be read."""
    predictions, notes = all_shown((list(predictions), notes))
    console = SafeConsole()
    width = max(cell_len(name) for prediction in predictions for name, _ in prediction.top)
    for prediction in predictions:
        console.print(Text(prediction.path, style="bold"), soft_wrap=True)
        if prediction.error is not None:
            reason = prediction.error.removeprefix(f"{prediction.path}: ")
            console.print(Text(f"  left out: {reason}", style="red"), soft_wrap=True)
        for note in prediction.notes:
            console.print(Text(f"  note: {note}", style="dim"))
        for name, share in prediction.top:
            line = Text(f"  {name}{' ' * (width - cell_len(name))}  {percent(share):>7s}  ")
            console.print(line.append(bar(share, console.options.ascii_only), style="cyan"))
    for note in notes:
        console.print(Text(f"note: {note.rstrip(':')}", style="dim"))


def _by_class(result: Evaluation, none: str) -> Table:
    """A row for each class; ``none`` stands for a share of no pictures."""
    table = Table(title="by class", title_justify="left", box=None, pad_edge=False)
    table.add_column("class")
    for heading in ("pictures", "of these recognised", "of those taken for it right"):
        table.add_column(heading, justify="right")
    for row in result.classes:
        shares = [none if s is None else percent(s) for s in (row.recall, row.precision)]
        table.add_row(Text(row.name), f"{row.count:,}", *shares)
    return table


def _confusion(result: Evaluation) -> Table:
    """Rows are what is in the picture, columns what it was taken for; zeros are left out."""
    table = Table(
        title="in the picture (rows), taken for (columns)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("")
    for row in result.classes:
        table.add_column(row.name, justify="right")
    for truth, (row, counts) in enumerate(zip(result.classes, result.confusion, strict=True)):
        cells = [
            Text(str(n) if n else ".", style="bold green" if i == truth else "red" if n else "dim")
            for i, n in enumerate(counts)
        ]
        table.add_row(row.name, *cells)
    return table


def _confused(result: Evaluation) -> Table:
    """The ten most frequent confusions."""
    names = [row.name for row in result.classes]
    pairs = [
        (count, names[truth], names[answer])
        for truth, row in enumerate(result.confusion)
        for answer, count in enumerate(row)
        if count and truth != answer
    ]
    table = Table(title="most often confused", title_justify="left", box=None, pad_edge=False)
    table.add_column("in the picture")
    table.add_column("taken for")
    table.add_column("pictures", justify="right")
    for count, truth_name, answer_name in sorted(pairs, key=lambda pair: -pair[0])[:10]:
        table.add_row(truth_name, answer_name, str(count))
    return table
