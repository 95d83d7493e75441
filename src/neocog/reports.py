"""What was compiled, what was handed back to PyTorch, and why."""

from __future__ import annotations

from dataclasses import dataclass

from .learning import LearningPlan
from .network import Foreign
from .running import Plan


@dataclass(frozen=True)
class HandedBack:
    """Calls that run in PyTorch, for one reason."""

    name: str
    reason: str
    count: int
    multiply_adds: int


@dataclass(frozen=True)
class Report:
    """What became of one captured call; prints as a few lines."""

    layers: tuple[str, ...] = ()
    """One line per compiled layer, after fusion."""
    programs: int = 0
    """Native programs; 1 if nothing in between was handed back."""
    multiply_adds: int = 0
    """Of the compiled convolutions and fully connected layers."""
    handed_back: tuple[HandedBack, ...] = ()
    whole: str = ""
    """Why everything was handed back; empty if it was not."""

    @property
    def share(self) -> float:
        """Share of the multiply-adds that were compiled (PyTorch's count for what was not)."""
        total = self.multiply_adds + sum(h.multiply_adds for h in self.handed_back)
        return self.multiply_adds / total if total else float(not self.whole)

    def __str__(self) -> str:
        if self.whole:
            return f"everything runs in PyTorch: {self.whole}"
        lines = [
            f"{len(self.layers)} layers in {self.programs} programs: "
            f"{self.multiply_adds / 1e6:.1f} million multiply-adds, {self.share:.1%} of all"
        ]
        lines += [
            f"  in PyTorch: {h.name} ({h.count} calls, {h.multiply_adds / 1e6:.1f} million "
            f"multiply-adds): {h.reason}"
            for h in self.handed_back
        ]
        return "\n".join(lines)


def report_of(plan: Plan | LearningPlan) -> Report:
    """The report of a plan."""
    native = [n for n in plan.network.nodes if n.native]
    found: dict[tuple[str, str], list[int]] = {}
    for node in plan.network.nodes:
        if isinstance(node.op, Foreign) and not node.op.part:
            found.setdefault((node.op.name, node.op.reason), []).append(node.op.multiply_adds)
    return Report(
        layers=tuple(map(repr, native)),
        programs=len(plan.natives),
        multiply_adds=sum(n.multiply_adds for n in native),
        handed_back=tuple(
            HandedBack(name, reason, len(work), sum(work)) for (name, reason), work in found.items()
        ),
    )
