"""Training: networks learn side by side from the very same batches, and can stop at any epoch.

Everything random about an epoch (the order of the pictures, their augmentation) is drawn from a
generator seeded by (seed, epoch), and the learning rate is a function of the step. So weights and
optimizer state after an epoch are all that the next one depends on: a run that was killed and
resumed ends with exactly the numbers of one that was not, given the same threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import models
from .augmentation import Augmentation
from .checkpoint import Preprocessing
from .data import DataSet
from .errors import InvalidModel, NeocogError
from .evaluation import score

WARM_UP = 0.2
"""Share of the steps over which the learning rate rises."""

AVERAGED_STEPS = 200
"""How many of the last steps the averaged weights look back on, about."""


class InvalidSetting(NeocogError, ValueError):
    """A training setting out of its range, or a device that is not there."""


class Diverged(NeocogError, ArithmeticError):
    """The loss or a weight became infinite or NaN; the epochs before are saved."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of, apart from its data. Checked when made: InvalidSetting.

    Attributes:
        architecture: of the network, in the shorthand of :mod:`neocog.models`.
        epochs: how often each training picture is shown.
        batch_size: pictures a step.
        lr: the highest learning rate on the way (AdamW).
        seed: of the initial weights, the validation part, the order and the augmentation.
        mlp: also train a multilayer perceptron with at least as many weights, to compare with
            (not if the network has no convolution itself).
        augment: distort the training pictures (:mod:`neocog.augmentation`).
        weight_decay: AdamW's, decoupled.
        label_smoothing: share of each target spread over all classes.
    """

    architecture: str = "32C3-P2-64C3-P2-10"
    epochs: int = 30
    batch_size: int = 32
    lr: float = 2e-3
    seed: int = 0
    mlp: bool = True
    augment: bool = True
    weight_decay: float = 0.05
    label_smoothing: float = 0.05

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name}={getattr(self, name)}: expected at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InvalidSetting(f"lr={self.lr}: expected a finite number above 0")
        if not 0 <= self.seed < 2**63:
            raise InvalidSetting(f"seed={self.seed}: expected 0 to 2^63 - 1")
        models.layers(self.architecture)


def learning_rate(progress: float, peak: float) -> float:
    """The rate after a share ``progress``, 0..1, of all steps: up in a line, down in a cosine."""
    if progress < WARM_UP:
        return peak * max(progress / WARM_UP, 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def choose_device(name: str) -> torch.device:
    """The device of that name, ``cpu`` or ``cuda``; InvalidSetting if it is not here."""
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda" and not name.startswith("cuda:"):
        raise InvalidSetting(f"device {name!r}: expected cpu or cuda")
    if not torch.cuda.is_available():
        raise InvalidSetting(
            f"device {name!r}: PyTorch {torch.__version__} finds no CUDA device here; expected cpu"
        )
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidSetting(f"device {name!r}: expected cpu, cuda or cuda:0") from error


class Learner:
    """One network, its optimizer, and an average of its weights over the last steps.

    The average is what is validated and kept: on a small validation part it wanders less from
    epoch to epoch than the weights do, so that fewer epochs win by luck.
    """

    def __init__(
        self, architecture: str, in_shape: models.Shape, settings: Settings, device: torch.device
    ) -> None:
        self.architecture = architecture
        # Modules draw their initial weights from the global generator: lend it, give it back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = models.parse(architecture, in_shape).to(device)
        self.averaged = AveragedModel(self.model, multi_avg_fn=_average)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.label_smoothing = settings.label_smoothing

    def step(self, x: Tensor, labels: Tensor, lr: float) -> tuple[float, int]:
        """One step down the gradient; the batch's mean loss and how many it read rightly."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        logits = self.model(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
            self.optimizer.step()
            self.averaged.update_parameters(self.model)
        return value, int((logits.argmax(dim=1) == labels).sum())

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
    """

    def __init__(
        self,
        data: DataSet,
        settings: Settings,
        preprocessing: Preprocessing,
        device: torch.device | str = "cpu",
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
        self.device = torch.device(device)
        if settings.mlp and models.has_convolution(settings.architecture):
            # "meta": only the sizes are asked for
            with torch.device("meta"):
                cnn = models.parse(settings.architecture, data.in_shape)
            architectures["mlp"] = models.mlp_beside(cnn, data.in_shape, classes)
        self.learners = {
            name: Learner(architecture, data.in_shape, settings, self.device)
            for name, architecture in architectures.items()
        }
        fill = "zeros" if preprocessing.background == "dark" else "border"
        self.augmentation = Augmentation(fill=fill) if settings.augment else None
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0

    @property
    def steps(self) -> int:
        """Steps of one epoch; the last batch may be smaller."""
        return -(-len(self.data.train) // self.settings.batch_size)

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
        generator = _generator(self.settings.seed, epoch)
        order = torch.randperm(len(self.data.train), generator=generator)
        losses = dict.fromkeys(self.learners, 0.0)
        right = dict.fromkeys(self.learners, 0)
        seen = 0
        for step, chosen in enumerate(order.split(self.settings.batch_size), 1):
            x, labels = self._batch(chosen, generator)
            done = (epoch - 1) * self.steps + step - 1
            lr = learning_rate(done / (self.settings.epochs * self.steps), self.settings.lr)
            seen += len(chosen)
            for name, learner in self.learners.items():
                loss, hits = learner.step(x, labels, lr)
                if not math.isfinite(loss):
                    raise self._diverged(f"the loss became {loss}", name, epoch, step)
                losses[name] += loss * len(chosen)
                right[name] += hits
            on_step(step, self.steps, {name: total / seen for name, total in losses.items()})
        row: dict[str, Any] = {"epoch": epoch}
        for name, learner in self.learners.items():
            val_loss, val_accuracy = score(
                learner.best, self.val, self.preprocessing, self.settings.label_smoothing
            )
            if not (learner.is_finite() and math.isfinite(val_loss)):
                raise self._diverged("a weight is not finite", name, epoch, self.steps)
            row[name] = {
                "loss": losses[name] / seen,
                "accuracy": right[name] / seen,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
            }
        self.history.append(row)
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
        self, tensors: Mapping[str, Tensor], history: list[dict[str, Any]], seconds: float
    ) -> None:
        """Goes back to where :meth:`tensors` was taken; InvalidModel if it is another run's."""
        try:
            for name, learner in self.learners.items():
                learner.restore(_under(f"{name}/", tensors))
        except (KeyError, RuntimeError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise InvalidModel(f"the saved state is not of this run: {first}") from error
        self.history, self.seconds = list(history), seconds

    def _batch(self, chosen: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        images, labels = self.data.train.images[chosen], self.data.train.labels[chosen]
        if self.augmentation is not None:
            images = self.augmentation(images, generator)
        return self.preprocessing.apply(images.to(self.device)), labels.to(self.device)

    def _diverged(self, what: str, name: str, epoch: int, step: int) -> Diverged:
        return Diverged(
            f"{what} in epoch {epoch}, step {step} of {self.steps} ({name}, architecture "
            f"{self.learners[name].architecture}); the state after epoch {epoch - 1} is kept; try "
            f"a learning rate below {self.settings.lr:g}"
        )


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
