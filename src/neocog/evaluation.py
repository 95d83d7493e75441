"""How well a network reads pictures: accuracy, per class, and which it takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Preprocessing
from .data import Split

PIXELS_AT_ONCE = 2**19
"""How many values of pictures go through a network at once: 668 digits, 3 photographs of 224x224.
What the layers make of them is a hundred times more."""


@dataclass(frozen=True)
class ClassScore:
    """One class: of its ``count`` pictures the share ``recall`` was recognised; of the pictures
    taken for it the share ``precision`` was right. A share of no pictures is None."""

    name: str
    count: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class Evaluation:
    """The scores of a network; shares are 0..1.

    ``confusion[t][p]`` counts the pictures of class t that were taken for class p.
    """

    accuracy: float
    loss: float
    count: int
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and dictionaries."""
        return asdict(self)


def logits(model: nn.Module, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What a network answers to pictures, uint8 [N, C, H, W]: float32 [N, classes], on the CPU.

    The pictures go to the model's device. It runs in evaluation mode and keeps its mode.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    chunk = max(1, PIXELS_AT_ONCE // images[0].numel())
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            answers = [model(preprocessing.apply(x.to(device))).cpu() for x in images.split(chunk)]
    finally:
        model.train(was_training)
    return torch.cat(answers)


def score(
    model: nn.Module, split: Split, preprocessing: Preprocessing, label_smoothing: float = 0.0
) -> tuple[float, float]:
    """(mean cross-entropy, share read rightly)."""
    answers = logits(model, split.images, preprocessing)
    return score_of(answers, split.labels, label_smoothing)


def score_of(answers: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[float, float]:
    """(mean cross-entropy, share read rightly) of logits, float32 [N, classes]."""
    right = int((answers.argmax(dim=1) == labels).sum())
    loss = F.cross_entropy(answers, labels, label_smoothing=label_smoothing)
    return loss.item(), right / len(labels)


def evaluate(
    model: nn.Module, split: Split, preprocessing: Preprocessing, classes: Sequence[str]
) -> Evaluation:
    """All scores of a network on one part of a data set."""
    # Imported here: it takes a second, and training's first epochs can do without.
    from torchmetrics.functional import classification

    answers, k = logits(model, split.images, preprocessing), len(classes)
    confusion = classification.multiclass_confusion_matrix(answers, split.labels, k)
    recall = classification.multiclass_recall(answers, split.labels, k, average="none")
    precision = classification.multiclass_precision(answers, split.labels, k, average="none")
    counts, taken = confusion.sum(dim=1), confusion.sum(dim=0)
    shares = _shares(recall, counts), _shares(precision, taken)
    rows = zip(classes, counts.tolist(), *shares, strict=True)
    return Evaluation(
        accuracy=int(confusion.trace()) / len(split),
        loss=F.cross_entropy(answers, split.labels).item(),
        count=len(split),
        classes=tuple(ClassScore(*row) for row in rows),
        confusion=tuple(map(tuple, confusion.tolist())),
    )


def _shares(values: Tensor, counts: Tensor) -> list[float | None]:
    """float32 as Python's float, without the digits that float32 does not have.

    None where ``counts``, what each is a share of, is 0: torchmetrics has 0 there.
    """
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return [round(value, 6) if count else None for value, count in pairs]
