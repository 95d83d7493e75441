"""What a training is made of, apart from its data: settings that are checked, and the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import models
from .augmentation import Augmentation
from .errors import NeocogError

ENGINES = ("neocog", "eager")
"""Who computes a step: neocog, the whole network at once, or one layer after the other."""

MOST_CROPPED = 0.9
"""The largest share of height and width that a crop may cut off."""


class InvalidSetting(NeocogError, ValueError):
    """A training setting out of its range, or a device that is not there."""


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
        engine: one of :data:`ENGINES`; on other devices than the CPU it is eager.
        shift, rotation, flip, crop: of the augmentation, see there; pixels, degrees, whether, and
            a share of height and width.
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
    engine: str = "neocog"
    shift: float = Augmentation.shift
    rotation: float = Augmentation.rotation
    flip: bool = Augmentation.flip
    crop: float = Augmentation.crop

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name}={getattr(self, name)}: expected at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InvalidSetting(f"lr={self.lr}: expected a finite number above 0")
        if not 0 <= self.seed < 2**63:
            raise InvalidSetting(f"seed={self.seed}: expected 0 to 2^63 - 1")
        if self.engine not in ENGINES:
            raise InvalidSetting(f"engine={self.engine!r}: expected {' or '.join(ENGINES)}")
        for name, most in (("shift", math.inf), ("rotation", 180.0), ("crop", MOST_CROPPED)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= most):
                up_to = f"from 0 to {most:g}" if most < math.inf else "of at least 0"
                raise InvalidSetting(f"{name}={value}: expected a number {up_to}")
            if not self.augment and value != getattr(Augmentation, name):
                raise InvalidSetting(f"{name}={value}: expected none without augmentation")
        if self.flip and not self.augment:
            raise InvalidSetting("flip=True: expected none without augmentation")
        models.layers(self.architecture)

    def augmentation(self, background: str) -> Augmentation | None:
        """How the training pictures are distorted, if they are, on a background like that."""
        if not self.augment:
            return None
        return Augmentation(
            rotation=self.rotation,
            shift=self.shift,
            flip=self.flip,
            crop=self.crop,
            fill="zeros" if background == "dark" else "border",
        )


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


def engine_on(device: torch.device, settings: Settings) -> str:
    """Which of :data:`ENGINES` computes the steps there: neocog's kernels are for the CPU."""
    return settings.engine if device.type == "cpu" else "eager"
