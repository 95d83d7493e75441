"""Training: networks learn side by side from the very same batches, and can stop at any epoch.

Everything random about an epoch (the order of the pictures, their augmentation) is drawn from a
generator seeded by (seed, epoch), and the learning rate is a function of the step. So weights and
optimizer state after an epoch are all that the next one depends on: a run that was killed and
resumed ends with exactly the numbers of one that was not, given the same threads.

The step is compiled as a whole (``torch.compile(model, backend="neocog")``), the next batches are
made ready meanwhile (:mod:`neocog.batches`), and several workers may share each batch
(:mod:`neocog.distribution`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import backend, models
from .batches import Batch, Batches
from .checkpoint import Preprocessing
from .data import DataSet
from .distribution import Group
from .errors import InvalidModel, NeocogError
from .evaluation import logits, score_of
from .settings import InvalidSetting, Settings, engine_on

WARM_UP = 0.2
"""Share of the steps over which the learning rate rises."""

PARTS = ("data", "step", "validation")
"""What an epoch's time goes into: waiting for batches, learning from them, judging the network."""

AVERAGED_STEPS = 200
"""How many of the last steps the averaged weights look back on, about."""


class Diverged(NeocogError, ArithmeticError):
    """The loss or a weight became infinite or NaN; the epochs before are saved."""


