"""The two plots of a run, as PNG files in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {"cnn": "network with convolutions", "mlp": "multilayer perceptron"}
COLOURS = {"cnn": "#0b6e99", "mlp": "#c8553d"}
SIZE = (6.4, 3.6)
"""Inches, at :data:`DPI`."""
DPI = 140


def training_curve(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss on the training pictures and validation accuracy by epoch (``Trainer.history``)."""
    # matplotlib takes half a second to import, which no other command should wait for
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * SIZE[0] / 1.4, SIZE[1]), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for name in [name for name in NAMES if name in history[0]]:
        style = {"color": COLOURS[name], "label": NAMES[name], "marker": "."}
        loss.plot(epochs, [row[name]["loss"] for row in history], **style)
        accuracy.plot(epochs, [100 * row[name]["val_accuracy"] for row in history], **style)
    loss.set(title="loss on the training pictures", xlabel="epoch", yscale="log")
    accuracy.set(title="validation accuracy (%)", xlabel="epoch")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend(loc="lower right")
    return _png(figure)


def shift_curve(shifted: Mapping[str, Mapping[str, float]]) -> bytes:
    """Test accuracy against the shift in pixels (``shifts.table``)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    pixels = [int(key) for key in shifted]
    for name in [name for name in NAMES if name in shifted["0"]]:
        heights = [100 * row[name] for row in shifted.values()]
        axes.plot(pixels, heights, color=COLOURS[name], label=NAMES[name], marker="o")
        for x, y in zip(pixels, heights, strict=True):
            axes.annotate(f"{y:.1f}", (x, y), (0, 6), textcoords="offset points", ha="center")
    axes.set(
        xlabel="shift of the test pictures (pixels; mean of up, down, left, right)",
        ylabel="test accuracy (%)",
        ylim=(0, 108),
        xticks=pixels,
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
