"""What was compiled, what PyTorch runs, and why."""

from __future__ import annotations

import html
from dataclasses import dataclass

from .rewriting import Rewritten


@dataclass(frozen=True)
class HandedBack:
    """Calls that run in PyTorch, for one reason."""

    name: str
    reason: str
    count: int
    multiply_adds: int


@dataclass(frozen=True)
class Report:
    """What became of one graph; prints as a few lines, and as a table in a notebook."""

    layers: tuple[str, ...] = ()
    """One line per compiled layer, after fusion."""
    programs: int = 0
    """Native programs; 1 if nothing in between is PyTorch's."""
    multiply_adds: int = 0
    """Of the compiled convolutions and fully connected layers."""
    handed_back: tuple[HandedBack, ...] = ()
    whole: str = ""
    """Why everything runs in PyTorch; empty if it does not."""

    @property
    def share(self) -> float:
        """Share of the multiply-adds that were compiled (PyTorch's count for what was not)."""
        total = self.multiply_adds + sum(h.multiply_adds for h in self.handed_back)
        return self.multiply_adds / total if total else float(not self.whole)

    @property
    def _summary(self) -> str:
        if self.whole:
            return f"everything runs in PyTorch: {self.whole}"
        return (
            f"{len(self.layers)} layers in {self.programs} programs: "
            f"{self.multiply_adds / 1e6:.1f} million multiply-adds, {self.share:.1%} of all"
        )

    def __str__(self) -> str:
        lines = [
            f"  in PyTorch: {h.name} ({h.count} calls, {h.multiply_adds / 1e6:.1f} million "
            f"multiply-adds): {h.reason}"
            for h in self.handed_back
        ]
        return "\n".join([self._summary, *lines])

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        rows = [(layer, "compiled") for layer in self.layers]
        rows += [(f"{h.name}, {h.count} calls", f"PyTorch: {h.reason}") for h in self.handed_back]
        cells = "".join(
            f"<tr><td>{html.escape(what)}</td><td>{html.escape(where)}</td></tr>"
            for what, where in rows
        )
        return f"<p>{html.escape(self._summary)}</p><table>{cells}</table>"


class Reports(tuple[Report, ...]):
    """The reports of a model's graphs, in order; a notebook shows them as tables."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def _repr_html_(self) -> str:
        """The tables that a notebook shows."""
        return "".join(report._repr_html_() for report in self)


def report_of(made: Rewritten) -> Report:
    """The report of a rewritten graph."""
    found: dict[tuple[str, str], list[int]] = {}
    for left in made.left:
        found.setdefault((left.name, left.reason), []).append(left.multiply_adds)
    nodes = made.nodes
    return Report(
        layers=tuple(map(repr, nodes)),
        programs=len(made.runs),
        multiply_adds=sum(n.multiply_adds for n in nodes),
        handed_back=tuple(
            HandedBack(name, reason, len(work), sum(work)) for (name, reason), work in found.items()
        ),
    )