def learning_rate(progress: float, peak: float) -> float:
    """The rate after a share ``progress``, 0..1, of all steps: up in a line, down in a cosine."""
    if progress < WARM_UP:
        return peak * max(progress / WARM_UP, 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


class Learner:
    """One network, its optimizer, and an average of its weights over the last steps.

    The average is what is validated and kept: on a small validation part it wanders less from
    epoch to epoch than the weights do, so that fewer epochs win by luck.
    """

    def __init__(
        self,
        architecture: str,
        in_shape: models.Shape,
        settings: Settings,
        device: torch.device,
        group: Group,
    ) -> None:
        self.architecture, self.group = architecture, group
        # Modules draw their initial weights from the global generator: lend it, give it back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = models.parse(architecture, in_shape).to(device)
        self.averaged = AveragedModel(self.model, multi_avg_fn=_average)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.label_smoothing = settings.label_smoothing
        computed: nn.Module = self.model
        if engine_on(device, settings) == "neocog":
            # One graph for each size of a batch, of which an epoch has two; a limit of its own.
            computed = torch.compile(  # type: ignore[call-overload]  # the stubs lack the last one
                models.plain(self.model),
                backend=backend.neocog,
                dynamic=False,
                isolate_recompiles=True,
            )
        self._computed = group.wrapped(computed)

    def step(self, batch: Batch, lr: float) -> tuple[float, int]:
        """One step down the gradient; the batch's mean loss and how many it read rightly.

        Both are of the whole batch, whatever part of it is this worker's.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        answers = self._computed(batch.x)
        loss = F.cross_entropy(answers, batch.labels, label_smoothing=self.label_smoothing)
        hits = (answers.argmax(dim=1) == batch.labels).sum()
        if self.group.size == 1:
            value, right = loss.item(), int(hits)
        else:
            found = torch.stack([loss.detach().double(), hits.double()])
            found[0] *= batch.share
            found[1] *= batch.share > 0
            value, right = self.group.total(found).tolist()
            loss = loss * (batch.share * self.group.size)  # of which the workers take the mean
        if math.isfinite(value):
            loss.backward()
            self.optimizer.step()
            self.averaged.update_parameters(self.model)
        return value, int(right)

    @property
    def best(self) -> nn.Module:
        """The network with the averaged weights."""
        return self.averaged.module

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """All that :meth:`restore` needs, by name."""
        found = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        found |= {f"averaged/{name}": t for name, t in self.averaged.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{index}/{name}": t for name, t in state.items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to where :meth:`tensors` was taken; KeyError or RuntimeError if unlike."""
        self.model.load_state_dict(_under("model/", tensors))
        self.averaged.load_state_dict(_under("averaged/", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer/", tensors).items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


OnStep = Callable[[int, int, dict[str, float]], None]
"""Called after each step with (step, steps of the epoch, the loss so far by network)."""


class Trainer:
    """Trains the networks of a run epoch by epoch.

    Attributes:
        learners: by name, ``"cnn"`` and, unless the settings say otherwise, ``"mlp"``.
        history: one row per finished epoch: ``{"epoch": 1, "cnn": {"loss", "accuracy",
            "val_loss", "val_accuracy"}, "mlp": {...}}``; accuracies are shares, 0..1.
        seconds: spent training so far.
        spent: of these, by what they went into: :data:`PARTS`; and ``"preparing"``, the seconds
            that went into batches in the background.
    """

    def __init__(
        self,
        data: DataSet,
        settings: Settings,
        preprocessing: Preprocessing,
        device: torch.device | str = "cpu",
        group: Group | None = None,
    ) -> None:
        if data.val is None:
            raise InvalidSetting("no validation part: expected a val_fraction above 0")
        architectures = {"cnn": settings.architecture}
        classes = models.class_count(settings.architecture)
        if classes != len(data.classes):
            raise InvalidModel(
                f"architecture {settings.architecture!r}: ends with {classes} classes, "
                f"{data.name} has {len(data.classes)}"
            )
        self.data, self.val, self.settings = data, data.val, settings
        self.preprocessing = preprocessing
        self.group = group or Group()
        self.device = self.group.device(torch.device(device))
        if settings.mlp and models.has_convolution(settings.architecture):
            # "meta": only the sizes are asked for
            with torch.device("meta"):
                cnn = models.parse(settings.architecture, data.in_shape)
            architectures["mlp"] = models.mlp_beside(cnn, data.in_shape, classes)
        self.learners = {
            name: Learner(architecture, data.in_shape, settings, self.device, self.group)
            for name, architecture in architectures.items()
        }
        side = min(data.in_shape[1:])
        if settings.shift > side / 2:
            raise InvalidSetting(
                f"shift={settings.shift:g}: expected at most half of the pictures' {side} pixels"
            )
        self.augmentation = settings.augmentation(preprocessing.background)
        self.batches = Batches(
            data.train,
            settings.batch_size,
            preprocessing,
            self.augmentation,
            self.device,
            self.group,
        )
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.spent = nothing_spent()

    @property
    def steps(self) -> int:
        """Steps of one epoch; the last batch may be smaller."""
        return len(self.batches)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) >= self.settings.epochs

    def best_epoch(self, name: str) -> int:
        """The epoch, from 1, of a network's lowest validation loss; of equal ones the last.

        Not of its highest accuracy: on a few hundred pictures that goes up and down by luck, and
        an early epoch can win. The loss is the one that is trained on, label smoothing included.
        """
        return -min((row[name]["val_loss"], -row["epoch"]) for row in self.history)[1]

    def run_epoch(self, on_step: OnStep = lambda step, steps, losses: None) -> dict[str, Any]:
        """Shows every training picture once, validates, and returns the new row of the history.

        Raises:
            Diverged: naming network, epoch and step. The trainer is of no use then.
        """
        started = time.perf_counter()
        epoch = len(self.history) + 1
        losses = dict.fromkeys(self.learners, 0.0)
        right = dict.fromkeys(self.learners, 0)
        seen = 0
        generator = _generator(self.settings.seed, epoch)
        with closing(self.batches.epoch(generator, self.spent)) as batches:
            for step, batch in enumerate(batches, 1):
                begun = time.perf_counter()
                seen += batch.count
                for name, (loss, hits) in self._step(batch, epoch, step):
                    losses[name] += loss * batch.count
                    right[name] += hits
                self.spent["step"] += time.perf_counter() - begun
                on_step(step, self.steps, {name: total / seen for name, total in losses.items()})
        begun = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch}
        for name in self.learners:
            val_loss, val_accuracy = self._validated(name, epoch)
            row[name] = {
                "loss": losses[name] / seen,
                "accuracy": right[name] / seen,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
            }
        self.history.append(row)
        self.spent["validation"] += time.perf_counter() - begun
        self.seconds += time.perf_counter() - started
        return row

    def tensors(self) -> dict[str, Tensor]:
        """The state of all networks; with ``history`` and ``seconds`` all there is to resume."""
        return {
            f"{name}/{key}": tensor
            for name, learner in self.learners.items()
            for key, tensor in learner.tensors().items()
        }

    def restore(
        self,
        tensors: Mapping[str, Tensor],
        history: list[dict[str, Any]],
        seconds: float,
        spent: Mapping[str, float] | None = None,
    ) -> None:
        """Goes back to where :meth:`tensors` was taken; InvalidModel if it is another run's."""
        try:
            for name, learner in self.learners.items():
                learner.restore(_under(f"{name}/", tensors))
        except (KeyError, RuntimeError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise InvalidModel(f"the saved state is not of this run: {first}") from error
        self.history, self.seconds = list(history), seconds
        self.spent = {**nothing_spent(), **(spent or {})}

    def _step(self, batch: Batch, epoch: int, step: int) -> Iterator[tuple[str, tuple[float, int]]]:
        """A step of each network: its loss and how many it read rightly."""
        done = (epoch - 1) * self.steps + step - 1
        lr = learning_rate(done / (self.settings.epochs * self.steps), self.settings.lr)
        for name, learner in self.learners.items():
            loss, hits = learner.step(batch, lr)
            if not math.isfinite(loss):
                raise self._diverged(f"the loss became {loss}", name, epoch, step)
            yield name, (loss, hits)

    def _validated(self, name: str, epoch: int) -> tuple[float, float]:
        """A network's loss and accuracy on the validation pictures, of which each worker reads
        its part."""
        learner, count = self.learners[name], len(self.val)
        part = self.group.part(count)
        mine = part.stop - part.start
        images = self.val.images[part] if mine else self.val.images[:1]
        answers = logits(learner.best, images, self.preprocessing)[:mine].to(self.device)
        answers = self.group.rows(answers, count).cpu()
        loss, accuracy = score_of(answers, self.val.labels, self.settings.label_smoothing)
        if not (learner.is_finite() and math.isfinite(loss)):
            raise self._diverged("a weight is not finite", name, epoch, self.steps)
        return loss, accuracy

    def _diverged(self, what: str, name: str, epoch: int, step: int) -> Diverged:
        return Diverged(
            f"{what} in epoch {epoch}, step {step} of {self.steps} ({name}, architecture "
            f"{self.learners[name].architecture}); the state after epoch {epoch - 1} is kept; try "
            f"a learning rate below {self.settings.lr:g}"
        )


def nothing_spent() -> dict[str, float]:
    """Seconds by what they went into, at the start."""
    return dict.fromkeys((*PARTS, "preparing"), 0.0)


def time_shares(spent: Mapping[str, float]) -> dict[str, float]:
    """Seconds as shares of all of :data:`PARTS`, 0..1; ``"preparing"`` runs beside them."""
    total = sum(spent[part] for part in PARTS) or 1.0
    return {part: round(seconds / total, 4) for part, seconds in spent.items()}


def _average(averaged: Any, current: Any, count: Any) -> None:
    """Moves the averaged weights towards the current ones, after ``count`` averaged steps.

    In the first steps by more, else the average would hang on the random initial weights.
    """
    weight = max(1 / AVERAGED_STEPS, 9 / (10 + float(count)))
    torch._foreach_lerp_(averaged, current, weight)


def _generator(seed: int, epoch: int) -> Generator:
    """A generator of this epoch's own; neighbouring seeds and epochs share nothing."""
    (word,) = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(word) >> 1)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
