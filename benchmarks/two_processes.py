"""One process and two, side by side: the losses of `neocog train` on the embedded digits.

    python benchmarks/two_processes.py [--json FILE] [--epochs N] [--engine NAME]

Both train with the same global batch; the second is started by torchrun. What differs is rounding,
which grows from step to step. That it is rounding alone is shown by a third run, in one process,
that adds up the gradients of each batch's two halves: its losses equal those of two processes, to
the last bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from neocog import data, runs
from neocog.distribution import Group
from neocog.settings import Settings
from neocog.training import Trainer, _generator, learning_rate, nothing_spent

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(folder: Path, launch: list[str], options: list[str]) -> dict[str, Any]:
    """The metrics of a run."""
    command = [sys.executable, *launch, "-m", "neocog", "train", *options, "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def in_halves(epochs: int, engine: str) -> list[float]:
    """The network's loss by epoch, in one process, a half of each batch after the other."""
    digits = data.load(None, seed=0)
    settings = Settings(epochs=epochs, engine=engine, mlp=False)
    trainer = Trainer(digits, settings, runs.preprocessing_of(digits))
    learner, found = trainer.learners["cnn"], []
    halves = [replace(trainer.batches, group=Group(rank, 2)) for rank in range(2)]
    for epoch in range(1, epochs + 1):
        generators = [_generator(settings.seed, epoch) for _ in halves]
        streams = [
            half.epoch(generator, nothing_spent())
            for half, generator in zip(halves, generators, strict=True)
        ]
        total = 0.0
        for step, pair in enumerate(zip(*streams, strict=True)):
            done = ((epoch - 1) * trainer.steps + step) / (epochs * trainer.steps)
            for group in learner.optimizer.param_groups:
                group["lr"] = learning_rate(done, settings.lr)
            learner.optimizer.zero_grad()
            value = 0.0
            for batch in pair:
                answers = learner._computed(batch.x)
                loss = F.cross_entropy(
                    answers, batch.labels, label_smoothing=settings.label_smoothing
                )
                value += loss.item() * batch.share
                (loss * batch.share).backward()
            learner.optimizer.step()
            total += value * pair[0].count
        found.append(total / len(digits.train))
    return found


def side_by_side(one: dict[str, Any], two: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each epoch and network, with the largest relative difference of its losses."""
    rows = []
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        for name in ("cnn", "mlp"):
            row: dict[str, Any] = {"epoch": mine["epoch"], "network": name}
            for key in ("loss", "val_loss", "val_accuracy"):
                row[key] = [mine[name][key], theirs[name][key]]
            pairs = [row["loss"], row["val_loss"]]
            row["difference"] = max(abs(a - b) / a for a, b in pairs)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--engine", default="neocog")
    given = parser.parse_args()
    options = ["--epochs", str(given.epochs), "--engine", given.engine, "--threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        one = run(Path(folder, "one"), [], options)
        two = run(Path(folder, "two"), LAUNCH, options)
    torch.set_num_threads(1)
    rows = side_by_side(one, two)
    halves = in_halves(given.epochs, given.engine)
    same = halves == [row["loss"][1] for row in rows if row["network"] == "cnn"]
    print("epoch  network   loss of one       of two            difference")
    for row in rows:
        losses = "  ".join(f"{loss:.12f}" for loss in row["loss"])
        print(f"{row['epoch']:5d}  {row['network']:7s}  {losses}  {row['difference']:.1e}")
    print(f"one process, in halves, as two: {'yes' if same else 'NO'} ({halves})")
    results = {
        "what": "neocog train on the embedded digits: [one process, two processes]",
        "engine": given.engine,
        "batch_size": 32,
        "threads_of_each": 1,
        "seconds": [one["seconds"], two["seconds"]],
        "test_accuracy": [one["test_accuracy"], two["test_accuracy"]],
        "versions": one["versions"],
        "one_in_halves_as_two": same,
        "losses_in_halves": halves,
        "rows": rows,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
