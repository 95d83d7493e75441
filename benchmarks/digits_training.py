"""Training on the embedded digits: `neocog train`'s steps beside plain PyTorch.

    python benchmarks/digits_training.py [--json FILE] [--epochs N] [--threads N]

All contenders learn the same network from the same initial weights and the very same batches, made
ready by `neocog.batches`; they take turns epoch by epoch, in one process, each round in another
order. An epoch's time is that of its batches and steps, without validation. The first epoch, in
which kernels are compiled, is reported by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from neocog import data, models, runs
from neocog.batches import Batch
from neocog.evaluation import score
from neocog.settings import Settings
from neocog.training import Learner, Trainer, _average, _generator, learning_rate, nothing_spent


class Contender(Protocol):
    """What takes steps and has a network to judge."""

    def step(self, batch: Batch, lr: float) -> tuple[float, int]: ...

    @property
    def best(self) -> nn.Module: ...


class Plain:
    """The same training, written out in PyTorch."""

    def __init__(self, like: Learner, settings: Settings, memory_format: torch.memory_format):
        self.model = models.plain(models.parse(settings.architecture))
        for mine, theirs in zip(self.model.parameters(), like.model.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        self.model = self.model.to(memory_format=memory_format)
        self.memory_format, self.label_smoothing = memory_format, settings.label_smoothing
        self.averaged = AveragedModel(self.model, multi_avg_fn=_average)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )

    def step(self, batch: Batch, lr: float) -> tuple[float, int]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        answers = self.model(batch.x.contiguous(memory_format=self.memory_format))
        loss = F.cross_entropy(answers, batch.labels, label_smoothing=self.label_smoothing)
        value = loss.item()
        loss.backward()
        self.optimizer.step()
        self.averaged.update_parameters(self.model)
        return value, int((answers.argmax(dim=1) == batch.labels).sum())

    @property
    def best(self) -> nn.Module:
        return self.averaged.module


def contenders(trainers: dict[str, Trainer], settings: Settings) -> dict[str, Contender]:
    found: dict[str, Contender] = {
        f"neocog train --engine {engine}": trainer.learners["cnn"]
        for engine, trainer in trainers.items()
    }
    like = trainers["eager"].learners["cnn"]
    found["PyTorch"] = Plain(like, settings, torch.contiguous_format)
    found["PyTorch, channels_last"] = Plain(like, settings, torch.channels_last)
    return found


def epoch(trainer: Trainer, contender: Contender, number: int) -> tuple[float, float]:
    """(seconds, mean loss) of an epoch, from 1."""
    settings, total, seen = trainer.settings, 0.0, 0
    started = time.perf_counter()
    generator = _generator(settings.seed, number)
    for step, batch in enumerate(trainer.batches.epoch(generator, nothing_spent())):
        done = (number - 1) * trainer.steps + step
        lr = learning_rate(done / (settings.epochs * trainer.steps), settings.lr)
        total += contender.step(batch, lr)[0] * batch.count
        seen += batch.count
    return time.perf_counter() - started, total / seen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    digits = data.load(None, seed=0)
    how = runs.preprocessing_of(digits)
    trainers = {
        engine: Trainer(digits, Settings(epochs=given.epochs, mlp=False, engine=engine), how)
        for engine in ("neocog", "eager")
    }
    trainer = trainers["eager"]
    compared = contenders(trainers, trainer.settings)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    losses: dict[str, list[float]] = {name: [] for name in compared}
    for number in range(1, given.epochs + 1):
        names = list(compared)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            took, loss = epoch(trainer, compared[name], number)
            seconds[name].append(round(took, 4))
            losses[name].append(loss)
    rows: list[dict[str, Any]] = []
    for name, contender in compared.items():
        rows.append(
            {
                "contender": name,
                "epoch_s": statistics.median(seconds[name][1:]),
                "first_epoch_s": seconds[name][0],
                "epochs_s": seconds[name],
                "losses": losses[name],
                "test_accuracy": score(contender.best, digits.test, how)[1],
            }
        )
        print(
            f"{name:30s} {rows[-1]['epoch_s']:7.3f} s an epoch, the first {seconds[name][0]:.3f} s;"
            f" loss {losses[name][-1]:.6f}, test {100 * rows[-1]['test_accuracy']:.1f} %"
        )
    results = {
        "what": f"{trainer.settings.architecture} on the embedded digits, {given.epochs} epochs",
        "threads": given.threads,
        "batch_size": trainer.settings.batch_size,
        "versions": runs.versions(),
        "rows": rows,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
