"""How ``neocog bench --layers`` looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..architectures import ARCHITECTURES, randomise_batch_norms
from ..diagnosis import cpu_name
from ..freezing import freeze
from ..layer_times import LayerTime, layer_times
from ..race import Case
from .shared import plain_table

SEED = 0

NOTE = (
    "us: inside the network's program, medians; share: the layer's multiply-adds by definition in "
    "this time, of the peak of all threads measured in the same rounds: Winograd saves "
    "multiply-adds and may pass 100 %"
)


def show_layers(
    console: Console,
    cases: Sequence[Case],
    rounds: int,
    keep: Callable[[Sequence[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Times the layers of each case, shows them, and hands all rows so far to ``keep``."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = _measure(case, rounds)
        head = {"network": case.network, "batch": case.batch, "threads": case.threads}
        rows += [{**head, **layer.plain()} for layer in found]
        console.print(_table(str(case), found))
        keep(rows)
    console.print(Text(f"{cpu_name()}; {NOTE}", style="dim"))
    return rows


def _measure(case: Case, rounds: int) -> list[LayerTime]:
    torch.manual_seed(SEED)
    architecture = ARCHITECTURES[case.network]
    model = randomise_batch_norms(architecture.make(), SEED).eval()
    x = torch.randn(case.batch, *architecture.in_shape)
    return layer_times(freeze(model, x), x, rounds, case.threads)


def _table(title: str, found: Sequence[LayerTime]) -> Table:
    total = sum(layer.seconds for layer in found)
    work = sum(layer.seconds * layer.share for layer in found)
    table = plain_table(f"{title}: {1e3 * total:.3f} ms, {work / total:.0%} of the peak")
    table.add_column("layer", overflow="fold")
    for name in ("us", "of all", "million\nmultiply-adds", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kernels", overflow="fold", style="dim")
    for layer in found:
        counted = layer.multiply_adds > 0
        table.add_row(
            Text(layer.layer),
            f"{1e6 * layer.seconds:.1f}",
            f"{layer.seconds / total:.1%}",
            f"{1e-6 * layer.multiply_adds:.2f}" if counted else "",
            f"{layer.share:.0%}" if counted else "",
            Text(layer.kernels),
        )
    return table
